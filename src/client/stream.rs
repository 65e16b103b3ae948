//! The byte stream of a client connection: plain TCP, or TLS on it.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// The byte stream of a client connection.
#[derive(Debug)]
pub(crate) enum ClientStream {
    /// Plain TCP.
    Plain(TcpStream),
    /// TLS.
    Tls(Box<Tls>),
}

/// A TLS connection whose handshake is done.
#[derive(Debug)]
pub(crate) struct Tls {
    stream: TlsStream<Wire>,
    /// Whether the close leaves out `close_notify`, so that the client sees a cut.
    is_cut: bool,
}

/// The TCP connection below TLS.
#[derive(Debug)]
pub(super) struct Wire {
    tcp: TcpStream,
    /// Whether it has taken bytes since this was last asked.
    has_written: bool,
}

impl From<TcpStream> for Wire {
    fn from(tcp: TcpStream) -> Self {
        Wire { tcp, has_written: false }
    }
}

impl From<TlsStream<Wire>> for ClientStream {
    fn from(stream: TlsStream<Wire>) -> Self {
        ClientStream::Tls(Box::new(Tls { stream, is_cut: false }))
    }
}

impl ClientStream {
    /// The TCP connection.
    pub(super) fn tcp(&self) -> &TcpStream {
        match self {
            ClientStream::Plain(tcp) => tcp,
            ClientStream::Tls(tls) => &tls.stream.get_ref().0.tcp,
        }
    }

    /// Is ready when there may be something to read.
    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            // The first bytes have come with the end of the handshake.
            ClientStream::Tls(tls) if !tls.stream.get_ref().1.wants_read() => Poll::Ready(Ok(())),
            _ => self.tcp().poll_read_ready(cx),
        }
    }

    /// Makes the close send a reset, and no clean end before it.
    pub(super) fn reset_on_close(&mut self) {
        // A socket that refuses the option is closed with FIN.
        let _ = socket2::SockRef::from(self.tcp()).set_linger(Some(std::time::Duration::ZERO));
        if let ClientStream::Tls(tls) = self {
            tls.is_cut = true;
        }
    }

    /// The TLS connection, which may hold back what was written. Plain TCP holds nothing back.
    pub(super) fn tls(&mut self) -> Option<&mut Tls> {
        match self {
            ClientStream::Plain(_) => None,
            ClientStream::Tls(tls) => Some(tls),
        }
    }

    #[inline]
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            ClientStream::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            ClientStream::Tls(tls) => tls.poll_read(cx, buf),
        }
    }

    #[inline]
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            ClientStream::Plain(tcp) => Pin::new(tcp).poll_write(cx, buf),
            ClientStream::Tls(tls) => tls.poll_write(cx, buf),
        }
    }

    #[inline]
    pub(super) fn poll_write_vectored(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self {
            ClientStream::Plain(tcp) => Pin::new(tcp).poll_write_vectored(cx, bufs),
            ClientStream::Tls(tls) => tls.poll_write_vectored(cx, bufs),
        }
    }

    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            ClientStream::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            ClientStream::Tls(tls) => tls.poll_shutdown(cx),
        }
    }
}

// These stay out of line, so that a plain connection does not pay for them.
impl Tls {
    /// Sends what is held back. The flag says whether bytes were sent meanwhile.
    #[inline(never)]
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> (Poll<io::Result<()>>, bool) {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        let wire = &mut self.stream.get_mut().0;
        (flushed, std::mem::take(&mut wire.has_written))
    }

    #[inline(never)]
    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }

    #[inline(never)]
    fn poll_write(&mut self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    #[inline(never)]
    fn poll_write_vectored(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    #[inline(never)]
    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.is_cut {
            true => Pin::new(&mut self.stream.get_mut().0.tcp).poll_shutdown(cx),
            false => Pin::new(&mut self.stream).poll_shutdown(cx),
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.tcp).poll_write(cx, buf))?;
        self.has_written |= n > 0;
        Poll::Ready(Ok(n))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs))?;
        self.has_written |= n > 0;
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

/// Whether the socket has data, even if the runtime does not know yet that it is readable.
pub(super) fn has_data(tcp: &TcpStream) -> bool {
    socket2::SockRef::from(tcp).peek(&mut [MaybeUninit::uninit()]).is_ok_and(|n| n > 0)
}

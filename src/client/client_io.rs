//! hyper's I/O handle of a connection: [`Conn`] chooses what is read, and sees writes and flushes.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::client::conn::Conn;
use crate::http1::coalesce::{Scratch, one_piece};

/// hyper's I/O handle of a connection.
#[derive(Debug)]
pub(crate) struct ClientIo(pub Rc<Conn>);

impl AsyncRead for ClientIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.poll_read(cx, buf)
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = self.0.socket.borrow_mut().poll_write(cx, buf);
        self.0.wrote(result)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut stream = self.0.socket.borrow_mut();
        let result = match one_piece(bufs, &mut Scratch::new()) {
            Some(piece) => stream.poll_write(cx, piece),
            None => stream.poll_write_vectored(cx, bufs),
        };
        self.0.wrote(result)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// hyper calls this when its own buffer is empty.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(tls) = self.0.socket.borrow_mut().tls() {
            let (flushed, has_sent) = tls.poll_flush(cx);
            if has_sent {
                self.0.progress();
            }
            ready!(flushed)?;
        }
        self.0.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.socket.borrow_mut().poll_shutdown(cx)
    }
}

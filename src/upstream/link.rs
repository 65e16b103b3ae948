//! One upstream HTTP/1.1 connection, as the pool, the attempt loop and the relay see it.
//!
//! The holder of a link drives it; there is no background task. Dropping a link closes the connection at once, and a
//! response is read only as fast as its reader polls. The rest of Zap uses the [`Link`] trait; [`Http1`] implements it.
//! Head and body leave in one write: a small message as one piece, a large one as slices. One read yields one frame.
//! Nothing is buffered between reads, so that an idle connection or a silent stream needs no memory besides its socket.

use std::cell::RefCell;
use std::fmt;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http::{HeaderName, response};
use http_body::SizeHint;
use hyper::rt::{Read, ReadBuf, Write};
use hyper_rustls::MaybeHttpsStream;
use smallvec::SmallVec;
use socket2::SockRef;
use tokio::io::Interest;

use crate::http1::coalesce::{Scratch, one_piece};
use crate::http1::decode::{Decoder, Invalid};
use crate::json::patch::Slices;
use crate::upstream::connect::Io;
use crate::upstream::fault::Fault;
use crate::upstream::receive_window::{NARROW, ReceiveWindow};

/// Size of the read buffer in bytes, and so the largest frame.
const READ: usize = 32 * 1024;

/// Maximum number of body slices in one write.
const MAX_SLICES: usize = 64;

thread_local! {
    /// The read buffer, shared by all connections of a worker. The data is copied into a frame of its exact size.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into());
}

/// Why a link has no response.
#[derive(Debug)]
pub(crate) enum LinkError {
    /// The connection failed after data was received, or the response is invalid.
    Broken(Fault),
    /// The connection failed before any data was received.
    HungUp(Fault),
    /// The connection failed before a byte of the request was written. Contains the request.
    Unsent(Box<WireRequest>, Fault),
}

/// One connection that carries one exchange at a time.
pub(crate) trait Link {
    /// Begins an exchange. The link must be [reusable](Link::is_reusable).
    fn start(&mut self, request: WireRequest);

    /// Drives the exchange up to the head of the response.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, LinkError>>;

    /// Drives the exchange up to the next frame of the body; `None` at the end.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Fault>>>;

    /// Number of body bytes left, if the response has a `content-length`.
    fn remaining(&self) -> SizeHint;

    /// Whether the body has been read to its end.
    fn is_end(&self) -> bool;

    /// Whether the link is new, or its last exchange ended without extra data and the peer keeps the connection.
    fn is_reusable(&self) -> bool;

    /// Whether the peer has neither closed the connection nor sent unsolicited data.
    fn is_open(&mut self) -> bool;
}

/// A request as it is sent, with the backend's key.
#[derive(Default)]
pub(crate) struct WireRequest {
    /// The head, with its final empty line (RFC 9112, section 3).
    pub head: Vec<u8>,
    /// The body: slices of the client's data, with Zap's changes spliced in.
    pub body: Slices,
}

impl fmt::Debug for WireRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WireRequest").finish_non_exhaustive()
    }
}

/// Writes one header line.
pub(crate) fn write_header(out: &mut Vec<u8>, name: &HeaderName, value: &[u8]) {
    out.extend_from_slice(name.as_str().as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// An HTTP/1.1 client connection.
pub(crate) struct Http1 {
    io: Io,
    /// The request being sent; dropped when it is sent.
    request: Option<WireRequest>,
    outbox: Outbox,
    decoder: Decoder,
    /// The beginning of the body, if it was received with the head.
    body_start: Option<Bytes>,
    /// Whether no exchange has begun yet.
    idle: bool,
    /// Whether data was received in this exchange.
    has_received: bool,
    /// Whether the reader was polled after the write side failed. The reader may still have a response.
    reader_polled: bool,
    window: ReceiveWindow,
}

/// The progress of sending a request.
#[derive(Debug, Default)]
struct Outbox {
    /// Bytes of the head that are written.
    head_written: usize,
    /// Slices of the body that are written as a whole.
    slices_written: usize,
    /// Bytes of the next slice that are written.
    slice_written: usize,
    state: Sending,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sending {
    /// Nothing is left to send.
    #[default]
    Done,
    /// All bytes are written, but buffers above the socket, such as TLS, may hold some.
    Flushing,
    /// Bytes are left to write.
    Writing,
    /// The write side failed. Data that the peer sent before may still be read.
    Broken,
}

impl Http1 {
    /// Creates a link from an open connection.
    pub(crate) fn new(io: Io) -> Self {
        // Set before the connection was open, it would limit how wide the window may ever be.
        set_window(&io, Some(NARROW));
        Http1 {
            io,
            request: None,
            outbox: Outbox::default(),
            decoder: Decoder::default(),
            body_start: None,
            idle: true,
            has_received: false,
            reader_polled: false,
            window: ReceiveWindow::default(),
        }
    }

    /// Writes as much of the request as possible.
    fn send(&mut self, cx: &mut Context<'_>) {
        let Some(request) = self.request.as_ref().filter(|_| self.outbox.state != Sending::Broken) else {
            return;
        };
        match self.outbox.poll(Pin::new(&mut self.io), cx, request) {
            // Free the client's body as soon as it is sent.
            Poll::Ready(Ok(())) => self.request = None,
            Poll::Ready(Err(_)) => self.outbox.state = Sending::Broken,
            Poll::Pending => {}
        }
    }

    /// Reads once and passes the data to `take`. Returns `Ok(None)` if the peer has closed its side.
    fn read<T>(
        &mut self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&mut Decoder, &[u8]) -> T,
    ) -> Poll<std::io::Result<Option<T>>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buf = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.io).poll_read(cx, buf.unfilled()))?;
            let data = buf.filled();
            self.has_received |= !data.is_empty();
            set_window(&self.io, self.window.took(data.len()));
            Poll::Ready(Ok((!data.is_empty()).then(|| take(&mut self.decoder, data))))
        })
    }

    /// Creates the error for a missing head. It contains the request if no byte of it was written.
    fn broken(&mut self, fault: Fault) -> LinkError {
        let is_unsent = self.is_unsent();
        match self.request.take().filter(|_| is_unsent) {
            Some(request) => LinkError::Unsent(Box::new(request), fault),
            None if self.has_received => LinkError::Broken(fault),
            None => LinkError::HungUp(fault),
        }
    }

    /// Whether sending failed before a byte of the request was written.
    fn is_unsent(&self) -> bool {
        self.outbox.state == Sending::Broken && self.outbox.head_written == 0
    }
}

/// Changes the window of a connection, if there is a `size`, in bytes.
#[inline]
fn set_window(io: &Io, size: Option<usize>) {
    let Some(size) = size else { return };
    let tcp = match io {
        MaybeHttpsStream::Http(tcp) => tcp.inner(),
        MaybeHttpsStream::Https(tls) => tls.inner().get_ref().0.inner().inner(),
    };
    // A system that refuses keeps its own size.
    let _ = SockRef::from(tcp).set_recv_buffer_size(size);
}

impl Outbox {
    /// Writes as much of the request as the socket accepts.
    fn poll(
        &mut self,
        mut io: Pin<&mut Io>,
        cx: &mut Context<'_>,
        WireRequest { head, body }: &WireRequest,
    ) -> Poll<std::io::Result<()>> {
        while self.state == Sending::Writing {
            let mut slices = SmallVec::<[IoSlice<'_>; 8]>::new();
            if self.head_written < head.len() {
                slices.push(IoSlice::new(&head[self.head_written..]));
            }
            let mut skip = self.slice_written;
            for slice in body[self.slices_written..].iter().take(MAX_SLICES) {
                slices.push(IoSlice::new(&slice[skip..]));
                skip = 0;
            }
            if slices.is_empty() {
                self.state = Sending::Flushing;
                break;
            }
            let written = match one_piece(&slices, &mut Scratch::new()) {
                Some(piece) => io.as_mut().poll_write(cx, piece),
                None => io.as_mut().poll_write_vectored(cx, &slices),
            };
            let mut n = ready!(written)?;
            if n == 0 {
                return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
            }
            let of_head = n.min(head.len() - self.head_written);
            self.head_written += of_head;
            n -= of_head;
            while n > 0 && self.slices_written < body.len() {
                let left = body[self.slices_written].len() - self.slice_written;
                if n < left {
                    self.slice_written += n;
                    break;
                }
                n -= left;
                (self.slices_written, self.slice_written) = (self.slices_written + 1, 0);
            }
        }
        if self.state == Sending::Flushing {
            ready!(io.poll_flush(cx))?;
            self.state = Sending::Done;
        }
        Poll::Ready(Ok(()))
    }
}

impl Link for Http1 {
    fn start(&mut self, request: WireRequest) {
        self.outbox = Outbox { state: Sending::Writing, ..Outbox::default() };
        self.request = Some(request);
        self.decoder.begin();
        self.body_start = None;
        (self.idle, self.has_received, self.reader_polled) = (false, false, false);
        set_window(&self.io, self.window.begin());
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, LinkError>> {
        self.send(cx);
        loop {
            let read = self.read(cx, Decoder::head);
            let failed = match read {
                // The peer never received this request, so the response belongs to something else.
                Poll::Ready(Ok(Some(Ok(Some(_))))) if self.is_unsent() => Fault::closed(),
                Poll::Ready(Ok(Some(Ok(Some((parts, ahead)))))) => {
                    self.body_start = Some(ahead).filter(|a| !a.is_empty());
                    return Poll::Ready(Ok(parts));
                }
                Poll::Ready(Ok(Some(Ok(None)))) => continue,
                Poll::Ready(Ok(Some(Err(Invalid(why))))) => Fault::not_http(why),
                Poll::Ready(Ok(None)) => match self.decoder.end_of_head() {
                    Err(Invalid(why)) => Fault::not_http(why),
                    Ok(()) => Fault::closed(),
                },
                Poll::Ready(Err(error)) => Fault::unreachable(&error),
                // The write side failed; poll the reader once more before reporting it.
                Poll::Pending if self.outbox.state == Sending::Broken && self.reader_polled => {
                    Fault::closed()
                }
                Poll::Pending => {
                    self.reader_polled = self.outbox.state == Sending::Broken;
                    return Poll::Pending;
                }
            };
            return Poll::Ready(Err(self.broken(failed)));
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Fault>>> {
        if let Some(ahead) = self.body_start.take() {
            return Poll::Ready(Some(Ok(ahead)));
        }
        if self.outbox.state != Sending::Done {
            self.send(cx);
        }
        while !self.decoder.is_done() {
            if self.decoder.is_broken() {
                return Poll::Ready(Some(Err(Fault::not_http("a chunk is malformed"))));
            }
            match ready!(self.read(cx, Decoder::body)) {
                Ok(Some(Ok(data))) if data.is_empty() => {}
                Ok(Some(Ok(data))) => return Poll::Ready(Some(Ok(data))),
                Ok(Some(Err(Invalid(why)))) => return Poll::Ready(Some(Err(Fault::not_http(why)))),
                Ok(None) if self.decoder.end() => {}
                Ok(None) => return Poll::Ready(Some(Err(Fault::cut_short()))),
                Err(error) => return Poll::Ready(Some(Err(Fault::unreachable(&error)))),
            }
        }
        Poll::Ready(None)
    }

    fn remaining(&self) -> SizeHint {
        let ahead = self.body_start.as_ref().map_or(0, |a| a.len() as u64);
        self.decoder.remaining().map_or_else(SizeHint::default, |left| SizeHint::with_exact(left + ahead))
    }

    fn is_end(&self) -> bool {
        self.body_start.is_none() && self.decoder.is_done()
    }

    fn is_reusable(&self) -> bool {
        let is_sent = self.request.is_none() && self.outbox.state == Sending::Done;
        let is_over = self.body_start.is_none() && self.decoder.may_go_on() && is_sent;
        self.idle || is_over
    }

    fn is_open(&mut self) -> bool {
        match &mut self.io {
            // `try_io` makes a system call only if the runtime has seen an event on the socket. A close that the
            // runtime has not seen yet is handled like one that crosses the request on the network.
            MaybeHttpsStream::Http(tcp) => {
                let tcp = tcp.inner();
                let mut byte = [MaybeUninit::uninit()];
                let peeked = tcp.try_io(Interest::READABLE, || SockRef::from(tcp).peek(&mut byte));
                matches!(peeked, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
            }
            MaybeHttpsStream::Https(_) => {
                let read = self.read(&mut Context::from_waker(Waker::noop()), |_, _| ());
                read.is_pending()
            }
        }
    }
}

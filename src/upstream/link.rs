//! One upstream HTTP/1.1 connection, as the pool, the attempt loop and the relay see it.
//!
//! A link is driven by whoever holds it: there is no task behind it, so dropping it closes the connection at
//! once, and a reply that nobody reads is not read ahead. [`Link`] is all that the rest of Zap knows; [`Http1`] fulfils
//! it: head and body leave in one write, a small message in one piece and a large one as slices; what one read brings is
//! one frame, and nothing is buffered between two reads, so an idle connection and a silent stream take no memory but their
//! socket's.

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

/// Most that one read brings, and so the largest frame.
const READ: usize = 32 * 1024;

/// Slices of a request that one write takes.
const MAX_SLICES: usize = 64;

thread_local! {
    /// What is read goes through here, and into a frame of its own size: one buffer for all connections of a worker.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into());
}

/// Why a link gave no answer.
#[derive(Debug)]
pub(crate) enum LinkError {
    /// It broke, or what came is not an answer.
    Broken(Fault),
    /// The peer closed it without a word.
    HungUp(Fault),
    /// It had died before a byte of the request was written; here is the request.
    Unsent(Box<WireRequest>, Fault),
}

/// One connection that carries one exchange at a time.
pub(crate) trait Link {
    /// Begins an exchange. Only on a link that [`is_reusable`](Link::is_reusable).
    fn start(&mut self, request: WireRequest);

    /// Drives the exchange to the head of the answer.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, LinkError>>;

    /// Drives the exchange to the next piece of the body; `None` at its end.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Fault>>>;

    /// Bytes of the body still to come, where the answer says so.
    fn remaining(&self) -> SizeHint;

    /// The body is at its end.
    fn is_end(&self) -> bool;

    /// Whether the last exchange ended exactly, with nothing behind it, and the peer means to go on.
    fn is_reusable(&self) -> bool;

    /// Whether the peer still holds the connection open and has sent nothing unasked.
    fn is_open(&mut self) -> bool;
}

/// A request as it goes out, with the backend's key in it.
#[derive(Default)]
pub(crate) struct WireRequest {
    /// The head, to its empty line (RFC 9112, section 3).
    pub head: Vec<u8>,
    /// Slices of the client's chunks and what was spliced in between.
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

/// Zap's own HTTP/1.1 client connection.
pub(crate) struct Http1 {
    io: Io,
    /// The request under way.
    request: Option<WireRequest>,
    outbox: Outbox,
    decoder: Decoder,
    /// The beginning of the body, which came with the head.
    ahead: Option<Bytes>,
    /// No exchange has begun yet.
    idle: bool,
    /// The peer has said something in this exchange.
    heard: bool,
    /// The break of what was written was met: the reader is to hear of it, once more.
    waited: bool,
}

/// What is still to be written.
#[derive(Debug, Default)]
struct Outbox {
    /// Bytes of the head that are written, then the slices that are, then the bytes of the next one.
    written: usize,
    slices: usize,
    of_slice: usize,
    state: Sending,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sending {
    /// Nothing to do.
    #[default]
    Done,
    /// All is written, and must leave what is between here and the socket.
    Flushing,
    Writing,
    /// It broke: what the peer has said before that may still be read.
    Broken,
}

impl Http1 {
    /// An open connection.
    pub(crate) fn new(io: Io) -> Self {
        Http1 {
            io,
            request: None,
            outbox: Outbox::default(),
            decoder: Decoder::default(),
            ahead: None,
            idle: true,
            heard: false,
            waited: false,
        }
    }

    /// Writes on.
    fn send(&mut self, cx: &mut Context<'_>) {
        let Some(request) = self.request.as_ref().filter(|_| self.outbox.state != Sending::Broken) else {
            return;
        };
        match self.outbox.poll(Pin::new(&mut self.io), cx, request) {
            // The client's body is not held any longer than that.
            Poll::Ready(Ok(())) => self.request = None,
            Poll::Ready(Err(_)) => self.outbox.state = Sending::Broken,
            Poll::Pending => {}
        }
    }

    /// Reads once and hands what came to `take`; `Ok(None)`: the peer has ended its side.
    fn read<T>(
        &mut self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&mut Decoder, &[u8]) -> T,
    ) -> Poll<std::io::Result<Option<T>>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buf = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.io).poll_read(cx, buf.unfilled()))?;
            let came = buf.filled();
            self.heard |= !came.is_empty();
            Poll::Ready(Ok((!came.is_empty()).then(|| take(&mut self.decoder, came))))
        })
    }

    /// Why there is no head: what is left of the request goes back if none of it was written.
    fn broken(&mut self, fault: Fault) -> LinkError {
        let is_unsent = self.is_unsent();
        match self.request.take().filter(|_| is_unsent) {
            Some(request) => LinkError::Unsent(Box::new(request), fault),
            None if self.heard => LinkError::Broken(fault),
            None => LinkError::HungUp(fault),
        }
    }

    /// Not a byte of the request was written, or will be.
    fn is_unsent(&self) -> bool {
        self.outbox.state == Sending::Broken && self.outbox.written == 0
    }
}

impl Outbox {
    /// Writes as much of a request as the socket takes.
    fn poll(
        &mut self,
        mut io: Pin<&mut Io>,
        cx: &mut Context<'_>,
        WireRequest { head, body }: &WireRequest,
    ) -> Poll<std::io::Result<()>> {
        while self.state == Sending::Writing {
            let mut slices = SmallVec::<[IoSlice<'_>; 8]>::new();
            if self.written < head.len() {
                slices.push(IoSlice::new(&head[self.written..]));
            }
            let mut skip = self.of_slice;
            for slice in body[self.slices..].iter().take(MAX_SLICES) {
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
            let of_head = n.min(head.len() - self.written);
            self.written += of_head;
            n -= of_head;
            while n > 0 && self.slices < body.len() {
                let left = body[self.slices].len() - self.of_slice;
                if n < left {
                    self.of_slice += n;
                    break;
                }
                n -= left;
                (self.slices, self.of_slice) = (self.slices + 1, 0);
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
        self.ahead = None;
        (self.idle, self.heard, self.waited) = (false, false, false);
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, LinkError>> {
        self.send(cx);
        loop {
            let read = self.read(cx, Decoder::head);
            let failed = match read {
                // Whatever it answers, it is not this request.
                Poll::Ready(Ok(Some(Ok(Some(_))))) if self.is_unsent() => Fault::closed(),
                Poll::Ready(Ok(Some(Ok(Some((parts, ahead)))))) => {
                    self.ahead = Some(ahead).filter(|a| !a.is_empty());
                    return Poll::Ready(Ok(parts));
                }
                Poll::Ready(Ok(Some(Ok(None)))) => continue,
                Poll::Ready(Ok(Some(Err(Invalid(why))))) => Fault::not_http(why),
                Poll::Ready(Ok(None)) => match self.decoder.end_of_head() {
                    Err(Invalid(why)) => Fault::not_http(why),
                    Ok(()) => Fault::closed(),
                },
                Poll::Ready(Err(error)) => Fault::unreachable(&error),
                // A broken connection says so to the reader too; until then what it has said before may come.
                Poll::Pending if self.outbox.state == Sending::Broken && self.waited => Fault::closed(),
                Poll::Pending => {
                    self.waited = self.outbox.state == Sending::Broken;
                    return Poll::Pending;
                }
            };
            return Poll::Ready(Err(self.broken(failed)));
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Fault>>> {
        if let Some(ahead) = self.ahead.take() {
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
                Ok(None) => return Poll::Ready(Some(Err(Fault::closed()))),
                Err(error) => return Poll::Ready(Some(Err(Fault::unreachable(&error)))),
            }
        }
        Poll::Ready(None)
    }

    fn remaining(&self) -> SizeHint {
        let ahead = self.ahead.as_ref().map_or(0, |a| a.len() as u64);
        self.decoder.remaining().map_or_else(SizeHint::default, |left| SizeHint::with_exact(left + ahead))
    }

    fn is_end(&self) -> bool {
        self.ahead.is_none() && self.decoder.is_done()
    }

    fn is_reusable(&self) -> bool {
        let is_sent = self.request.is_none() && self.outbox.state == Sending::Done;
        let is_over = self.ahead.is_none() && self.decoder.may_go_on() && is_sent;
        self.idle || is_over
    }

    fn is_open(&mut self) -> bool {
        match &mut self.io {
            // The kernel is asked only where the runtime has heard of something: between two of its looks a peer's close
            // may cross the request, as it may on the way here, and is met there.
            MaybeHttpsStream::Http(tcp) => {
                let tcp = tcp.inner();
                let mut one = [MaybeUninit::uninit()];
                let peeked = tcp.try_io(Interest::READABLE, || SockRef::from(tcp).peek(&mut one));
                matches!(peeked, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
            }
            MaybeHttpsStream::Https(_) => {
                let read = self.read(&mut Context::from_waker(Waker::noop()), |_, _| ());
                read.is_pending()
            }
        }
    }
}

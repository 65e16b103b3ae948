//! One upstream HTTP/1.1 connection, as the pool, the attempt loop and the relay see it.
//!
//! A link is driven by whoever holds it: there is no task behind it, so dropping it closes the connection at
//! once, and a reply that nobody reads is not read ahead. [`Link`] is all that the rest of Zap knows;
//! [`HyperLink`] fulfils it with hyper's client.

use std::convert::Infallible;
use std::error::Error;
use std::io::ErrorKind;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{Request, Response, response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, Connection, SendRequest};

use super::connect::Io;
use crate::error::Code;
use crate::policy::patch::Slices;

/// Largest head of a response, and what is buffered of a body at most.
const MAX_BUFFER: usize = 64 * 1024;

/// Most headers of a response.
const MAX_HEADERS: usize = 100;

/// Why a link gave no answer.
#[derive(Debug)]
pub enum LinkError {
    /// It broke, or what came is not an answer.
    Broken(Code),
    /// It had died, of what the code says, before a byte of the request was written; here is the request.
    Unsent(Box<Request<SendBody>>, Code),
}

/// One connection that carries one exchange at a time.
pub trait Link {
    /// Begins an exchange. Only on a link that [`is_idle`](Link::is_idle).
    fn start(&mut self, request: Request<SendBody>);

    /// Drives the exchange to the head of the answer.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, LinkError>>;

    /// Drives the exchange to the next piece of the body; `None` at its end.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Code>>>;

    /// Bytes of the body still to come, where the answer says so.
    fn remaining(&self) -> SizeHint;

    /// The body is known to be at its end without another poll.
    fn is_end(&self) -> bool;

    /// Whether the last exchange ended exactly and the peer still holds the connection open.
    fn is_idle(&mut self) -> bool;
}

/// A request's body: slices of the client's chunks and what was spliced in between.
#[derive(Debug)]
pub struct SendBody {
    slices: smallvec::IntoIter<[Bytes; 4]>,
    left: u64,
}

impl SendBody {
    /// A body of these slices in order.
    pub fn new(slices: Slices) -> Self {
        SendBody { left: slices.iter().map(|s| s.len() as u64).sum(), slices: slices.into_iter() }
    }
}

impl Default for SendBody {
    fn default() -> Self {
        SendBody::new(Slices::new())
    }
}

impl Body for SendBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Some(slice) = self.slices.next() else { return Poll::Ready(None) };
        self.left -= slice.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(slice))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// hyper's client connection, polled in place.
pub struct HyperLink {
    connection: Connection<Io, SendBody>,
    sender: SendRequest<SendBody>,
    reply: Reply,
    /// The connection's future has ended; it must not be polled again.
    over: bool,
    /// What it ended of.
    fault: Code,
}

type Head = Pin<Box<dyn Future<Output = Result<Response<Incoming>, Failed>>>>;

/// hyper's error, and the request where not a byte of it was written.
struct Failed {
    error: hyper::Error,
    unsent: Option<Box<Request<SendBody>>>,
}

enum Reply {
    Idle,
    Waiting(Head),
    Body(Incoming),
}

impl HyperLink {
    /// Prepares an open connection.
    ///
    /// # Errors
    /// [`Code::UpstreamUnreachable`]; hyper has no reason to fail here.
    pub async fn new(io: Io) -> Result<Self, Code> {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(MAX_BUFFER).max_headers(MAX_HEADERS);
        let (sender, connection) = builder.handshake(io).await.map_err(|_| Code::UpstreamUnreachable)?;
        Ok(HyperLink {
            connection,
            sender,
            reply: Reply::Idle,
            over: false,
            fault: Code::UpstreamUnreachable,
        })
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        if self.over {
            return;
        }
        if let Poll::Ready(end) = Pin::new(&mut self.connection).poll(cx) {
            self.over = true;
            if let Err(error) = end {
                self.fault = code_of(&error);
            }
        }
    }

    /// The head of the answer, if it is here, or what came instead.
    fn take_head(&mut self) -> Option<Result<response::Parts, LinkError>> {
        let Reply::Waiting(head) = &mut self.reply else {
            return Some(Err(LinkError::Broken(Code::UpstreamUnreachable)));
        };
        let failed = match head.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(response)) => {
                let (parts, body) = response.into_parts();
                self.reply = Reply::Body(body);
                return Some(Ok(parts));
            }
            Poll::Ready(Err(failed)) => failed,
            Poll::Pending if self.over => return Some(Err(LinkError::Broken(self.fault))),
            Poll::Pending => return None,
        };
        self.reply = Reply::Idle;
        let code = code_of(&failed.error);
        Some(Err(match failed.unsent {
            Some(request) => LinkError::Unsent(request, code),
            None => LinkError::Broken(code),
        }))
    }

    /// The next frame of the body, if it is here; `Some(None)` at the end.
    fn take_frame(&mut self) -> Option<Option<Result<Bytes, Code>>> {
        loop {
            let Reply::Body(body) = &mut self.reply else { return Some(None) };
            return match Pin::new(body).poll_frame(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => Some(Some(Ok(data))),
                    // Trailers end at Zap.
                    Err(_) => continue,
                },
                Poll::Ready(Some(Err(error))) => Some(Some(Err(code_of(&error)))),
                Poll::Ready(None) => Some(None),
                Poll::Pending if self.over => Some(Some(Err(self.fault))),
                Poll::Pending => None,
            };
        }
    }

    /// Drives the connection until `take` has something. hyper's halves wake each other, which here would only
    /// wake the task that runs already; so they get a waker that does nothing, and the task's own one last, when
    /// there is nothing left to do but to wait for the socket.
    fn drive_for<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut take: impl FnMut(&mut Self) -> Option<T>,
    ) -> Option<T> {
        for waker in [Waker::noop(), cx.waker()] {
            self.drive(&mut Context::from_waker(waker));
            if let Some(got) = take(self) {
                return Some(got);
            }
        }
        None
    }
}

/// What came is not HTTP, or nothing came.
fn code_of(error: &hyper::Error) -> Code {
    let mut causes = std::iter::successors(Some(error as &(dyn Error + 'static)), |e| Error::source(*e));
    let is_not_http = |e: &(dyn Error + 'static)| match (e.downcast_ref(), e.downcast_ref()) {
        (Some(io), _) => matches!(std::io::Error::kind(io), ErrorKind::InvalidInput | ErrorKind::InvalidData),
        // hyper has no question for what comes unasked, but a text.
        (_, Some(e)) => {
            hyper::Error::is_parse(e) || e.to_string().ends_with("unexpected message from connection")
        }
        (None, None) => false,
    };
    if causes.any(is_not_http) { Code::UpstreamInvalidResponse } else { Code::UpstreamUnreachable }
}

impl Link for HyperLink {
    fn start(&mut self, request: Request<SendBody>) {
        let sending = self.sender.try_send_request(request);
        let head = async {
            sending.await.map_err(|mut e| {
                let unsent = e.take_message().map(Box::new);
                Failed { error: e.into_error(), unsent }
            })
        };
        // hyper answers through a channel whose other end is polled just before: a waker of its own would only
        // wake the task that runs already, and the runtime's budget must not hide an answer that is there.
        self.reply = Reply::Waiting(Box::pin(tokio::task::unconstrained(head)));
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, LinkError>> {
        self.drive_for(cx, Self::take_head).map_or(Poll::Pending, Poll::Ready)
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Code>>> {
        self.drive_for(cx, Self::take_frame).map_or(Poll::Pending, Poll::Ready)
    }

    fn remaining(&self) -> SizeHint {
        match &self.reply {
            Reply::Body(body) => body.size_hint(),
            Reply::Idle | Reply::Waiting(_) => SizeHint::with_exact(0),
        }
    }

    fn is_end(&self) -> bool {
        matches!(&self.reply, Reply::Body(body) if body.is_end_stream())
    }

    fn is_idle(&mut self) -> bool {
        self.reply = Reply::Idle;
        self.drive(&mut Context::from_waker(Waker::noop()));
        !self.over && self.sender.is_ready()
    }
}

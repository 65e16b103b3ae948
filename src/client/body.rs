//! The one body type of all answers.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use crate::client::conn::Conn;
use crate::client::exchange::Exchange;

/// The body of an answer: one piece of Zap's own, or an upstream's, passed on.
#[derive(Debug)]
pub(crate) struct Body<S> {
    kind: Kind<S>,
    turn: Option<ExchangeEnd>,
}

#[derive(Debug)]
enum Kind<S> {
    Full(Option<Bytes>),
    Stream(Box<S>),
}

/// Says, when the body is dropped, that the connection may serve the next request.
#[derive(Debug)]
struct ExchangeEnd(Rc<Conn>);

impl Drop for ExchangeEnd {
    fn drop(&mut self) {
        self.0.end_turn();
    }
}

/// An answer that breaks off: hyper closes the connection without a clean end.
#[derive(Debug)]
pub(crate) struct Cut;

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the answer was cut")
    }
}

impl std::error::Error for Cut {}

impl From<Infallible> for Cut {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

impl<S> Body<S> {
    /// One piece, or nothing.
    pub(crate) fn full(data: Bytes) -> Self {
        Body { kind: Kind::Full(Some(data).filter(|d| !d.is_empty())), turn: None }
    }

    /// A body that comes piece by piece.
    pub(crate) fn stream(body: S) -> Self {
        Body { kind: Kind::Stream(Box::new(body)), turn: None }
    }

    /// The body, which ends the exchange when it is done.
    pub(crate) fn on(mut self, exchange: &Exchange) -> Self {
        self.turn = Some(ExchangeEnd(exchange.conn().clone()));
        self
    }
}

impl<S> http_body::Body for Body<S>
where
    S: http_body::Body<Data = Bytes, Error = Cut> + Unpin,
{
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        match &mut self.kind {
            Kind::Full(data) => Poll::Ready(data.take().map(|d| Ok(Frame::data(d)))),
            Kind::Stream(stream) => Pin::new(&mut **stream).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Full(data) => data.is_none(),
            Kind::Stream(stream) => stream.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Full(data) => SizeHint::with_exact(data.as_ref().map_or(0, |d| d.len() as u64)),
            Kind::Stream(stream) => stream.size_hint(),
        }
    }
}

//! The body of every response.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use crate::client::conn::Conn;
use crate::client::exchange::Exchange;

/// The body of a response: one piece, or a stream.
#[derive(Debug)]
pub(crate) struct Body<S> {
    kind: Kind<S>,
    end: Option<ExchangeEnd>,
}

#[derive(Debug)]
enum Kind<S> {
    Full(Option<Bytes>),
    Stream(Box<S>),
}

/// Ends the exchange when the body is dropped: the connection may serve the next request.
#[derive(Debug)]
struct ExchangeEnd(Rc<Conn>);

impl Drop for ExchangeEnd {
    fn drop(&mut self) {
        self.0.end_exchange();
    }
}

/// The response was cut: hyper closes the connection without a clean end.
#[derive(Debug)]
pub(crate) struct Cut;

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the response was cut")
    }
}

impl std::error::Error for Cut {}

impl From<Infallible> for Cut {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

impl<S> Body<S> {
    /// A body of one piece, or an empty one.
    pub(crate) fn full(data: Bytes) -> Self {
        Body { kind: Kind::Full(Some(data).filter(|d| !d.is_empty())), end: None }
    }

    /// A body that comes in pieces.
    pub(crate) fn stream(body: S) -> Self {
        Body { kind: Kind::Stream(Box::new(body)), end: None }
    }

    /// The same body; it ends `exchange` when it is dropped.
    pub(crate) fn on(mut self, exchange: &Exchange) -> Self {
        self.end = Some(ExchangeEnd(exchange.conn().clone()));
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

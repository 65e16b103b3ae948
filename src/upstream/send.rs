//! One try at one backend: a pooled connection or a fresh one, the request, the head of the answer.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Method, Request, StatusCode, Uri, response};

use super::Upstream;
use super::link::{HyperLink, Link, LinkError, SendBody};
use super::pool::{Lease, Pool};
use crate::clock;
use crate::error::Code;

/// An answer whose head is here and whose body is still to be read from `lease`.
pub struct Answer {
    /// Status and headers as they came.
    pub head: response::Parts,
    /// The connection.
    pub lease: Lease,
}

/// A request in the form a backend gets it.
pub struct Outgoing {
    /// Path and query.
    pub target: Uri,
    /// All headers but the length.
    pub headers: HeaderMap,
    /// The body.
    pub body: SendBody,
    /// How long a fresh connection may take.
    pub connect: Duration,
}

impl Outgoing {
    fn into_request(self) -> Box<Request<SendBody>> {
        let mut request = Box::new(Request::new(self.body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.target;
        *request.headers_mut() = self.headers;
        request
    }
}

/// Sends `outgoing` to `upstream` and waits for the head of the answer; the caller limits the time.
///
/// A pooled connection that had died before a byte was written costs nothing: the next one is taken.
/// `on_connect` is told before a fresh connection is opened and again when it stands.
///
/// # Errors
/// What broke, as a code of the error table.
pub async fn send(
    pool: &Pool,
    worker: usize,
    upstream: &Arc<Upstream>,
    outgoing: Outgoing,
    mut on_connect: impl FnMut(bool),
) -> Result<Answer, Code> {
    let limit = outgoing.connect;
    let mut request = outgoing.into_request();
    loop {
        let (mut lease, reused) = match pool.take(upstream, clock::now()) {
            Some(lease) => (lease, true),
            None => {
                on_connect(true);
                let link = HyperLink::new(upstream.connector().connect(limit).await?).await?;
                on_connect(false);
                (Lease::new(link, upstream.clone(), worker, clock::now()), false)
            }
        };
        lease.link.start(*request);
        match poll_fn(|cx| lease.link.poll_head(cx)).await {
            Ok(head) if head.status == StatusCode::SWITCHING_PROTOCOLS => {
                return Err(Code::UpstreamInvalidResponse);
            }
            Ok(head) => return Ok(Answer { head, lease }),
            Err(LinkError::Broken(code)) => return Err(code),
            Err(LinkError::Unsent(back)) if reused => request = back,
            Err(LinkError::Unsent(_)) => return Err(Code::UpstreamUnreachable),
        }
    }
}

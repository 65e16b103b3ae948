//! One try at one backend: a pooled connection or a fresh one, the request, the head of the answer.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::{StatusCode, response};

use super::Upstream;
use super::connect::ConnectError;
use super::link::{Http1, Link, LinkError, Message};
use super::pool::{Lease, Pool};
use crate::clock;
use crate::error::Code;
use crate::policy::{Nanos, SECOND};

/// An answer whose head is here and whose body is still to be read from `lease`.
pub struct Answer {
    /// Status and headers as they came.
    pub head: response::Parts,
    /// The connection.
    pub lease: Lease,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendError {
    /// What broke, as a code of the error table.
    Broken(Code),
    /// The caller's time has passed.
    Silent,
    /// No connection could be opened, and the backend has no part in that.
    Exhausted,
    /// A connection that had served before was closed, without a word, as soon as the request was written: the peer had
    /// most likely closed it meanwhile, and a fresh one will do.
    Stale,
}

impl From<Code> for SendError {
    fn from(code: Code) -> Self {
        SendError::Broken(code)
    }
}

impl From<ConnectError> for SendError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Exhausted(_) => SendError::Exhausted,
            ConnectError::Peer { code, .. } => SendError::Broken(code),
        }
    }
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Its turn has come, then: what follows is waiting for the backend.
    Begun(Nanos),
    /// A fresh connection is to be opened.
    Connecting,
    /// The request goes out, for the first time or once more.
    Sending,
}

/// A peer's close crosses the request within the time of a round trip, however far it is.
const CROSSING: Nanos = SECOND;

/// Lets all that is ready go first: a worker that has been woken for many requests reads them all and then writes them
/// all. Writes that follow one another find their peer awake, which is a tenth of what a request costs, and code that is
/// still in the cache.
async fn last_in_line() {
    let mut has_waited = false;
    poll_fn(|cx| {
        if has_waited {
            return Poll::Ready(());
        }
        has_waited = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Sends `request` to `upstream` and waits for the head of the answer; the caller limits the time, `limit` is for a fresh
/// connection alone.
///
/// A pooled connection that had died before a byte was written costs nothing: the next one is taken. `pool`: where to
/// look for one.
///
/// # Errors
/// Why there is no answer.
pub async fn send(
    pool: Option<&Pool>,
    worker: usize,
    upstream: &Arc<Upstream>,
    mut request: Message,
    limit: Duration,
    mut on_step: impl FnMut(Step),
) -> Result<Answer, SendError> {
    last_in_line().await;
    let since = clock::now();
    on_step(Step::Begun(since));
    loop {
        let (mut lease, reused) = match pool.and_then(|pool| pool.take(upstream, since)) {
            Some(lease) => (lease, true),
            None => {
                on_step(Step::Connecting);
                let link = Http1::new(upstream.connector().connect(limit).await?);
                (Lease::new(link, upstream.clone(), worker, clock::now()), false)
            }
        };
        on_step(Step::Sending);
        lease.link.start(request);
        match poll_fn(|cx| lease.link.poll_head(cx)).await {
            Ok(head) if head.status == StatusCode::SWITCHING_PROTOCOLS => {
                return Err(Code::UpstreamInvalidResponse.into());
            }
            Ok(head) => return Ok(Answer { head, lease }),
            Err(LinkError::HungUp) if reused && clock::now() < since + CROSSING => {
                return Err(SendError::Stale);
            }
            Err(LinkError::HungUp) => return Err(Code::UpstreamUnreachable.into()),
            Err(LinkError::Broken(code)) => return Err(code.into()),
            Err(LinkError::Unsent(back, _)) if reused => request = *back,
            Err(LinkError::Unsent(_, code)) => return Err(code.into()),
        }
    }
}

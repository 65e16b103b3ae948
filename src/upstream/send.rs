//! One try at one backend: a pooled connection or a fresh one, the request, the head of the answer.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::{StatusCode, response};

use crate::clock;
use crate::time::{Nanos, SECOND};
use crate::upstream::Upstream;
use crate::upstream::connect::{ConnectError, Io};
use crate::upstream::fault::Fault;
use crate::upstream::link::{Http1, Link, LinkError, WireRequest};
use crate::upstream::pool::{Lease, Pool};

/// An answer whose head is here and whose body is still to be read from `lease`.
pub(crate) struct UpstreamAnswer {
    /// Status and headers as they came.
    pub head: response::Parts,
    /// The connection.
    pub lease: Lease,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum SendError {
    /// What broke.
    Broken(Fault),
    /// The caller's time has passed.
    Late(Fault),
    /// No connection could be opened, and the backend has no part in that.
    Exhausted(Fault),
    /// A connection that had served before was closed, without a word, as soon as the request was written: the peer had
    /// most likely closed it meanwhile, and a fresh one will do.
    Stale,
}

impl From<Fault> for SendError {
    fn from(fault: Fault) -> Self {
        SendError::Broken(fault)
    }
}

impl From<ConnectError> for SendError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Exhausted { fault, .. } => SendError::Exhausted(fault),
            ConnectError::Peer(fault) => SendError::Broken(fault),
        }
    }
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
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

/// Where the connection for a request comes from.
#[derive(Clone, Copy)]
pub(crate) struct Source<'p> {
    /// The worker's connections.
    pub pool: &'p Pool,
    /// An idle one will do.
    pub reuse: bool,
    /// How long it may take to open a fresh one.
    pub limit: Duration,
}

impl Source<'_> {
    /// Opens a fresh connection. Where no file is left, the worker's idle connections make room, one by one.
    async fn open(self, upstream: &Upstream) -> Result<Io, ConnectError> {
        self.pool.make_room();
        let began = clock::now();
        loop {
            let left = self.limit.saturating_sub(Duration::from_nanos(clock::now() - began));
            match upstream.connector().connect(left).await {
                Err(ConnectError::Exhausted { lacks_a_file: true, .. }) if self.pool.close_oldest() => {}
                opened => return opened,
            }
        }
    }
}

/// Sends `request` to `upstream` and waits for the head of the answer; the caller limits the time.
///
/// A pooled connection that had died before a byte was written costs nothing: the next one is taken.
///
/// # Errors
/// Why there is no answer.
pub(crate) async fn send(
    source: Source<'_>,
    upstream: &Arc<Upstream>,
    mut request: WireRequest,
    mut on_step: impl FnMut(Step),
) -> Result<UpstreamAnswer, SendError> {
    last_in_line().await;
    let since = clock::now();
    on_step(Step::Begun(since));
    loop {
        let idle = if source.reuse { source.pool.take(upstream, since) } else { None };
        let (mut lease, reused) = match idle {
            Some(lease) => (lease, true),
            None => {
                on_step(Step::Connecting);
                let link = Http1::new(source.open(upstream).await?);
                (source.pool.lease(link, upstream.clone(), clock::now()), false)
            }
        };
        on_step(Step::Sending);
        lease.link.start(request);
        match poll_fn(|cx| lease.link.poll_head(cx)).await {
            Ok(head) if head.status == StatusCode::SWITCHING_PROTOCOLS => {
                return Err(Fault::not_http("status 101, which nobody asked for").into());
            }
            Ok(head) => return Ok(UpstreamAnswer { head, lease }),
            Err(LinkError::HungUp(_)) if reused && clock::now() < since + CROSSING => {
                return Err(SendError::Stale);
            }
            Err(LinkError::Unsent(back, _)) if reused => request = *back,
            Err(LinkError::HungUp(fault) | LinkError::Broken(fault) | LinkError::Unsent(_, fault)) => {
                return Err(fault.into());
            }
        }
    }
}

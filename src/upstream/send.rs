//! One try at one backend: takes or opens a connection, sends the request and reads the head of the response.

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

/// A response whose head has been read. The body is still to be read from `lease`.
pub(crate) struct UpstreamResponse {
    /// Status and headers as received.
    pub head: response::Parts,
    /// The connection.
    pub lease: Lease,
}

/// Why a try got no response.
#[derive(Debug)]
pub(crate) enum SendError {
    /// The connection failed, or the response is invalid.
    Broken(Fault),
    /// No connection could be opened, for lack of resources on this machine.
    Exhausted(Fault),
    /// The peer closed a reused connection without a response right after the request was sent. Most likely the close
    /// crossed the request, so the request can be sent again on a new connection.
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

/// The progress of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The try began at this time. From here on the request waits for the backend.
    Begun(Nanos),
    /// A new connection is being opened.
    Connecting,
    /// The request is being sent, for the first time or again.
    Sending,
}

/// Time after the start of a try in which the peer's close may still cross the request. Longer than any round trip.
const MAX_CROSSING: Nanos = SECOND;

/// Yields to the other ready tasks once. A worker with many ready requests then first reads them all and then writes
/// them all. Consecutive writes are cheaper: the peer is awake already, which saves a tenth of the cost of a request,
/// and the code stays in the CPU cache.
async fn yield_once() {
    let mut has_yielded = false;
    poll_fn(|cx| {
        if has_yielded {
            return Poll::Ready(());
        }
        has_yielded = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// How to get a connection for a request.
#[derive(Clone, Copy)]
pub(crate) struct Source<'p> {
    /// The worker's idle connections.
    pub pool: &'p Pool,
    /// Whether an idle connection may be reused.
    pub reuse: bool,
    /// Time limit for opening a new connection.
    pub limit: Duration,
}

impl Source<'_> {
    /// Opens a new connection. If no file is free, closes idle connections of the worker one by one and retries.
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

/// Sends `request` to `upstream` and waits for the head of the response. The caller limits the time.
///
/// If a pooled connection fails before a byte of the request was written, the next connection is used.
///
/// # Errors
/// Returns why there is no response.
pub(crate) async fn send(
    source: Source<'_>,
    upstream: &Arc<Upstream>,
    mut request: WireRequest,
    mut on_step: impl FnMut(Step),
) -> Result<UpstreamResponse, SendError> {
    yield_once().await;
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
            Ok(head) => match upstream.connector().proxy_fault(head.status) {
                None => return Ok(UpstreamResponse { head, lease }),
                Some(fault) => return Err(fault.into()),
            },
            Err(LinkError::HungUp(_)) if reused && clock::now() < since + MAX_CROSSING => {
                return Err(SendError::Stale);
            }
            Err(LinkError::Unsent(back, _)) if reused => request = *back,
            Err(LinkError::HungUp(fault) | LinkError::Broken(fault) | LinkError::Unsent(_, fault)) => {
                return Err(fault.into());
            }
        }
    }
}

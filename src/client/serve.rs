//! One client connection: hyper's settings, the time limits between requests, and how it ends.

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use bytes::Bytes;
use http::request::Parts;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::client::body::{Body, Cut};
use crate::client::client_io::ClientIo;
use crate::client::conn::Conn;
use crate::client::deadline::Deadlines;
use crate::client::exchange::Exchange;
use crate::client::future_pool::{FuturePool, Mailbox};
use crate::http1::header_map_pool;
use crate::time::{Nanos, SECOND};

/// Largest head and largest piece of a body that hyper buffers.
const MAX_BUFFER: usize = 64 * 1024;

/// Most headers of a request.
const MAX_HEADERS: usize = 100;

/// How long a closed connection is drained, so that the client can read the answer before a reset reaches it.
const LINGER: Nanos = 2 * SECOND;

/// How much a client may send meanwhile.
const MAX_DISCARD: usize = 64 << 20;

/// What answers requests.
pub(crate) trait Service: 'static {
    /// The body of an answer that comes piece by piece.
    type Stream: http_body::Body<Data = Bytes, Error = Cut> + Unpin + 'static;

    /// Answers one request. Everything it does is owned by the future and by the body of the answer.
    fn handle<B>(
        self: &Rc<Self>,
        head: &Parts,
        body: B,
        exchange: &Exchange,
    ) -> impl Future<Output = Response<Body<Self::Stream>>>
    where
        B: http_body::Body<Data = Bytes> + Unpin;

    /// The answer to a request that a bug has ended.
    fn broken(&self) -> Response<Body<Self::Stream>>;

    /// Connections close behind their answers.
    fn is_draining(&self) -> bool;

    /// Idle connections close.
    fn is_closing(&self) -> bool;
}

/// What a pooled future is given.
pub(crate) type Job = (Request<Incoming>, Rc<Conn>);

/// The answer of a service.
type ServiceAnswer<S> = Response<Body<<S as Service>::Stream>>;

/// What connections have in common.
#[derive(Debug)]
pub(crate) struct Settings {
    /// The worker's deadlines.
    pub deadlines: Rc<Deadlines>,
    /// How long a connection may be idle.
    pub keep_alive: Nanos,
}

/// Serves one connection to its end, each request in one of the pooled futures.
pub(crate) async fn serve<S: Service, F: Future>(
    (stream, peer): (TcpStream, IpAddr),
    settings: &Settings,
    gateway: Rc<S>,
    futures: Rc<FuturePool<Job, ServiceAnswer<S>, F>>,
) {
    let conn = Conn::new(stream, peer, settings.deadlines.clone(), settings.keep_alive);
    // A connection that says nothing costs no buffers: hyper comes in with the first byte.
    let first = poll_fn(|cx| {
        conn.deadline.register(cx);
        match conn.poll_readable(cx) {
            Poll::Pending if conn.deadline.has_expired() || gateway.is_closing() => Poll::Ready(false),
            readable => readable.map(|r| r.is_ok()),
        }
    });
    if !first.await {
        return;
    }
    let service = service_fn(|request| futures.run((request, conn.clone())));
    let answered = serve_http(&conn, &gateway, service).await;
    if answered && conn.is_unread() {
        let _ = conn.deadline.limit(conn.coarse_now() + LINGER, conn.discard(MAX_DISCARD)).await;
    }
}

/// Tells the stories of the requests that come to `mailbox`.
pub(crate) async fn run_requests<S: Service>(gateway: Rc<S>, mailbox: Rc<Mailbox<Job, ServiceAnswer<S>>>) {
    loop {
        let (request, conn) = mailbox.next().await;
        let (head, body) = request.into_parts();
        let answer = guarded(&gateway, &head, body, &Exchange::new(conn)).await;
        header_map_pool::give_back(head.headers);
        mailbox.reply(answer);
    }
}

/// The answer to one request. A bug on its way ends that request alone: what it held is dropped, its client gets a 500.
async fn guarded<S: Service>(
    gateway: &Rc<S>,
    head: &Parts,
    body: Incoming,
    exchange: &Exchange,
) -> ServiceAnswer<S> {
    let mut answer = pin!(gateway.handle(head, body, exchange));
    let answer = poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| answer.as_mut().poll(cx))) {
        Ok(polled) => polled.map(Some),
        Err(_) => Poll::Ready(None),
    });
    answer.await.unwrap_or_else(|| gateway.broken())
}

/// `true`: hyper ended it; `false`: an deadline did, and nobody waits for an answer.
async fn serve_http<S, H>(conn: &Rc<Conn>, gateway: &Rc<S>, service: H) -> bool
where
    S: Service,
    H: HttpService<Incoming, ResBody = Body<S::Stream>, Error = Infallible>,
{
    let mut builder = http1::Builder::new();
    // No timer: `deadline` does what hyper's would, for less. A client that stops sending has left: `has_left` sees it. Without
    // `half_close` hyper would look itself, and take 8 KiB for it.
    builder.max_buf_size(MAX_BUFFER).max_headers(MAX_HEADERS).half_close(true);
    let mut http = pin!(builder.serve_connection(TokioIo::new(ClientIo(conn.clone())), service));
    let mut closing = false;
    poll_fn(|cx| {
        conn.deadline.register(cx);
        let answers = conn.is_answering();
        let mut ended = http.as_mut().poll(cx).is_ready();
        // On the way out a connection closes behind its answer, also behind one whose head did not say so. What has come is
        // read before, and answered.
        let is_last = gateway.is_closing() || answers && gateway.is_draining();
        if is_last && !closing && !ended {
            closing = true;
            http.as_mut().graceful_shutdown();
            ended = http.as_mut().poll(cx).is_ready();
        }
        if ended {
            // What has come meanwhile is to be known before the close.
            conn.has_left(cx);
            return Poll::Ready(true);
        }
        // An deadline that no phase of a request has answered: idle, a slow head, or a write that nobody reads.
        if conn.deadline.has_expired() || conn.has_left(cx) { Poll::Ready(false) } else { Poll::Pending }
    })
    .await
}

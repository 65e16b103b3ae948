//! One client connection: hyper's settings, the time limits between requests, and how it ends.

use std::convert::Infallible;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use http::request::Parts;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use tokio::net::TcpStream;

use crate::client::body::{Body, Cut};
use crate::client::client_io::ClientIo;
use crate::client::conn::{Conn, LINGER, Settings};
use crate::client::connection_limit::ConnectionPermit;
use crate::client::exchange::Exchange;
use crate::client::future_pool::{FuturePool, Mailbox};
use crate::client::handshake::{HandshakeError, accept};
use crate::client::peer::Peer;
use crate::client::stream::ClientStream;
use crate::http1::header_map_pool;
use crate::time::{Nanos, SECOND};

/// Largest head and largest piece of a body that hyper buffers.
const MAX_BUFFER: usize = 64 * 1024;

/// Most headers of a request.
const MAX_HEADERS: usize = 100;

/// Most bytes that are dropped at the end of a connection.
const MAX_DISCARD: usize = 64 << 20;

/// While idle connections close, a client that has just ended its handshake has this time to send its request.
const FIRST_REQUEST: Nanos = SECOND / 2;

/// A service that responds to requests.
pub(crate) trait Service: 'static {
    /// A response body that comes in pieces.
    type Stream: http_body::Body<Data = Bytes, Error = Cut> + Unpin + 'static;

    /// Handles one request. The future and the body of the response own all that the request holds.
    fn handle<B>(
        self: &Rc<Self>,
        head: &Parts,
        body: B,
        exchange: &Exchange,
    ) -> impl Future<Output = Response<Body<Self::Stream>>>
    where
        B: http_body::Body<Data = Bytes> + Unpin;

    /// The response to a request whose handler panicked.
    fn panicked(&self, head: &Parts) -> Response<Body<Self::Stream>>;

    /// Whether connections close after their response.
    fn is_stopping(&self) -> bool;

    /// Whether idle connections close.
    fn is_closing(&self) -> bool;
}

/// The input of a pooled future.
pub(crate) type Job = (Request<Incoming>, Rc<Conn>);

/// The response of a service.
type ServiceResponse<S> = Response<Body<<S as Service>::Stream>>;

/// Serves one connection until it ends; over TLS if there are settings for it. Each request runs in a pooled future.
///
/// # Errors
/// The connection did not get through the TLS handshake.
pub(crate) async fn serve<S: Service, F: Future>(
    (tcp, peer, permit): (TcpStream, Peer, Option<ConnectionPermit>),
    tls: Option<Arc<ServerConfig>>,
    settings: &Settings,
    gateway: Rc<S>,
    futures: Rc<FuturePool<Job, ServiceResponse<S>, F>>,
) -> Result<(), HandshakeError> {
    // Until `grace`, a connection without a request stays open while idle connections close.
    let (conn, grace) = match tls {
        None => (Conn::new((ClientStream::Plain(tcp), peer, permit), None, settings), 0),
        Some(tls) => {
            // In a box, which is freed after the handshake, so that the task stays small.
            let conn = Box::pin(accept((tcp, peer, permit), tls, settings, || gateway.is_closing())).await?;
            let grace = conn.coarse_now() + FIRST_REQUEST;
            conn.deadline.nudge_at(grace);
            (conn, grace)
        }
    };
    // A silent connection costs no buffers: hyper starts with the first byte.
    let first = poll_fn(|cx| {
        conn.deadline.register(cx);
        match conn.poll_readable(cx) {
            Poll::Pending if conn.deadline.has_expired() => Poll::Ready(false),
            // A new connection is not known to be readable yet. If it has a request already, Zap responds.
            Poll::Pending if gateway.is_closing() && !conn.has_data() && conn.coarse_now() >= grace => {
                Poll::Ready(false)
            }
            readable => readable.map(|r| r.is_ok()),
        }
    });
    if !first.await {
        return Ok(());
    }
    conn.deadline.nudge_at(0);
    let service = service_fn(|request| futures.run((request, conn.clone())));
    let was_ended_by_hyper = serve_http(&conn, &gateway, service).await;
    if was_ended_by_hyper && conn.has_unread() {
        let _ = conn.deadline.limit(conn.coarse_now() + LINGER, conn.discard(MAX_DISCARD)).await;
    }
    Ok(())
}

/// Handles the requests that come to `mailbox`.
pub(crate) async fn run_requests<S: Service>(gateway: Rc<S>, mailbox: Rc<Mailbox<Job, ServiceResponse<S>>>) {
    loop {
        let (request, conn) = mailbox.next().await;
        let (head, mut body) = request.into_parts();
        let response = guarded(&gateway, &head, &mut body, &Exchange::new(conn.clone())).await;
        if conn.has_whole_chunked_body() {
            // hyper gives up a body that is left with more than one piece, and closes the connection. All pieces are
            // here: a refused request must not cost its connection.
            while let Some(Ok(_)) = body.frame().await {}
        }
        drop(body);
        header_map_pool::give_back(head.headers);
        mailbox.reply(response);
    }
}

/// Handles one request. A panic ends only this request: what it holds is dropped, and its client gets a 500.
async fn guarded<S: Service>(
    gateway: &Rc<S>,
    head: &Parts,
    body: &mut Incoming,
    exchange: &Exchange,
) -> ServiceResponse<S> {
    let mut handling = pin!(gateway.handle(head, body, exchange));
    let response = poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| handling.as_mut().poll(cx))) {
        Ok(polled) => polled.map(Some),
        Err(_) => Poll::Ready(None),
    });
    response.await.unwrap_or_else(|| gateway.panicked(head))
}

/// Runs hyper on a connection. Returns whether hyper ended it; otherwise a deadline or the client did, and nobody waits
/// for a response.
async fn serve_http<S, H>(conn: &Rc<Conn>, gateway: &Rc<S>, service: H) -> bool
where
    S: Service,
    H: HttpService<Incoming, ResBody = Body<S::Stream>, Error = Infallible>,
{
    let mut builder = http1::Builder::new();
    // No timer of hyper's: `deadline` costs less. A client that closes its side has disconnected: `is_disconnected`
    // sees it. Without `half_close` hyper would look itself, with a buffer of 8 KiB.
    builder.max_buf_size(MAX_BUFFER).max_headers(MAX_HEADERS).half_close(true);
    let mut http = pin!(builder.serve_connection(TokioIo::new(ClientIo(conn.clone())), service));
    let mut closing = false;
    poll_fn(|cx| {
        conn.deadline.register(cx);
        let responds = conn.response.idle_timeout() > 0;
        let mut ended = http.as_mut().poll(cx).is_ready();
        // At shutdown a connection closes after its response, even if the head of the response did not say so. A
        // request that has come before is still served.
        let is_last = gateway.is_closing() || responds && gateway.is_stopping();
        if is_last && !closing && !ended {
            closing = true;
            http.as_mut().graceful_shutdown();
            ended = http.as_mut().poll(cx).is_ready();
        }
        if ended {
            // Input that has come meanwhile must be known before the close.
            conn.is_disconnected(cx);
            return Poll::Ready(true);
        }
        // A deadline that no phase of a request takes: idle, a slow head, or a write that nobody reads.
        if conn.deadline.has_expired() || conn.is_disconnected(cx) {
            Poll::Ready(false)
        } else {
            Poll::Pending
        }
    })
    .await
}

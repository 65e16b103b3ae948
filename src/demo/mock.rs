//! The HTTP side of a mock provider: a thread that reads requests and sends what a function answers.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

/// Largest request body that a mock provider reads, in bytes.
const MAX_BODY: usize = 64 << 20;

/// The answer to a request. An error closes the connection without a response.
pub(super) type Answer = io::Result<Response<MockBody>>;

/// Starts a provider on its own thread, on a free port of loopback; the provider runs until the process ends. `answer`
/// gets the path and the body of each POST. Any other request gets 200, so that health checks succeed.
///
/// # Errors
/// Returns the error of the system if no port or no thread is available.
pub(super) fn start<F>(
    name: &'static str,
    answer: impl Fn(String, Value) -> F + Clone + Send + 'static,
) -> io::Result<SocketAddr>
where
    F: Future<Output = Answer> + Send + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name(format!("mock-{name}")).spawn(move || {
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            loop {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let answer = answer.clone();
                let service = service_fn(move |request: Request<Incoming>| {
                    let (answer, path) = (answer.clone(), request.uri().path().to_owned());
                    async move {
                        match read(name, request).await {
                            Ok(body) => answer(path, body).await,
                            Err(response) => Ok(*response),
                        }
                    }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
            #[allow(unreachable_code)]
            io::Result::Ok(())
        })
    })?;
    Ok(address)
}

/// Reads the body of a request.
///
/// # Errors
/// The response to a request that is no POST of JSON.
async fn read(name: &str, request: Request<Incoming>) -> Result<Value, Box<Response<MockBody>>> {
    if request.method() != Method::POST {
        return Err(Box::new(json_response(
            StatusCode::OK,
            json!({"status": "ok", "name": name}).to_string(),
        )));
    }
    let body = Limited::new(request.into_body(), MAX_BODY).collect().await.map(|b| b.to_bytes());
    body.ok().and_then(|b| serde_json::from_slice(&b).ok()).ok_or_else(|| {
        let error = json!({"error": {"message": "not JSON", "type": "invalid_request_error", "param": null, "code": null}});
        Box::new(json_response(StatusCode::BAD_REQUEST, error.to_string()))
    })
}

/// A response with a JSON text.
pub(super) fn json_response(status: StatusCode, text: impl Into<Bytes>) -> Response<MockBody> {
    let mut response = Response::new(MockBody::Full(Some(text.into())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A response that streams `events`, one each `pace`.
pub(super) fn event_response(events: Events) -> Response<MockBody> {
    let mut response = Response::new(MockBody::Events(events));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response
}

/// The body of a response.
pub(super) enum MockBody {
    /// A body that is sent piece by piece.
    Events(Events),
    /// A body that is sent at once.
    Full(Option<Bytes>),
}

/// Pieces of a body that are sent one by one, the first after the head.
pub(super) struct Events {
    ticks: Interval,
    left: std::vec::IntoIter<Bytes>,
    is_cut: bool,
}

impl Events {
    /// Sends one event each `pace`. If `is_cut` is set, the connection then closes within the body.
    pub(super) fn new(events: Vec<Bytes>, pace: Duration, is_cut: bool) -> Self {
        let mut ticks = interval_at(Instant::now() + pace, pace);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Events { ticks, left: events.into_iter(), is_cut }
    }
}

impl http_body::Body for MockBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match &mut *self {
            MockBody::Full(data) => Poll::Ready(data.take().map(|d| Ok(Frame::data(d)))),
            MockBody::Events(events) => {
                ready!(events.ticks.poll_tick(cx));
                Poll::Ready(match events.left.next() {
                    Some(event) => Some(Ok(Frame::data(event))),
                    None => events.is_cut.then(|| Err(io::ErrorKind::ConnectionAborted.into())),
                })
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            MockBody::Full(data) => SizeHint::with_exact(data.as_ref().map_or(0, |d| d.len() as u64)),
            MockBody::Events(_) => SizeHint::default(),
        }
    }
}

//! The built-in mock providers of `zap demo`.
//!
//! A mock provider answers chat completions with a text that contains its name, at once or as a stream of tokens.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
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
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::config::Config;

/// Largest request body that a mock provider reads, in bytes.
const MAX_BODY: usize = 64 << 20;

/// A mock provider.
#[derive(Clone, Debug)]
pub(crate) struct Provider {
    /// Name of the provider; every response contains it.
    pub name: &'static str,
    /// Time between two tokens of a stream, and before a response that is not a stream.
    pub pace: Duration,
}

impl Provider {
    /// Starts the provider on its own thread, on a free port of loopback; the provider runs until the process ends.
    ///
    /// # Errors
    /// Returns the error of the system if no port or no thread is available.
    pub(crate) fn start(self) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name(format!("mock-{}", self.name)).spawn(move || {
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                loop {
                    let (stream, _) = listener.accept().await?;
                    stream.set_nodelay(true)?;
                    let provider = self.clone();
                    let service = service_fn(move |request| {
                        let provider = provider.clone();
                        async move { Ok::<_, Infallible>(provider.answer(request).await) }
                    });
                    tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
                }
                #[allow(unreachable_code)]
                io::Result::Ok(())
            })
        })?;
        Ok(address)
    }

    async fn answer(self, request: Request<Incoming>) -> Response<MockBody> {
        if request.method() != Method::POST {
            return json_response(StatusCode::OK, &json!({"status": "ok", "name": self.name}));
        }
        let body = Limited::new(request.into_body(), MAX_BODY).collect().await.map(|b| b.to_bytes());
        let chat: Value = match body.ok().and_then(|b| serde_json::from_slice(&b).ok()) {
            Some(chat) => chat,
            None => {
                let error = json!({"error": {"message": "not JSON", "type": "invalid_request_error", "param": null, "code": null}});
                return json_response(StatusCode::BAD_REQUEST, &error);
            }
        };
        let model = chat["model"].as_str().unwrap_or("mock").to_owned();
        if chat["stream"] == json!(true) {
            let mut response = Response::new(MockBody::Events(Events::new(&self, model)));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
            return response;
        }
        tokio::time::sleep(self.pace).await;
        let words = self.words();
        let answer = json!({
            "id": "chatcmpl-mock", "object": "chat.completion", "created": 1_700_000_000, "model": model,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": words.concat()}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": words.len(), "total_tokens": words.len() + 1},
        });
        json_response(StatusCode::OK, &answer)
    }

    fn words(&self) -> Vec<String> {
        let text = format!(
            "Hello from the mock provider {}: every word of this line is one token of its answer.",
            self.name
        );
        text.split_inclusive(' ').map(str::to_owned).collect()
    }
}

fn json_response(status: StatusCode, value: &Value) -> Response<MockBody> {
    let mut response = Response::new(MockBody::Full(Some(Bytes::from(value.to_string()))));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

enum MockBody {
    Events(Events),
    Full(Option<Bytes>),
}

struct Events {
    ticks: Interval,
    left: std::vec::IntoIter<Bytes>,
}

impl Events {
    fn new(provider: &Provider, model: String) -> Self {
        let chunk = |delta: Value, finish: Value| {
            let chunk = json!({
                "id": "chatcmpl-mock", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": model,
                "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
            });
            Bytes::from(format!("data: {chunk}\n\n"))
        };
        let mut events = vec![chunk(json!({"role": "assistant", "content": ""}), Value::Null)];
        events.extend(provider.words().into_iter().map(|w| chunk(json!({"content": w}), Value::Null)));
        events.push(chunk(json!({}), json!("stop")));
        events.push(Bytes::from_static(b"data: [DONE]\n\n"));
        let mut ticks = interval(provider.pace);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Events { ticks, left: events.into_iter() }
    }
}

impl http_body::Body for MockBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut *self {
            MockBody::Full(data) => Poll::Ready(data.take().map(|d| Ok(Frame::data(d)))),
            MockBody::Events(events) => {
                ready!(events.ticks.poll_tick(cx));
                Poll::Ready(events.left.next().map(|e| Ok(Frame::data(e))))
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

/// Starts two mock providers and returns the configuration of `zap demo`: round robin 2:1 between them.
///
/// # Errors
/// Returns the error of the system if a provider cannot be started.
pub(crate) fn configuration(port: u16) -> io::Result<Config> {
    let fast = Provider { name: "alpha", pace: Duration::from_millis(20) }.start()?;
    let slow = Provider { name: "beta", pace: Duration::from_millis(25) }.start()?;
    let text = format!(
        "[server]\nhost = \"127.0.0.1\"\nport = {port}\n\n\
         [[backends]]\nname = \"alpha\"\nurl = \"http://{fast}\"\nweight = 2\ndefault_model = \"mock-alpha\"\n\n\
         [[backends]]\nname = \"beta\"\nurl = \"http://{slow}\"\nweight = 1\ndefault_model = \"mock-beta\"\n"
    );
    Config::parse(&text, "demo", Path::new(""), &|_| None).map_err(io::Error::other)
}

/// The text that `zap demo` prints: commands to try.
pub(crate) fn curl_lines(port: u16) -> String {
    format!(
        "Zap balances two mock providers, alpha and beta, 2:1. Try:\n\n\
         \x20 curl -s http://127.0.0.1:{port}/v1/chat/completions -d '{{\"messages\":[{{\"role\":\"user\",\"content\":\"Hi\"}}]}}'\n\
         \x20 curl -sN http://127.0.0.1:{port}/v1/chat/completions -d '{{\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Hi\"}}]}}'\n\
         \x20 curl -s http://127.0.0.1:{port}/status\n\
         \x20 curl -s http://127.0.0.1:{port}/metrics\n\n\
         Press Ctrl-C to stop.\n\n"
    )
}

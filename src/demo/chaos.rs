//! The provider of `zap demo --chaos` that fails every chat, each time in the next way of a list.
//!
//! All failures come before the first content. After that no gateway can hide a failure: the client has read a part of
//! the answer, and no other provider continues it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use serde_json::json;
use tokio::time::sleep;

use crate::demo::mock::{self, Answer, Events, MockBody, event_response, json_response};

/// The configuration of the demo, beside listener and backends. With it chaos is not ejected, each request may be
/// retried, and no wait is long. Further time limits go under `[timeouts]`.
pub(super) const SETTINGS: &str = "
[health]
interval_secs = 1
failure_threshold = 1000

[retry]
budget_percent = 100

[timeouts]
connect_ms = 500
first_byte_secs = 1
stream_idle_secs = 5
";

/// How long a stalled request stays without a response head, before the connection closes.
pub(super) const STALL: Duration = Duration::from_secs(2);

/// Time between a head and the first event, and between two events.
const PACE: Duration = Duration::from_millis(20);

/// A response header that names the failure. A client that sees it has got a response of chaos.
const X_MOCK_FAILURE: HeaderName = HeaderName::from_static("x-mock-failure");

/// A failure that the provider plays.
enum Failure {
    /// The connection closes before a response head.
    Close,
    /// The head of a JSON response; then the connection closes.
    CutBody,
    /// A whole response with this status and JSON text.
    Respond(StatusCode, &'static str),
    /// No head for [`STALL`]; then the connection closes.
    Stall,
    /// An event stream with these events; then the end, or a cut.
    Stream { events: &'static [&'static str], is_cut: bool },
}

/// A failure and its name.
type Named = (&'static str, Failure);

const ERROR: &str =
    r#"{"error":{"message":"the mock provider fails","type":"server_error","param":null,"code":502}}"#;
const NO_CHOICES: &str = r#"{"id":"chatcmpl-mock","object":"chat.completion","created":1700000000,"model":"mock-chaos","choices":[],"usage":null}"#;
const ERROR_EVENT: &str = "data: {\"error\":{\"message\":\"the mock provider fails\",\"type\":\"server_error\",\"param\":null,\"code\":502}}\n\n";
const ROLE_EVENT: &str = "data: {\"id\":\"chatcmpl-mock\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"mock-chaos\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";
const NO_CHOICES_EVENT: &str = "data: {\"id\":\"chatcmpl-mock\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"mock-chaos\",\"choices\":[]}\n\n";
const DONE_EVENT: &str = "data: [DONE]\n\n";

/// The failures of chats that are not streamed.
const PLAIN: [Named; 9] = [
    ("HTTP 500", Failure::Respond(StatusCode::INTERNAL_SERVER_ERROR, ERROR)),
    ("an error in a 200", Failure::Respond(StatusCode::OK, ERROR)),
    ("closed before the head", Failure::Close),
    ("no choices in a 200", Failure::Respond(StatusCode::OK, NO_CHOICES)),
    ("HTTP 429", Failure::Respond(StatusCode::TOO_MANY_REQUESTS, ERROR)),
    ("an empty 200", Failure::Respond(StatusCode::OK, "")),
    ("HTTP 503", Failure::Respond(StatusCode::SERVICE_UNAVAILABLE, ERROR)),
    ("closed before the body", Failure::CutBody),
    ("stalled before the head", Failure::Stall),
];

/// The failures of streamed chats.
const STREAMED: [Named; 10] = [
    ("HTTP 500", Failure::Respond(StatusCode::INTERNAL_SERVER_ERROR, ERROR)),
    ("an error event in a 200", Failure::Stream { events: &[ERROR_EVENT], is_cut: false }),
    ("closed before the head", Failure::Close),
    ("closed before the content", Failure::Stream { events: &[ROLE_EVENT], is_cut: true }),
    ("HTTP 429", Failure::Respond(StatusCode::TOO_MANY_REQUESTS, ERROR)),
    ("an empty stream", Failure::Stream { events: &[], is_cut: false }),
    ("HTTP 503", Failure::Respond(StatusCode::SERVICE_UNAVAILABLE, ERROR)),
    ("a JSON error in a 200", Failure::Respond(StatusCode::OK, ERROR)),
    ("a stream without choices", Failure::Stream { events: &[NO_CHOICES_EVENT, DONE_EVENT], is_cut: false }),
    ("stalled before the head", Failure::Stall),
];

/// Starts the provider. Requests that stall do so for `stall`.
///
/// # Errors
/// Returns the error of the system if no port or no thread is available.
pub(super) fn start(stall: Duration) -> io::Result<SocketAddr> {
    let turns = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    mock::start("chaos", move |_path, chat| {
        let failure = match chat["stream"] == json!(true) {
            true => next(&STREAMED, &turns.1),
            false => next(&PLAIN, &turns.0),
        };
        fail(failure, stall)
    })
}

fn next(failures: &'static [Named], turn: &AtomicUsize) -> &'static Named {
    &failures[turn.fetch_add(1, Ordering::Relaxed) % failures.len()]
}

async fn fail((name, failure): &'static Named, stall: Duration) -> Answer {
    let mut response = match failure {
        Failure::Close => return Err(io::ErrorKind::ConnectionAborted.into()),
        Failure::CutBody => {
            let body = Events::new(Vec::new(), PACE, true);
            let mut response = Response::new(MockBody::Events(body));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Failure::Respond(status, text) => json_response(*status, *text),
        Failure::Stall => {
            sleep(stall).await;
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        Failure::Stream { events, is_cut } => {
            let events = events.iter().map(|event| Bytes::from_static(event.as_bytes())).collect();
            event_response(Events::new(events, PACE, *is_cut))
        }
    };
    let headers = response.headers_mut();
    headers.insert(X_MOCK_FAILURE, HeaderValue::from_static(name));
    // On a connection of its own, each failure is one try; Zap repeats a request if a reused connection closes.
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    if response.status() == StatusCode::TOO_MANY_REQUESTS {
        response.headers_mut().insert("retry-after-ms", HeaderValue::from_static("50"));
    }
    Ok(response)
}

/// The names of `failures` as a list, wrapped and indented.
fn names(failures: &[Named]) -> String {
    let lines =
        failures.chunks(4).map(|line| line.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "));
    lines.collect::<Vec<_>>().join(",\n    ")
}

/// The text that `zap demo --chaos` prints: what fails, and commands to try.
pub(super) fn introduction(port: u16) -> String {
    let (plain, streamed) = (names(&PLAIN), names(&STREAMED));
    let url = format!("http://127.0.0.1:{port}");
    format!(
        "The page {url}/ shows each failure, and which provider served the request instead.\n\n\
         Zap balances three mock providers with equal weights. Alpha and beta serve every request. Chaos fails every\n\
         request, each time in the next of these ways:\n\n\
         \x20 not streamed:\n\x20   {plain}\n\
         \x20 streamed:\n\x20   {streamed}\n\n\
         Clients do not notice: Zap then asks alpha or beta. Chaos never fails after the first token, because no other\n\
         provider can continue a stream that the client has begun to read. With the default of 3 for\n\
         health.failure_threshold Zap would eject chaos at once; here chaos stays.\n\nTry:\n\n\
         \x20 for i in $(seq 50); do curl -s -o /dev/null -w '%{{http_code}} from %header{{x-zap-backend}}, x-zap-attempts: %header{{x-zap-attempts}}\\n' {url}/v1/chat/completions -d '{{\"messages\":[]}}'; done | sort | uniq -c\n\
         \x20 for i in $(seq 50); do curl -sN {url}/v1/chat/completions -d '{{\"stream\":true,\"messages\":[]}}' | grep -c '^data: .DONE.'; done | sort | uniq -c\n\
         \x20 curl -s {url}/metrics | grep -E '^zap_.*(failovers|attempts|retries).* [1-9]'\n\
         \x20 curl -s {url}/status\n\n\
         The log below names the tries of each request. Press Ctrl-C to stop.\n\n"
    )
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    use super::*;

    /// All bytes of the response to one chat.
    fn ask(address: SocketAddr, body: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        let length = body.len();
        write!(stream, "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n{body}").unwrap();
        let mut response = Vec::new();
        stream.read_to_end(&mut response).unwrap();
        String::from_utf8(response).unwrap()
    }

    #[test]
    fn each_chat_fails_in_the_next_way_and_before_any_content() {
        let chaos = start(Duration::from_millis(10)).unwrap();
        let check = |body: &str, failures: &'static [Named], wants: &[(&str, &str)]| {
            assert_eq!(failures.len(), wants.len());
            // Twice, since the list begins again after its end.
            for ((name, _), (head, end)) in failures.iter().zip(wants).chain(failures.iter().zip(wants)) {
                let response = ask(chaos, body);
                assert!(response.starts_with(head) && response.ends_with(end), "{name}: {response}");
                let is_closed = end.is_empty() && head.is_empty();
                assert_eq!(response.is_empty(), is_closed, "{name}: {response}");
                let mark = format!("\r\nx-mock-failure: {name}\r\n");
                assert!(is_closed || response.contains(&mark), "{name}: {response}");
                assert!(!response.contains("\"finish_reason\":\"stop\""), "{name}: {response}");
            }
        };
        let ok = "HTTP/1.1 200 OK\r\n";
        check(
            "{\"messages\":[]}",
            &PLAIN,
            &[
                ("HTTP/1.1 500 ", "}}"),
                (ok, "}}"),
                ("", ""),
                (ok, "\"choices\":[],\"usage\":null}"),
                ("HTTP/1.1 429 ", "}}"),
                (ok, "\r\n\r\n"),
                ("HTTP/1.1 503 ", "}}"),
                (ok, "\r\n\r\n"),
                ("", ""),
            ],
        );
        check(
            "{\"messages\":[],\"stream\":true}",
            &STREAMED,
            &[
                ("HTTP/1.1 500 ", "}}"),
                (ok, "\"code\":502}}\n\n\r\n0\r\n\r\n"),
                ("", ""),
                (ok, "\"finish_reason\":null}]}\n\n\r\n"),
                ("HTTP/1.1 429 ", "}}"),
                (ok, "\r\n\r\n0\r\n\r\n"),
                ("HTTP/1.1 503 ", "}}"),
                (ok, "\"code\":502}}"),
                (ok, "data: [DONE]\n\n\r\n0\r\n\r\n"),
                ("", ""),
            ],
        );
    }
}

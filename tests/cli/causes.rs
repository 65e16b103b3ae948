//! The cause of a failure is in the event, in `/status` and in the log line.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::{CHAT, File, OK, Running, ask, provider, respond, tls_server};

/// Starts a TLS backend with a certificate for `name`. Returns its URL and the file of the certificate.
fn tls(name: &str) -> (String, File) {
    let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
    let (address, pem) = tls_server::server_with(params);
    (format!("https://localhost:{}", address.port()), File(pem))
}

fn url(address: SocketAddr) -> String {
    format!("http://{address}")
}

/// Starts Zap with backend `a` at `url` and a working backend `b` of lower priority.
fn start(url: &str, more: &str, failure_threshold: u32) -> Running {
    let b = provider(OK, Duration::ZERO);
    Running::with(&format!(
        "[server]\nport = 0\nworkers = 1\n[timeouts]\nconnect_ms = 500\n\
         [health]\ninterval_secs = 1\ntimeout_secs = 5\nfailure_threshold = {failure_threshold}\n\
         [[backends]]\nname = \"a\"\nurl = \"{url}\"\nweight = 1\n{more}\n\
         [[backends]]\nname = \"b\"\nurl = \"http://{b}\"\nweight = 1\npriority = 1\n"
    ))
}

/// Sends a chat and returns its log line.
fn chat(zap: &Running) -> Value {
    assert!(ask(zap.address, "POST /chat HTTP/1.1\r\nx-request-id: chat-1", CHAT).ends_with("ok"));
    serde_json::from_str(&zap.line("chat-1")).unwrap()
}

/// The `last_error` of backend `a` in `/status`.
fn last_error(zap: &Running) -> Value {
    let status = ask(zap.address, "GET /status HTTP/1.1", "");
    let status: Value = serde_json::from_str(status.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    status["backends"][0]["last_error"].clone()
}

/// The URL of a backend, its other settings, the expected error code (any if empty) and the accepted causes.
type Case = (String, String, &'static str, &'static [&'static str]);

/// Backends that cannot be reached, and the files that their settings name.
fn unreachable() -> ([Case; 4], [File; 2]) {
    const LOOKUP: &[&str] =
        &["no such host", "the name server does not answer", "connect timed out after 0.5 s"];
    let (untrusted, unused) = tls("localhost");
    let (wrong_name, certificate) = tls("other.test");
    let trusting = format!("ca_file = \"{}\"", certificate.path());
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let none = String::new;
    let cases: [Case; 4] = [
        (untrusted, none(), "upstream_tls_error", &["certificate: unknown issuer"]),
        (wrong_name, trusting, "upstream_tls_error", &["certificate: not valid for this name"]),
        ("http://nowhere.invalid:8000".to_owned(), none(), "", LOOKUP),
        (url(closed), none(), "upstream_unreachable", &["connection refused"]),
    ];
    (cases, [unused, certificate])
}

/// Whether `cause` is one of `causes`.
fn is_one(cause: &Value, causes: &[&str]) -> bool {
    causes.iter().any(|accepted| cause == accepted)
}

#[test]
fn the_cause_of_a_failed_check_is_in_the_event_in_status_and_in_the_log_line() {
    const INVALID_RESPONSE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\n";
    let (cases, _files) = unreachable();
    let page = |response| respond(move |is_check| if is_check { response } else { OK });
    let sick = page("HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n");
    let more: [Case; 2] = [
        (
            // The query may hold a key, so the cause does not show it.
            format!("{}/base", url(sick)),
            "health_path = \"/ping?key=sk-secret\"".to_owned(),
            "upstream_error",
            &["HTTP 503 to GET /base/ping"],
        ),
        (
            url(page(INVALID_RESPONSE)),
            String::new(),
            "upstream_invalid_response",
            &["not HTTP: two content-lengths"],
        ),
    ];
    for (url, more, code, causes) in cases.into_iter().chain(more) {
        let zap = start(&url, &more, 1);
        let event = zap.line("backend_down");
        let cause = event.split("backend a is down after 1 failure: health check: ").nth(1);
        assert!(is_one(&cause.into(), causes), "{event}");
        let error = last_error(&zap);
        assert!(is_one(&error["cause"], causes), "{error}");
        assert!(code.is_empty() || error["code"] == code, "{error}");
        let passed = &chat(&zap)["passed"][0];
        assert_eq!((&passed[0], &passed[1]), (&"a".into(), &"ejected".into()));
        assert!(is_one(&passed[2], causes), "{passed}");
    }
}

#[test]
fn the_cause_of_a_failed_try_is_in_the_log_line_and_in_status() {
    const INVALID_RESPONSE: &str = "HTTP/1.1 200 OK\r\na : b\r\n\r\n";
    let (cases, _files) = unreachable();
    let page = |response| respond(move |is_check| if is_check { OK } else { response });
    let more: [Case; 4] = [
        (
            url(page("HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n")),
            String::new(),
            "upstream_error",
            &["HTTP 503"],
        ),
        (
            url(page(INVALID_RESPONSE)),
            String::new(),
            "upstream_invalid_response",
            &["not HTTP: a header is malformed"],
        ),
        (url(page("")), String::new(), "upstream_unreachable", &["connection closed before a response"]),
        (
            url(page("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")),
            String::new(),
            "stream_interrupted",
            &["connection closed inside the body"],
        ),
    ];
    for (url, more, code, causes) in cases.into_iter().chain(more) {
        let zap = start(&url, &more, 1_000);
        let line = chat(&zap);
        let (attempts, error) = (&line["attempts"], last_error(&zap));
        assert!(attempts[0][0] == "a" && is_one(&attempts[0][2], causes), "{line}");
        assert!(code.is_empty() || attempts[0][1] == code, "{line}");
        assert_eq!(told(&attempts[1]), [Value::from("b"), "200".into(), Value::Null], "{line}");
        assert_eq!((&error["code"], &error["cause"]), (&attempts[0][1], &attempts[0][2]));
    }
}

/// The backend, the outcome and the cause of a try in a log line; behind them stands the time that it took.
fn told(attempt: &Value) -> &[Value] {
    let [told @ .., took] = &attempt.as_array().unwrap()[..] else { panic!("no time: {attempt}") };
    assert!(told.len() == 3 && took.as_f64().is_some_and(|ms| (0.0..10_000.0).contains(&ms)), "{attempt}");
    told
}

#[test]
fn events_tell_whether_a_request_or_a_check_changed_the_state() {
    // What a backend answers counts for the model, and a request brings it back.
    let has_failed = AtomicBool::new(false);
    let a = respond(move |is_check| match is_check || has_failed.swap(true, Ordering::SeqCst) {
        true => OK,
        false => "HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n",
    });
    let zap = start(&url(a), "", 1);
    assert_eq!(told(&chat(&zap)["attempts"][0]), ["a", "upstream_error", "HTTP 500"]);
    let down = "backend a is down for requests without a model after 1 failure: request: HTTP 500";
    assert!(zap.line("backend_down").ends_with(down));
    let comes_back = || ask(zap.address, "POST /chat HTTP/1.1", CHAT).contains("x-zap-backend: a\r\n");
    crate::faults::wait_until("a request brings the model back", comes_back);
    assert!(zap.line("backend_up").ends_with("backend a serves requests without a model again"));
    // What the transport says counts for the backend, and a check brings it back.
    let a = respond(|is_check| if is_check { OK } else { "" });
    let zap = start(&url(a), "", 1);
    assert_eq!(chat(&zap)["attempts"][0][2], "connection closed before a response");
    let down = "backend a is down after 1 failure: request: connection closed before a response";
    assert!(zap.line("backend_down").ends_with(down));
    assert!(zap.line("backend_up").ends_with("backend a is up again: health check: HTTP 200"));
}

#[test]
fn the_line_of_a_stream_that_ends_badly_tells_why() {
    for (events, attempt, end) in [
        ("", ["a", "stream_interrupted", "connection closed inside the body"], "upstream_error"),
        (
            "data: {\"error\":{\"message\":\"m\"}}\n\n",
            ["a", "upstream_error_event", "an error event within the stream"],
            "upstream_error_event",
        ),
    ] {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        let body = format!("data: one\n\n{events}");
        let response: &str = format!("{head}{:x}\r\n{body}\r\n", body.len()).leak();
        let zap = Running::with(&crate::config(provider(response, Duration::ZERO), ""));
        ask(
            zap.address,
            "POST /chat HTTP/1.1\r\nx-request-id: broken-1",
            "{\"stream\":true,\"messages\":[]}",
        );
        let line: Value = serde_json::from_str(&zap.line("broken-1")).unwrap();
        assert_eq!(line["attempts"].as_array().map(Vec::len), Some(1), "{line}");
        assert_eq!(told(&line["attempts"][0]), attempt, "{line}");
        assert_eq!((&line["status"], &line["end"]), (&200.into(), &end.into()), "{line}");
    }
}

#[test]
fn the_first_check_after_a_start_or_a_reload_tells_at_once_that_it_failed() {
    let checks = Arc::new(AtomicUsize::new(0));
    let seen = checks.clone();
    let a = respond(move |is_check| {
        seen.fetch_add(usize::from(is_check), Ordering::SeqCst);
        "HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n"
    });
    let zap = start(&url(a), "", 1_000);
    let line = " ms: health check: HTTP 503 to GET /health";
    let told = zap.line("the first check of backend a");
    assert!(told.contains("the first check of backend a failed after ") && told.ends_with(line), "{told}");
    crate::faults::wait_until("a third check", || checks.load(Ordering::SeqCst) >= 3);
    let told = zap.log.lock().unwrap().iter().filter(|logged| logged.ends_with(line)).count();
    assert_eq!(told, 1, "later checks are counted, not told");
}

//! The tries in the log line of a request: each with its outcome, its cause and its time.

use std::time::Duration;

use serde_json::Value;

use crate::support::provider::{After, reply, wait_closed};
use crate::support::{CHAT, Provider, Zap, eventually};

/// Backend, outcome and cause of each try of a line, and their times in ms.
fn attempts(line: &Value) -> (Vec<[Value; 3]>, Vec<f64>) {
    let attempts = line["attempts"].as_array().unwrap().iter();
    attempts.map(|a| ([0, 1, 2].map(|i| a[i].clone()), a[3].as_f64().unwrap())).unzip()
}

fn outcome(backend: &str, outcome: &str, cause: Option<&str>) -> [Value; 3] {
    [backend.into(), outcome.into(), cause.into()]
}

#[test]
fn each_try_has_its_own_time() {
    let slow = |wait, status| {
        Provider::start(move |_, stream| {
            std::thread::sleep(Duration::from_millis(wait));
            reply(stream, status, "", b"ok");
            After::Keep
        })
    };
    let (a, b) = (slow(80, 500), slow(40, 200));
    let backends = [a.backend("a", ""), b.backend("b", "priority = 1\nmodels = { m = \"own\" }")];
    let zap = Zap::with_log("", &backends);
    let body = "{\"messages\":[],\"model\":\"m\"}";
    assert_eq!(zap.chat(body).status, 200);
    let line = &zap.lines(1)[0];
    let (tries, times) = attempts(line);
    assert_eq!(tries, [outcome("a", "upstream_error", Some("HTTP 500")), outcome("b", "200", None)]);
    let all = line["ttfb_ms"].as_f64().unwrap();
    assert!(times[0] >= 80.0 && times[1] >= 40.0 && times.iter().sum::<f64>() <= all, "{line}");
    assert_eq!(line["upstream_model"], "own");
}

#[test]
fn a_response_that_is_kept_has_the_time_and_the_model_of_its_own_try() {
    let a = Provider::start(|_, stream| {
        std::thread::sleep(Duration::from_millis(60));
        reply(stream, 503, "", b"busy");
        After::Keep
    });
    let retry = "[retry]\nmax_retries = 1\nbase_delay_ms = 200\nmax_delay_ms = 200\n";
    let zap = Zap::with_log(retry, &[a.backend("a", "default_model = \"own\"")]);
    assert_eq!(zap.chat(CHAT).status, 503);
    let line = &zap.lines(1)[0];
    let (tries, times) = attempts(line);
    assert_eq!(tries, [outcome("a", "upstream_error", Some("HTTP 503")), outcome("a", "503", None)]);
    assert!(times.iter().all(|ms| (60.0..190.0).contains(ms)), "the backoff is no part of a try: {line}");
    assert_eq!((&line["upstream_model"], &line["level"]), (&"own".into(), &"warn".into()));
}

#[test]
fn a_try_during_which_the_client_leaves_is_in_the_line() {
    let a = Provider::start(|_, stream| {
        wait_closed(stream);
        After::Close
    });
    let zap = Zap::with_log("", &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    eventually("the backend has the request", || a.count() == 1);
    drop(client);
    let line = &zap.lines(1)[0];
    assert_eq!(attempts(line).0, [outcome("a", "client_gone", None)]);
    assert_eq!(
        (&line["status"], &line["backend"], &line["level"]),
        (&499.into(), &Value::Null, &"info".into())
    );
}

#[cfg(debug_assertions)]
#[test]
fn a_panic_during_a_try_is_in_the_line() {
    let a = Provider::named("a");
    let zap = Zap::with_log("", &[a.backend("a", "")]);
    zap::internals::failpoint::arm_panic("try", http::HeaderValue::from_static("bug-log"));
    assert_eq!(zap.client().chat("x-request-id: bug-log\r\n", CHAT).status, 500);
    let line = &zap.lines(1)[0];
    assert_eq!(attempts(line).0, [outcome("a", "internal_error", None)]);
    assert_eq!((&line["code"], &line["level"]), (&"internal_error".into(), &"warn".into()));
    let log = zap.log();
    assert!(log.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{log}");
}

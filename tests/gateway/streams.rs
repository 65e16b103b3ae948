//! Streamed responses, complete and interrupted ones.

use std::io::Write;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::provider::{After, Gate, chunk, end_chunks, reply, start_events, wait_closed};
use crate::support::{Provider, STREAM, Zap, eventually};

const DONE: &str = "data: [DONE]\n\n";

/// A complete stream.
const ANSWER: &str = "data: one\n\ndata: [DONE]\n\n";

/// A provider that sends these pieces as chunks and then calls `last`.
fn pieces(all: &'static [&'static str], last: fn(&mut std::net::TcpStream) -> After) -> Provider {
    Provider::start(move |_, stream| {
        start_events(stream);
        all.iter().for_each(|p| assert!(chunk(stream, p)));
        last(stream)
    })
}

/// The number of failed tries of all kinds.
fn failures(zap: &Zap) -> f64 {
    let all = zap.metrics();
    all.iter().filter(|(series, _)| series.starts_with("zap_upstream_errors_total")).map(|(_, n)| *n).sum()
}

fn whole(stream: &mut std::net::TcpStream) -> After {
    end_chunks(stream);
    After::Keep
}

fn cut(_: &mut std::net::TcpStream) -> After {
    After::Close
}

fn reset(stream: &mut std::net::TcpStream) -> After {
    socket2::SockRef::from(&*stream).set_linger(Some(Duration::ZERO)).unwrap();
    // Give Zap time to read the bytes sent before the reset.
    std::thread::sleep(Duration::from_millis(100));
    After::Close
}

#[test]
fn every_token_arrives_before_the_next_is_sent() {
    let (sender, receiver) = sync_channel::<&'static str>(0);
    let receiver = Arc::new(Mutex::new(receiver));
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        while let Ok(piece) = receiver.lock().unwrap().recv() {
            if piece.is_empty() {
                break;
            }
            chunk(stream, piece);
        }
        whole(stream)
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", STREAM);
    eventually("the backend has the request", || a.count() == 1);
    std::thread::sleep(Duration::from_millis(50));
    assert!(client.is_quiet(), "the head waits for the first event");
    sender.send("data: one\n\n").unwrap();
    let head = client.head();
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
    assert_eq!(client.chunk().unwrap(), b"data: one\n\n");
    // An unfinished event waits for its end, since no parser can use it.
    for (piece, out) in [
        ("data: two\n\n", "data: two\n\n"),
        (": comment\n\n", ": comment\n\n"),
        ("da", ""),
        ("ta: three\r\n\r\n", "data: three\r\n\r\n"),
        ("data: four\n\ndata: f", "data: four\n\n"),
        ("ive\n\n", "data: five\n\n"),
        (DONE, DONE),
    ] {
        sender.send(piece).unwrap();
        if out.is_empty() {
            std::thread::sleep(Duration::from_millis(50));
        } else {
            assert_eq!(client.chunk().unwrap(), out.as_bytes());
        }
        assert!(client.is_quiet());
    }
    sender.send("").unwrap();
    assert_eq!(client.chunk().unwrap(), b"");
    zap.wait_until_idle();
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 0.0);
    // The connection stays usable.
    client.post("/chat", "", STREAM);
    sender.send(ANSWER).unwrap();
    sender.send("").unwrap();
    assert!(client.response().whole);
}

#[test]
fn a_proxy_in_front_is_told_not_to_buffer_a_stream() {
    for (headers, buffering, cache) in [
        ("content-type: text/event-stream\r\n", Some("no"), Some("no-cache")),
        (
            "content-type: text/event-stream; charset=utf-8\r\nx-accel-buffering: yes\r\n",
            Some("yes"),
            Some("no-cache"),
        ),
        ("content-type: text/event-stream\r\ncache-control: no-store\r\n", Some("no"), Some("no-store")),
        // An event stream is known by its beginning, whatever its label says.
        ("content-type: text/plain\r\n", Some("no"), Some("no-cache")),
        ("content-type: application/json\r\n", None, None),
    ] {
        let body = if headers.contains("json") { "{}" } else { ANSWER };
        let a = Provider::fixed(200, headers, body);
        let answer = Zap::with("", &[a.backend("a", "")]).chat(STREAM);
        assert_eq!(answer.text(), body, "{headers}");
        let said = ["x-accel-buffering", "cache-control"].map(|name| answer.header(name));
        assert_eq!(said, [buffering, cache], "{headers}");
        let names = answer.headers.iter().filter(|(n, _)| n == "cache-control" || n == "x-accel-buffering");
        assert!(names.count() <= 2, "no header is repeated");
    }
}

#[test]
fn a_stream_cut_between_events_ends_with_an_error_event_and_an_abort() {
    let a = pieces(&["data: one\n\n", "data: two\n\n"], cut);
    let zap = Zap::with("", &[a.backend("a", "")]);
    let answer = zap.chat(STREAM);
    let rest =
        answer.text().strip_prefix("data: one\n\ndata: two\n\n").expect("the received events are delivered");
    let event =
        rest.strip_prefix("data: ").and_then(|r| r.strip_suffix("\n\n")).expect("exactly one event follows");
    let error: serde_json::Value = serde_json::from_str(event).unwrap();
    assert_eq!(
        (&error["error"]["code"], &error["error"]["type"]),
        (&"stream_interrupted".into(), &"upstream_error".into())
    );
    assert!(!answer.whole && !answer.text().contains("[DONE]"));
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 1.0);
    assert_eq!(zap.metric("zap_client_disconnects_total{phase=\"streaming\"}"), 0.0);
    zap.wait_until_idle();
}

/// The `response.failed` event that ends an interrupted stream of `/v1/responses`.
fn failed_response(text: &str) -> serde_json::Value {
    let at = text
        .find("event: response.failed\ndata: ")
        .unwrap_or_else(|| panic!("no response.failed event: {text}"));
    let event = text[at..].strip_prefix("event: response.failed\ndata: ").unwrap();
    serde_json::from_str(event.strip_suffix("\n\n").unwrap()).unwrap()
}

#[test]
fn a_stream_after_response_completed_is_complete_even_if_its_connection_closes() {
    let events = "event: response.created\ndata: {\"type\":\"response.created\"}\n\nevent: response.completed\ndata: {\"type\":\"response.completed\"}\n\n";
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        chunk(stream, events);
        // Close without the last chunk.
        After::Close
    });
    let settings = "[health]\nfailure_threshold = 1\ninterval_secs = 600";
    let zap = Zap::with(settings, &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/v1/responses", "", r#"{"stream":true,"input":"hi"}"#);
    let answer = client.response();
    assert_eq!((answer.text(), answer.whole), (events, true));
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 0.0);
    assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 1.0);
    zap.wait_until_idle();
}

#[test]
fn an_interrupted_v1_responses_stream_ends_with_response_failed() {
    let created = "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"id\":\"resp_\\u0031\",\"object\":\"response\",\"created_at\":1741290958,\"metadata\":{\"model\":\"no\"},\"model\":\"gpt\"},\"sequence_number\":0}\n\n";
    let delta = "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"sequence_number\": 41,\"delta\":\"\\\"sequence_number\\\":7\"}\n\n";
    for (pieces, want) in [
        (vec![created, delta], (42, "resp_1", 1_741_290_958, "gpt")),
        (
            vec![&created[..100], &created[100..], &delta[..70], &delta[70..], "event: re"],
            (42, "resp_1", 1_741_290_958, "gpt"),
        ),
        (vec!["event: response.queued\ndata: {}\n\n"], (0, "resp_id-1", 0, "")),
    ] {
        let sent = pieces.concat();
        let a = Provider::start(move |_, stream| {
            start_events(stream);
            pieces.iter().for_each(|p| assert!(chunk(stream, p)));
            After::Close
        });
        let zap = Zap::with("", &[a.backend("a", "")]);
        let mut client = zap.client();
        client.post("/v1/responses", "x-request-id: id-1\r\n", r#"{"stream":true,"input":"hi"}"#);
        let answer = client.response();
        assert!(answer.whole, "the body must end cleanly, or Codex drops the event");
        assert!(answer.text().starts_with(&sent), "{}", answer.text());
        let event = failed_response(answer.text());
        let (number, id, created_at, model) = want;
        assert_eq!(event["type"], "response.failed");
        assert_eq!(event["sequence_number"], number);
        let response = serde_json::json!({
            "id": id, "object": "response", "created_at": created_at, "model": model, "output": [],
            "status": "failed", "error": { "code": "stream_interrupted", "message": event["error"]["message"] },
        });
        assert_eq!(event["response"], response);
        assert_eq!(
            (&event["error"]["code"], &event["error"]["type"]),
            (&"stream_interrupted".into(), &"upstream_error".into())
        );
        assert!(event["error"]["param"].is_null() && event["error"]["message"].is_string());
        assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 1.0);
        zap.wait_until_idle();
        // The connection stays usable.
        client.post("/v1/responses", "", r#"{"stream":true,"input":"hi"}"#);
        assert_eq!(client.response().status, 200);
    }
}

#[test]
fn of_a_stream_cut_inside_an_event_the_unfinished_event_is_held_back() {
    for all in [&["data: one\n\ndata: {\"tw"][..], &["data: one\n\n", "data: {\"tw", "o\"}\n"]] {
        let a = pieces(Vec::leak(all.to_vec()), cut);
        let zap = Zap::with("", &[a.backend("a", "")]);
        let answer = zap.chat(STREAM);
        let rest = answer.text().strip_prefix("data: one\n\n").expect("the whole event is delivered");
        assert!(rest.starts_with("data: {\"error\":") && rest.matches("data:").count() == 1, "{rest}");
        assert!(!answer.whole);
    }
    // At a clean end the rest goes out.
    let a = pieces(&["data: one\n\ndata: [DO", "NE]\n"], whole);
    let zap = Zap::with("", &[a.backend("a", "")]);
    let answer = zap.chat(STREAM);
    assert_eq!((answer.text(), answer.whole), ("data: one\n\ndata: [DONE]\n", true));
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 0.0);
}

#[test]
fn an_unfinished_event_that_is_too_long_to_be_held_goes_out_and_its_line_ends_before_the_error_event() {
    let long = format!("data: {}", "x".repeat(100_000));
    let sent = long.clone();
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        chunk(stream, &sent);
        After::Close
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    let answer = zap.chat(STREAM);
    let rest = answer.text().strip_prefix(&*long).expect("the begun event is delivered");
    assert!(rest.starts_with("\n\ndata: {\"error\":") && !answer.whole, "{rest}");
}

#[test]
fn a_stream_cut_after_done_is_not_interrupted() {
    const COMMENT: &str = ": a comment that is longer than what is kept of a stream\n\n";
    for all in [
        &["data: one\n\ndata: [DONE]\n\n: a comment that is longer than what is kept of a stream\n\n"][..],
        &["data: one\n\n", DONE, COMMENT],
        &["data: one\n\nda", "ta: [DO", "NE]", "\n\n", COMMENT],
        &["data: one\r\n\r\ndata:[DONE]\r\n\r\n", DONE, "event: usage\ndata: {\"usage\":null,\"x\":[]}\n\n"],
    ] {
        for (last, is_whole) in [(whole as fn(&mut _) -> _, true), (cut, false), (reset, false)] {
            let a = pieces(Vec::leak(all.to_vec()), last);
            let zap = Zap::with("[health]\nfailure_threshold = 1", &[a.backend("a", "")]);
            let answer = zap.chat(STREAM);
            assert_eq!((answer.text(), answer.whole), (&*all.concat(), true), "{all:?}");
            assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 0.0, "{all:?}");
            assert_eq!(failures(&zap), 0.0, "{all:?}");
            assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 1.0);
            let idle = zap.metric("zap_upstream_connections{backend=\"a\",state=\"idle\"}");
            assert_eq!(idle == 1.0, is_whole, "{all:?}");
            zap.wait_until_idle();
        }
    }
    // `[DONE]` inside a value or a comment does not end the stream.
    let a = pieces(&["data: {\"delta\":\"data: [DONE]\"}\n\n: data: [DONE]\n\n"], cut);
    let zap = Zap::with("", &[a.backend("a", "")]);
    assert!(zap.chat(STREAM).text().contains("stream_interrupted"));
}

#[test]
fn a_stream_that_stalls_after_done_is_complete() {
    let a = Provider::start(|_, stream| {
        start_events(stream);
        chunk(stream, ANSWER);
        wait_closed(stream);
        After::Close
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    let since = Instant::now();
    let answer = zap.chat(STREAM);
    assert_eq!((answer.text(), answer.whole), (ANSWER, true));
    // The clock of this limit has steps of 100 ms, longer on a busy machine, and may be one step late.
    let took = since.elapsed();
    assert!(took > Duration::from_millis(700) && took < Duration::from_secs(2), "{took:?}");
    eventually("the upstream connection is closed", || a.connections() == 0);
    assert_eq!(failures(&zap), 0.0);
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 0.0);
    // A body shorter than its content-length cannot end cleanly, but after `[DONE]` it is not an upstream error.
    let b = Provider::start(|_, stream| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 500\r\n\r\n";
        let _ = stream.write_all([head, ANSWER].concat().as_bytes());
        After::Close
    });
    let zap = Zap::with("", &[b.backend("b", "")]);
    let answer = zap.chat(STREAM);
    assert_eq!((answer.text(), answer.whole), (ANSWER, false));
    assert_eq!(failures(&zap), 0.0);
    zap.wait_until_idle();
}

#[test]
fn a_stream_with_invalid_framing_ends_with_an_error_event() {
    let a = Provider::start(|_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        let _ = stream.write_all(b"nonsense\r\n");
        After::Close
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    let answer = zap.chat(STREAM);
    assert!(
        answer.text().starts_with("data: one\n\ndata: {\"error\":") && !answer.whole,
        "{}",
        answer.text()
    );
}

#[test]
fn a_stream_that_stalls_ends_with_an_error_event_and_closes_the_upstream_connection() {
    let a = Provider::start(|_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        wait_closed(stream);
        After::Close
    });
    let zap = Zap::with("[timeouts]\nstream_idle_secs = 1", &[a.backend("a", "")]);
    let answer = zap.chat(STREAM);
    assert!(answer.text().contains("stream_interrupted") && !answer.whole);
    eventually("the upstream connection is closed", || a.connections() == 0);
    assert_eq!(zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"upstream_timeout\"}"), 1.0);
    zap.wait_until_idle();
}

#[test]
fn a_clean_end_without_done_is_a_cut_unless_the_answer_has_a_finish_reason() {
    let a = pieces(&["data: one\n\n"], whole);
    let zap = Zap::with("", &[a.backend("a", "")]);
    let answer = zap.chat(STREAM);
    assert!(
        answer.text().starts_with("data: one\n\ndata: {\"error\":") && !answer.whole,
        "{}",
        answer.text()
    );
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 1.0);
    assert_eq!(zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"stream_interrupted\"}"), 1.0);

    // Some providers never send `[DONE]`.
    const FINISH: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
    let a = pieces(&["data: one\n\n", FINISH], whole);
    let zap = Zap::with("", &[a.backend("a", "")]);
    let answer = zap.chat(STREAM);
    assert_eq!((answer.text(), answer.whole), (&*["data: one\n\n", FINISH].concat(), true));
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 0.0);
}

#[test]
fn a_stream_without_content_is_no_answer_even_with_done() {
    const ROLE: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n";
    for all in [&[][..], &[DONE], &[": hello\n\n", ROLE, DONE], &[ROLE]] {
        let (a, b) = (pieces(Vec::leak(all.to_vec()), whole), Provider::named("b"));
        let zap = Zap::with("", &[a.backend("a", "weight = 9"), b.backend("b", "")]);
        let answer = zap.chat(STREAM);
        assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("b", Some("2")), "{all:?}");
        assert_eq!(zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"upstream_empty\"}"), 1.0);
        zap.wait_until_idle();
    }
    for all in [&[][..], &[DONE]] {
        let a = pieces(Vec::leak(all.to_vec()), whole);
        let zap = Zap::with("[retry]\nbase_delay_ms = 1\nmax_delay_ms = 1", &[a.backend("a", "")]);
        let answer = zap.chat(STREAM);
        assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_empty"), "{all:?}");
        assert_eq!(answer.header("x-zap-attempts"), Some("3"));
        zap.wait_until_idle();
    }
}

#[test]
fn streams_that_cannot_hold_an_event_are_aborted() {
    for head in [
        "content-type: text/event-stream\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked",
        "content-type: text/event-stream\r\ncontent-length: 500",
        "content-type: application/json\r\ncontent-length: 500",
        "content-type: application/json\r\ntransfer-encoding: chunked",
    ] {
        let chunked = head.contains("chunked");
        // Of a readable stream only whole events go out.
        let sent = if head.contains("stream\r\ncontent-length") { "data: one\n\n" } else { "some" };
        let a = Provider::start(move |_, stream| {
            let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n").as_bytes());
            let _ = if chunked { chunk(stream, sent) } else { stream.write_all(sent.as_bytes()).is_ok() };
            After::Close
        });
        let zap = Zap::with("", &[a.backend("a", "")]);
        let answer = zap.chat(STREAM);
        assert_eq!((answer.status, answer.text(), answer.whole), (200, sent, false), "{head}");
        zap.wait_until_idle();
    }
}

#[test]
fn a_silent_stream_gets_comments_between_its_events() {
    let gate = Gate::default();
    let held = gate.clone();
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\ndata: tw");
        held.pass();
        chunk(stream, "o\n\n");
        chunk(stream, DONE);
        whole(stream)
    });
    let zap = Zap::with("[stream]\nheartbeat_secs = 1", &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", STREAM);
    client.head();
    for want in ["data: one\n\n", ": ping\n\n", ": ping\n\n"] {
        assert_eq!(client.chunk().unwrap(), want.as_bytes(), "half an event is held back");
    }
    gate.open(1);
    let mut rest = Vec::new();
    while let Some(piece) = client.chunk().filter(|piece| !piece.is_empty()) {
        rest.extend_from_slice(&piece);
    }
    assert_eq!(String::from_utf8(rest).unwrap(), format!("data: two\n\n{DONE}"));
    zap.wait_until_idle();
}

#[test]
fn comments_do_not_hide_a_backend_that_is_silent_for_too_long() {
    let a = Provider::start(|_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        wait_closed(stream);
        After::Close
    });
    let settings = "[stream]\nheartbeat_secs = 1\n[timeouts]\nstream_idle_secs = 3";
    let answer = Zap::with(settings, &[a.backend("a", "")]).chat(STREAM);
    let text = answer.text();
    assert!(text.starts_with("data: one\n\n: ping\n\n: ping\n\n"), "{text}");
    assert!(
        text.contains("stream_interrupted") && !answer.whole && text.matches("ping").count() <= 3,
        "{text}"
    );
}

#[test]
fn a_heartbeat_that_is_due_releases_what_is_held() {
    let (gate, b) = (Gate::default(), Provider::named("b"));
    let held = gate.clone();
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        chunk(stream, ": thinking\n\n");
        held.pass();
        chunk(stream, DONE);
        whole(stream)
    });
    let zap =
        Zap::with("[stream]\nheartbeat_secs = 1", &[a.backend("a", ""), b.backend("b", "priority = 1")]);
    let mut client = zap.client();
    client.post("/chat", "", STREAM);
    assert_eq!(client.head().header("x-zap-backend"), Some("a"));
    assert_eq!(client.chunk().unwrap(), b": thinking\n\n");
    assert_eq!(client.chunk().unwrap(), b": ping\n\n");
    gate.open(1);
    while client.chunk().is_some_and(|piece| !piece.is_empty()) {}
    assert_eq!(b.count(), 0, "after the release there is no other try");
}

#[test]
fn a_content_encoding_of_identity_is_treated_as_none() {
    for (value, event) in [
        ("identity", true),
        ("None", true),
        ("", true),
        ("identity, identity", true),
        ("gzip", false),
        ("identity, br", false),
    ] {
        let a = Provider::start(move |_, stream| {
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: {value}\r\n"
            );
            let _ = stream.write_all(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes());
            chunk(stream, "data: one\n\n");
            After::Close
        });
        let answer = Zap::with("", &[a.backend("a", "")]).chat(STREAM);
        assert_eq!(answer.text().contains("stream_interrupted"), event, "{value:?}: {}", answer.text());
        assert_eq!(
            answer.header("content-encoding"),
            Some(value),
            "the content-encoding header passes unchanged"
        );
    }
}

#[test]
fn an_interrupted_http_1_0_response_ends_with_a_reset() {
    let a = Provider::start(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nsome\r\n");
        After::Close
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    let mut client = zap.client();
    client.send(format!("POST /chat HTTP/1.0\r\ncontent-length: {}\r\n\r\n{STREAM}", STREAM.len()));
    let (_, clean) = client.rest();
    assert!(!clean, "a truncated response must not look complete");
}

#[test]
fn a_response_that_is_not_a_stream_passes_on_a_stream_request() {
    let a = Provider::fixed(400, "content-type: application/json\r\n", "{\"error\":{}}");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let answer = zap.chat(STREAM);
    assert_eq!((answer.status, answer.text(), answer.whole), (400, "{\"error\":{}}", true));
}

#[test]
fn a_slow_reader_slows_the_upstream_down() {
    let sent = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (count, gate) = (sent.clone(), Gate::default());
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        let piece = format!("data: {}\n\n", "x".repeat(16 * 1024 - 8));
        for _ in 0..4096 {
            if !chunk(stream, &piece) {
                return After::Close;
            }
            count.fetch_add(piece.len(), std::sync::atomic::Ordering::SeqCst);
        }
        chunk(stream, DONE);
        whole(stream)
    });
    drop(gate);
    let zap = Zap::with("", &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", STREAM);
    client.head();
    // The client reads nothing, so the upstream must stop far below its 64 MiB.
    let mut last = usize::MAX;
    eventually("the upstream stops sending", || {
        std::thread::sleep(Duration::from_millis(50));
        let now = sent.load(std::sync::atomic::Ordering::SeqCst);
        std::mem::replace(&mut last, now) == now && now > 0
    });
    assert!(last < 32 << 20, "{last} bytes were read from the upstream");
    let mut total = 0;
    while let Some(piece) = client.chunk().filter(|p| !p.is_empty()) {
        total += piece.len();
    }
    assert_eq!(total, (64 << 20) + DONE.len());
    zap.wait_until_idle();
}

#[test]
fn a_client_that_closes_behind_the_terminal_event_has_a_complete_answer() {
    let chat = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n";
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        [chat, DONE].iter().for_each(|event| assert!(chunk(stream, event)));
        wait_closed(stream);
        After::Close
    });
    let zap = Zap::with_log("[health]\nfailure_threshold = 1\n", &[a.backend("a", "")]);
    for _ in 0..3 {
        let mut client = zap.client();
        client.post("/chat", "", STREAM);
        client.head();
        let mut got = Vec::new();
        while !got.ends_with(DONE.as_bytes()) {
            got.extend_from_slice(&client.chunk().unwrap());
        }
        assert_eq!(got, [chat, DONE].concat().as_bytes());
        drop(client);
        eventually("the upstream connection is closed", || a.connections() == 0);
    }
    for line in zap.lines(3) {
        assert_eq!((&line["end"], &line["status"]), (&"complete".into(), &200.into()), "{line}");
    }
    let metrics = zap.metrics();
    let left = metrics.iter().filter(|(name, _)| {
        ["zap_client_disconnects_total", "zap_streams_interrupted_total", "zap_upstream_errors_total"]
            .iter()
            .any(|family| name.starts_with(family))
    });
    let left: Vec<_> = left.filter(|(_, count)| **count != 0.0).collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(zap.client().get("/status").json()["backends"][0]["state"], "healthy");
    assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 1.0);
    zap.wait_until_idle();
}

#[test]
fn a_compressed_stream_without_a_byte_is_no_answer() {
    const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n";
    let quick = "[retry]\nbase_delay_ms = 1\nmax_delay_ms = 1\n";
    let b = Provider::named("b");
    let both = |a: &Provider| [a.backend("a", "weight = 9"), b.backend("b", "")];
    for end in ["content-length: 0\r\n\r\n", "transfer-encoding: chunked\r\n\r\n0\r\n\r\n"] {
        let a = Provider::start(move |_, stream| {
            let _ = stream.write_all(format!("{HEAD}{end}").as_bytes());
            After::Keep
        });
        for settings in ["", "[stream]\nhold_secs = 0\n"].map(|more| format!("{quick}{more}")) {
            let answer = Zap::with(&settings, &[a.backend("a", "")]).chat(STREAM);
            assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_empty"), "{end}");
            let zap = Zap::with(&settings, &both(&a));
            assert_eq!(zap.chat(STREAM).text(), "b", "{end}");
            assert_eq!(zap.metric("zap_prelude_failovers_total{backend=\"a\",reason=\"empty\"}"), 1.0);
        }
    }
    let a = Provider::start(|_, stream| {
        let _ = stream.write_all(format!("{HEAD}transfer-encoding: chunked\r\n\r\n").as_bytes());
        After::Close
    });
    let zap = Zap::with(quick, &both(&a));
    assert_eq!(zap.chat(STREAM).text(), "b");
    assert_eq!(zap.metric("zap_prelude_failovers_total{backend=\"a\",reason=\"cut\"}"), 1.0);
    // Silence is judged by the clocks of any stream: by that of the first token, and by that of the request.
    let a = Provider::start(|_, stream| {
        let _ = stream.write_all(format!("{HEAD}transfer-encoding: chunked\r\n\r\n").as_bytes());
        wait_closed(stream);
        After::Close
    });
    let zap = Zap::with(&format!("{quick}[timeouts]\nfirst_token_secs = 1\n"), &both(&a));
    assert_eq!(zap.chat(STREAM).text(), "b");
    assert_eq!(zap.metric("zap_prelude_failovers_total{backend=\"a\",reason=\"timeout\"}"), 1.0);
    let settings = format!("{quick}[timeouts]\nfirst_token_secs = 1\n[queue]\ntimeout_secs = 2\n");
    let (zap, since) = (Zap::with(&settings, &[a.backend("a", "")]), Instant::now());
    let answer = zap.chat(STREAM);
    assert_eq!((answer.status, answer.code().as_str()), (504, "upstream_timeout"));
    assert!(since.elapsed() > Duration::from_millis(1900), "the last target has the time of the request");
    zap.wait_until_idle();
}

#[test]
fn a_client_that_stops_reading_is_closed_on_both_sides() {
    let a = Provider::start(|_, stream| {
        start_events(stream);
        let piece = "x".repeat(16 * 1024);
        while chunk(stream, &piece) {}
        After::Close
    });
    let zap = Zap::with("[timeouts]\nstream_idle_secs = 1", &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", STREAM);
    client.head();
    eventually("the upstream connection is closed", || a.connections() == 0 && a.count() == 1);
    zap.wait_until_idle();
    assert_eq!(zap.metric("zap_client_disconnects_total{phase=\"streaming\"}"), 1.0);
}

#[test]
fn a_length_and_an_empty_body_are_kept() {
    let a = Provider::fixed(400, "content-type: application/json\r\n", "");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let answer = zap.chat(STREAM);
    assert_eq!((answer.status, answer.header("content-length"), answer.whole), (400, Some("0"), true));
    // A success without a byte is no answer.
    for length in ["content-length: 0\r\n\r\n", "transfer-encoding: chunked\r\n\r\n0\r\n\r\n"] {
        let a = Provider::start(move |_, stream| {
            let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\n{length}").as_bytes());
            After::Keep
        });
        let settings = "[retry]\nbase_delay_ms = 1\nmax_delay_ms = 1";
        let answer = Zap::with(settings, &[a.backend("a", "")]).chat(STREAM);
        assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_empty"), "{length}");
        let b = Provider::named("b");
        let zap = Zap::with(settings, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
        assert_eq!(zap.chat(STREAM).text(), "b", "{length}");
    }
    let b = Provider::start(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n");
        After::Keep
    });
    let zap = Zap::with("", &[b.backend("b", "")]);
    let mut client = zap.client();
    for _ in 0..2 {
        let answer = client.chat("", STREAM);
        assert_eq!((answer.status, answer.whole), (204, true));
    }
    let c = Provider::start(|_, stream| {
        reply(stream, 200, "content-type: text/event-stream\r\n", ANSWER.as_bytes());
        After::Keep
    });
    let zap = Zap::with("", &[c.backend("c", "")]);
    let answer = zap.chat(STREAM);
    assert_eq!((answer.header("content-length"), answer.text()), (Some("25"), ANSWER));
}

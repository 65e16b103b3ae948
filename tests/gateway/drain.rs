//! Shutdown: draining, its time limit, and the second order.

use std::time::{Duration, Instant};

use zap::internals::Order;

use crate::support::provider::{After, Gate, chunk, end_chunks, reply, start_events, wait_closed};
use crate::support::{CHAT, Provider, STREAM, Zap, eventually};

#[test]
fn draining_finishes_running_requests_and_refuses_new_ones() {
    let gate = Gate::default();
    let held = gate.clone();
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        held.pass();
        chunk(stream, "data: [DONE]\n\n");
        end_chunks(stream);
        After::Keep
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    let mut idle = zap.client();
    assert_eq!(idle.get("/ready").status, 200);
    let mut stream = zap.client();
    stream.post("/chat", "", STREAM);
    stream.head();
    assert_eq!(stream.chunk().unwrap(), b"data: one\n\n");
    zap.order(Order::Drain);
    eventually("/ready is a 503", || zap.client().get("/ready").status == 503);
    let refused = zap.chat(CHAT);
    assert_eq!((refused.status, refused.code().as_str()), (503, "draining"));
    assert_eq!((refused.header("retry-after"), refused.header("connection")), (Some("1"), Some("close")));
    let last = idle.get("/health");
    assert_eq!((last.status, last.header("connection")), (200, Some("close")));
    gate.open(1);
    assert_eq!(stream.chunk().unwrap(), b"data: [DONE]\n\n");
    assert_eq!(stream.chunk().unwrap(), b"");
    assert!(zap.join(), "no request was cut");
}

#[test]
fn a_request_whose_body_is_still_arriving_is_finished() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let mut upload = zap.client();
    let expect = "expect: 100-continue\r\n";
    upload.send(format!("POST /chat HTTP/1.1\r\nhost: x\r\n{expect}content-length: {}\r\n\r\n", CHAT.len()));
    assert_eq!(upload.head().status, 100, "Zap asks for the body");
    upload.send("{");
    zap.order(Order::Drain);
    eventually("/ready is a 503", || zap.client().get("/ready").status == 503);
    let end = Instant::now() + Duration::from_millis(300);
    while Instant::now() < end {
        for path in ["/ready", "/v1/models"] {
            assert_eq!(zap.client().get(path).status, 503, "connections are still accepted");
        }
        assert_eq!(zap.chat(CHAT).code(), "draining");
    }
    upload.send(&CHAT[1..]);
    let answer = upload.response();
    assert_eq!((answer.text(), answer.header("connection")), ("a", Some("close")));
    assert!(zap.join(), "no request was cut");
}

#[test]
fn a_connection_closes_after_a_response_that_began_before_the_drain() {
    let (short, long) = (Gate::default(), Gate::default());
    let (held_short, held_long) = (short.clone(), long.clone());
    let a = Provider::start(move |seen, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        if seen.body.ends_with(b" ") {
            held_long.pass()
        } else {
            held_short.pass()
        }
        chunk(stream, "data: [DONE]\n\n");
        end_chunks(stream);
        After::Keep
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    let mut streams = [STREAM.to_owned(), format!("{STREAM} ")].map(|body| {
        let mut client = zap.client();
        client.post("/chat", "", body);
        let head = client.head();
        assert_eq!(head.header("connection"), None);
        assert_eq!(client.chunk().unwrap(), b"data: one\n\n");
        client
    });
    zap.order(Order::Drain);
    eventually("/ready is a 503", || zap.client().get("/ready").status == 503);
    short.open(1);
    assert_eq!(streams[0].chunk().unwrap(), b"data: [DONE]\n\n");
    assert_eq!(streams[0].chunk().unwrap(), b"");
    streams[0].close_within(Duration::from_secs(2));
    assert_eq!(zap.client().get("/ready").status, 503, "the other stream still runs");
    long.open(1);
    assert_eq!(streams[1].chunk().unwrap(), b"data: [DONE]\n\n");
    assert!(zap.join(), "no request was cut");
}

#[test]
fn a_stream_that_outlasts_drain_secs_is_cut_with_an_error() {
    let a = Provider::start(|_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        wait_closed(stream);
        After::Close
    });
    let zap = Zap::with("[server]\ndrain_secs = 1", &[a.backend("a", "")]);
    let mut stream = zap.client();
    stream.post("/chat", "", STREAM);
    let mut answer = stream.head();
    assert_eq!(stream.chunk().unwrap(), b"data: one\n\n");
    let since = Instant::now();
    zap.order(Order::Drain);
    stream.body(&mut answer);
    assert!(answer.text().contains("\"code\":\"draining\"") && !answer.whole, "{}", answer.text());
    assert!(!zap.join(), "a request was cut");
    let took = since.elapsed();
    assert!(took > Duration::from_millis(900) && took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn a_v1_responses_stream_that_outlasts_drain_secs_ends_with_response_failed() {
    let a = Provider::start(|_, stream| {
        start_events(stream);
        chunk(stream, "data: {\"type\":\"x\",\"sequence_number\":3}\n\n");
        wait_closed(stream);
        After::Close
    });
    let zap = Zap::with("[server]\ndrain_secs = 0", &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/v1/responses", "", r#"{"stream":true,"input":"hi"}"#);
    let mut answer = client.head();
    answer.body = client.chunk().unwrap();
    zap.order(Order::Drain);
    client.body(&mut answer);
    let (_, event) = answer
        .text()
        .split_once("\n\nevent: response.failed\ndata: ")
        .expect("the stream ends with response.failed");
    let event: serde_json::Value = serde_json::from_str(event).unwrap();
    assert_eq!((&event["sequence_number"], answer.whole), (&4.into(), true));
    assert_eq!(
        (&event["error"]["code"], &event["response"]["error"]["code"]),
        (&"draining".into(), &"draining".into())
    );
    assert!(!zap.join(), "a request was cut");
}

#[test]
fn a_second_order_ends_the_drain_at_once() {
    let a = Provider::start(|_, stream| {
        wait_closed(stream);
        After::Close
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    eventually("the backend has the request", || a.count() == 1);
    let since = Instant::now();
    zap.order(Order::Drain);
    zap.order(Order::Now);
    let answer = client.response();
    assert_eq!((answer.status, answer.code().as_str()), (503, "draining"));
    assert!(!zap.join());
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    assert_eq!(a.count(), 1, "a request that was cut is not retried");
}

#[test]
fn an_idle_gateway_stops_at_once() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let mut idle = zap.client();
    assert_eq!(idle.chat("", CHAT).status, 200);
    let since = Instant::now();
    zap.order(Order::Drain);
    assert!(zap.join());
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    assert_eq!(idle.rest(), (Vec::new(), true));
}

#[test]
fn a_busy_stream_is_cut_with_an_error_too() {
    // Data that keeps arriving must not hide the order to cut.
    let a = Provider::start(|_, stream| {
        start_events(stream);
        while chunk(stream, "data: more\n\n") {}
        After::Close
    });
    for _ in 0..5 {
        let zap = Zap::with("[server]\ndrain_secs = 0\n", &[a.backend("a", "")]);
        let mut client = zap.client();
        client.post("/chat", "", STREAM);
        let mut answer = client.head();
        for _ in 0..50 {
            assert!(client.chunk().is_some_and(|c| !c.is_empty()));
        }
        zap.order(Order::Drain);
        let end = Instant::now() + Duration::from_secs(5);
        while let Some(piece) = client.chunk() {
            assert!(Instant::now() < end, "the stream is not cut");
            answer.body.extend_from_slice(&piece);
            answer.whole |= piece.is_empty();
        }
        let end = answer.text().rfind("data: {\"error\"").expect("the stream ends with an error event");
        assert!(!answer.whole && answer.text()[end..].contains("\"code\":\"draining\""));
        assert!(!zap.join(), "a request was cut");
    }
}

#[test]
fn all_requests_are_served_during_the_drain_delay() {
    let a = Provider::named("a");
    let zap = Zap::with("[server]\ndrain_delay_secs = 2\ndrain_secs = 0", &[a.backend("a", "")]);
    let mut idle = zap.client();
    assert_eq!(idle.get("/ready").status, 200);
    let since = Instant::now();
    zap.order(Order::DelayedDrain);
    eventually("/ready is a 503", || zap.client().get("/ready").status == 503);
    let last = idle.chat("", CHAT);
    assert_eq!((last.status, last.header("connection")), (200, Some("close")));
    assert_eq!(zap.client().get("/v1/models").status, 200);
    while since.elapsed() < Duration::from_millis(900) {
        assert_eq!(zap.chat(CHAT).status, 200);
    }
    assert!(zap.join(), "no request was cut");
    assert!(since.elapsed() >= Duration::from_secs(2), "{:?}", since.elapsed());
}

#[test]
fn a_connection_whose_response_began_before_the_drain_delay_serves_one_more_request() {
    let gate = Gate::default();
    let held = gate.clone();
    let a = Provider::start(move |seen, stream| {
        if seen.body == CHAT.as_bytes() {
            reply(stream, 200, "", b"a");
            return After::Keep;
        }
        start_events(stream);
        chunk(stream, "data: one\n\n");
        held.pass();
        chunk(stream, "data: [DONE]\n\n");
        end_chunks(stream);
        After::Keep
    });
    let zap = Zap::with("[server]\ndrain_delay_secs = 60", &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", STREAM);
    assert_eq!(client.head().header("connection"), None);
    assert_eq!(client.chunk().unwrap(), b"data: one\n\n");
    zap.order(Order::DelayedDrain);
    eventually("/ready is a 503", || zap.client().get("/ready").status == 503);
    gate.open(1);
    assert_eq!(client.chunk().unwrap(), b"data: [DONE]\n\n");
    assert_eq!(client.chunk().unwrap(), b"");
    let last = client.chat("", CHAT);
    assert_eq!((last.status, last.header("connection")), (200, Some("close")));
    client.close_within(Duration::from_secs(2));
    zap.order(Order::Now);
    zap.join();
}

#[test]
fn a_second_order_ends_the_drain_delay_and_other_orders_skip_it() {
    let a = Provider::named("a");
    for orders in [&[Order::DelayedDrain, Order::Now][..], &[Order::Drain]] {
        let zap = Zap::with("[server]\ndrain_delay_secs = 60", &[a.backend("a", "")]);
        let since = Instant::now();
        orders.iter().for_each(|order| zap.order(*order));
        zap.join();
        assert!(since.elapsed() < Duration::from_secs(5), "{orders:?} took {:?}", since.elapsed());
    }
}

#[test]
fn connections_in_the_queue_of_the_kernel_get_a_response_before_the_listener_closes() {
    let a = Provider::named("a");
    let zap = Zap::with("[server]\nmax_connections = 1", &[a.backend("a", "")]);
    let mut only = zap.client();
    assert_eq!(only.get("/ready").status, 200);
    // All of the reserve, for as long as a head may take there.
    let reserve: Vec<_> = (0..16).map(|_| zap.client()).collect();
    // The limit of connections keeps these in the queue.
    let mut queued: Vec<_> = (0..20).map(|_| zap.client()).collect();
    queued.iter_mut().for_each(|client| client.post("/chat", "", CHAT));
    zap.order(Order::Drain);
    for client in &mut queued {
        let response = client.response();
        assert_eq!((response.status, response.code().as_str()), (503, "draining"));
        assert_eq!(client.rest(), (Vec::new(), true), "the connection closes cleanly");
    }
    drop(reserve);
    assert!(zap.join(), "no request was cut");
}

//! The limit of requests in flight, and the queue in front of it.

use std::time::{Duration, Instant};

use crate::support::provider::{After, Gate, chunk, end_chunks, start_events};
use crate::support::{CHAT, Provider, STREAM, Zap, eventually};

#[test]
fn requests_beyond_max_in_flight_and_max_size_are_refused_at_once() {
    let gate = Gate::default();
    let provider = Provider::gated(&gate);
    let zap = Zap::with("[queue]\nmax_in_flight = 4\nmax_size = 10", &[provider.backend("a", "")]);
    let mut clients: Vec<_> = (0..60).map(|_| zap.client()).collect();
    clients.iter_mut().for_each(|c| c.post("/chat", "", CHAT));
    eventually("46 requests are refused", || zap.metric("zap_rejected_total{reason=\"queue_full\"}") == 46.0);
    eventually("the backend holds four requests", || gate.waiting() == 4);
    assert_eq!(zap.metric("zap_queue_depth"), 10.0);
    gate.open(14);
    let answers: Vec<_> = clients.iter_mut().map(|c| c.response()).collect();
    assert_eq!(answers.iter().filter(|r| r.status == 200).count(), 14);
    for refused in answers.iter().filter(|r| r.status != 200) {
        assert_eq!((refused.status, refused.code().as_str()), (503, "queue_full"));
        assert_eq!((refused.header("retry-after"), refused.header("x-zap-attempts")), (Some("1"), Some("0")));
    }
    assert_eq!(provider.count(), 14);
    zap.wait_until_idle();
    assert_eq!(zap.metric("zap_queue_wait_seconds_count"), 10.0);
}

#[test]
fn a_queue_of_size_0_refuses_the_next_request() {
    let gate = Gate::default();
    let provider = Provider::gated(&gate);
    let zap = Zap::with("[queue]\nmax_in_flight = 1\nmax_size = 0", &[provider.backend("a", "")]);
    let mut first = zap.client();
    first.post("/chat", "", CHAT);
    eventually("the backend holds the first request", || gate.waiting() == 1);
    assert_eq!(zap.chat(CHAT).code(), "queue_full");
    gate.open(2);
    assert_eq!(first.response().status, 200);
    assert_eq!(zap.chat(CHAT).status, 200);
    zap.wait_until_idle();
}

#[test]
fn queued_requests_are_served_in_order_of_arrival() {
    let gate = Gate::default();
    let provider = Provider::gated(&gate);
    let zap = Zap::with("[queue]\nmax_in_flight = 1", &[provider.backend("a", "")]);
    let mut clients: Vec<_> = (0..6)
        .map(|i| {
            let mut client = zap.client();
            client.post("/chat", &format!("x-request-id: n{i}\r\n"), CHAT);
            eventually("the request is at the backend or in the queue", || {
                gate.waiting() as f64 + zap.metric("zap_queue_depth") == f64::from(i + 1)
            });
            client
        })
        .collect();
    gate.open(6);
    clients.iter_mut().for_each(|c| assert_eq!(c.response().status, 200));
    let order: Vec<_> =
        provider.seen().iter().map(|s| s.header("x-request-id").unwrap().to_owned()).collect();
    assert_eq!(order, ["n0", "n1", "n2", "n3", "n4", "n5"]);
}

#[test]
fn a_queued_request_that_reaches_its_deadline_gets_a_504_and_is_not_sent() {
    let gate = Gate::default();
    let held = gate.clone();
    let provider = Provider::start(move |_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        held.pass();
        chunk(stream, "data: [DONE]\n\n");
        end_chunks(stream);
        After::Keep
    });
    let zap = Zap::with("[queue]\nmax_in_flight = 1\ntimeout_secs = 1", &[provider.backend("a", "")]);
    let mut first = zap.client();
    first.post("/chat", "", STREAM);
    let mut answer = first.head();
    assert_eq!(answer.status, 200, "the deadline of a stream ends at its first content");
    let since = Instant::now();
    let second = zap.chat(CHAT);
    assert_eq!((second.status, second.code().as_str()), (504, "queue_timeout"));
    assert_eq!((second.header("retry-after"), second.header("x-zap-attempts")), (Some("1"), Some("0")));
    assert!(since.elapsed() > Duration::from_millis(900) && since.elapsed() < Duration::from_secs(2));
    assert_eq!(provider.count(), 1);
    gate.open(1);
    first.body(&mut answer);
    assert!(answer.whole, "a stream may last longer than the deadline");
    zap.wait_until_idle();
}

#[test]
fn a_client_that_disconnects_while_queued_leaves_the_queue() {
    let gate = Gate::default();
    let provider = Provider::gated(&gate);
    let zap = Zap::with("[queue]\nmax_in_flight = 1\nmax_size = 1", &[provider.backend("a", "")]);
    let mut first = zap.client();
    first.post("/chat", "", CHAT);
    eventually("the backend holds the first request", || gate.waiting() == 1);
    for _ in 0..5 {
        let mut leaving = zap.client();
        leaving.post("/chat", "", CHAT);
        eventually("the request is queued", || zap.metric("zap_queue_depth") == 1.0);
        drop(leaving);
        eventually("the queue is empty", || zap.metric("zap_queue_depth") == 0.0);
    }
    let mut last = zap.client();
    last.post("/chat", "", CHAT);
    gate.open(2);
    assert_eq!((first.response().status, last.response().status), (200, 200));
    assert_eq!(provider.count(), 2);
    assert_eq!(zap.metric("zap_client_disconnects_total{phase=\"queued\"}"), 5.0);
    zap.wait_until_idle();
}

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

/// Sends a request of this key that waits at the provider or in the queue, after `before` others.
fn queued(zap: &Zap, gate: &Gate, (key, id): (&str, &str), before: usize) -> crate::support::Client {
    let mut client = zap.client();
    client.post("/chat", &format!("authorization: Bearer {key}\r\nx-request-id: {id}\r\n"), CHAT);
    eventually("the request is at the backend or in the queue", || {
        gate.waiting() as f64 + zap.metric("zap_queue_depth") == (before + 1) as f64
    });
    client
}

/// The order in which a provider has got requests.
fn order(provider: &Provider) -> String {
    let ids =
        provider.seen().iter().map(|s| s.header("x-request-id").unwrap().to_owned()).collect::<Vec<_>>();
    ids.join(" ")
}

#[test]
fn the_burst_of_one_client_delays_another_by_one_request() {
    // With a limit of the gateway, and with one of the backend alone.
    for (settings, more) in [("[queue]\nmax_in_flight = 1", ""), ("", "max_in_flight = 1")] {
        let gate = Gate::default();
        let provider = Provider::gated(&gate);
        let zap = Zap::with(settings, &[provider.backend("a", more)]);
        let burst = (0..20).map(|i| queued(&zap, &gate, ("team-a", &format!("a{i}")), i));
        let mut clients: Vec<_> = burst.collect();
        clients.push(queued(&zap, &gate, ("team-b", "b"), 20));
        gate.open(21);
        clients.iter_mut().for_each(|c| assert_eq!(c.response().status, 200));
        let order = order(&provider);
        assert!(order.starts_with("a0 b a1 a2 a3 "), "{settings} {more}: {order}");
        zap.wait_until_idle();
    }
}

#[test]
fn clients_without_a_key_have_a_line_for_each_address() {
    let gate = Gate::default();
    let provider = Provider::gated(&gate);
    let settings = "[server]\ntrusted_proxies = [\"127.0.0.1\"]\n[queue]\nmax_in_flight = 1";
    let zap = Zap::with(settings, &[provider.backend("a", "")]);
    let mut clients: Vec<_> = [("10.0.0.1", "a0"), ("10.0.0.1", "a1"), ("10.0.0.1", "a2"), ("10.0.0.2", "b")]
        .iter()
        .enumerate()
        .map(|(before, (address, id))| {
            let mut client = zap.client();
            client.post("/chat", &format!("x-forwarded-for: {address}\r\nx-request-id: {id}\r\n"), CHAT);
            eventually("the request is at the backend or in the queue", || {
                gate.waiting() as f64 + zap.metric("zap_queue_depth") == (before + 1) as f64
            });
            client
        })
        .collect();
    gate.open(4);
    clients.iter_mut().for_each(|c| assert_eq!(c.response().status, 200));
    assert_eq!(order(&provider), "a0 b a1 a2");
}

#[test]
fn waiting_requests_of_keys_with_a_lower_priority_value_come_first() {
    let gate = Gate::default();
    let provider = Provider::gated(&gate);
    let key =
        |name: &str, more: &str| format!("[[client_keys]]\nname = \"{name}\"\nkey = \"zk-{name}\"\n{more}\n");
    let keys = key("batch", "priority = 5") + &key("people", "");
    let zap = Zap::with(&format!("[queue]\nmax_in_flight = 1\n{keys}"), &[provider.backend("a", "")]);
    let sent = [("zk-batch", "b0"), ("zk-batch", "b1"), ("zk-people", "p0"), ("zk-people", "p1")];
    let mut clients: Vec<_> =
        sent.iter().enumerate().map(|(before, sent)| queued(&zap, &gate, *sent, before)).collect();
    gate.open(4);
    clients.iter_mut().for_each(|c| assert_eq!(c.response().status, 200));
    assert_eq!(order(&provider), "b0 p0 p1 b1");
}

#[test]
fn a_backend_that_hangs_takes_its_share_of_the_slots_and_no_more() {
    let (hang, open) = (Gate::default(), Gate::default());
    let (slow, quick) = (Provider::gated(&hang), Provider::gated(&open));
    let backends = [slow.backend("slow", "models = [\"s\"]"), quick.backend("quick", "models = [\"q\"]")];
    let zap = Zap::with("[queue]\nmax_in_flight = 8", &backends);
    let ask = |model: &str| {
        let mut client = zap.client();
        client.post("/chat", "", format!("{{\"model\":\"{model}\",\"messages\":[]}}"));
        client
    };
    let mut waiting: Vec<_> = (0..20).map(|_| ask("s")).collect();
    eventually("three quarters of the slots are taken, and the others wait", || {
        hang.waiting() == 6 && zap.metric("zap_queue_depth") == 14.0
    });
    open.open(1);
    assert_eq!(ask("q").response().status, 200, "a slot is free for the other backend");
    let status = zap.client().get("/status").json();
    assert_eq!(
        (&status["backends"][0]["state"], &status["backends"][0]["max_in_flight"]),
        (&"full".into(), &6.into())
    );
    hang.open(20);
    waiting.iter_mut().for_each(|c| assert_eq!(c.response().status, 200));
    zap.wait_until_idle();
}

#[test]
fn a_single_backend_and_a_share_of_1_have_all_slots() {
    for (share, others) in [("", false), ("backend_share = 1\n", true)] {
        let gate = Gate::default();
        let (slow, other) = (Provider::gated(&gate), Provider::named("b"));
        let mut backends = vec![slow.backend("slow", "models = [\"s\"]")];
        backends.extend(others.then(|| other.backend("b", "models = [\"q\"]")));
        let zap = Zap::with(&format!("[queue]\nmax_in_flight = 4\n{share}"), &backends);
        let mut clients: Vec<_> = (0..4).map(|_| zap.client()).collect();
        clients.iter_mut().for_each(|c| c.post("/chat", "", r#"{"model":"s","messages":[]}"#));
        eventually("all slots are taken", || gate.waiting() == 4);
        gate.open(4);
        clients.iter_mut().for_each(|c| assert_eq!(c.response().status, 200));
    }
}

//! Queues for backends that are full or cool down.

use std::time::{Duration, Instant};

use crate::support::provider::{After, Gate, chunk, end_chunks, reply, start_events};
use crate::support::{CHAT, Provider, STREAM, Zap, assert_wait, eventually};

fn ask(model: &str) -> String {
    format!("{{\"messages\":[],\"model\":\"{model}\"}}")
}

#[test]
fn requests_that_wait_for_a_full_backend_are_served_in_order() {
    let gate = Gate::default();
    let a = Provider::gated(&gate);
    let zap = Zap::with("[server]\nworkers = 2", &[a.backend("a", "max_in_flight = 1")]);
    let mut clients = Vec::new();
    for i in 0..8 {
        let mut client = zap.client();
        client.post("/chat", "", ask(&format!("m{i}")));
        eventually("the request is at a backend or in the queue", || {
            gate.waiting() == 1 && zap.metric("zap_queue_depth") == i as f64
        });
        clients.push(client);
    }
    for client in &mut clients {
        gate.open(1);
        assert_eq!(client.response().status, 200);
    }
    let order: Vec<_> = a.seen().iter().map(|s| String::from_utf8(s.body.clone()).unwrap()).collect();
    assert_eq!(order, (0..8).map(|i| ask(&format!("m{i}"))).collect::<Vec<_>>());
    zap.wait_until_idle();
}

#[test]
fn a_request_that_waits_for_two_backends_takes_the_first_with_room() {
    let (gate_a, gate_b) = (Gate::default(), Gate::default());
    let (a, b) = (Provider::gated(&gate_a), Provider::gated(&gate_b));
    let backends = [a.backend("a", "max_in_flight = 1"), b.backend("b", "max_in_flight = 1")];
    let zap = Zap::with("", &backends);
    let mut clients: Vec<_> = (0..3).map(|_| zap.client()).collect();
    for (i, client) in clients.iter_mut().enumerate() {
        client.post("/chat", "", CHAT);
        eventually("the request is at a backend or in the queue", || {
            gate_a.waiting() + gate_b.waiting() + zap.metric("zap_queue_depth") as usize == i + 1
        });
    }
    gate_b.open(2);
    eventually("backend b has served two requests", || b.count() == 2 && gate_b.waiting() == 0);
    assert_eq!(a.count(), 1);
    gate_a.open(1);
    clients.iter_mut().for_each(|c| assert_eq!(c.response().status, 200));
    zap.wait_until_idle();
}

#[test]
fn requests_that_wait_for_a_full_backend_are_served_by_one_that_comes_back() {
    let gate = Gate::default();
    let (a, b) = (Provider::named("a"), Provider::gated(&gate));
    a.set_health(503);
    let settings = "[health]\ninterval_secs = 1\nfailure_threshold = 1";
    let zap = Zap::with(settings, &[a.backend("a", ""), b.backend("b", "max_in_flight = 1")]);
    eventually("backend a is ejected", || zap.metric("zap_backend_up{backend=\"a\"}") == 0.0);
    let mut first = zap.client();
    first.post("/chat", "", CHAT);
    eventually("backend b is full", || gate.waiting() == 1);
    let mut waiting: Vec<_> = (0..3).map(|_| zap.client()).collect();
    waiting.iter_mut().for_each(|client| client.post("/chat", "", CHAT));
    eventually("three requests are queued", || zap.metric("zap_queue_depth") == 3.0);
    a.set_health(200);
    waiting.iter_mut().for_each(|client| assert_eq!(client.response().text(), "a"));
    assert_eq!(b.count(), 1, "backend b is still full");
    gate.open(1);
    assert_eq!(first.response().status, 200);
    zap.wait_until_idle();
}

#[test]
fn a_wait_for_a_cooldown_continues_if_the_backend_is_ejected() {
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let a = Provider::start(move |_, stream| {
        match asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => reply(stream, 429, "retry-after: 3\r\n", b"wait"),
            _ => reply(stream, 200, "", b"served"),
        }
        After::Keep
    });
    let zap = Zap::with("[health]\ninterval_secs = 1\nfailure_threshold = 1", &[a.backend("a", "")]);
    let since = Instant::now();
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    eventually("the request that met the 429 is queued", || zap.metric("zap_queue_depth") == 1.0);
    a.set_health(500);
    eventually("backend a is ejected", || zap.metric("zap_backend_up{backend=\"a\"}") == 0.0);
    assert_eq!((a.count(), zap.metric("zap_queue_depth")), (1, 1.0));
    let answer = client.response();
    assert_eq!((answer.status, answer.text()), (200, "served"));
    assert!(since.elapsed() > Duration::from_millis(2_900), "the cooldown is kept: {:?}", since.elapsed());
    assert_eq!((a.count(), zap.metric("zap_panic_picks_total")), (2, 1.0));
    zap.wait_until_idle();
}

#[test]
fn a_client_that_leaves_the_queue_does_not_block_the_next() {
    let gate = Gate::default();
    let a = Provider::gated(&gate);
    let zap = Zap::with("", &[a.backend("a", "max_in_flight = 1")]);
    let mut clients: Vec<_> = (0..4).map(|_| zap.client()).collect();
    for (i, client) in clients.iter_mut().enumerate() {
        client.post("/chat", "", ask(&format!("m{i}")));
        eventually("the request is at a backend or in the queue", || {
            gate.waiting() == 1 && zap.metric("zap_queue_depth") == i as f64
        });
    }
    drop(clients.remove(1));
    eventually("the request has left the queue", || zap.metric("zap_queue_depth") == 2.0);
    gate.open(3);
    clients.iter_mut().for_each(|c| assert_eq!(c.response().status, 200));
    assert_eq!(a.count(), 3);
    assert_eq!(zap.metric("zap_client_disconnects_total{phase=\"queued\"}"), 1.0);
    zap.wait_until_idle();
}

#[test]
fn requests_that_wait_for_one_model_never_block_another_model() {
    let gate = Gate::default();
    let (slow, free) = (Provider::gated(&gate), Provider::named("free"));
    let backends = [
        slow.backend("slow", "max_in_flight = 1\nmodels = [\"slow\"]"),
        free.backend("free", "models = [\"free\"]"),
    ];
    // Of the two slots, the request at the backend takes one; the waiting requests take none.
    let zap = Zap::with("[queue]\nmax_in_flight = 2\nmax_size = 5", &backends);
    let mut clients: Vec<_> = (0..6).map(|_| zap.client()).collect();
    clients.iter_mut().for_each(|c| c.post("/chat", "", ask("slow")));
    eventually("five requests are queued", || zap.metric("zap_queue_depth") == 5.0 && gate.waiting() == 1);
    (0..20).for_each(|_| assert_eq!(zap.chat(ask("free")).text(), "free"));
    let refused = zap.chat(ask("slow"));
    assert_eq!((refused.status, refused.code().as_str()), (503, "queue_full"));
    assert_eq!(refused.header("retry-after"), Some("1"));
    gate.open(6);
    clients.iter_mut().for_each(|c| assert_eq!(c.response().status, 200));
    zap.wait_until_idle();
}

#[test]
fn random_requests_and_disconnects_release_everything() {
    let provider = || {
        Provider::start(|_, stream| {
            std::thread::sleep(Duration::from_millis(1));
            reply(stream, 200, "", b"ok");
            After::Keep
        })
    };
    let (a, b) = (provider(), provider());
    let backends = [
        a.backend("a", "max_in_flight = 2\nmodels = [\"x\", \"y\"]"),
        b.backend("b", "max_in_flight = 1\nrequests_per_minute = 40\nmodels = [\"y\"]"),
    ];
    let zap = Zap::with("[queue]\nmax_in_flight = 4\nmax_size = 30", &backends);
    let served: usize = std::thread::scope(|s| {
        let crowd: Vec<_> = (0..8u64)
            .map(|seed| {
                let zap = &zap;
                s.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(seed);
                    let mut served = 0;
                    for _ in 0..60 {
                        let mut client = zap.client();
                        client.post("/chat", "", ask(if rng.bool() { "x" } else { "y" }));
                        if rng.u8(..3) == 0 {
                            std::thread::sleep(Duration::from_micros(rng.u64(..3_000)));
                            continue;
                        }
                        let answer = client.response();
                        assert_eq!(answer.status, 200, "{}", answer.text());
                        served += 1;
                    }
                    served
                })
            })
            .collect();
        crowd.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert!(served > 250, "{served}");
    assert!(b.count() <= 40, "the quota is 40, and the backend got {}", b.count());
    zap.wait_until_idle();
    (0..10).for_each(|_| assert_eq!(zap.chat(ask("x")).status, 200));
}

#[test]
fn a_wait_for_a_full_backend_ends_at_the_deadline() {
    let gate = Gate::default();
    let held = gate.clone();
    // A stream that has begun keeps its permit for longer than any request may wait.
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        held.pass();
        chunk(stream, "data: [DONE]\n\n");
        end_chunks(stream);
        After::Keep
    });
    let zap = Zap::with("[queue]\ntimeout_secs = 1", &[a.backend("a", "max_in_flight = 1")]);
    let mut first = zap.client();
    first.post("/chat", "", STREAM);
    assert_eq!(first.head().status, 200);
    let late = zap.chat(CHAT);
    assert_eq!((late.status, late.code().as_str()), (504, "queue_timeout"));
    gate.open(1);
    assert_eq!(a.count(), 1, "the request that timed out is not sent");
    drop(first);
    zap.wait_until_idle();
}

#[test]
fn a_quota_that_refills_too_late_refuses_at_once_with_retry_after() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "requests_per_minute = 2")]);
    let began = Instant::now();
    (0..2).for_each(|_| assert_eq!(zap.chat(CHAT).status, 200));
    let since = Instant::now();
    let refused = zap.chat(CHAT);
    assert_eq!((refused.status, refused.code().as_str()), (429, "upstream_rate_limited"));
    assert_wait(&refused, 59, began);
    assert!(since.elapsed().as_secs() < 5);
    let status = &zap.client().get("/status").json()["backends"][0];
    assert_eq!(status["state"], "quota");
    assert!(status["quota_opens_secs"].as_f64().unwrap() > 50.0, "{status}");
    zap.wait_until_idle();
}

#[test]
fn a_full_backend_is_shown_as_full() {
    let gate = Gate::default();
    let a = Provider::gated(&gate);
    let zap = Zap::with("", &[a.backend("a", "max_in_flight = 1")]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    eventually("the backend has the request", || gate.waiting() == 1);
    assert_eq!(zap.client().get("/status").json()["backends"][0]["state"], "full");
    gate.open(1);
    assert_eq!(client.response().status, 200);
    eventually("the backend is healthy", || {
        zap.client().get("/status").json()["backends"][0]["state"] == "healthy"
    });
}

/// Backend `a` answers its first request with `status` and `headers`, and then serves; `b` comes behind it and is full.
fn wait_before_a_full_backend(status: u16, headers: &'static str, settings: &str) -> Duration {
    let (gate, first) = (Gate::default(), std::sync::atomic::AtomicBool::new(true));
    let a = Provider::start(move |_, stream| {
        match first.swap(false, std::sync::atomic::Ordering::SeqCst) {
            true => reply(stream, status, headers, b"{}"),
            false => reply(stream, 200, "", b"a"),
        }
        After::Keep
    });
    let b = Provider::gated(&gate);
    let zap = Zap::with(
        &format!("[health]\nfailure_threshold = 1\n{settings}"),
        &[a.backend("a", ""), b.backend("b", "priority = 1\nmax_in_flight = 1")],
    );
    let (mut holds, mut waits) = (zap.client(), zap.client());
    holds.post("/chat", "", CHAT);
    eventually("the first request is at b", || gate.waiting() == 1);
    let began = Instant::now();
    waits.post("/chat", "", CHAT);
    let answer = waits.response();
    assert_eq!((answer.status, answer.header("x-zap-backend")), (200, Some("a")));
    let waited = began.elapsed();
    gate.open(1);
    assert_eq!(holds.response().status, 200);
    zap.wait_until_idle();
    waited
}

#[test]
fn a_request_that_waits_for_a_full_backend_tries_an_ejected_one_when_it_may() {
    wait_before_a_full_backend(500, "", "");
}

#[test]
fn a_request_that_waits_for_a_full_backend_takes_one_whose_cooldown_ends_after_max_wait() {
    let waited = wait_before_a_full_backend(
        429,
        "retry-after: 3\r\n",
        "[queue]\nmax_wait_secs = 1\ntimeout_secs = 20\n",
    );
    assert!(waited >= Duration::from_secs(2), "{waited:?}");
}

//! Load balancing: which backend gets a request.

use std::collections::HashMap;

use crate::support::provider::{After, Gate, reply};
use crate::support::{CHAT, Provider, STREAM, Zap, assert_wait, eventually};

#[test]
fn round_robin_follows_the_weights_exactly_across_all_workers() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let zap = Zap::with("", &[a.backend("a", "weight = 2"), b.backend("b", "weight = 1")]);
    std::thread::scope(|s| {
        for _ in 0..6 {
            s.spawn(|| {
                let mut client = zap.client();
                (0..50).for_each(|_| assert_eq!(client.chat("", CHAT).status, 200));
            });
        }
    });
    assert_eq!((a.count(), b.count()), (200, 100));
    assert_eq!(zap.metric("zap_requests_total{endpoint=\"chat\",backend=\"a\",status=\"200\"}"), 200.0);
}

#[test]
fn round_robin_is_smooth() {
    let (a, b) = (Provider::named("A"), Provider::named("B"));
    let zap = Zap::with("", &[a.backend("a", "weight = 2"), b.backend("b", "weight = 1")]);
    let order: String = (0..6).map(|_| zap.chat(CHAT).text().to_owned()).collect();
    assert_eq!(order, "ABAABA");
}

#[test]
fn a_backend_that_fails_keeps_its_share_of_first_tries() {
    let (a, b) = (Provider::fixed(500, "", "a failed"), Provider::named("b"));
    let settings = "[health]\nfailure_threshold = 1000\n[retry]\nbudget_percent = 100";
    let zap = Zap::with(settings, &[a.backend("a", ""), b.backend("b", "")]);
    let mut client = zap.client();
    (0..120).for_each(|_| assert_eq!(client.chat("", CHAT).text(), "b"));
    assert_eq!(a.count(), 60);
}

#[test]
fn the_first_requests_for_many_models_are_spread_over_backends() {
    for strategy in ["round_robin", "least_loaded"] {
        let (a, b) = (Provider::named("a"), Provider::named("b"));
        let names: Vec<_> = (0..60).map(|n| format!("\"m{n}\"")).collect();
        let served = format!("models = [{}]", names.join(", "));
        let settings = format!("[load_balancer]\nstrategy = \"{strategy}\"");
        let zap = Zap::with(&settings, &[a.backend("a", &served), b.backend("b", &served)]);
        let mut client = zap.client();
        for name in names {
            assert_eq!(client.chat("", format!("{{\"model\":{name},\"messages\":[]}}")).status, 200);
        }
        assert_eq!((a.count(), b.count()), (30, 30), "{strategy}");
    }
}

#[test]
fn endpoints_and_routes_have_separate_rotations() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let served = "models = [\"m\", \"n\"]";
    let zap = Zap::with("", &[a.backend("a", served), b.backend("b", served)]);
    let mut client = zap.client();
    let mut ask = |path: &str, body: &str| {
        client.post(path, "", body);
        client.response().text().to_owned()
    };
    let mut served = HashMap::<_, usize>::new();
    for _ in 0..10 {
        for (path, body) in [
            ("/v1/chat/completions", r#"{"model":"m","messages":[]}"#),
            ("/v1/embeddings", r#"{"model":"m","input":"x"}"#),
            ("/v1/chat/completions", r#"{"model":"n","messages":[]}"#),
            ("/v1/moderations", r#"{"model":"n","input":"x"}"#),
        ] {
            *served.entry((path, body, ask(path, body))).or_default() += 1;
        }
    }
    assert_eq!(served.len(), 8, "{served:?}");
    assert!(served.values().all(|n| *n == 5), "{served:?}");
}

#[test]
fn least_loaded_picks_the_backend_with_the_fewest_requests() {
    let gate = Gate::default();
    let (held, free) = (gate.clone(), Provider::named("free"));
    let slow = Provider::start(move |_, stream| {
        held.pass();
        reply(stream, 200, "", b"slow");
        After::Keep
    });
    let backends = [slow.backend("slow", ""), free.backend("free", "")];
    let zap = Zap::with("[load_balancer]\nstrategy = \"least_loaded\"", &backends);
    let mut waiting = Vec::new();
    while gate.waiting() == 0 {
        let mut client = zap.client();
        client.post("/chat", "", CHAT);
        eventually("a backend has the request", || gate.waiting() == 1 || free.count() > 0);
        waiting.push(client);
    }
    for _ in 0..20 {
        assert_eq!(zap.chat(CHAT).text(), "free");
    }
    gate.open(1);
    waiting.iter_mut().for_each(|c| assert_eq!(c.response().status, 200));
    zap.wait_until_idle();
}

#[test]
fn a_backend_of_weight_0_gets_no_requests_and_without_others_there_is_no_backend() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let zap = Zap::with("", &[a.backend("a", "weight = 0"), b.backend("b", "")]);
    (0..4).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    assert_eq!(a.count(), 0);
    assert_eq!(zap.client().get("/status").json()["backends"][0]["state"], "drained");

    let zap = Zap::with("", &[a.backend("a", "weight = 0")]);
    let refused = zap.chat(CHAT);
    assert_eq!((refused.status, refused.code().as_str()), (503, "no_backend"));
    assert_eq!(refused.header("retry-after"), Some("59"), "only a reload opens a backend");
}

#[test]
fn a_higher_priority_number_serves_only_if_no_lower_one_can() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let zap = Zap::with("", &[a.backend("a", ""), b.backend("b", "priority = 1")]);
    (0..5).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "a"));
    drop(a);
    let full = Gate::default();
    let held = full.clone();
    let a = Provider::start(move |_, stream| {
        held.pass();
        reply(stream, 200, "", b"a");
        After::Keep
    });
    let zap = Zap::with("", &[a.backend("a", "max_in_flight = 1"), b.backend("b", "priority = 1")]);
    let mut first = zap.client();
    first.post("/chat", "", CHAT);
    eventually("backend a has the first request", || full.waiting() == 1);
    assert_eq!(zap.chat(CHAT).text(), "b");
    full.open(1);
    assert_eq!(first.response().text(), "a");
}

#[test]
fn requests_for_a_backend_at_its_limit_wait_without_a_slot() {
    let gate = Gate::default();
    let held = gate.clone();
    let provider = Provider::start(move |_, stream| {
        held.pass();
        reply(stream, 200, "", b"ok");
        After::Keep
    });
    let zap = Zap::with("", &[provider.backend("a", "max_in_flight = 2")]);
    let mut clients: Vec<_> = (0..6).map(|_| zap.client()).collect();
    clients.iter_mut().for_each(|c| c.post("/chat", "", CHAT));
    eventually("four requests are queued", || zap.metric("zap_queue_depth") == 4.0);
    eventually("the backend holds two requests", || gate.waiting() == 2);
    assert_eq!((provider.count(), zap.metric("zap_in_flight{backend=\"a\"}")), (2, 2.0));
    gate.open(6);
    clients.iter_mut().for_each(|c| assert_eq!(c.response().status, 200));
    zap.wait_until_idle();
}

#[test]
fn a_backend_is_never_sent_more_than_its_quota() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let backends = [a.backend("a", "requests_per_minute = 3"), b.backend("b", "requests_per_minute = 2")];
    let zap = Zap::with("[queue]\nmax_wait_secs = 1", &backends);
    let mut served = HashMap::<String, usize>::new();
    let since = std::time::Instant::now();
    for _ in 0..5 {
        *served.entry(zap.chat(CHAT).text().to_owned()).or_default() += 1;
    }
    assert_eq!((served["a"], served["b"]), (3, 2));
    let refused = zap.chat(CHAT);
    assert_eq!((refused.status, refused.code().as_str()), (429, "upstream_rate_limited"));
    assert_wait(&refused, 59, since);
    assert_eq!((a.count(), b.count()), (3, 2));
    zap.wait_until_idle();
}

#[test]
fn under_least_latency_a_slow_backend_gets_few_requests_and_a_failing_one_too() {
    let slow = Provider::start(|_, stream| {
        std::thread::sleep(std::time::Duration::from_millis(300));
        reply(stream, 200, "", b"slow");
        After::Keep
    });
    let (fast, busy) = (Provider::named("fast"), Provider::fixed(500, "", "{}"));
    let settings = "[load_balancer]\nstrategy = \"least_latency\"\n[health]\nfailure_threshold = 1000\n\
        [retry]\nbudget_percent = 100\n";
    for other in [&slow, &busy] {
        let zap = Zap::with(settings, &[other.backend("other", ""), fast.backend("fast", "")]);
        let before = fast.count();
        (0..80).for_each(|_| assert_eq!(zap.chat(CHAT).status, 200));
        // Both are asked at first, then one request in 64 explores: 12 of 80 have a chance of less than 1 in 10^7.
        assert!(fast.count() - before >= 68, "{} requests to the other", 80 + before - fast.count());
        assert!(other.count() >= 1);
        zap.wait_until_idle();
    }
}

#[test]
fn under_least_latency_streams_are_told_from_other_answers_and_by_size() {
    // Fast for streams, slow for the rest; the other the other way round.
    let provider = |name: &'static [u8], slow_streams: bool| {
        Provider::start(move |seen, stream| {
            let is_stream = seen.body.windows(13).any(|part| part == b"\"stream\":true");
            if is_stream == slow_streams {
                std::thread::sleep(std::time::Duration::from_millis(300));
            }
            match is_stream {
                true => reply(stream, 200, "content-type: text/event-stream\r\n", EVENTS),
                false => reply(stream, 200, "", name),
            }
            After::Keep
        })
    };
    const EVENTS: &[u8] = b"data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\ndata: [DONE]\n\n";
    let (a, b) = (provider(b"a", true), provider(b"b", false));
    let settings = "[load_balancer]\nstrategy = \"least_latency\"\n";
    let zap = Zap::with(settings, &[a.backend("a", ""), b.backend("b", "")]);
    for _ in 0..60 {
        assert_eq!(zap.chat(CHAT).status, 200);
        assert_eq!(zap.chat(STREAM).status, 200);
    }
    let streams = |p: &Provider| {
        p.seen().iter().filter(|s| s.body.windows(8).any(|part| part == b"\"stream\"")).count()
    };
    assert!(streams(&a) <= 12 && a.count() - streams(&a) >= 48, "{} of {}", streams(&a), a.count());
    assert!(streams(&b) >= 48 && b.count() - streams(&b) <= 12, "{} of {}", streams(&b), b.count());
}

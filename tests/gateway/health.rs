//! Health checks, ejection, and what is done if all backends are ejected.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::support::provider::{After, Gate, chunk, end_chunks, reply, start_events, wait_closed};
use crate::support::{CHAT, Provider, STREAM, TIMEOUT, Zap, eventually};

fn state(zap: &Zap, i: usize) -> String {
    zap.client().get("/status").json()["backends"][i]["state"].as_str().unwrap().to_owned()
}

const FAST: &str = "[health]\ninterval_secs = 1\n";

#[test]
fn probes_carry_the_key_and_eject_and_restore_a_backend() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let settings = "[health]\ninterval_secs = 1\nfailure_threshold = 2\n";
    let zap = Zap::with(settings, &[a.backend("a", "api_key = \"sk-probe\""), b.backend("b", "")]);
    a.set_health(503);
    eventually("backend a is ejected", || state(&zap, 0) == "ejected");
    assert_eq!(a.probes()[0].header("authorization"), Some("Bearer sk-probe"));
    assert_eq!(b.probes()[0].header("authorization"), None);
    (0..4).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 0.0);
    a.set_health(200);
    eventually("backend a is healthy", || state(&zap, 0) == "healthy");
    eventually("backend a gets requests again", || zap.chat(CHAT).text() == "a");
}

#[test]
fn a_probe_status_of_404_405_or_429_is_healthy() {
    for status in [404, 405, 429] {
        let a = Provider::named("a");
        a.set_health(status);
        let zap = Zap::with("[health]\ninterval_secs = 1\nfailure_threshold = 1", &[a.backend("a", "")]);
        eventually("two probes were sent", || a.probes().len() >= 2);
        assert_eq!(state(&zap, 0), "healthy", "{status}");
    }
}

#[test]
fn a_probe_with_a_refused_key_shows_the_backend_as_misconfigured() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    a.set_health(401);
    let zap = Zap::with(FAST, &[a.backend("a", "api_key = \"sk-CANARY\""), b.backend("b", "")]);
    eventually("the backend is misconfigured", || state(&zap, 0) == "misconfigured");
    assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 0.0);
    (0..3).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    a.set_health(200);
    eventually("the backend is healthy", || state(&zap, 0) == "healthy");
}

#[test]
fn no_probe_is_sent_while_real_requests_succeed() {
    let a = Provider::named("a");
    let zap = Zap::with(FAST, &[a.backend("a", "")]);
    eventually("the first probe is sent", || a.probes().len() == 1);
    let mut client = zap.client();
    let end = std::time::Instant::now() + std::time::Duration::from_millis(2_500);
    while std::time::Instant::now() < end {
        assert_eq!(client.chat("", CHAT).status, 200);
    }
    assert_eq!(a.probes().len(), 1);
    eventually("probes are sent again", || a.probes().len() > 1);
}

/// Asserts that a backend which treats chats by `answers` is still probed, and is ejected when its probes fail. The
/// clients disconnect before any content.
fn assert_ejected_by_probes(answers: impl Fn(&mut TcpStream) -> After + Send + Sync + 'static, body: &str) {
    let a = Provider::start(move |_, stream| answers(stream));
    let settings = format!("{FAST}failure_threshold = 2\n[retry]\nmax_retries = 0");
    let zap = Zap::with(&settings, &[a.backend("a", "")]);
    eventually("the backend is probed", || !a.probes().is_empty());
    a.set_health(503);
    let ends = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let since = std::time::Instant::now();
            for n in 0.. {
                if ends.load(Ordering::Relaxed) || since.elapsed() > 2 * TIMEOUT {
                    return;
                }
                let mut client = zap.client();
                // A model of its own, so that the strikes of requests eject nothing.
                client.post("/chat", "", body.replacen('{', &format!("{{\"model\":\"m{n}\","), 1));
                let leaves = std::time::Instant::now() + std::time::Duration::from_millis(20);
                while client.is_quiet() && std::time::Instant::now() < leaves {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
        });
        eventually("the backend is ejected", || state(&zap, 0) == "ejected");
        ends.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_head_without_a_complete_body_is_no_success() {
    // The backend sends a good head and then nothing, and the clients disconnect.
    assert_ejected_by_probes(
        |stream| {
            start_events(stream);
            wait_closed(stream);
            After::Close
        },
        STREAM,
    );
    // The backend begins a stream, which goes out at once, and sends no content.
    assert_ejected_by_probes(
        |stream| {
            start_events(stream);
            chunk(stream, "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n");
            wait_closed(stream);
            After::Close
        },
        STREAM,
    );
    // The stream ends at once, without a byte.
    assert_ejected_by_probes(
        |stream| {
            start_events(stream);
            end_chunks(stream);
            After::Keep
        },
        STREAM,
    );
    // The stream ends without an end event.
    assert_ejected_by_probes(
        |stream| {
            start_events(stream);
            chunk(stream, ": hi\n\n");
            end_chunks(stream);
            After::Keep
        },
        STREAM,
    );
    // A client error says nothing about the health of the backend.
    assert_ejected_by_probes(
        |stream| {
            reply(stream, 404, "", b"{}");
            After::Keep
        },
        CHAT,
    );
}

#[test]
fn failing_chats_eject_a_backend_whose_probes_succeed() {
    let a = Provider::fixed(500, "", "a failed");
    let b = Provider::named("b");
    let zap = Zap::with("[health]\ninterval_secs = 60", &[a.backend("a", ""), b.backend("b", "")]);
    eventually("both backends are probed", || !a.probes().is_empty() && !b.probes().is_empty());
    (0..12).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    assert_eq!(a.count(), 3, "three consecutive failures eject a backend");
    assert_eq!(state(&zap, 0), "ejected");
    assert_eq!(zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"upstream_error\"}"), 3.0);
    assert_eq!(zap.metric("zap_retries_total{backend=\"a\",reason=\"upstream_error\"}"), 3.0);
}

#[test]
fn with_all_backends_ejected_the_best_of_them_is_tried_once() {
    let a = Provider::fixed(500, "", "a failed");
    let zap = Zap::with(
        "[health]\ninterval_secs = 60\nfailure_threshold = 1\n[retry]\nbase_delay_ms = 1",
        &[a.backend("a", "")],
    );
    eventually("the backend is probed", || !a.probes().is_empty());
    assert_eq!(zap.chat(CHAT).text(), "a failed");
    assert_eq!(state(&zap, 0), "ejected");
    let before = a.count();
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.text()), (500, "a failed"));
    assert_eq!((a.count() - before, answer.header("x-zap-attempts")), (1, Some("1")));
    assert_eq!(zap.metric("zap_panic_picks_total"), 1.0);

    let gone = crate::support::provider::backend(Provider::closed_port(), "gone", "");
    let zap = Zap::with("[health]\nfailure_threshold = 1", &[gone]);
    eventually("the backend is ejected", || state(&zap, 0) == "ejected");
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_unreachable"));
}

#[test]
fn a_failure_that_is_delivered_to_the_client_still_counts_as_a_failure() {
    let a = Provider::fixed(500, "", "a failed");
    let settings = "[health]\ninterval_secs = 60\n[retry]\nmax_retries = 0";
    let zap = Zap::with(settings, &[a.backend("a", "")]);
    eventually("the probe has ended", || !a.probes().is_empty() && a.connections() == 0);
    for n in 0..3 {
        assert_eq!(state(&zap, 0), "healthy", "after {n}");
        assert_eq!(zap.chat(CHAT).text(), "a failed");
    }
    assert_eq!(state(&zap, 0), "ejected", "three consecutive failures eject a backend");

    // Of two targets both have failed, also the one whose response is delivered. If both give the same status, the
    // request is to blame.
    for (statuses, want) in [((500, 502), "ejected"), ((500, 500), "healthy")] {
        let (a, b) = (Provider::fixed(statuses.0, "", "failed"), Provider::fixed(statuses.1, "", "failed"));
        let settings = "[health]\ninterval_secs = 60\nfailure_threshold = 1\n[retry]\nmax_retries = 1";
        let zap = Zap::with(settings, &[a.backend("a", ""), b.backend("b", "")]);
        assert_eq!(zap.chat(CHAT).text(), "failed");
        assert_eq!((state(&zap, 0), state(&zap, 1)), (want.to_owned(), want.to_owned()), "{statuses:?}");
    }

    // A delivered failure does not replace a probe either.
    let a = Provider::fixed(500, "", "a failed");
    let settings = "[health]\ninterval_secs = 1\nfailure_threshold = 1000\n[retry]\nmax_retries = 0";
    let zap = Zap::with(settings, &[a.backend("a", "")]);
    eventually("probes are still sent", || {
        assert_eq!(zap.chat(CHAT).status, 500);
        a.probes().len() >= 3
    });
}

#[test]
fn with_all_backends_ejected_a_failed_try_is_retried_on_the_others() {
    let failing = Provider::fixed(500, "", "a failed");
    let b = Provider::named("b");
    let gone = crate::support::provider::backend(Provider::closed_port(), "c", "weight = 50");
    // With a backoff this long, a wait for it would be noticed.
    failing.set_health(500);
    b.set_health(500);
    let settings = "[health]\ninterval_secs = 60\nfailure_threshold = 1\n\
        [retry]\nbase_delay_ms = 600000\nmax_delay_ms = 600000";
    let backends = [failing.backend("a", "weight = 100"), b.backend("b", ""), gone];
    let zap = Zap::with(settings, &backends);
    (0..3).for_each(|i| eventually("the backend is ejected", || state(&zap, i) == "ejected"));
    for _ in 0..4 {
        assert_eq!(zap.chat(CHAT).text(), "b");
    }
    assert!(failing.count() > 0, "backend a is the best pick at first");
    zap.wait_until_idle();

    // Each backend is tried once, within `max_retries`; then the client gets the last response unchanged.
    let (a, b) = (Provider::fixed(500, "", "a failed"), Provider::fixed(502, "", "b failed"));
    let zap = all_ejected(&[a.backend("a", ""), b.backend("b", "")], &[&a, &b]);
    let answer = zap.chat(CHAT);
    assert!([500, 502].contains(&answer.status), "{}", answer.status);
    assert_eq!((answer.header("x-zap-attempts"), a.count(), b.count()), (Some("2"), 1, 1));
}

/// Starts Zap and waits until all backends are ejected.
fn all_ejected(backends: &[String], providers: &[&Provider]) -> Zap {
    providers.iter().for_each(|p| p.set_health(500));
    let zap = Zap::with("[health]\ninterval_secs = 60\nfailure_threshold = 1", backends);
    (0..backends.len()).for_each(|i| eventually("the backend is ejected", || state(&zap, i) == "ejected"));
    zap
}

#[test]
fn with_all_backends_ejected_one_below_its_limit_is_picked() {
    let gate = Gate::default();
    let held = gate.clone();
    let a = Provider::start(move |_, stream| {
        held.pass();
        reply(stream, 200, "", b"a");
        After::Keep
    });
    let b = Provider::named("b");
    let one = "max_in_flight = 1";
    let zap = all_ejected(&[a.backend("a", one)], &[&a]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    eventually("backend a has the request", || gate.waiting() == 1);
    let refused = zap.chat(CHAT);
    assert_eq!((refused.status, refused.code().as_str()), (503, "queue_full"), "{}", refused.text());
    gate.open(1);
    assert_eq!(client.response().text(), "a");

    let heavy = "max_in_flight = 1\nweight = 100";
    let zap = all_ejected(&[a.backend("a", heavy), b.backend("b", "")], &[&a, &b]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    eventually("backend a has the request", || gate.waiting() == 1);
    (0..3).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    gate.open(1);
    assert_eq!(client.response().text(), "a");
}

#[test]
fn requests_queued_for_a_backend_that_is_then_ejected_are_still_served() {
    // A status ejects the backend for the model, until a request succeeds; a closed connection ejects it as a whole,
    // until a probe succeeds.
    for (status, picks, after) in [(500, 1.0, "healthy"), (502, 3.0, "ejected")] {
        let gate = Gate::default();
        let (held, asked) = (gate.clone(), AtomicUsize::new(0));
        let a = Provider::start(move |_, stream| {
            held.pass();
            match (asked.fetch_add(1, Ordering::Relaxed), status) {
                (0, 502) => return After::Close,
                (0, _) => reply(stream, status, "", b"a failed"),
                _ => reply(stream, 200, "", b"a"),
            }
            After::Keep
        });
        let settings = "[health]\ninterval_secs = 60\nfailure_threshold = 1\n[retry]\nmax_retries = 0";
        let zap = Zap::with(settings, &[a.backend("a", "max_in_flight = 1")]);
        eventually("the probe has ended", || !a.probes().is_empty() && a.connections() == 0);
        let mut clients: Vec<_> = (0..4).map(|_| zap.client()).collect();
        for (i, client) in clients.iter_mut().enumerate() {
            client.post("/chat", "", CHAT);
            eventually("the request is at the backend or in the queue", || {
                gate.waiting() == 1 && zap.metric("zap_queue_depth") == i as f64
            });
        }
        gate.open(4);
        let answers: Vec<_> = clients.iter_mut().map(|c| c.response().status).collect();
        assert_eq!(answers, [status, 200, 200, 200]);
        assert_eq!(zap.metric("zap_panic_picks_total"), picks, "{status}");
        assert_eq!(state(&zap, 0), after, "{status}");
        zap.wait_until_idle();
    }
}

#[test]
fn a_request_whose_backend_is_ejected_meanwhile_moves_to_the_next_target() {
    for body in [CHAT, STREAM] {
        let gate = Gate::default();
        let held = gate.clone();
        let a = Provider::start(move |_, stream| {
            held.pass();
            reply(stream, 200, "", b"a");
            After::Keep
        });
        let b = Provider::named("b");
        let settings = "[health]\ninterval_secs = 1\nfailure_threshold = 1\n";
        let zap = Zap::with(settings, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
        let alone = Zap::with(settings, &[a.backend("a", "")]);
        let (mut client, mut other) = (zap.client(), alone.client());
        client.post("/chat", "", body);
        other.post("/chat", "", body);
        eventually("the backend has both requests", || a.count() == 2);
        a.set_health(500);
        let answer = client.response();
        assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("b", Some("2")), "{body}");
        eventually("the backend is ejected", || state(&alone, 0) == "ejected");
        gate.open(2);
        let answer = other.response();
        let stayed = (answer.text(), answer.header("x-zap-attempts"));
        assert_eq!(stayed, ("a", Some("1")), "where no target is left, the request stays");
        zap.wait_until_idle();
    }
}

#[test]
fn an_ejected_backend_keeps_its_quota_and_its_cooldown() {
    let a = Provider::named("a");
    let zap = all_ejected(&[a.backend("a", "requests_per_minute = 1")], &[&a]);
    assert_eq!(zap.chat(CHAT).text(), "a", "the only backend is tried although it is ejected");
    let refused = zap.chat(CHAT);
    assert_eq!((refused.status, refused.code().as_str()), (429, "upstream_rate_limited"));
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((50..=60).contains(&wait), "{wait}");
    assert_eq!(a.count(), 1);

    let a = Provider::fixed(429, "retry-after: 30\r\n", "slow down");
    let zap = all_ejected(&[a.backend("a", "")], &[&a]);
    let refused = zap.chat(CHAT);
    assert_eq!((refused.status, refused.text()), (429, "slow down"));
    assert_eq!(refused.header("retry-after"), Some("30"));
    let refused = zap.chat(CHAT);
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("30")));
    assert_eq!(a.count(), 1, "a backend that cools down is not tried");

    // A backend that is ejected for the model alone.
    let asked = AtomicUsize::new(0);
    let a = Provider::start(move |_, stream| {
        match asked.fetch_add(1, Ordering::Relaxed) {
            0 => reply(stream, 500, "", b"a failed"),
            _ => reply(stream, 429, "retry-after: 30\r\n", b"slow down"),
        }
        After::Keep
    });
    let settings = "[health]\ninterval_secs = 60\nfailure_threshold = 1";
    let zap = Zap::with(settings, &[a.backend("a", "")]);
    let sdk = "x-stainless-retry-count: 1\r\n";
    assert_eq!(zap.client().chat(sdk, CHAT).status, 500, "one try a target");
    assert_eq!(state(&zap, 0), "ejected");
    for tries in [2, 2] {
        let refused = zap.chat(CHAT);
        assert_eq!((refused.status, refused.header("retry-after")), (429, Some("30")));
        assert_eq!(a.count(), tries, "a backend that cools down is not tried");
    }
}

#[test]
fn a_provider_that_comes_back_gets_requests_again() {
    let (address, socket) = Provider::bound_port();
    let b = Provider::named("b");
    let zap = Zap::with(FAST, &[crate::support::provider::backend(address, "a", ""), b.backend("b", "")]);
    (0..6).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    socket.listen(16).unwrap();
    let _a = Provider::start_on(socket.into(), |_, stream| {
        reply(stream, 200, "", b"a");
        After::Keep
    });
    eventually("backend a serves a request", || zap.chat(CHAT).text() == "a");
}

#[test]
fn a_backend_whose_checks_are_refused_is_asked_last_and_serves() {
    let is_broken = Arc::new(AtomicBool::new(false));
    let breaks = is_broken.clone();
    let a = Provider::named("a");
    let b = Provider::start(move |_, stream| {
        reply(stream, if breaks.load(Ordering::SeqCst) { 500 } else { 200 }, "", b"b");
        After::Keep
    });
    a.set_health(401);
    let settings = "[health]\ninterval_secs = 1\nfailure_threshold = 1\n";
    let zap = Zap::with(settings, &[a.backend("a", "api_key = \"sk-CANARY\""), b.backend("b", "")]);
    eventually("the checks of a are refused", || state(&zap, 0) == "misconfigured");
    (0..4).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    b.set_health(503);
    eventually("b is ejected", || state(&zap, 1) == "ejected");
    assert_eq!(zap.chat(CHAT).text(), "b", "in panic mode the ejected one is asked first");
    is_broken.store(true, Ordering::SeqCst);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("a", Some("2")));
}

#[test]
fn the_state_of_a_configured_model_is_in_metrics_and_status() {
    let a = Provider::start(|seen, stream| {
        let is_broken = String::from_utf8_lossy(&seen.body).contains("broken");
        reply(stream, if is_broken { 500 } else { 200 }, "", b"a");
        After::Keep
    });
    let b = Provider::named("b");
    let models = "models = [\"good\", \"broken\"]\n";
    let settings = "[health]\ninterval_secs = 600\nfailure_threshold = 1\n";
    let zap =
        Zap::with(settings, &[a.backend("a", models), b.backend("b", &format!("{models}priority = 1"))]);
    for model in ["broken", "good"] {
        assert_eq!(zap.chat(format!("{{\"messages\":[],\"model\":\"{model}\"}}")).status, 200);
    }
    let up = |b: &str, model: &str| zap.metric(&format!("zap_model_up{{backend=\"{b}\",model=\"{model}\"}}"));
    assert_eq!([up("a", "good"), up("a", "broken"), up("b", "broken")], [1.0, 0.0, 1.0]);
    assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 1.0, "another model serves");
    let models = zap.client().get("/status").json()["backends"][0]["models"].clone();
    assert_eq!(models, serde_json::json!({ "good": "healthy", "broken": "ejected" }));
}

#[test]
fn a_backend_may_have_its_own_path_and_interval() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let own = "health = { path = \"/own?x=1\", interval_secs = 1 }";
    let zap = Zap::with("[health]\ninterval_secs = 600\n", &[a.backend("a", own), b.backend("b", "")]);
    eventually("backend a is checked by its own interval", || a.probes().len() >= 2);
    assert_eq!(a.probes()[0].line, "GET /own?x=1 HTTP/1.1");
    assert_eq!(b.probes().len(), 1);
    drop(zap);
}

#[test]
fn without_checks_real_requests_eject_a_backend_and_bring_it_back() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let b = Provider::named("b");
    let settings =
        "[health]\ninterval_secs = 1\nfailure_threshold = 1\n[retry]\nbase_delay_ms = 1\nmax_delay_ms = 1\n";
    let unchecked = crate::support::provider::backend(address, "a", "health = { enabled = false }");
    let zap = Zap::with(settings, &[unchecked, b.backend("b", "priority = 1")]);
    let since = std::time::Instant::now();
    assert_eq!((zap.chat(CHAT).text(), state(&zap, 0).as_str()), ("b", "ejected"));
    let failures = || zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"upstream_unreachable\"}");
    assert_eq!(failures(), 1.0);
    // Nobody tries it for a second, then one request does, in vain; the next trial is two seconds later.
    eventually("one request tries the backend", || {
        assert_eq!(zap.chat(CHAT).text(), "b");
        failures() == 2.0
    });
    let tried = since.elapsed();
    assert!(tried >= std::time::Duration::from_secs(1), "{tried:?}");
    (0..20).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    let seen = (failures(), state(&zap, 0));
    // On a slow machine the next trial may have come meanwhile.
    if since.elapsed() < std::time::Duration::from_secs(3) {
        assert_eq!(seen, (2.0, "ejected".to_owned()));
    }
    let a = Provider::start_on(std::net::TcpListener::bind(address).unwrap(), |_, stream| {
        reply(stream, 200, "content-type: application/json\r\n", b"a");
        After::Keep
    });
    eventually("the first answer brings it back", || zap.chat(CHAT).text() == "a");
    assert_eq!(state(&zap, 0), "healthy");
    (0..5).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "a"));
    assert_eq!(a.probes().len(), 0, "it was never checked");
}

#[test]
fn a_reload_switches_the_checks_off_and_on() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let file = crate::support::File::new();
    let settings = "[health]\ninterval_secs = 1\nfailure_threshold = 1\n";
    let backends = |more: &str| [a.backend("a", more), b.backend("b", "")];
    a.set_health(500);
    let zap = Zap::with_file(&file, settings, &backends(""));
    eventually("the check ejects the backend", || state(&zap, 0) == "ejected");
    // What only the check refuses is served again.
    file.write(settings, &backends("health = { enabled = false }"));
    assert!(zap.reload());
    eventually("a real request brings it back", || {
        zap.chat(CHAT);
        state(&zap, 0) == "healthy"
    });
    let (probes, checks) = (a.probes().len(), b.probes().len());
    eventually("the other backend is checked twice", || b.probes().len() >= checks + 2);
    assert_eq!(a.probes().len(), probes);
    file.write(settings, &backends("health = { enabled = true }"));
    assert!(zap.reload());
    eventually("the check ejects it again", || state(&zap, 0) == "ejected");
}

/// A response that is about the request, or a client that has left, says nothing about the target of a trial.
#[test]
fn a_trial_that_ends_without_a_result_is_given_to_the_next_request() {
    let body = |content: &str| CHAT.replace("hi", content);
    let is_limited = AtomicBool::new(true);
    let a = Provider::start(move |seen, stream| {
        let is_about = |content: &str| String::from_utf8_lossy(&seen.body).contains(content);
        match () {
            () if is_limited.swap(false, Ordering::SeqCst) => {
                reply(stream, 429, "retry-after: 1\r\n", b"wait")
            }
            () if is_about("bad") => reply(stream, 400, "", b"{}"),
            () if is_about("unknown") => reply(stream, 501, "", b"{}"),
            () if is_about("slow") => {
                wait_closed(stream);
                return After::Close;
            }
            () => reply(stream, 200, "", b"a"),
        }
        After::Keep
    });
    let b = Provider::named("b");
    let settings = "[health]\ninterval_secs = 600\n";
    let zap = Zap::with(settings, &[a.backend("a", ""), b.backend("b", "priority = 1")]);
    assert_eq!(zap.chat(CHAT).text(), "b");
    // The gate lets one request pass in a second, unless that one ends without a result.
    eventually("the cooldown ends", || zap.chat(body("bad")).status == 400);
    for content in ["bad", "unknown"] {
        let refused = zap.chat(body(content));
        assert!(matches!(refused.status, 400 | 501), "{content}: {}", refused.text());
    }
    let asked = a.count();
    let mut client = zap.client();
    client.post("/chat", "", body("slow"));
    eventually("the trial is at the backend", || a.count() > asked);
    drop(client);
    zap.wait_until_idle();
    assert_eq!(zap.chat(CHAT).text(), "a");
}

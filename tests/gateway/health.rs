//! Who is asked whether it lives, and what follows.

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::support::provider::{After, Gate, chunk, end_chunks, reply, start_events, wait_closed};
use crate::support::{CHAT, PATIENCE, Provider, STREAM, Zap, eventually};

fn state(zap: &Zap, i: usize) -> String {
    zap.client().get("/status").json()["backends"][i]["state"].as_str().unwrap().to_owned()
}

const FAST: &str = "[health]\ninterval_secs = 1\n";

#[test]
fn probes_carry_the_key_and_take_a_backend_out_and_back() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let settings = "[health]\ninterval_secs = 1\nfailure_threshold = 2\n";
    let zap = Zap::with(settings, &[a.backend("a", "api_key = \"sk-probe\""), b.backend("b", "")]);
    a.set_health(503);
    eventually("a is out", || state(&zap, 0) == "ejected");
    assert_eq!(a.probes()[0].header("authorization"), Some("Bearer sk-probe"));
    assert_eq!(b.probes()[0].header("authorization"), None);
    (0..4).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 0.0);
    a.set_health(200);
    eventually("a is back", || state(&zap, 0) == "healthy");
    eventually("a serves again", || zap.chat(CHAT).text() == "a");
}

#[test]
fn an_answer_of_404_405_or_429_is_alive() {
    for status in [404, 405, 429] {
        let a = Provider::named("a");
        a.set_health(status);
        let zap = Zap::with("[health]\ninterval_secs = 1\nfailure_threshold = 1", &[a.backend("a", "")]);
        eventually("it was probed twice", || a.probes().len() >= 2);
        assert_eq!(state(&zap, 0), "healthy", "{status}");
    }
}

#[test]
fn a_probe_whose_key_is_refused_shows_a_misconfigured_backend() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    a.set_health(401);
    let zap = Zap::with(FAST, &[a.backend("a", "api_key = \"sk-CANARY\""), b.backend("b", "")]);
    eventually("it shows", || state(&zap, 0) == "misconfigured");
    assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 0.0);
    (0..3).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    a.set_health(200);
    eventually("it is taken back", || state(&zap, 0) == "healthy");
}

#[test]
fn no_probe_is_sent_while_real_traffic_goes_well() {
    let a = Provider::named("a");
    let zap = Zap::with(FAST, &[a.backend("a", "")]);
    eventually("the first probe came", || a.probes().len() == 1);
    let mut client = zap.client();
    let end = std::time::Instant::now() + std::time::Duration::from_millis(2_500);
    while std::time::Instant::now() < end {
        assert_eq!(client.chat("", CHAT).status, 200);
    }
    assert_eq!(a.probes().len(), 1);
    eventually("probes begin again", || a.probes().len() > 1);
}

/// Whether a backend of these `answers` to chats is checked on and goes out when its checks fail.
fn is_found_out(answers: impl Fn(&mut TcpStream) -> After + Send + Sync + 'static, body: &str) {
    let a = Provider::start(move |_, stream| answers(stream));
    let settings = format!("{FAST}failure_threshold = 2\n[retry]\nmax_retries = 0");
    let zap = Zap::with(&settings, &[a.backend("a", "")]);
    eventually("it was checked", || !a.probes().is_empty());
    a.set_health(503);
    let ends = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let since = std::time::Instant::now();
            while !ends.load(Ordering::Relaxed) && since.elapsed() < 2 * PATIENCE {
                let mut client = zap.client();
                client.post("/chat", "", body);
                let _ = client.head();
                // It leaves before any content.
            }
        });
        eventually("it is out", || state(&zap, 0) == "ejected");
        ends.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_head_without_a_body_that_ends_whole_is_no_success() {
    // Silence behind a good head, and clients that give up.
    is_found_out(
        |stream| {
            start_events(stream);
            wait_closed(stream);
            After::Close
        },
        STREAM,
    );
    // Streams that end at once, without a byte.
    is_found_out(
        |stream| {
            start_events(stream);
            end_chunks(stream);
            After::Keep
        },
        STREAM,
    );
    // Streams that end without saying so.
    is_found_out(
        |stream| {
            start_events(stream);
            chunk(stream, ": hi\n\n");
            end_chunks(stream);
            After::Keep
        },
        STREAM,
    );
    // An error of the client says nothing about the backend.
    is_found_out(
        |stream| {
            reply(stream, 404, "", b"{}");
            After::Keep
        },
        CHAT,
    );
}

#[test]
fn failing_chats_take_a_backend_out_although_its_probes_are_fine() {
    let a = Provider::fixed(500, "", "a failed");
    let b = Provider::named("b");
    let zap = Zap::with("[health]\ninterval_secs = 60", &[a.backend("a", ""), b.backend("b", "")]);
    eventually("both were probed", || !a.probes().is_empty() && !b.probes().is_empty());
    (0..12).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    assert_eq!(a.count(), 3, "three failures in a row are enough");
    assert_eq!(state(&zap, 0), "ejected");
    assert_eq!(zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"upstream_error\"}"), 3.0);
    assert_eq!(zap.metric("zap_retries_total{backend=\"a\",reason=\"upstream_error\"}"), 3.0);
}

#[test]
fn when_all_are_out_the_least_bad_is_asked_once() {
    let a = Provider::fixed(500, "", "a failed");
    let zap = Zap::with(
        "[health]\ninterval_secs = 60\nfailure_threshold = 1\n[retry]\nbase_delay_ms = 1",
        &[a.backend("a", "")],
    );
    eventually("it was probed", || !a.probes().is_empty());
    assert_eq!(zap.chat(CHAT).text(), "a failed");
    assert_eq!(state(&zap, 0), "ejected");
    let before = a.count();
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.text()), (500, "a failed"));
    assert_eq!((a.count() - before, answer.header("x-zap-attempts")), (1, Some("1")));
    assert_eq!(zap.metric("zap_panic_picks_total"), 1.0);

    let nobody = crate::support::provider::backend(Provider::nobody(), "gone", "");
    let zap = Zap::with("[health]\nfailure_threshold = 1", &[nobody]);
    eventually("it is out", || state(&zap, 0) == "ejected");
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_unreachable"));
}

#[test]
fn a_failure_that_is_delivered_is_no_success() {
    let a = Provider::fixed(500, "", "a failed");
    let settings = "[health]\ninterval_secs = 60\n[retry]\nmax_retries = 0";
    let zap = Zap::with(settings, &[a.backend("a", "")]);
    eventually("the probe is over", || !a.probes().is_empty() && a.connections() == 0);
    for n in 0..3 {
        assert_eq!(state(&zap, 0), "healthy", "after {n}");
        assert_eq!(zap.chat(CHAT).text(), "a failed");
    }
    assert_eq!(state(&zap, 0), "ejected", "three failures in a row are enough");

    // Nor does it stand for a health check.
    let a = Provider::fixed(500, "", "a failed");
    let settings = "[health]\ninterval_secs = 1\nfailure_threshold = 1000\n[retry]\nmax_retries = 0";
    let zap = Zap::with(settings, &[a.backend("a", "")]);
    eventually("it is probed on", || {
        assert_eq!(zap.chat(CHAT).status, 500);
        a.probes().len() >= 3
    });
}

#[test]
fn where_all_are_out_the_others_are_asked_too() {
    let failing = Provider::fixed(500, "", "a failed");
    let b = Provider::named("b");
    let gone = crate::support::provider::backend(Provider::nobody(), "c", "weight = 50");
    // A long backoff would show.
    failing.set_health(500);
    b.set_health(500);
    let settings = "[health]\ninterval_secs = 60\nfailure_threshold = 1\n\
        [retry]\nbase_delay_ms = 600000\nmax_delay_ms = 600000";
    let backends = [failing.backend("a", "weight = 100"), b.backend("b", ""), gone];
    let zap = Zap::with(settings, &backends);
    (0..3).for_each(|i| eventually("it is out", || state(&zap, i) == "ejected"));
    for _ in 0..4 {
        assert_eq!(zap.chat(CHAT).text(), "b");
    }
    assert!(failing.count() > 0, "it was the least bad at first");
    zap.is_clean();

    // No further than max_retries; then the last answer as it came.
    let (a, b) = (Provider::fixed(500, "", "a failed"), Provider::fixed(502, "", "b failed"));
    let zap = all_out(&[a.backend("a", ""), b.backend("b", "")], &[&a, &b]);
    let answer = zap.chat(CHAT);
    assert!([500, 502].contains(&answer.status), "{}", answer.status);
    assert_eq!((answer.header("x-zap-attempts"), a.count(), b.count()), (Some("2"), 1, 1));
}

/// Zap with backends that are out.
fn all_out(backends: &[String], providers: &[&Provider]) -> Zap {
    providers.iter().for_each(|p| p.set_health(500));
    let zap = Zap::with("[health]\ninterval_secs = 60\nfailure_threshold = 1", backends);
    (0..backends.len()).for_each(|i| eventually("it is out", || state(&zap, i) == "ejected"));
    zap
}

#[test]
fn of_those_that_are_out_one_with_room_is_asked() {
    let gate = Gate::default();
    let held = gate.clone();
    let a = Provider::start(move |_, stream| {
        held.pass();
        reply(stream, 200, "", b"a");
        After::Keep
    });
    let b = Provider::named("b");
    let one = "max_in_flight = 1";
    let zap = all_out(&[a.backend("a", one)], &[&a]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    eventually("a has it", || gate.waiting() == 1);
    let refused = zap.chat(CHAT);
    assert_eq!((refused.status, refused.code().as_str()), (503, "queue_full"), "{}", refused.text());
    gate.open(1);
    assert_eq!(client.response().text(), "a");

    let heavy = "max_in_flight = 1\nweight = 100";
    let zap = all_out(&[a.backend("a", heavy), b.backend("b", "")], &[&a, &b]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    eventually("a has it", || gate.waiting() == 1);
    (0..3).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    gate.open(1);
    assert_eq!(client.response().text(), "a");
}

#[test]
fn who_waited_for_a_backend_that_went_out_is_served_by_it_all_the_same() {
    let gate = Gate::default();
    let (held, asked) = (gate.clone(), AtomicUsize::new(0));
    let a = Provider::start(move |_, stream| {
        held.pass();
        match asked.fetch_add(1, Ordering::Relaxed) {
            0 => reply(stream, 500, "", b"a failed"),
            _ => reply(stream, 200, "", b"a"),
        }
        After::Keep
    });
    let settings = "[health]\ninterval_secs = 60\nfailure_threshold = 1\n[retry]\nmax_retries = 0";
    let zap = Zap::with(settings, &[a.backend("a", "max_in_flight = 1")]);
    eventually("the probe is over", || !a.probes().is_empty() && a.connections() == 0);
    let mut clients: Vec<_> = (0..4).map(|_| zap.client()).collect();
    for (i, client) in clients.iter_mut().enumerate() {
        client.post("/chat", "", CHAT);
        eventually("it has its place", || gate.waiting() == 1 && zap.metric("zap_queue_depth") == i as f64);
    }
    gate.open(4);
    let answers: Vec<_> = clients.iter_mut().map(|c| c.response().status).collect();
    assert_eq!(answers, [500, 200, 200, 200]);
    assert_eq!(zap.metric("zap_panic_picks_total"), 3.0);
    zap.is_clean();
}

#[test]
fn whoever_is_out_keeps_its_quota_and_its_peace() {
    let a = Provider::named("a");
    let zap = all_out(&[a.backend("a", "requests_per_minute = 1")], &[&a]);
    assert_eq!(zap.chat(CHAT).text(), "a", "the least bad is asked");
    let refused = zap.chat(CHAT);
    assert_eq!((refused.status, refused.code().as_str()), (429, "upstream_rate_limited"));
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((50..=60).contains(&wait), "{wait}");
    assert_eq!(a.count(), 1);

    let a = Provider::fixed(429, "retry-after: 30\r\n", "slow down");
    let zap = all_out(&[a.backend("a", "")], &[&a]);
    assert_eq!(zap.chat(CHAT).status, 429);
    let refused = zap.chat(CHAT);
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("30")));
    assert_eq!(a.count(), 1, "it wants to be left alone");
}

#[test]
fn a_provider_that_comes_back_is_found() {
    let nobody = Provider::nobody();
    let b = Provider::named("b");
    let zap = Zap::with(FAST, &[crate::support::provider::backend(nobody, "a", ""), b.backend("b", "")]);
    (0..6).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    let listener = std::net::TcpListener::bind(nobody).unwrap();
    let _a = Provider::start_on(listener, |_, stream| {
        reply(stream, 200, "", b"a");
        After::Keep
    });
    eventually("it serves", || zap.chat(CHAT).text() == "a");
}

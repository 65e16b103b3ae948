//! Providers without room for a request: how long Zap leaves a target alone, and what a request does meanwhile.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::provider::{After, reply};
use crate::support::{CHAT, Provider, Zap, eventually};

#[test]
fn a_429_cools_down_its_backend_and_is_not_a_failure() {
    for header in ["retry-after: 30\r\n", "retry-after-ms: 30000\r\n", ""] {
        let a = Provider::fixed(429, header, "slow down");
        let b = Provider::named("b");
        let zap =
            Zap::with("[health]\nfailure_threshold = 1", &[a.backend("a", "weight = 9"), b.backend("b", "")]);
        (0..6).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
        assert_eq!(a.count(), 1, "{header}");
        assert_eq!(zap.metric("zap_backend_cooling{backend=\"a\"}"), 1.0);
        assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 1.0);
        let secs = zap.client().get("/status").json()["backends"][0]["cooling_secs"].as_f64().unwrap();
        let want = if header.is_empty() { 5.0 } else { 30.0 };
        assert!(secs > want - 4.0 && secs <= want, "{secs}");
    }
}

#[test]
fn if_all_backends_send_429_the_last_is_delivered_with_the_shortest_wait() {
    let a = Provider::fixed(429, "retry-after: 40\r\n", "a");
    let b = Provider::fixed(429, "retry-after: 50\r\nretry-after-ms: 50000\r\n", "b");
    let zap = Zap::with("", &[a.backend("a", "weight = 2"), b.backend("b", "")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.text()), (429, "b"));
    assert_eq!((answer.header("retry-after"), answer.header("retry-after-ms")), (Some("40"), None));
    // Both cool down for longer than `max_wait_secs`: the next request is refused at once and sent to no backend.
    let since = Instant::now();
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.code().as_str()), (429, "upstream_rate_limited"));
    assert_eq!(answer.header("x-zap-attempts"), Some("0"));
    assert_eq!(answer.header("retry-after"), Some("40"));
    assert!(since.elapsed() < Duration::from_secs(2));
    assert_eq!((a.count(), b.count()), (1, 1));
}

#[test]
fn a_request_waits_for_a_short_cooldown() {
    let n = AtomicUsize::new(0);
    let a = Provider::start(move |_, stream| {
        match n.fetch_add(1, Ordering::SeqCst) {
            0 | 2 => reply(stream, 429, "retry-after: 1\r\n", b"wait"),
            _ => reply(stream, 200, "", b"served"),
        }
        After::Keep
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    let early = "the backend got the request before its cooldown ended";
    // The request that met the 429 waits.
    let since = Instant::now();
    let answer = zap.chat(CHAT);
    assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("served", Some("2")));
    assert!(since.elapsed() > Duration::from_millis(900), "{early}");
    assert_eq!(zap.metric("zap_queue_wait_seconds_count"), 1.0);
    // A request that comes meanwhile waits with it.
    let since = Instant::now();
    let mut clients = [zap.client(), zap.client()];
    for (client, depth) in clients.iter_mut().zip([1.0, 2.0]) {
        client.post("/chat", "", CHAT);
        eventually("the request is queued", || zap.metric("zap_queue_depth") == depth);
    }
    assert_eq!(a.count(), 3);
    let mut attempts = clients.each_mut().map(|client| {
        let answer = client.response();
        assert_eq!(answer.text(), "served");
        answer.header("x-zap-attempts").unwrap().to_owned()
    });
    attempts.sort_unstable();
    assert_eq!(attempts, ["1", "2"]);
    assert!(since.elapsed() > Duration::from_millis(900), "{early}");
    assert_eq!((a.count(), zap.metric("zap_queue_wait_seconds_count")), (5, 3.0));
    zap.wait_until_idle();
}

#[test]
fn without_retries_a_429_is_delivered_at_once() {
    let a = Provider::fixed(429, "retry-after: 1\r\n", "wait");
    let zap = Zap::with("[retry]\nmax_retries = 0", &[a.backend("a", "")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.text(), answer.header("x-zap-attempts")), (429, "wait", Some("1")));
    assert_eq!((a.count(), zap.metric("zap_queue_wait_seconds_count")), (1, 0.0));
    zap.wait_until_idle();
}

#[test]
fn a_429_that_states_no_time_at_all_is_asked_again_at_a_slow_pace_and_delivered_after_max_wait_secs() {
    for headers in ["retry-after: 0\r\n", "retry-after-ms: 1\r\n"] {
        let a = Provider::fixed(429, headers, "wait");
        let zap = Zap::with("[queue]\nmax_wait_secs = 1", &[a.backend("a", "")]);
        let since = Instant::now();
        let answer = zap.chat(CHAT);
        assert_eq!((answer.status, answer.text()), (429, "wait"), "{headers}");
        let took = since.elapsed();
        assert!(took > Duration::from_millis(500) && took < Duration::from_secs(3), "{took:?}");
        assert!((3..=10).contains(&a.count()), "{} requests", a.count());
        zap.wait_until_idle();
    }
}

#[test]
fn a_backend_with_no_requests_remaining_gets_none_until_its_reset() {
    let n = AtomicUsize::new(0);
    let a = Provider::start(move |_, stream| {
        let headers = match n.fetch_add(1, Ordering::SeqCst) {
            0 => "x-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 3s\r\n",
            _ => "x-ratelimit-remaining-requests: 9\r\n",
        };
        reply(stream, 200, headers, b"a");
        After::Keep
    });
    let b = Provider::named("b");
    let zap = Zap::with("", &[a.backend("a", "weight = 9"), b.backend("b", "")]);
    assert_eq!(zap.chat(CHAT).text(), "a");
    let since = Instant::now();
    let mut client = zap.client();
    while since.elapsed() < Duration::from_millis(2_900) {
        assert_eq!(client.chat("", CHAT).text(), "b");
    }
    assert_eq!(a.count(), 1, "no request before the reset, 3 s later");
    assert_eq!(zap.metric("zap_backend_cooling{backend=\"a\"}"), 1.0);
    eventually("backend a serves requests again", || zap.chat(CHAT).text() == "a");
}

/// Case 28 of the review: `Retry-After` decides alone on a 429; a limit of 0 and a negative rest say nothing.
#[test]
fn an_empty_daily_limit_does_not_close_a_backend_for_the_day() {
    for (headers, has_pace) in [
        (
            "retry-after-ms: 200\r\nx-ratelimit-remaining-requests-day: 0\r\nx-ratelimit-reset-requests-day: 86340\r\n",
            false,
        ),
        (
            "retry-after-ms: 200\r\nx-ratelimit-limit-tokens: 0\r\nx-ratelimit-remaining-tokens: 0\r\nx-ratelimit-reset-tokens: 1h\r\n",
            false,
        ),
        (
            "x-ratelimit-limit-requests: 18000\r\nx-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 1h\r\n",
            true,
        ),
    ] {
        let n = AtomicUsize::new(0);
        let a = Provider::start(move |_, stream| {
            match n.fetch_add(1, Ordering::SeqCst) {
                0 => reply(stream, 429, headers, b"a"),
                _ => reply(
                    stream,
                    200,
                    "x-ratelimit-remaining-requests: -1\r\nx-ratelimit-reset-requests: 1h\r\n",
                    b"a",
                ),
            }
            After::Keep
        });
        let b = Provider::named("b");
        let zap = Zap::with("", &[a.backend("a", ""), b.backend("b", "priority = 1")]);
        assert_eq!(zap.chat(CHAT).text(), "b");
        assert_eq!(zap.metric("zap_backend_cooling{backend=\"a\"}"), 1.0, "{headers}");
        eventually("backend a serves requests again", || zap.chat(CHAT).text() == "a");
        if has_pace {
            // The provider's bucket gets a unit each 200 ms, so backend a gets one request each 200 ms.
            let (since, before) = (Instant::now(), a.count());
            while since.elapsed() < Duration::from_millis(1_100) {
                zap.chat(CHAT);
                std::thread::sleep(Duration::from_millis(5));
            }
            let (got, units) = (a.count() - before, since.elapsed().as_millis() as usize / 200);
            assert!(got >= 2 && got <= units + 1, "{got} requests in {units} units");
            // Nobody has come for a whole unit: the wait is over.
            std::thread::sleep(Duration::from_millis(450));
        }
        (0..4).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "a", "a negative rest says nothing"));
    }
}

#[test]
fn a_backend_cools_down_for_the_refused_model_only() {
    let a = Provider::start(|seen, stream| {
        match String::from_utf8_lossy(&seen.body).contains("busy") {
            true => reply(stream, 429, "retry-after: 30\r\n", b"a"),
            false => reply(stream, 200, "", b"a"),
        }
        After::Keep
    });
    let b = Provider::named("b");
    let zap = Zap::with("", &[a.backend("a", "weight = 9"), b.backend("b", "")]);
    let chat = |model: &str| zap.chat(format!("{{\"messages\":[],\"model\":\"{model}\"}}")).text().to_owned();
    assert_eq!(chat("busy"), "b");
    let asked = a.count();
    (0..9).for_each(|_| assert_eq!(chat("busy"), "b"));
    assert_eq!(a.count(), asked);
    assert!((0..9).filter(|_| chat("free") == "a").count() >= 8);
}

#[test]
fn the_delay_in_the_body_of_a_429_is_waited_for() {
    let asked = AtomicUsize::new(0);
    let a = Provider::start(move |_, stream| {
        let body = r#"[{"error":{"code":429,"details":[{"retryDelay":"0.7s"}]}}]"#;
        match asked.fetch_add(1, Ordering::SeqCst) {
            0 => reply(stream, 429, "", body.as_bytes()),
            _ => reply(stream, 200, "", b"a"),
        }
        After::Keep
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    let since = Instant::now();
    let answer = zap.chat(CHAT);
    assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("a", Some("2")));
    let took = since.elapsed();
    assert!(took > Duration::from_millis(650) && took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn a_request_that_an_sdk_sends_again_is_tried_once_at_each_target() {
    let (a, b) = (Provider::fixed(500, "", "a"), Provider::fixed(502, "", "b"));
    let zap = Zap::with("", &[a.backend("a", ""), b.backend("b", "")]);
    for (count, attempts) in [("0", "3"), ("1", "2"), ("2", "2")] {
        let answer = zap.client().chat(&format!("x-stainless-retry-count: {count}\r\n"), CHAT);
        assert_eq!(answer.header("x-zap-attempts"), Some(attempts), "{count}");
    }
}

#[test]
fn one_request_asks_a_provider_that_names_no_wait_a_few_times_only() {
    let a = Provider::fixed(429, "retry-after: 0\r\n", "wait");
    let zap = Zap::with("[queue]\nmax_wait_secs = 2", &[a.backend("a", "")]);
    assert_eq!(zap.chat(CHAT).status, 429);
    assert!(a.count() <= 6, "{}", a.count());
    let before = a.count();
    let zap = Zap::with("", &[a.backend("a", "")]);
    assert_eq!(zap.client().chat("x-stainless-retry-count: 1\r\n", CHAT).status, 429);
    assert_eq!(a.count(), before + 1, "the SDK retries by itself");
}

#[test]
fn a_429_from_every_provider_costs_a_try_each() {
    let all: Vec<_> = (0..9).map(|_| Provider::fixed(429, "retry-after: 60\r\n", "wait")).collect();
    let backends: Vec<_> = all.iter().enumerate().map(|(i, a)| a.backend(&format!("b{i}"), "")).collect();
    let answer = Zap::with("[retry]\nmax_retries = 2", &backends).chat(CHAT);
    assert_eq!((answer.status, answer.header("x-zap-attempts")), (429, Some("3")));
    assert_eq!(all.iter().map(Provider::count).sum::<usize>(), 3);
}

#[test]
fn a_request_that_meets_a_503_with_retry_after_waits_like_others() {
    let asked = AtomicUsize::new(0);
    let a = Provider::start(move |_, stream| {
        match asked.fetch_add(1, Ordering::SeqCst) {
            0 => reply(stream, 503, "retry-after: 1\r\n", b"later"),
            _ => reply(stream, 200, "", b"a"),
        }
        After::Keep
    });
    let answer = Zap::with("", &[a.backend("a", "")]).chat(CHAT);
    assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("a", Some("2")));
}

#[test]
fn a_provider_with_few_slots_is_kept_busy_and_healthy() {
    const SLOTS: usize = 4;
    let (busy, served, refused) =
        (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counts = (served.clone(), refused.clone());
    let a = Provider::start(move |_, stream| {
        if busy.fetch_add(1, Ordering::SeqCst) < SLOTS {
            std::thread::sleep(Duration::from_millis(100));
            counts.0.fetch_add(1, Ordering::SeqCst);
            // The slot is free before the client can know of it.
            busy.fetch_sub(1, Ordering::SeqCst);
            reply(stream, 200, "", b"ok");
        } else {
            busy.fetch_sub(1, Ordering::SeqCst);
            counts.1.fetch_add(1, Ordering::SeqCst);
            reply(stream, 503, "", b"queue full");
        }
        After::Keep
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    // A 503 means "busy" only of a provider that has just served a request.
    assert_eq!(zap.chat(CHAT).status, 200);
    let since = Instant::now();
    let statuses: Vec<Vec<u16>> = std::thread::scope(|scope| {
        let run = || {
            let (mut client, mut statuses) = (zap.client(), Vec::new());
            while since.elapsed() < Duration::from_secs(4) {
                statuses.push(client.chat("", CHAT).status);
            }
            statuses
        };
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(run)).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let possible = since.elapsed().as_millis() as usize / 100 * SLOTS;
    let (served, refused) = (served.load(Ordering::SeqCst), refused.load(Ordering::SeqCst));
    assert!(statuses.iter().flatten().all(|status| *status == 200), "{statuses:?}");
    assert!(served * 2 >= possible, "{served} of {possible} served, {refused} refused");
    assert_eq!(zap.client().get("/status").json()["backends"][0]["state"], "healthy");
    assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 1.0);
}

#[test]
fn a_burst_at_targets_that_cool_for_a_second_is_served_whole() {
    let cooling = || {
        let (first, refused) = (Mutex::new(None), Arc::new(Mutex::new(Vec::new())));
        let theirs = refused.clone();
        let provider = Provider::start(move |seen, stream| {
            let first = *first.lock().unwrap().get_or_insert_with(Instant::now);
            match first.elapsed() < Duration::from_secs(1) {
                true => {
                    theirs.lock().unwrap().push(seen.header("x-request-id").unwrap().to_owned());
                    reply(stream, 429, "retry-after: 1\r\n", b"wait");
                }
                false => reply(stream, 200, "", b"ok"),
            }
            After::Keep
        });
        (provider, refused)
    };
    let ((a, of_a), (b, of_b)) = (cooling(), cooling());
    let zap = Zap::with("", &[a.backend("a", ""), b.backend("b", "")]);
    let mut clients: Vec<_> = (0..40).map(|_| zap.client()).collect();
    for (i, client) in clients.iter_mut().enumerate() {
        client.post("/chat", &format!("x-request-id: r{i}\r\n"), CHAT);
    }
    let statuses: Vec<u16> = clients.iter_mut().map(|client| client.response().status).collect();
    assert_eq!(statuses, [200; 40]);
    for refused in [of_a, of_b] {
        let mut ids = refused.lock().unwrap().clone();
        let all = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), all, "a target has refused a request twice: {ids:?}");
    }
    zap.wait_until_idle();
}

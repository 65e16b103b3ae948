//! Tries and retries: what Zap does with each response or failure of a backend.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::provider::{After, Gate, backend, blackhole, chunk, reply, start_events, wait_closed};
use crate::support::{CHAT, Provider, STREAM, Zap, eventually};

const QUICK: &str = "[retry]\nbase_delay_ms = 1\nmax_delay_ms = 2\n[health]\nfailure_threshold = 1000\n";

/// A provider that writes these bytes and closes.
fn raw(bytes: impl Into<Vec<u8>>) -> Provider {
    let bytes = bytes.into();
    Provider::start(move |_, stream| {
        let _ = stream.write_all(&bytes);
        After::Close
    })
}

#[test]
fn a_refused_connection_is_retried_on_another_backend() {
    let b = Provider::named("b");
    let zap = Zap::with(QUICK, &[backend(Provider::closed_port(), "a", "weight = 9"), b.backend("b", "")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.text(), answer.header("x-zap-backend")), ("b", Some("b")));
    assert_eq!(answer.header("x-zap-attempts"), Some("2"));
    assert_eq!(zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"upstream_unreachable\"}"), 1.0);
    assert_eq!(zap.metric("zap_retries_total{backend=\"a\",reason=\"upstream_unreachable\"}"), 1.0);
}

#[test]
fn three_failures_eject_a_backend_and_no_client_sees_an_error() {
    let b = Provider::named("b");
    let settings = "[health]\ninterval_secs = 600\n";
    let a = raw("");
    let zap = Zap::with(settings, &[a.backend("a", ""), b.backend("b", "")]);
    eventually("both backends are probed", || !a.probes().is_empty() && !b.probes().is_empty());
    (0..20).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    assert_eq!(a.count(), 3);
    assert_eq!(
        zap.client().get("/status").json()["backends"][0]["last_error"]["code"],
        "upstream_unreachable"
    );
    zap.wait_until_idle();
}

#[test]
fn a_failed_try_releases_its_permit_for_the_next_try() {
    let answers = [500, 503, 200];
    let asked = AtomicUsize::new(0);
    let a = Provider::start(move |_, stream| {
        let n = asked.fetch_add(1, Ordering::Relaxed);
        reply(stream, answers[n.min(2)], "", b"ok");
        After::Keep
    });
    let zap = Zap::with(QUICK, &[a.backend("a", "max_in_flight = 1")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.header("x-zap-attempts")), (200, Some("3")));
    zap.wait_until_idle();
}

#[test]
fn every_failing_status_is_retried_on_another_backend() {
    for status in [408, 498, 500, 502, 503, 504, 529] {
        let a = Provider::fixed(status, "", "a failed");
        let b = Provider::named("b");
        let zap = Zap::with(QUICK, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
        let answer = zap.chat(CHAT);
        assert_eq!((answer.status, answer.text()), (200, "b"), "{status}");
        assert_eq!(answer.header("x-zap-attempts"), Some("2"));
    }
}

#[test]
fn after_three_tries_the_last_response_is_delivered_unchanged() {
    let a = Provider::fixed(503, "content-type: text/plain\r\nx-own: 1\r\n", "overloaded");
    let zap = Zap::with(QUICK, &[a.backend("a", "")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.text(), answer.header("x-own")), (503, "overloaded", Some("1")));
    assert_eq!((answer.header("x-zap-attempts"), answer.header("x-zap-backend")), (Some("3"), Some("a")));
    assert_eq!(answer.header("content-length"), Some("10"));
    assert_eq!(a.count(), 3);
    zap.wait_until_idle();
}

#[test]
fn max_retries_0_means_one_try() {
    let a = Provider::fixed(500, "", "no");
    let b = Provider::named("b");
    let zap = Zap::with(
        &QUICK.replace("[retry]", "[retry]\nmax_retries = 0"),
        &[a.backend("a", "weight = 9"), b.backend("b", "")],
    );
    assert_eq!(zap.chat(CHAT).text(), "no");
    assert_eq!((a.count(), b.count()), (1, 0));
}

#[test]
fn the_second_round_starts_with_the_backend_of_the_first_try() {
    let n = AtomicUsize::new(0);
    let a = Provider::start(move |_, stream| {
        match n.fetch_add(1, Ordering::SeqCst) {
            0 => reply(stream, 500, "", b"first"),
            _ => reply(stream, 200, "", b"second"),
        }
        After::Keep
    });
    let b = Provider::fixed(502, "", "b");
    let zap = Zap::with(QUICK, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("second", Some("3")));
    assert_eq!((a.count(), b.count()), (2, 1));
}

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
fn a_refused_backend_key_is_a_502_and_closes_the_backend() {
    let a = Provider::fixed(401, "", "{\"error\":{\"message\":\"Incorrect API key: sk-CANARY\"}}");
    let b = Provider::named("b");
    let zap = Zap::with("", &[a.backend("a", "weight = 9\napi_key = \"sk-CANARY\""), b.backend("b", "")]);
    (0..4).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    assert_eq!(a.count(), 1);
    assert_eq!(zap.client().get("/status").json()["backends"][0]["state"], "unauthorized");

    // Retries of an SDK get the same error as the first request, with what the provider said.
    let zap = Zap::with("", &[a.backend("a", "api_key = \"sk-CANARY\"")]);
    for attempts in ["1", "0", "0"] {
        let answer = zap.chat(CHAT);
        assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_auth_error"));
        assert_eq!(answer.header("x-should-retry"), Some("false"));
        assert_eq!(answer.header("x-zap-attempts"), Some(attempts));
        let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains("(HTTP 401: Incorrect API key: ***)"), "{message}");
    }
}

#[test]
fn a_401_to_one_request_does_not_close_a_backend_that_serves_others() {
    let a = Provider::start(|seen, stream| {
        let is_refused = String::from_utf8_lossy(&seen.body).contains("strange");
        reply(stream, if is_refused { 401 } else { 200 }, "", b"a");
        After::Keep
    });
    let zap = Zap::with("", &[a.backend("a", "api_key = \"sk-CANARY\"")]);
    assert_eq!(zap.chat(CHAT).status, 200);
    assert_eq!(zap.chat("{\"messages\":[],\"model\":\"strange\"}").status, 502);
    assert_eq!(zap.chat(CHAT).status, 200);
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
fn a_403_or_402_is_retried_elsewhere_and_the_backend_stays_healthy() {
    for status in [402, 403] {
        // Only one client's request is flagged.
        let picky = || {
            Provider::start(move |seen, stream| {
                match String::from_utf8_lossy(&seen.body).contains("flagged") {
                    true => reply(stream, status, "x-own: 1\r\n", b"not that"),
                    false => reply(stream, 200, "", b"ok"),
                }
                After::Keep
            })
        };
        let flagged = r#"{"messages":["flagged"]}"#;
        let (a, b) = (picky(), picky());
        let key = "api_key = \"sk-CANARY\"";
        let settings = "[health]\nfailure_threshold = 1\ninterval_secs = 600";
        let zap = Zap::with(settings, &[a.backend("a", key), b.backend("b", key)]);
        for _ in 0..5 {
            let answer = zap.chat(flagged);
            assert_eq!(
                (answer.status, answer.text(), answer.header("x-own")),
                (status, "not that", Some("1"))
            );
            assert_eq!(answer.header("x-zap-attempts"), Some("2"), "each backend is tried once");
        }
        let served: Vec<_> = (0..4).map(|_| zap.chat(CHAT)).collect();
        assert!(served.iter().all(|r| r.header("x-zap-attempts") == Some("1")));
        let states = &zap.client().get("/status").json()["backends"];
        assert_eq!((&states[0]["state"], &states[1]["state"]), (&"healthy".into(), &"healthy".into()));
        assert_eq!(zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"upstream_refused\"}"), 5.0);

        let c = Provider::named("c");
        let zap = Zap::with(settings, &[a.backend("a", "weight = 9"), c.backend("c", "")]);
        assert_eq!(zap.chat(flagged).text(), "c", "another backend serves the request");
        zap.wait_until_idle();
    }
}

#[test]
fn a_refused_request_leaves_the_backend_healthy_whatever_its_headers_and_body() {
    for status in [400, 402, 403] {
        let a = Provider::start(move |seen, stream| {
            if String::from_utf8_lossy(&seen.body).contains("flagged") {
                let spent = "x-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 50s\r\n";
                let head = format!("HTTP/1.1 {status} X\r\ncontent-length: 100\r\n{spent}\r\nnot");
                let _ = stream.write_all(head.as_bytes());
                return After::Close;
            }
            reply(stream, 200, "", b"ok");
            After::Keep
        });
        let settings = "[health]\nfailure_threshold = 1\ninterval_secs = 600\n[retry]\nmax_retries = 0";
        let zap = Zap::with(settings, &[a.backend("a", "")]);
        let answer = zap.chat(r#"{"messages":["flagged"]}"#);
        assert_eq!((answer.status, answer.whole), (status, false));
        assert_eq!(zap.client().get("/status").json()["backends"][0]["state"], "healthy");
        assert_eq!(zap.chat(CHAT).text(), "ok");
        zap.wait_until_idle();
    }
}

#[test]
fn the_last_response_is_delivered_even_if_a_later_try_got_none() {
    let a = Provider::fixed(403, "", "not that");
    let gone = || backend(Provider::closed_port(), "b", "");
    let zap = Zap::with(QUICK, &[a.backend("a", "weight = 9"), gone()]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.text(), answer.header("x-zap-backend")), (403, "not that", Some("a")));
    assert_eq!(answer.header("x-zap-attempts"), Some("3"));
    zap.wait_until_idle();
}

#[test]
fn a_client_error_is_delivered_unchanged() {
    for status in [400, 401, 404, 413, 418, 422] {
        let a = Provider::fixed(status, "content-type: application/json\r\n", "{\"error\":1}");
        let zap = Zap::with("[health]\nfailure_threshold = 1", &[a.backend("a", "")]);
        let answer = zap.chat(CHAT);
        assert_eq!((answer.status, answer.text()), (status, "{\"error\":1}"));
        assert_eq!((a.count(), answer.header("x-zap-attempts")), (1, Some("1")));
        assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 1.0);
    }
}

#[test]
fn a_key_echoed_in_an_error_is_redacted() {
    let a = Provider::fixed(400, "x-echo: sk-CANARY\r\n", "{\"error\":\"key sk-CANARY is bad, sk-CANARY\"}");
    let zap = Zap::with("", &[a.backend("a", "api_key = \"sk-CANARY\"")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.text()), (400, "{\"error\":\"key *** is bad, ***\"}"));
    assert_eq!((answer.header("x-echo"), answer.whole), (Some("***"), true));
}

#[test]
fn no_piece_of_a_key_is_quoted_or_logged_wherever_the_message_of_a_401_is_cut() {
    const KEY: &str = "sk-CANARY-0123456789-abcdefghijklmnopqrstuv";
    let pieces: Vec<&str> = (0..=KEY.len() - 8).map(|at| &KEY[at..at + 8]).collect();
    let padding = AtomicUsize::new(100);
    let a = Provider::start(move |_, stream| {
        let padding = "x".repeat(padding.fetch_add(1, Ordering::SeqCst));
        let body = format!("{{\"error\":{{\"message\":\"{padding} {KEY}\"}}}}");
        reply(stream, 401, "content-type: application/json\r\n", body.as_bytes());
        After::Keep
    });
    // Each backend is closed by its 401, and asked once.
    let zaps: Vec<Zap> = (0..10)
        .map(|_| {
            let more = format!("api_key = \"{KEY}\"\nmodels = [\"mNN\"]");
            let one = |n: usize| a.backend(&format!("b{n}"), &more.replace("NN", &n.to_string()));
            Zap::with_log("[health]\ninterval_secs = 600\n", &(0..10).map(one).collect::<Vec<_>>())
        })
        .collect();
    for zap in &zaps {
        for n in 0..10 {
            let answer = zap.chat(format!("{{\"model\":\"m{n}\",\"messages\":[]}}"));
            assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_auth_error"));
            assert!(answer.text().contains("(HTTP 401: xxx"), "{}", answer.text());
            let pages = ["/status", "/metrics"].map(|path| zap.client().get(path).text().to_owned());
            for text in [answer.text()].into_iter().chain(pages.iter().map(String::as_str)) {
                assert!(!pieces.iter().any(|piece| text.contains(piece)), "{text}");
            }
        }
        let messages = zap.lines(10).iter().filter(|line| line.to_string().contains("HTTP 401: xxx")).count();
        assert_eq!(messages, 10, "each line has the provider's message");
        eventually("each backend is closed", || zap.log().matches("backend_misconfigured").count() == 10);
        let log = zap.log();
        assert!(!pieces.iter().any(|piece| log.contains(piece)), "{log}");
    }
    assert_eq!(a.count(), 100);
}

#[test]
fn a_dummy_key_is_not_redacted_from_errors() {
    for key in ["1", "x", "null", "jso", "1234567"] {
        let body = "{\"error\":{\"message\":\"xx jso 1234567\",\"code\":null,\"n\":1234567}}";
        let a = Provider::fixed(400, "content-type: application/json\r\nx-echo: 1x null jso\r\n", body);
        let zap = Zap::with("", &[a.backend("a", &format!("api_key = \"{key}\""))]);
        let answer = zap.chat(CHAT);
        assert_eq!((answer.text(), answer.header("x-echo")), (body, Some("1x null jso")), "{key}");
        assert_eq!(answer.header("content-type"), Some("application/json"), "{key}");
        assert_eq!(answer.header("content-length"), Some(body.len().to_string().as_str()), "{key}");
    }
}

#[test]
fn a_redacted_error_is_still_json_with_its_type() {
    let body = r#"{"a":"application\/json\u002Butf8 \u0061pplication/json+utf8","n":12345678,"error":"\napplication"}"#;
    for (key, want) in [
        ("application/json+utf8", r#"{"a":"*** ***","n":12345678,"error":"\napplication"}"#),
        ("12345678", &*body.replace("12345678", "11111111")),
        (
            "napplication",
            r#"{"a":"application\/json\u002Butf8 \u0061pplication/json+utf8","n":12345678,"error":"***"}"#,
        ),
    ] {
        let headers =
            "content-type: application/json+utf8; x=12345678\r\nx-echo: application\\/json+utf8\r\n";
        let a = Provider::fixed(422, headers, body);
        let zap = Zap::with("", &[a.backend("a", &format!("api_key = \"{key}\""))]);
        let answer = zap.chat(CHAT);
        assert_eq!((answer.text(), answer.whole), (want, true));
        assert_eq!(answer.header("content-type"), Some("application/json+utf8; x=12345678"));
        assert_eq!(answer.header("x-echo") == Some("***"), key.contains('/'));
    }
}

#[test]
fn a_redirect_is_never_followed() {
    let b = Provider::named("b");
    let location = format!("location: http://{}/\r\n", b.address).leak();
    let a = Provider::fixed(307, location, "");
    let zap = Zap::with("", &[a.backend("a", "weight = 9"), b.backend("b", "")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_redirect"));
    assert_eq!(b.count(), 0);
}

#[test]
fn a_response_that_is_not_http_is_a_failure_and_then_a_502() {
    let big = format!("HTTP/1.1 200 OK\r\nx: {}\r\ncontent-length: 2\r\n\r\nok", "y".repeat(1 << 20));
    let many = format!("HTTP/1.1 200 OK\r\n{}content-length: 2\r\n\r\nok", "x: y\r\n".repeat(1000));
    for bytes in [
        "SSH-2.0-x\r\n\r\n",
        "HTTP/9.9 200 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\nok",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        &big,
        &many,
    ] {
        let a = raw(bytes);
        let zap = Zap::with(QUICK, &[a.backend("a", "")]);
        let answer = zap.chat(CHAT);
        let shown = &bytes[..bytes.len().min(60)];
        assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_invalid_response"), "{shown:?}");
        assert_eq!(answer.header("x-zap-attempts"), Some("3"));
        let b = Provider::named("b");
        let zap = Zap::with(QUICK, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
        assert_eq!(zap.chat(CHAT).text(), "b", "{shown:?}");
    }
}

#[test]
fn a_response_that_breaks_before_its_first_body_byte_is_retried() {
    let a = raw("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n");
    let b = Provider::named("b");
    let zap = Zap::with(QUICK, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
    assert_eq!(zap.chat(CHAT).text(), "b");
}

#[test]
fn interim_responses_are_dropped() {
    let a = raw(
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    );
    let zap = Zap::with(QUICK, &[a.backend("a", "")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.text(), answer.header("link")), (200, "ok", None));
}

#[test]
fn a_silent_backend_times_out_early_enough_for_a_retry() {
    let silent = Provider::start(|_, stream| {
        wait_closed(stream);
        After::Close
    });
    let b = Provider::named("b");
    let settings = "[timeouts]\nfirst_byte_secs = 1";
    let zap = Zap::with(settings, &[silent.backend("a", "weight = 9"), b.backend("b", "")]);
    let since = Instant::now();
    assert_eq!(zap.chat(STREAM).text(), "b");
    let took = since.elapsed();
    assert!(took > Duration::from_millis(800) && took < Duration::from_millis(1_900), "{took:?}");
    assert_eq!(silent.count(), 1);
    assert_eq!(zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"upstream_timeout\"}"), 1.0);

    // The head of a good stream that says nothing is no answer either, if `first_token_secs` is set.
    for begun in ["", ": ping\n\n"] {
        let mute = Provider::start(move |_, stream| {
            start_events(stream);
            if !begun.is_empty() {
                chunk(stream, begun);
            }
            wait_closed(stream);
            After::Close
        });
        let settings = "[timeouts]\nfirst_token_secs = 1";
        let zap = Zap::with(settings, &[mute.backend("a", "weight = 9"), b.backend("b", "")]);
        assert_eq!(zap.chat(STREAM).text(), "b", "{begun:?}");
        assert_eq!(zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"upstream_timeout\"}"), 1.0);
    }

    // A plain request, and the last target of a stream, have `queue.timeout_secs` alone.
    let settings = "[queue]\ntimeout_secs = 2\n[timeouts]\nfirst_byte_secs = 1\nfirst_token_secs = 1";
    let zap = Zap::with(settings, &[silent.backend("a", "")]);
    for body in [CHAT, STREAM] {
        let since = Instant::now();
        let answer = zap.chat(body);
        assert_eq!((answer.status, answer.code().as_str()), (504, "upstream_timeout"), "{body}");
        assert!(since.elapsed() > Duration::from_millis(1_900));
    }
    eventually("the connections to the silent backend are closed", || silent.connections() == 0);
    zap.wait_until_idle();
}

#[test]
fn an_unanswered_connect_ends_after_connect_ms() {
    let (address, _held) = blackhole();
    let b = Provider::named("b");
    let zap =
        Zap::with("[timeouts]\nconnect_ms = 100", &[backend(address, "a", "weight = 9"), b.backend("b", "")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("b", Some("2")));
    assert_eq!(zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"upstream_timeout\"}"), 1.0);
}

#[test]
fn a_closed_pooled_connection_counts_as_neither_failure_nor_retry() {
    let a = Provider::start(|_, stream| {
        reply(stream, 200, "", b"ok");
        After::Close
    });
    let zap = Zap::with(
        "[health]\nfailure_threshold = 1\n[retry]\nmax_retries = 0\n[server]\nworkers = 1",
        &[a.backend("a", "")],
    );
    let mut client = zap.client();
    for _ in 0..50 {
        let answer = client.chat("", CHAT);
        assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("ok", Some("1")));
        eventually("the provider has closed the connection", || a.connections() == 0);
    }
    assert_eq!(zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"upstream_unreachable\"}"), 0.0);
}

#[test]
fn connections_are_reused() {
    let a = Provider::named("ok");
    let zap = Zap::with("[server]\nworkers = 1\n[health]\ninterval_secs = 600", &[a.backend("a", "")]);
    eventually("the backend is probed", || a.probes().len() == 1 && a.connections() == 0);
    let mut client = zap.client();
    (0..20).for_each(|_| assert_eq!(client.chat("", CHAT).status, 200));
    assert_eq!(a.connections(), 1);
    assert_eq!(zap.metric("zap_upstream_connections{backend=\"a\",state=\"idle\"}"), 1.0);
}

#[test]
fn the_connection_of_a_discarded_response_is_reused() {
    let a = Provider::fixed(500, "", "no");
    let b = Provider::named("b");
    let settings = format!("{QUICK}interval_secs = 600\n[server]\nworkers = 1");
    let zap = Zap::with(&settings, &[a.backend("a", ""), b.backend("b", "")]);
    eventually("both backends are probed", || {
        [&a, &b].iter().all(|p| p.probes().len() == 1 && p.connections() == 0)
    });
    let mut client = zap.client();
    (0..10).for_each(|_| assert_eq!(client.chat("", CHAT).text(), "b"));
    assert!(
        a.count() >= 4 && a.connections() == 1,
        "{} requests, {} connections",
        a.count(),
        a.connections()
    );
}

#[test]
fn a_spent_retry_budget_tells_clients_not_to_retry() {
    let a = Provider::fixed(500, "", "down");
    let zap = Zap::with(&QUICK.replace("[retry]", "[retry]\nbudget_percent = 0"), &[a.backend("a", "")]);
    let answers: Vec<_> = (0..40).map(|_| zap.chat(CHAT)).collect();
    assert!(answers.iter().all(|r| r.status == 500));
    assert_eq!(answers[0].header("x-should-retry"), None);
    assert!(
        answers.iter().any(|r| r.header("x-should-retry") == Some("false")),
        "the budget of ten retries per second is never spent"
    );
    let spent = answers.iter().filter(|r| r.header("x-zap-attempts") == Some("1")).count();
    assert!(spent > 10, "{spent}");
}

#[test]
fn the_cause_of_a_timeout_names_the_phase_that_timed_out() {
    let (address, _held) = blackhole();
    let silent = Provider::start(|_, stream| {
        wait_closed(stream);
        After::Close
    });
    let connecting = backend(address, "a", "");
    let mute = Provider::start(|_, stream| {
        start_events(stream);
        wait_closed(stream);
        After::Close
    });
    let stalled = Provider::start(|_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        wait_closed(stream);
        After::Close
    });
    let settings = "[timeouts]\nconnect_ms = 500\nfirst_byte_secs = 1\nfirst_token_secs = 2\n\
        stream_idle_secs = 1\n[health]\ninterval_secs = 600\nfailure_threshold = 1000\n";
    for (first, cause, limit) in [
        (connecting, "connect timed out after ", 0.5),
        (silent.backend("a", ""), "response timed out after ", 1.0),
        (mute.backend("a", ""), "first token timed out after ", 2.0),
        (stalled.backend("a", ""), "stream timed out after ", 1.0),
    ] {
        let b = Provider::named("b");
        let zap = Zap::with(settings, &[first, b.backend("b", "priority = 1")]);
        let answer = zap.chat(STREAM);
        assert!(answer.text() == "b" || cause.starts_with("stream"), "{cause}: {}", answer.text());
        let status = zap.client().get("/status").json();
        let found = status["backends"][0]["last_error"]["cause"].as_str().unwrap();
        let secs = found.strip_prefix(cause).and_then(|rest| rest.strip_suffix(" s"));
        // A machine that is busy wakes the worker later; the cause says the time that has passed.
        let secs: f64 = secs.unwrap_or_else(|| panic!("{found}")).parse().unwrap();
        assert!((limit..limit + 2.0).contains(&secs), "{found}");
    }
}

#[test]
fn a_time_limit_of_a_stream_cuts_nobody_who_has_nowhere_to_go() {
    // All clocks end at once, and the budget is for 10 of them.
    let slow = || {
        Provider::start(|_, stream| {
            std::thread::sleep(Duration::from_millis(2_500));
            start_events(stream);
            chunk(stream, "data: one\n\ndata: [DONE]\n\n");
            stream.write_all(b"0\r\n\r\n").unwrap();
            After::Keep
        })
    };
    let (a, b) = (slow(), slow());
    for clock in ["first_byte_secs", "first_token_secs"] {
        let settings = format!("[timeouts]\n{clock} = 1\n[health]\nfailure_threshold = 1000");
        let zap = Zap::with(&settings, &[a.backend("a", ""), b.backend("b", "")]);
        let clients: Vec<_> = (0..60)
            .map(|_| {
                let mut client = zap.client();
                client.post("/chat", "", STREAM);
                client
            })
            .collect();
        let statuses: Vec<_> = clients.into_iter().map(|mut client| client.response().status).collect();
        assert!(statuses.iter().all(|status| *status == 200), "{clock}: {statuses:?}");
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
fn a_stream_without_content_is_no_success_even_after_it_has_gone_out() {
    let a = Provider::start(|_, stream| {
        start_events(stream);
        chunk(stream, "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\ndata: [DONE]\n\n");
        stream.write_all(b"0\r\n\r\n").unwrap();
        After::Keep
    });
    let zap = Zap::with("[stream]\nhold_secs = 0\n[health]\nfailure_threshold = 1", &[a.backend("a", "")]);
    assert_eq!(zap.chat(STREAM).status, 200);
    eventually("the model is out", || zap.metric("zap_backend_up{backend=\"a\"}") == 0.0);
    assert_eq!(zap.metric("zap_upstream_errors_total{backend=\"a\",kind=\"upstream_empty\"}"), 1.0);
}

/// Sends 60 chats at once to `zap`, which serves one at a time, and opens `gate` once all others wait. Returns the numbers
/// of their tries, in the order in which `a` has got them.
fn tries_of_a_queue(zap: &Zap, a: &Provider, gate: &Gate) -> Vec<usize> {
    const CLIENTS: usize = 60;
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| zap.client()).collect();
    for (i, client) in clients.iter_mut().enumerate() {
        client.post("/chat", &format!("x-request-id: r{i}\r\n"), CHAT);
    }
    eventually("one is served and all others wait", || {
        gate.waiting() == 1 && zap.metric("zap_queue_depth") == (CLIENTS - 1) as f64
    });
    gate.open(usize::MAX / 2);
    let mut tries = std::collections::HashMap::new();
    for (i, client) in clients.iter_mut().enumerate() {
        let tried = client.response().header("x-zap-attempts").unwrap().parse().unwrap();
        tries.insert(format!("r{i}"), tried);
    }
    let ids = a.seen().into_iter().map(|seen| seen.header("x-request-id").unwrap().to_owned());
    ids.filter_map(|id| tries.remove(&id)).collect()
}

#[test]
fn a_request_counts_for_the_retry_budget_when_it_leaves_the_queue() {
    let failing = || {
        let gate = Gate::default();
        let held = gate.clone();
        let a = Provider::start(move |_, stream| {
            held.pass();
            reply(stream, 500, "", b"down");
            After::Keep
        });
        (a, gate)
    };
    let (a, gate) = failing();
    let b = Provider::named("b");
    let settings = |retries: u32| {
        let retry = format!("[retry]\nbudget_percent = 100\nmax_retries = {retries}");
        format!("[queue]\nmax_in_flight = 1\n{}", QUICK.replace("[retry]", &retry))
    };
    // Each pays for its own retry, however many there are in a second.
    let zap = Zap::with(&settings(2), &[a.backend("a", ""), b.backend("b", "priority = 1")]);
    let tries = tries_of_a_queue(&zap, &a, &gate);
    assert_eq!(tries, [2; 60]);
    // The requests that still wait pay for nothing: the first ones soon have no more than ten retries in a second and one
    // each. If all of the queue paid, each of them would be tried eleven times.
    let (a, gate) = failing();
    let zap = Zap::with(&settings(10), &[a.backend("a", "")]);
    let tries = tries_of_a_queue(&zap, &a, &gate);
    assert_eq!(tries[0], 11);
    assert!(tries[..6].iter().sum::<usize>() < 50, "{tries:?}");
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

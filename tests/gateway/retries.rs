//! Tries and retries: what Zap does with each response or failure of a backend.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
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

/// Sends 60 chats at once to `zap`, which serves one at a time, and opens `gate` once all others wait. Returns the
/// numbers of their tries, in the order in which `a` has got them.
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
    // The requests that still wait pay for nothing: the first ones soon have no more than ten retries in a second and
    // one each. If all of the queue paid, each of them would be tried eleven times.
    let (a, gate) = failing();
    let zap = Zap::with(&settings(10), &[a.backend("a", "")]);
    let tries = tries_of_a_queue(&zap, &a, &gate);
    assert_eq!(tries[0], 11);
    assert!(tries[..6].iter().sum::<usize>() < 50, "{tries:?}");
}

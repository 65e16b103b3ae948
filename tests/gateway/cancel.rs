//! Cancellation: when a client disconnects, all work for its request ends at once.

use std::time::{Duration, Instant};

use crate::support::provider::{After, blackhole, chunk, start_events, wait_closed};
use crate::support::{CHAT, Client, Provider, STREAM, Zap, eventually, within};

/// Sends no response and waits until Zap closes the connection.
fn silent() -> Provider {
    Provider::start(|_, stream| {
        wait_closed(stream);
        After::Close
    })
}

/// Streams one event, then waits until Zap closes the connection.
fn starts() -> Provider {
    Provider::start(|_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        wait_closed(stream);
        After::Close
    })
}

const NO_PROBES: &str = "[health]\ninterval_secs = 600\n";

fn closes_upstream(provider: &Provider, leave: impl FnOnce()) {
    let since = Instant::now();
    leave();
    eventually("the upstream connection is closed", || provider.connections() == 0);
    assert!(since.elapsed() < Duration::from_millis(250), "{:?}", since.elapsed());
}

#[test]
fn a_disconnect_before_the_first_byte_closes_the_upstream_connection() {
    let a = silent();
    let zap = Zap::with(NO_PROBES, &[a.backend("a", "")]);
    let ways: [fn(Client); 3] = [drop, Client::reset, |c| {
        c.half_close();
        std::mem::forget(c);
    }];
    for (i, leave) in ways.into_iter().enumerate() {
        let mut client = zap.client();
        client.post("/chat", "", CHAT);
        eventually("the backend has the request", || a.count() == i + 1);
        closes_upstream(&a, || leave(client));
        zap.wait_until_idle();
    }
    assert_eq!(zap.metric("zap_client_disconnects_total{phase=\"waiting\"}"), 3.0);
    assert_eq!(a.count(), 3, "a request whose client disconnected is not retried");
}

#[test]
fn a_client_that_leaves_between_two_tries_does_not_spare_the_target_that_failed() {
    let (a, b) = (
        Provider::start(|_, stream| {
            // Cut before any content.
            start_events(stream);
            After::Close
        }),
        silent(),
    );
    let settings = "[health]\ninterval_secs = 600\nfailure_threshold = 1\n";
    let zap = Zap::with(settings, &[a.backend("a", "weight = 1000"), b.backend("b", "weight = 1")]);
    let mut client = zap.client();
    client.post("/chat", "", STREAM);
    eventually("the second target has the request", || b.count() == 1);
    drop(client);
    zap.wait_until_idle();
    let up = |name| zap.metric(&format!("zap_backend_up{{backend=\"{name}\"}}"));
    assert_eq!((a.count(), up("a"), up("b")), (1, 0.0, 1.0));
}

#[test]
fn a_disconnect_mid_stream_closes_the_upstream_connection() {
    let a = starts();
    let zap = Zap::with(NO_PROBES, &[a.backend("a", "")]);
    for leave in [drop as fn(Client), Client::reset] {
        let mut client = zap.client();
        client.post("/chat", "", STREAM);
        client.head();
        assert_eq!(client.chunk().unwrap(), b"data: one\n\n");
        closes_upstream(&a, || leave(client));
        zap.wait_until_idle();
    }
    assert_eq!(zap.metric("zap_client_disconnects_total{phase=\"streaming\"}"), 2.0);
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"client\"}"), 2.0);
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 0.0);
}

#[test]
fn bytes_after_the_request_do_not_hide_a_disconnect() {
    let a = silent();
    let zap = Zap::with(NO_PROBES, &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    client.post("/chat", "", CHAT);
    eventually("the backend has the request", || a.count() == 1);
    client.send("GET /health HT");
    closes_upstream(&a, || drop(client));
    zap.wait_until_idle();
    assert_eq!(a.count(), 1, "the second request is not sent");
}

#[test]
fn a_disconnect_during_connect_or_backoff_is_counted_in_that_phase() {
    let a = Provider::fixed(500, "", "no");
    let settings = "[health]\ninterval_secs = 600\nfailure_threshold = 1000\n[retry]\nbase_delay_ms = 600000\nmax_delay_ms = 600000\n[queue]\ntimeout_secs = 86400\n";
    let zap = Zap::with(settings, &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    eventually("the first try has ended", || {
        a.count() == 1 && zap.metric("zap_in_flight{backend=\"a\"}") == 1.0
    });
    drop(client);
    eventually("the disconnect is counted", || {
        zap.metric("zap_client_disconnects_total{phase=\"backoff\"}") == 1.0
    });
    zap.wait_until_idle();

    let (address, _held) = blackhole();
    let settings =
        "[health]\ninterval_secs = 600\nfailure_threshold = 1000\n[timeouts]\nconnect_ms = 600000\n";
    let zap = Zap::with(settings, &[crate::support::provider::backend(address, "a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    eventually("the connect has begun", || zap.metric("zap_in_flight{backend=\"a\"}") == 1.0);
    drop(client);
    eventually("the disconnect is counted", || {
        zap.metric("zap_client_disconnects_total{phase=\"connecting\"}") == 1.0
    });
    zap.wait_until_idle();
}

#[test]
fn a_disconnect_in_any_phase_releases_everything() {
    let (hole, _held) = blackhole();
    let silent = silent();
    let streams = starts();
    let failing = Provider::fixed(500, "", "failed");
    let model = |name: &str| format!("models = [\"{name}\"]");
    let backends = [
        silent.backend("silent", &format!("{}\nmax_in_flight = 1", model("silent"))),
        streams.backend("streams", &model("streams")),
        failing.backend("failing", &model("failing")),
        crate::support::provider::backend(hole, "hole", &model("hole")),
    ];
    let settings = "[queue]\nmax_in_flight = 8\n[retry]\nbase_delay_ms = 60000\nmax_delay_ms = 60000\nbudget_percent = 100\n\
        [timeouts]\nconnect_ms = 60000\n[health]\nfailure_threshold = 1000\ninterval_secs = 3600\n\
        [rate_limit]\nrequests_per_minute = 100000\n";
    let zap = Zap::with(settings, &backends);
    let ask = |model: &str| {
        let mut client = zap.client();
        client.post("/chat", "", format!("{{\"model\":\"{model}\",\"stream\":true,\"messages\":[]}}"));
        client
    };
    let gauge = |series: &str| zap.metric(series);
    for reset in [false, true] {
        for phase in ["body", "queued", "connecting", "waiting", "backoff", "streaming"] {
            let series = format!("zap_client_disconnects_total{{phase=\"{phase}\"}}");
            let before = gauge(&series);
            let mut others = Vec::new();
            let client = match phase {
                "body" => {
                    let mut client = zap.client();
                    client.send("POST /chat HTTP/1.1\r\nhost: zap\r\ncontent-length: 99\r\n\r\n{\"model\":");
                    client
                }
                "queued" => {
                    others.push(ask("silent"));
                    eventually("the backend is full", || gauge("zap_in_flight{backend=\"silent\"}") == 1.0);
                    let client = ask("silent");
                    eventually("the request is queued", || gauge("zap_queue_depth") == 1.0);
                    client
                }
                "connecting" => {
                    let client = ask("hole");
                    eventually("the connect has begun", || gauge("zap_in_flight{backend=\"hole\"}") == 1.0);
                    client
                }
                "waiting" => {
                    let client = ask("silent");
                    eventually("the request is sent", || {
                        gauge("zap_upstream_connections{backend=\"silent\",state=\"active\"}") == 1.0
                    });
                    client
                }
                "backoff" => {
                    let failures =
                        gauge("zap_upstream_errors_total{backend=\"failing\",kind=\"upstream_error\"}");
                    let client = ask("failing");
                    let again =
                        || gauge("zap_upstream_errors_total{backend=\"failing\",kind=\"upstream_error\"}");
                    eventually("the first try has failed", || again() > failures);
                    client
                }
                _ => {
                    let mut client = ask("streams");
                    assert_eq!(client.head().status, 200);
                    client
                }
            };
            if reset {
                client.reset();
            } else {
                drop(client);
            }
            within(Duration::from_secs(1), phase, || gauge(&series) > before);
            others.into_iter().for_each(drop);
            zap.wait_until_idle();
        }
    }
    eventually("all upstream connections are closed", || silent.connections() + streams.connections() == 0);
    assert_eq!(gauge("zap_rate_limit_keys"), 1.0);
}

//! Clients that leave: whatever was being done for them ends at once.

use std::time::{Duration, Instant};

use crate::support::provider::{After, blackhole, chunk, start_events, wait_closed};
use crate::support::{CHAT, Client, Provider, STREAM, Zap, eventually};

/// Says nothing until the other side closes.
fn silent() -> Provider {
    Provider::start(|_, stream| {
        wait_closed(stream);
        After::Close
    })
}

/// Streams one event and then waits for the other side to close.
fn starts() -> Provider {
    Provider::start(|_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        wait_closed(stream);
        After::Close
    })
}

const NO_PROBES: &str = "[health]\ninterval_secs = 600\n";

fn let_go(provider: &Provider, leave: impl FnOnce()) {
    let since = Instant::now();
    leave();
    eventually("the upstream is let go", || provider.connections() == 0);
    assert!(since.elapsed() < Duration::from_millis(250), "{:?}", since.elapsed());
}

#[test]
fn one_that_leaves_before_the_first_byte_ends_the_upstreams_work() {
    let a = silent();
    let zap = Zap::with(NO_PROBES, &[a.backend("a", "")]);
    let ways: [fn(Client); 3] = [drop, Client::reset, |c| {
        c.half_close();
        std::mem::forget(c);
    }];
    for (i, leave) in ways.into_iter().enumerate() {
        let mut client = zap.client();
        client.post("/chat", "", CHAT);
        eventually("the upstream works", || a.count() == i + 1);
        let_go(&a, || leave(client));
        zap.is_clean();
    }
    assert_eq!(zap.metric("zap_client_disconnects_total{phase=\"waiting\"}"), 3.0);
    assert_eq!(a.count(), 3, "nothing is tried again for a client that left");
}

#[test]
fn one_that_leaves_mid_stream_ends_the_upstreams_work() {
    let a = starts();
    let zap = Zap::with(NO_PROBES, &[a.backend("a", "")]);
    for leave in [drop as fn(Client), Client::reset] {
        let mut client = zap.client();
        client.post("/chat", "", STREAM);
        client.head();
        assert_eq!(client.chunk().unwrap(), b"data: one\n\n");
        let_go(&a, || leave(client));
        zap.is_clean();
    }
    assert_eq!(zap.metric("zap_client_disconnects_total{phase=\"streaming\"}"), 2.0);
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"client\"}"), 2.0);
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 0.0);
}

#[test]
fn bytes_behind_the_request_do_not_hide_that_its_client_left() {
    let a = silent();
    let zap = Zap::with(NO_PROBES, &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    client.post("/chat", "", CHAT);
    eventually("the upstream works", || a.count() == 1);
    client.send("GET /health HT");
    let_go(&a, || drop(client));
    zap.is_clean();
    assert_eq!(a.count(), 1, "the second request was never made");
}

#[test]
fn one_that_leaves_while_a_connection_opens_or_a_retry_waits_is_counted_there() {
    let a = Provider::fixed(500, "", "no");
    let settings = "[health]\ninterval_secs = 600\nfailure_threshold = 1000\n[retry]\nbase_delay_ms = 600000\nmax_delay_ms = 600000\n[queue]\ntimeout_secs = 86400\n";
    let zap = Zap::with(settings, &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    eventually("it was tried once", || a.count() == 1 && zap.metric("zap_in_flight{backend=\"a\"}") == 1.0);
    drop(client);
    eventually("it is counted", || zap.metric("zap_client_disconnects_total{phase=\"backoff\"}") == 1.0);
    zap.is_clean();

    let (address, _held) = blackhole();
    let settings =
        "[health]\ninterval_secs = 600\nfailure_threshold = 1000\n[timeouts]\nconnect_ms = 600000\n";
    let zap = Zap::with(settings, &[crate::support::provider::backend(address, "a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    eventually("it is on its way", || zap.metric("zap_in_flight{backend=\"a\"}") == 1.0);
    drop(client);
    eventually("it is counted", || zap.metric("zap_client_disconnects_total{phase=\"connecting\"}") == 1.0);
    zap.is_clean();
}

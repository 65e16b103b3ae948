//! Reload on SIGHUP: what a new configuration changes at once, and which state is kept.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::provider::{After, Gate, chunk, end_chunks, reply, start_events};
use crate::support::{CHAT, File, Provider, STREAM, Zap, eventually};

fn state(zap: &Zap, name: &str) -> String {
    let status = zap.client().get("/status").json();
    let backends = status["backends"].as_array().unwrap();
    let found = backends.iter().find(|b| b["name"] == name).unwrap_or_else(|| panic!("no {name}"));
    found["state"].as_str().unwrap().to_owned()
}

#[test]
fn new_backends_apply_at_once_and_an_invalid_file_changes_nothing() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let file = File::new();
    let zap = Zap::with_file(&file, "", &[a.backend("a", "")]);
    assert_eq!(zap.chat(CHAT).text(), "a");
    file.write("", &[b.backend("b", "")]);
    assert!(zap.reload());
    (0..4).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    let text = zap.client().get("/metrics");
    assert!(!text.text().contains("backend=\"a\""), "a removed backend has no series");
    for bad in ["[queue]\nmax_sice = 3\n", "[[backends]\n", "[retry]\nmax_retries = 11\n"] {
        file.write(bad, &[a.backend("a", "")]);
        assert!(!zap.reload(), "{bad}");
        assert_eq!(zap.chat(CHAT).text(), "b");
    }
    // The text is valid, but the certificates do not load.
    file.write("", &[format!("{}ca_file = \"/dev/null\"\n", a.backend("a", "").replace("http:", "https:"))]);
    assert!(!zap.reload());
    assert_eq!(zap.chat(CHAT).text(), "b");
    assert_eq!(zap.metric("zap_config_reloads_total{result=\"applied\"}"), 1.0);
    assert_eq!(zap.metric("zap_config_reloads_total{result=\"rejected\"}"), 4.0);
}

#[test]
fn a_gateway_without_a_file_survives_a_reload() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "")]);
    assert!(!zap.reload());
    assert_eq!(zap.chat(CHAT).text(), "a");
}

#[test]
fn unchanged_backends_keep_health_cooling_connections_and_counts() {
    let (a, b, c) =
        (Provider::named("a"), Provider::fixed(429, "retry-after: 50\r\n", ""), Provider::named("c"));
    let closed = Provider::closed_port();
    let settings = "[health]\ninterval_secs = 60\nfailure_threshold = 1\n";
    let file = File::new();
    let fleet = |weight: u32, more: &str| {
        [
            a.backend("a", &format!("weight = {weight}")),
            b.backend("b", ""),
            crate::support::provider::backend(closed, "out", ""),
            c.backend("c", &format!("requests_per_minute = 3\n{more}")),
        ]
    };
    let zap = Zap::with_file(&file, settings, &fleet(1, ""));
    let mut client = zap.client();
    (0..8).for_each(|_| assert_eq!(client.chat("", CHAT).status, 200));
    let before = |name| state(&zap, name);
    assert_eq!([before("b"), before("out"), before("c")], ["cooling", "ejected", "quota"]);
    let (at_b, at_c) = (b.count(), c.count());
    let connections = a.connections();

    file.write(settings, &fleet(7, "max_in_flight = 2"));
    assert!(zap.reload());
    assert_eq!([before("b"), before("out"), before("c")], ["cooling", "ejected", "quota"]);
    (0..20).for_each(|_| assert_eq!(client.chat("", CHAT).text(), "a"));
    assert_eq!((b.count(), c.count()), (at_b, at_c), "unavailable backends get no requests");
    assert_eq!(a.connections(), connections, "the connections are kept");
    let served = zap.metric("zap_requests_total{endpoint=\"chat\",backend=\"a\",status=\"200\"}");
    assert_eq!(served, a.count() as f64, "the counters are kept");

    // The new quota is one request per minute larger.
    file.write(settings, &fleet(0, "").map(|text| text.replace("minute = 3", "minute = 4")));
    assert!(zap.reload());
    assert_eq!(client.chat("", CHAT).text(), "c");
    assert_eq!((c.count(), before("c")), (4, "quota".to_owned()));
}

#[test]
fn a_new_key_resets_the_unauthorized_state() {
    let refuses = Provider::start(|seen, stream| {
        let good = seen.header("authorization") == Some("Bearer sk-new");
        reply(stream, if good { 200 } else { 401 }, "", b"fine");
        After::Keep
    });
    let file = File::new();
    let settings = "[health]\ninterval_secs = 60\n";
    let zap = Zap::with_file(&file, settings, &[refuses.backend("a", "api_key = \"sk-old\"")]);
    assert_eq!(zap.chat(CHAT).status, 502);
    assert_eq!(state(&zap, "a"), "unauthorized");
    assert!(zap.reload());
    assert_eq!(state(&zap, "a"), "unauthorized", "the key is unchanged");
    file.write(settings, &[refuses.backend("a", "api_key = \"sk-new\"")]);
    assert!(zap.reload());
    assert_eq!(zap.chat(CHAT).text(), "fine");
}

#[test]
fn running_requests_keep_the_old_configuration() {
    let gate = Gate::default();
    let (gate_a, gate_b) = (gate.clone(), gate.clone());
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        chunk(stream, "data: {}\n\n");
        gate_a.pass();
        chunk(stream, "data: [DONE]\n\n");
        end_chunks(stream);
        After::Keep
    });
    let slow = Provider::start(move |_, stream| {
        gate_b.pass();
        reply(stream, 200, "", b"slow");
        After::Keep
    });
    let b = Provider::named("b");
    let file = File::new();
    let zap = Zap::with_file(&file, "", &[a.backend("a", ""), slow.backend("slow", "")]);
    let (mut stream, mut plain) = (zap.client(), zap.client());
    stream.post("/chat", "", STREAM);
    let mut streamed = stream.head();
    plain.post("/chat", "", CHAT);
    eventually("both requests are at the backends", || gate.waiting() == 2);
    file.write("", &[b.backend("b", "")]);
    assert!(zap.reload());
    assert_eq!(zap.chat(CHAT).text(), "b");
    gate.open(2);
    stream.body(&mut streamed);
    assert!(streamed.whole && streamed.text().ends_with("[DONE]\n\n"));
    assert_eq!(plain.response().text(), "slow");
    zap.wait_until_idle();
    eventually("connections to removed backends are closed", || a.connections() + slow.connections() == 0);
    // The next requests on the same client connections go to the new backends.
    assert_eq!((stream.chat("", CHAT).text(), plain.chat("", CHAT).text()), ("b", "b"));
}

#[test]
fn new_limits_apply_to_queued_requests_and_rate_limit_windows_are_kept() {
    let gate = Gate::default();
    let door = gate.clone();
    let a = Provider::start(move |_, stream| {
        door.pass();
        reply(stream, 200, "", b"a");
        After::Keep
    });
    let file = File::new();
    let settings = |slots: u32, limit: u32| {
        format!(
            "[queue]\nmax_in_flight = {slots}\nmax_size = 1\n[rate_limit]\nrequests_per_minute = {limit}\n"
        )
    };
    let zap = Zap::with_file(&file, &settings(1, 4), &[a.backend("a", "")]);
    let mut clients = [zap.client(), zap.client(), zap.client()];
    clients[0].post("/chat", "", CHAT);
    eventually("the backend holds one request", || gate.waiting() == 1);
    clients[1].post("/chat", "", CHAT);
    eventually("one request is queued", || zap.metric("zap_queue_depth") == 1.0);
    assert_eq!(clients[2].chat("", CHAT).code(), "queue_full");
    file.write(&settings(2, 3), &[a.backend("a", "")]);
    assert!(zap.reload());
    eventually("the queued request has the new slot", || gate.waiting() == 2);
    clients[2].post("/chat", "", CHAT);
    eventually("the next request is queued", || zap.metric("zap_queue_depth") == 1.0);
    assert_eq!(
        zap.chat(CHAT).code(),
        "rate_limit_exceeded",
        "two requests were counted before the reload, one after it; a request for which the queue was full does not count"
    );
    gate.open(3);
    clients.iter_mut().for_each(|c| assert_eq!(c.response().text(), "a"));
    zap.wait_until_idle();
}

#[test]
fn probes_follow_the_new_configuration() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let file = File::new();
    let every = |secs: u32| format!("[health]\ninterval_secs = {secs}\n");
    let zap = Zap::with_file(&file, &every(3600), &[a.backend("a", "")]);
    eventually("backend a is probed", || a.probes().len() == 1);
    // The new interval applies to known backends too.
    file.write(&every(1), &[a.backend("a", "health_path = \"/other\""), b.backend("b", "")]);
    assert!(zap.reload());
    eventually("both backends are probed", || a.probes().len() >= 3 && b.probes().len() >= 2);
    assert!(a.probes().last().is_some_and(|p| p.line.starts_with("GET /other ")));
    file.write(&every(1), &[b.backend("b", "")]);
    assert!(zap.reload());
    let (gone, more) = (a.probes().len(), b.probes().len() + 2);
    eventually("backend b is still probed", || b.probes().len() >= more);
    assert!(a.probes().len() <= gone + 1, "at most one probe was in flight");
}

#[test]
fn reloads_under_load_fail_no_request() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let file = File::new();
    let zap = Zap::with_file(&file, "", &[a.backend("a", ""), b.backend("b", "")]);
    let (stop, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                let mut client = zap.client();
                while !stop.load(Ordering::SeqCst) {
                    let answer = client.chat("", CHAT);
                    let bad = || stop.store(true, Ordering::SeqCst);
                    if answer.status != 200 || !answer.whole {
                        bad();
                        panic!("{}", answer.text());
                    }
                    served.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for i in 0..50 {
            let from = served.load(Ordering::SeqCst);
            let (end, enough) = (Instant::now() + Duration::from_secs(10), from + 20);
            while served.load(Ordering::SeqCst) < enough && !stop.load(Ordering::SeqCst) {
                assert!(Instant::now() < end, "requests must still be served");
                std::thread::yield_now();
            }
            match i % 5 {
                0 => file.write("[queue]\nmax_size = -1\n", &[]),
                1 => file.write("", &[b.backend("b", "")]),
                2 => file.write(
                    "[load_balancer]\nstrategy = \"least_loaded\"\n",
                    &[a.backend("a", ""), b.backend("b", "weight = 9")],
                ),
                3 => file.write(
                    "",
                    &[b.backend("other", "default_model = \"m\""), a.backend("a", "api_key = \"sk\"")],
                ),
                _ => file.write("[queue]\nmax_in_flight = 2\n", &[a.backend("a", ""), b.backend("b", "")]),
            };
            let taken = zap.reload();
            assert_eq!(taken, i % 5 != 0);
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!(served.load(Ordering::SeqCst) >= 1000);
    zap.wait_until_idle();
}

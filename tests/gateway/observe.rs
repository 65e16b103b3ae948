//! Metrics and status: what operators see.

use crate::support::{CHAT, Provider, STREAM, Zap, eventually};

#[test]
fn every_metric_family_exists_from_the_start() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let zap = Zap::with("", &[a.backend("a", ""), b.backend("b", "")]);
    let text = zap.client().get("/metrics");
    assert_eq!(text.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    for family in [
        "zap_requests_total",
        "zap_request_duration_seconds",
        "zap_backend_first_byte_seconds",
        "zap_overhead_seconds",
        "zap_queue_depth",
        "zap_queue_wait_seconds",
        "zap_in_flight",
        "zap_rejected_total",
        "zap_upstream_connections",
        "zap_panic_picks_total",
        "zap_retries_total",
        "zap_upstream_errors_total",
        "zap_backend_up",
        "zap_backend_cooling",
        "zap_streams_interrupted_total",
        "zap_client_disconnects_total",
        "zap_rate_limit_keys",
        "zap_config_reloads_total",
        "zap_config_last_reload_successful",
        "zap_config_last_reload_success_timestamp_seconds",
        "zap_build_info",
        "zap_log_lines_dropped_total",
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_open_fds",
        "process_start_time_seconds",
    ] {
        let at = text.text().find(&format!("# TYPE {family} ")).unwrap_or_else(|| panic!("no {family}"));
        let sample = text.text()[at..].lines().nth(1).unwrap();
        assert!(sample.starts_with(family), "{family} has no sample: {sample}");
    }
    let all = zap.metrics();
    for b in ["a", "b"] {
        assert_eq!(
            all[&format!("zap_requests_total{{endpoint=\"chat\",backend=\"{b}\",status=\"200\"}}")],
            0.0
        );
        assert_eq!(all[&format!("zap_backend_first_byte_seconds_count{{backend=\"{b}\"}}")], 0.0);
        assert_eq!(all[&format!("zap_backend_up{{backend=\"{b}\"}}")], 1.0);
        assert_eq!(all[&format!("zap_upstream_connections{{backend=\"{b}\",state=\"idle\"}}")], 0.0);
    }
    assert_eq!(all["zap_overhead_seconds_bucket{le=\"0.00001\"}"], 0.0);
    assert_eq!(all["zap_request_duration_seconds_bucket{endpoint=\"chat\",le=\"0.005\"}"], 0.0);
    assert_eq!(all["zap_request_duration_seconds_bucket{endpoint=\"chat\",le=\"300\"}"], 0.0);
}

#[test]
fn a_point_in_time_is_the_same_in_every_scrape() {
    let busy = Provider::fixed(429, "retry-after: 30\r\n", "");
    let zap = Zap::with("[retry]\nmax_retries = 0", &[busy.backend("a", "")]);
    assert_eq!(zap.chat(CHAT).status, 429);
    let look = || {
        let status = zap.client().get("/status").json();
        let backend = &status["backends"][0];
        let until = backend["cooling_until"].as_str().expect("the backend cools down").to_owned();
        (zap.metric("process_start_time_seconds"), until, backend["last_error"]["at"].clone())
    };
    let first = look();
    for _ in 0..12 {
        std::thread::sleep(std::time::Duration::from_millis(7));
        assert_eq!(look(), first);
    }
}

#[test]
fn frequent_scrapes_share_a_rendered_page_of_at_most_one_second() {
    let a = Provider::named("a");
    let backends: Vec<_> = (0..200).map(|i| a.backend(&format!("b{i}"), "")).collect();
    let zap = Zap::with("[health]\ninterval_secs = 3600", &backends);
    let (mut made, mut served) = (std::collections::HashSet::new(), 0);
    let since = std::time::Instant::now();
    let mut client = zap.client();
    while since.elapsed() < std::time::Duration::from_millis(2500) {
        let before = since.elapsed();
        let text = client.get("/metrics");
        let seconds = text.text().lines().find_map(|l| l.strip_prefix("process_cpu_seconds_total "));
        made.insert((seconds.unwrap().to_owned(), text.body.len()));
        served += 1;
        // Each scrape takes less than the second for which a page is reused, even on two cores.
        assert!(since.elapsed() - before < std::time::Duration::from_secs(1));
    }
    assert!(made.len() * 2 < served, "{} of {served} pages were rendered", made.len());
    // An occasional scrape gets a fresh page.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let count = || zap.metric("zap_requests_total{endpoint=\"metrics\",backend=\"\",status=\"200\"}");
    assert_eq!(count() + 1.0, count());
}

#[test]
fn each_request_is_counted_once_under_the_backend_that_responded() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "")]);
    zap.chat(CHAT);
    zap.chat("{");
    zap.client().get("/nothing");
    eventually("all requests are counted", || {
        zap.metric("zap_request_duration_seconds_count{endpoint=\"chat\"}") == 2.0
    });
    let all = zap.metrics();
    assert_eq!(all["zap_requests_total{endpoint=\"chat\",backend=\"a\",status=\"200\"}"], 1.0);
    assert_eq!(all["zap_requests_total{endpoint=\"chat\",backend=\"\",status=\"400\"}"], 1.0);
    assert_eq!(all["zap_requests_total{endpoint=\"other\",backend=\"\",status=\"404\"}"], 1.0);
    assert_eq!(all["zap_rejected_total{reason=\"invalid_json\"}"], 1.0);
    assert_eq!(all["zap_backend_first_byte_seconds_count{backend=\"a\"}"], 1.0);
    assert_eq!(all["zap_overhead_seconds_count"], 1.0);
}

#[test]
fn the_overhead_excludes_the_time_of_the_backend() {
    let a = Provider::start(|_, stream| {
        std::thread::sleep(std::time::Duration::from_millis(120));
        crate::support::provider::reply(stream, 200, "", b"ok");
        crate::support::provider::After::Keep
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    zap.chat(CHAT);
    eventually("the overhead is recorded", || zap.metric("zap_overhead_seconds_count") == 1.0);
    assert!(zap.metric("zap_overhead_seconds_sum") < 0.1);
    assert!(zap.metric("zap_backend_first_byte_seconds_sum{backend=\"a\"}") > 0.1);
}

#[test]
fn the_overhead_includes_work_on_the_body_but_not_the_wait_for_it() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let body = format!("{{\"messages\":[\"{}\"]}}", "\\u00e4 ".repeat(2_000_000));
    assert_eq!(zap.chat(body).status, 200);
    let sum = zap.metric("zap_overhead_seconds_sum");
    assert!(sum > 0.002, "{sum} s is too little to scan 16 MB");

    let zap = Zap::with("", &[a.backend("a", "")]);
    let mut client = zap.client();
    client.send(format!("POST /chat HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{{", CHAT.len()));
    std::thread::sleep(std::time::Duration::from_millis(300));
    client.send(&CHAT[1..]);
    assert_eq!(client.response().status, 200);
    let sum = zap.metric("zap_overhead_seconds_sum");
    assert!(sum < 0.2, "{sum} s includes the wait for the client");
}

#[test]
fn nothing_that_a_client_sends_becomes_a_series() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let ask = |i: usize| {
        zap.client().get(&format!("/path{i}"));
        zap.chat(format!("{{\"messages\":[],\"model\":\"m{i}\"}}"));
        let mut client = zap.client();
        client.send(format!("M{i} /chat HTTP/1.1\r\nhost: h{i}\r\nauthorization: Bearer k{i}\r\n\r\n"));
        client.response();
    };
    ask(0);
    eventually("all requests are counted", || {
        zap.metric("zap_request_duration_seconds_count{endpoint=\"chat\"}") == 2.0
    });
    let before = zap.metrics().len();
    (1..30).for_each(ask);
    assert_eq!(zap.metrics().len(), before);
}

#[test]
fn status_and_metrics_hold_no_key_and_no_url() {
    let a = Provider::fixed(401, "", "sk-CANARY");
    let zap = Zap::with("", &[a.backend("a", "api_key = \"sk-CANARY\"")]);
    zap.client().chat("authorization: Bearer sk-client\r\n", CHAT);
    zap.client().chat("authorization: Bearer sk-client\r\n", STREAM);
    for path in ["/status", "/metrics"] {
        let text = zap.client().get(path).text().to_owned();
        for secret in ["sk-CANARY", "sk-client", "127.0.0.1"] {
            assert!(!text.contains(secret), "{path} contains {secret}");
        }
    }
    let status = zap.client().get("/status").json();
    assert_eq!(status["backends"][0]["name"], "a");
    assert_eq!(status["backends"][0]["last_error"]["code"], "upstream_auth_error");
}

#[test]
fn each_try_has_its_time_at_its_own_backend_and_each_check_its_result() {
    let (a, b) = (Provider::fixed(500, "", "no"), Provider::named("b"));
    let closed = crate::support::provider::backend(Provider::closed_port(), "closed", "");
    let settings = "[health]\ninterval_secs = 1\nfailure_threshold = 1000\n";
    let zap = Zap::with(settings, &[a.backend("a", ""), closed, b.backend("b", "priority = 1")]);
    assert_eq!(zap.chat(CHAT).text(), "b");
    let tries = |name| zap.metric(&format!("zap_backend_first_byte_seconds_count{{backend=\"{name}\"}}"));
    assert_eq!(["a", "closed", "b"].map(tries), [1.0; 3], "failures included");
    let checks = |name, result| {
        zap.metric(&format!("zap_health_checks_total{{backend=\"{name}\",result=\"{result}\"}}"))
    };
    a.set_health(401);
    eventually("each backend is checked", || {
        checks("a", "unauthorized") > 0.0 && checks("b", "ok") > 0.0 && checks("closed", "failed") > 0.0
    });
    assert_eq!((checks("b", "failed"), checks("closed", "ok")), (0.0, 0.0));
}

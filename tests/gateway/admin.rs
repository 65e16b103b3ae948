//! The pages for operators: who may see them on the listener for clients, and the admin listener.

use std::net::TcpStream;
use std::time::Duration;

use zap::internals::Order;

use crate::support::provider::Gate;
use crate::support::tls_client::Authority;
use crate::support::{CHAT, Client, File, Provider, Response, Zap, eventually};

const KEY: &str = "[[client_keys]]\nname = \"team\"\nkey = \"zk-team\"\n";
/// `operator:zk-team` and `:zt-1`.
const BASIC_KEY: &str = "authorization: Basic b3BlcmF0b3I6emstdGVhbQ==\r\n";
const BASIC_TOKEN: &str = "authorization: bAsIc Onp0LTE=\r\n";
const BROWSER: &str = "accept: text/html,*/*;q=0.8\r\n";
const FORWARDED: &str = "x-forwarded-for: 10.0.0.1\r\n";
const PAGES: [&str; 3] = ["/metrics", "/status", "/usage"];

fn get(mut client: Client, path: &str, headers: &str) -> Response {
    client.send(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n"));
    client.response()
}

#[test]
fn with_client_keys_the_pages_need_one_unless_the_request_is_from_this_machine() {
    let a = Provider::named("a");
    let zap = Zap::with(
        &format!("[server]\ncors_origins = [\"https://app.example\"]\n{KEY}"),
        &[a.backend("a", "")],
    );
    let all = PAGES.iter().map(|path| (*path, "")).chain([("/", BROWSER), ("/status", BROWSER)]);
    for (path, accept) in all {
        assert_eq!(get(zap.client(), path, accept).status, 200, "{path}: from this machine");
        for proxy in [FORWARDED, "forwarded: for=10.0.0.1\r\n", "via: 1.1 proxy\r\n", "x-real-ip: ::1\r\n"] {
            let refused = get(zap.client(), path, &format!("{accept}{proxy}"));
            assert_eq!((refused.status, refused.code().as_str()), (401, "invalid_api_key"), "{path} {proxy}");
            assert_eq!(refused.header("www-authenticate"), Some("Basic realm=\"Zap\""));
        }
        for key in ["authorization: Bearer zk-team\r\n", "x-api-key: zk-team\r\n", BASIC_KEY] {
            let seen = get(zap.client(), path, &format!("{accept}{FORWARDED}{key}"));
            assert_eq!(seen.status, 200, "{path} {key}");
            assert!(!seen.text().contains("zk-team"));
        }
        for key in [
            "authorization: Bearer zk-x\r\n",
            "authorization: Basic emstdGVhbQ==\r\n",
            "authorization: Basic *\r\n",
        ] {
            assert_eq!(
                get(zap.client(), path, &format!("{FORWARDED}{key}")).status,
                if path == "/" { 200 } else { 401 },
                "{path} {key}"
            );
        }
    }
    for (head, status) in [
        ("host: 127.0.0.1:8000\r\n", 200),
        ("host: [::1]\r\nsec-fetch-site: same-origin\r\n", 200),
        ("host: zap.example\r\n", 401),
        ("host: localhost\r\nsec-fetch-site: cross-site\r\n", 401),
        ("host: localhost\r\norigin: https://app.example\r\n", 401),
    ] {
        let mut client = zap.client();
        client.send(format!("GET /status HTTP/1.1\r\n{head}\r\n"));
        assert_eq!(client.response().status, status, "{head}");
    }
    let twice = format!("{FORWARDED}authorization: Bearer zk-team\r\nauthorization: Bearer zk-team\r\n");
    assert_eq!(get(zap.client(), "/status", &twice).status, 400);
    for (path, status) in [("/health", 200), ("/ready", 200), ("/", 200), ("/v1/models", 401)] {
        assert_eq!(get(zap.client(), path, FORWARDED).status, status, "{path}");
    }
}

#[test]
fn without_client_keys_the_pages_are_open_and_open_metrics_opens_one_of_them() {
    let a = Provider::named("a");
    let open = Zap::with("", &[a.backend("a", "")]);
    let metrics = Zap::with(&format!("[server]\nopen_metrics = true\n{KEY}"), &[a.backend("a", "")]);
    for path in PAGES {
        assert_eq!(get(open.client(), path, FORWARDED).status, 200, "{path}");
        let want = if path == "/metrics" { 200 } else { 401 };
        assert_eq!(get(metrics.client(), path, FORWARDED).status, want, "{path}");
    }
}

#[test]
fn the_admin_listener_has_the_pages_and_the_other_one_the_api() {
    let a = Provider::named("a");
    for keys in ["", KEY] {
        let zap = Zap::with(&format!("[admin]\n{keys}"), &[a.backend("a", "")]);
        for path in PAGES {
            assert_eq!(get(zap.operator(), path, FORWARDED).status, 200, "{path}");
            let moved = get(zap.client(), path, "");
            assert_eq!((moved.status, moved.code().as_str()), (404, "unknown_url"), "{path}");
            assert!(moved.text().contains("admin listener"), "{}", moved.text());
        }
        for path in ["/", "/status"] {
            assert!(get(zap.operator(), path, BROWSER).text().starts_with("<!doctype html>"), "{path}");
        }
        assert!(get(zap.client(), "/", BROWSER).text().starts_with("Zap "));
        for path in ["/health", "/ready"] {
            assert_eq!(get(zap.operator(), path, "").status, 200, "{path}");
            assert_eq!(get(zap.client(), path, "").status, 200, "{path}");
        }
        for path in ["/v1/models", "/v1/responses/resp_1", "/v1/nothing", "/nothing"] {
            let refused = get(zap.operator(), path, "authorization: Bearer zk-team\r\n");
            assert_eq!((refused.status, refused.code().as_str()), (404, "unknown_url"), "{path}");
        }
        let chat = zap.operator().chat("authorization: Bearer zk-team\r\n", CHAT);
        assert_eq!((chat.status, chat.code().as_str()), (404, "unknown_url"));
        let foreign = "origin: https://evil.example\r\nsec-fetch-site: cross-site\r\n";
        assert_eq!(get(zap.operator(), "/status", foreign).code(), "origin_not_allowed");
    }
    assert_eq!(a.count(), 0);
}

#[test]
fn the_token_guards_all_pages_but_the_probes() {
    let a = Provider::named("a");
    let zap = Zap::with(&format!("[admin]\ntoken = \"zt-1\"\n{KEY}"), &[a.backend("a", "")]);
    for (path, accept) in PAGES.iter().map(|path| (*path, "")).chain([("/", ""), ("/", BROWSER)]) {
        for shown in ["", "authorization: Bearer zk-team\r\n", "x-api-key: zt-\r\n", BASIC_KEY] {
            let refused = get(zap.operator(), path, &format!("{accept}{shown}"));
            let got = (refused.status, refused.code());
            assert_eq!(got, (401, "invalid_admin_token".to_owned()), "{path} {shown}");
            assert_eq!(refused.header("www-authenticate"), Some("Basic realm=\"Zap\""));
        }
        for shown in ["authorization: Bearer zt-1\r\n", "x-api-key: zt-1\r\n", BASIC_TOKEN] {
            let seen = get(zap.operator(), path, &format!("{accept}{shown}"));
            assert_eq!(seen.status, 200, "{path} {shown}");
            assert!(!seen.text().contains("zt-1"));
        }
    }
    for path in ["/health", "/ready"] {
        assert_eq!(get(zap.operator(), path, "").status, 200, "{path}");
    }
    // The token opens nothing for clients.
    assert_eq!(get(zap.client(), "/v1/models", "authorization: Bearer zt-1\r\n").status, 401);
}

#[test]
fn a_reload_replaces_the_token_and_keeps_it_when_the_section_goes() {
    let a = Provider::named("a");
    let file = File::new();
    let zap = Zap::with_file(&file, "[admin]\ntoken = \"zt-1\"\n", &[a.backend("a", "")]);
    let status =
        |token: &str| get(zap.operator(), "/status", &format!("authorization: Bearer {token}\r\n")).status;
    file.write("[admin]\ntoken = \"zt-2\"\n", &[a.backend("a", "")]);
    zap.order(Order::Reload);
    eventually("the new token is in effect", || status("zt-2") == 200);
    assert_eq!(status("zt-1"), 401);
    file.write("", &[a.backend("a", "")]);
    zap.order(Order::Reload);
    let applied = "zap_config_reloads_total{result=\"applied\"} 2\n";
    let metrics = || get(zap.operator(), "/metrics", "authorization: Bearer zt-2\r\n").text().to_owned();
    eventually("the section is gone", || metrics().contains(applied));
    assert_eq!((status("zt-2"), status("")), (200, 401), "the listener stays, and its token");
    file.write("[admin]\nport = 1\n", &[a.backend("a", "")]);
    zap.order(Order::Reload);
    eventually("it has moved", || metrics().contains("zap_config_reloads_total{result=\"applied\"} 3\n"));
    assert_eq!(
        (status("zt-2"), status("")),
        (200, 401),
        "another address needs a restart, and so does its token"
    );
    assert_eq!(get(zap.client(), "/status", "").status, 404);
}

#[test]
fn the_admin_listener_answers_while_clients_have_taken_all_connections() {
    let a = Provider::named("a");
    let zap = Zap::with("[server]\nmax_connections = 3\n[admin]\n", &[a.backend("a", "")]);
    let mut all: Vec<_> = (0..3).map(|_| zap.client()).collect();
    all.iter_mut().for_each(|client| assert_eq!(client.get("/health").status, 200));
    for path in ["/health", "/ready", "/metrics", "/status"] {
        assert_eq!(get(zap.operator(), path, "").status, 200, "{path}");
    }
    // One connection more waits until one goes.
    let mut late = zap.client();
    late.send("GET /v1/models HTTP/1.1\r\nhost: zap\r\n\r\n");
    drop(all.pop());
    assert_eq!(late.response().status, 200);
}

#[test]
fn a_drain_is_seen_at_the_admin_listener() {
    let gate = Gate::default();
    let a = Provider::gated(&gate);
    let zap = Zap::with("[admin]\n", &[a.backend("a", "")]);
    let mut running = zap.client();
    running.post("/chat", "", CHAT);
    eventually("it is at the backend", || gate.waiting() == 1);
    zap.order(Order::Drain);
    eventually("it is not ready", || get(zap.operator(), "/ready", "").status == 503);
    assert_eq!(get(zap.operator(), "/metrics", "").status, 200);
    gate.open(1);
    assert_eq!(running.response().status, 200);
    let address = zap.admin.unwrap();
    assert!(zap.join());
    assert!(TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err());
}

#[test]
fn the_admin_listener_has_certificates_of_its_own() {
    let authority = Authority::new("ca");
    let a = Provider::named("a");
    authority.write("admin.test", 2090);
    let entry = authority.entry("admin.test", false).replace("[[server.tls]]", "[[admin.tls]]");
    let zap = Zap::with(&format!("[admin]\ntoken = \"zt-1\"\n{entry}"), &[a.backend("a", "")]);
    let tls = authority.client("admin.test", None);
    let metrics = get(zap.operator().over_tls(&tls), "/metrics", "authorization: Bearer zt-1\r\n");
    assert!(metrics.text().contains("zap_tls_certificate_expiry_timestamp_seconds{name=\"admin.test\"} 3"));
    assert_eq!(get(zap.operator(), "/metrics", "").status, 400, "plain HTTP gets a plain answer");
    assert_eq!(zap.chat(CHAT).status, 200, "clients speak plain HTTP");
}

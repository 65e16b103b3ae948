//! The HTTP edge: which requests are served, and which are refused before any routing.

use std::time::{Duration, Instant};

use crate::support::{CHAT, Provider, Zap, eventually};

fn start() -> (Provider, Zap) {
    let provider = Provider::named("ok");
    let zap = Zap::with("", &[provider.backend("a", "")]);
    (provider, zap)
}

#[test]
fn an_ambiguous_head_is_refused_and_the_connection_closed() {
    let (provider, zap) = start();
    let body = format!("content-length: {}\r\n\r\n{CHAT}", CHAT.len());
    for head in [
        format!("POST /chat HTTP/1.1\r\n{body}"),
        format!("POST /chat HTTP/1.1\r\nhost: a\r\nhost: a\r\n{body}"),
        format!("POST /chat HTTP/1.1\r\nhost: a b\r\n{body}"),
        format!("POST /chat HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n{body}"),
        "POST /chat HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
        "POST /chat HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n".to_owned(),
        format!("POST http://b/chat HTTP/1.1\r\nhost: a\r\n{body}"),
        format!("POST /chat HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n{body}"),
        "CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n".to_owned(),
        "GET /health HTTP/1.1\nhost: a\n\n".to_owned(),
        "\nGET /health HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
        "\r\rGET /health HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
        "GET /metrics#x HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
        format!("POST /chat?#x HTTP/1.1\r\nhost: a\r\n{body}"),
        "GET /v1/models/é HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
        "GET /health?\\ HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
        "\u{16}\u{3}\u{1}\u{2}".to_owned(),
    ] {
        let mut client = zap.client();
        // A second request follows; it must get no response.
        client.send(format!("{head}GET /health HTTP/1.1\r\nhost: a\r\n\r\n"));
        let answer = client.response();
        assert_eq!((answer.status, answer.code().as_str()), (400, "bad_request"), "{head:?}");
        assert_eq!(answer.header("connection"), Some("close"));
        assert_eq!(client.rest().0, b"", "{head:?}");
    }
    assert_eq!(provider.count(), 0);
    zap.wait_until_idle();
}

#[test]
fn a_head_may_arrive_byte_by_byte_and_requests_may_be_pipelined() {
    let (_provider, zap) = start();
    let mut client = zap.client();
    for byte in b"\r\nGET /health HTTP/1.1\r\nHost: zap\r\n\r\n" {
        client.send([*byte]);
    }
    assert_eq!(client.response().status, 200);
    let one = format!("POST /chat HTTP/1.1\r\nhost: zap\r\ncontent-length: {}\r\n\r\n{CHAT}", CHAT.len());
    client.send(format!(
        "{one}GET /health HTTP/1.1\r\nhost: zap\r\n\r\n{one}GET /ready HTTP/1.1\r\nhost: zap\r\n\r\n"
    ));
    let texts: Vec<_> = (0..4).map(|_| client.response().text().to_owned()).collect();
    assert_eq!(texts, ["ok", "{\"status\":\"ok\"}", "ok", "{\"status\":\"ready\"}"]);
    client.send("GET /health HTTP/1.1\r\nhost: a\r\n\r\nGET /health HTTP/1.1\r\n\r\n");
    assert_eq!((client.response().status, client.response().status), (200, 400));
}

#[test]
fn a_response_before_the_end_of_the_body_closes_the_connection() {
    let (_provider, zap) = start();
    for (path, part, close) in [
        ("/nothing", "", true),
        ("/health", "{", true),
        ("/chat", "x", true),
        ("/nothing", "{ }", false),
        ("/health", "{ }", false),
        ("/chat", "x  ", false),
    ] {
        let mut client = zap.client();
        client.send(format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n{part}"));
        let answer = client.response();
        assert!(answer.status >= 400);
        assert_eq!(answer.header("connection") == Some("close"), close, "{path} {part:?}");
        match close {
            true => client.close_within(Duration::from_secs(3)),
            false => assert_eq!(client.get("/health").status, 200, "{path} {part:?}"),
        }
    }
}

#[test]
fn a_large_head_and_body_in_one_write_arrive_complete() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "")]);
    let body = format!("{{\"messages\":[\"{}\"]}}", "x".repeat(100_000));
    let mut client = zap.client();
    for size in [100, 8_000, 30_000, 60_000] {
        let padding = format!("x-padding: {}\r\n", "p".repeat(size));
        assert_eq!(client.chat(&padding, &body).text(), body, "{size}");
    }
}

#[test]
fn an_oversized_head_gets_a_431_from_hyper() {
    let (provider, zap) = start();
    for (head, status) in [
        (format!("GET /health HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "y".repeat(500_000)), 431),
        (format!("GET /health HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: y\r\n".repeat(101)), 431),
    ] {
        let mut client = zap.client();
        client.try_send(head);
        assert_eq!(client.response().status, status);
    }
    assert_eq!(provider.count(), 0);
}

#[test]
fn paths_and_methods_are_exact() {
    let (provider, zap) = start();
    let mut client = zap.client();
    for path in ["//", "/nothing", "/v1//chat", "/%63hat", "/chat/", "/v1/chat/completions/"] {
        let answer = client.get(path);
        assert_eq!((answer.status, answer.code().as_str()), (404, "unknown_url"), "{path}");
        client.post(path, "", CHAT);
        assert_eq!(client.response().status, 404, "{path}");
    }
    // Characters that clients often leave unescaped in a query are accepted.
    assert_eq!(client.get("/health?a[]={b}|^c&d='(e)'!$*+,;=?").status, 200);
    for (path, allow) in [("/chat", "POST"), ("/v1/chat/completions", "POST")] {
        let answer = client.get(path);
        assert_eq!((answer.status, answer.code().as_str()), (405, "method_not_allowed"));
        assert_eq!(answer.header("allow"), Some(allow));
    }
    for path in ["/health", "/ready", "/metrics", "/status"] {
        client.post(path, "", "");
        let answer = client.response();
        assert_eq!((answer.status, answer.header("allow")), (405, Some("GET, HEAD")), "{path}");
        client.send(format!("HEAD {path} HTTP/1.1\r\nhost: a\r\n\r\n"));
        let head = client.head();
        assert_eq!(head.status, 200);
        assert!(head.header("content-length").is_some() && client.is_quiet(), "{path}");
    }
    assert_eq!(provider.count(), 0);
}

#[test]
fn http_1_0_is_served_without_chunks() {
    let stream = Provider::start(|_, stream| {
        crate::support::provider::start_events(stream);
        crate::support::provider::chunk(stream, "data: one\n\ndata: [DONE]\n\n");
        crate::support::provider::end_chunks(stream);
        crate::support::provider::After::Keep
    });
    let zap = Zap::with("", &[stream.backend("a", "")]);
    for headers in ["", "host: a\r\n", "connection: keep-alive\r\n"] {
        let mut client = zap.client();
        client.send(format!("POST /chat HTTP/1.0\r\n{headers}content-length: {}\r\n\r\n{CHAT}", CHAT.len()));
        let answer = client.head();
        assert_eq!((answer.status, answer.header("transfer-encoding")), (200, None), "{headers}");
        assert_eq!(client.rest(), (b"data: one\n\ndata: [DONE]\n\n".to_vec(), true));
    }
}

#[test]
fn an_absolute_form_target_that_matches_the_host_is_served() {
    let (_provider, zap) = start();
    let mut client = zap.client();
    client.send("GET http://a:1/health HTTP/1.1\r\nhost: a:1\r\n\r\n");
    assert_eq!(client.response().text(), "{\"status\":\"ok\"}");
}

#[test]
fn idle_connections_and_slow_heads_are_closed() {
    let provider = Provider::named("ok");
    let zap = Zap::with("[server]\nkeep_alive_secs = 1", &[provider.backend("a", "")]);
    let mut idle = zap.client();
    assert_eq!(idle.chat("", CHAT).status, 200);
    let since = Instant::now();
    assert_eq!(idle.rest().0, b"");
    assert!(since.elapsed() > Duration::from_millis(900), "{:?}", since.elapsed());

    let zap = Zap::with("", &[provider.backend("a", "")]);
    let since = Instant::now();
    let threads: Vec<_> = ["", "GET /health HTTP/1.1\r\nhost: "]
        .into_iter()
        .map(|part| {
            let mut client = zap.client();
            std::thread::spawn(move || {
                client.send(part);
                std::thread::sleep(Duration::from_millis(100));
                client.close_within(Duration::from_secs(15));
                since.elapsed()
            })
        })
        .collect();
    for thread in threads {
        let took = thread.join().unwrap();
        assert!(took > Duration::from_secs(9) && took < Duration::from_secs(12), "{took:?}");
    }
}

#[test]
fn health_checks_get_an_answer_while_all_connections_are_taken() {
    let provider = Provider::named("ok");
    let zap = Zap::with("[server]\nmax_connections = 2", &[provider.backend("a", "")]);
    let (mut first, mut second) = (zap.client(), zap.client());
    assert_eq!((first.chat("", CHAT).status, second.chat("", CHAT).status), (200, 200));
    for path in ["/health", "/ready"] {
        let mut probe = zap.client();
        let response = probe.get(path);
        assert_eq!((response.status, response.header("connection")), (200, Some("close")), "{path}");
        assert_eq!(probe.rest(), (Vec::new(), true), "the next health check needs the place");
    }
    // Half of the reserve may wait for a regular connection to end, and the rest is refused at once.
    let (answer, answers) = std::sync::mpsc::channel();
    let began = Instant::now();
    for path in ["/v1/models", "/metrics", "/unknown"].iter().cycle().take(10) {
        let (answer, mut client) = (answer.clone(), zap.client());
        std::thread::spawn(move || {
            let response = client.get(path);
            let close = response.header("connection") == Some("close");
            let code = if response.status == 503 { response.code() } else { String::new() };
            let _ = answer.send((code, response.header("retry-after").map(str::to_owned), close));
        });
    }
    let next = || answers.recv_timeout(Duration::from_secs(20)).unwrap();
    let refused = ("too_many_connections".to_owned(), Some("1".to_owned()), true);
    assert_eq!((next(), next()), (refused.clone(), refused.clone()));
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert_eq!(zap.client().get("/health").status, 200, "the other half is for health checks");
    assert_eq!(provider.count(), 2, "no backend sees what is refused");
    assert_eq!(second.chat("", CHAT).status, 200, "a connection within the limit is served as before");
    drop(first);
    for _ in 0..8 {
        assert_eq!(next().0, "", "each takes the place of the one before");
    }
    let mut third = zap.client();
    assert_eq!(third.get("/v1/models").status, 200);
    let began = Instant::now();
    assert_eq!(zap.client().get("/v1/models").code(), "too_many_connections");
    assert!(began.elapsed() > Duration::from_secs(4), "it has waited");
    drop(third);
    drop(second);
    let refusals = || {
        let page = zap.client().get("/metrics");
        let line = page.text().lines().find(|line| line.contains("{reason=\"too_many_connections\"}"));
        line.and_then(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
    };
    eventually("the refusals are counted", || refusals().is_some_and(|n| n >= 3));
}

#[test]
fn silent_connections_leave_the_reserve_soon() {
    let provider = Provider::named("ok");
    let zap = Zap::with("[server]\nmax_connections = 1", &[provider.backend("a", "")]);
    let mut only = zap.client();
    assert_eq!(only.get("/ready").status, 200);
    let silent: Vec<_> = (0..16).map(|_| zap.client()).collect();
    let since = Instant::now();
    assert_eq!(zap.client().get("/health").status, 200);
    let took = since.elapsed();
    assert!(took > Duration::from_secs(1) && took < Duration::from_secs(5), "{took:?}");
    drop(silent);
}

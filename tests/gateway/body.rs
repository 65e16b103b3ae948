//! Request bodies: checks, limits, and the bytes that reach the backend.

use std::time::{Duration, Instant};

use crate::support::{CHAT, Provider, Zap, eventually, within};

#[test]
fn the_default_model_is_inserted_if_the_body_has_none_and_nothing_else_changes() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "default_model = \"m\\\"1\"")]);
    for (body, want) in [
        (r#"{"messages":[]}"#, r#"{"model":"m\"1","messages":[]}"#),
        (r#" { "messages" : [ ] } "#, r#" {"model":"m\"1", "messages" : [ ] } "#),
        (r#"{"messages":[],"model":null}"#, r#"{"messages":[],"model":"m\"1"}"#),
        (r#"{"messages":[],"model":"","x":1e400}"#, r#"{"messages":[],"model":"m\"1","x":1e400}"#),
        (r#"{"mod\u0065l":"","messages":[]}"#, r#"{"mod\u0065l":"m\"1","messages":[]}"#),
        (r#"{"messages":[],"model":"own"}"#, r#"{"messages":[],"model":"own"}"#),
        (r#"{"messages":[{"model":null}],"model":"own"}"#, r#"{"messages":[{"model":null}],"model":"own"}"#),
    ] {
        let answer = zap.chat(body);
        assert_eq!((answer.status, answer.text()), (200, want), "{body}");
    }
    assert_eq!(provider.seen()[0].header("content-length"), Some("30"));
}

#[test]
fn without_a_default_model_the_body_passes_unchanged() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "")]);
    for body in [r#"{"messages":[]}"#, r#"{"model":null,"messages":[]}"#, r#"{"model":"","messages":[]}"#] {
        assert_eq!(zap.chat(body).text(), body);
    }
}

#[test]
fn each_invalid_body_gets_its_error_and_is_not_sent() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "")]);
    let deep = format!("{{\"messages\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let half = "{\"messages\":[\"".repeat(700_000);
    for (body, code, hint) in [
        (&b""[..], "invalid_json", "byte 0,"),
        (b"[]", "invalid_json", "byte 0,"),
        (b"3", "invalid_json", "byte 0,"),
        (b"\xEF\xBB\xBF{\"messages\":[]}", "invalid_json", "byte 0,"),
        (br#"{"messages":[],}"#, "invalid_json", "byte 15,"),
        (br#"{"messages":["a"#, "invalid_json", "byte 15,"),
        (b"{\"messages\":[\"\xFF\"]}", "invalid_json", "byte 14,"),
        (deep.as_bytes(), "invalid_json", "byte 139,"),
        (half.as_bytes(), "invalid_json", "byte"),
        (br#"{"messages":[],"model":"a","model":"b"}"#, "duplicate_key", "\"model\""),
        (br#"{"messages":[],"model":"a","\u006dodel":"b"}"#, "duplicate_key", "\"model\""),
        (br#"{"messages":[],"stream":true,"stream":true}"#, "duplicate_key", "\"stream\""),
        (br#"{"messages":[],"messages":[]}"#, "duplicate_key", "\"messages\""),
        (
            br#"{"messages":[],"model":"a","Model":"b"}"#,
            "duplicate_key",
            "The key \"Model\" differs from \"model\"",
        ),
        (br#"{"Model":"b","messages":[],"model":"a"}"#, "duplicate_key", "The key \"Model\""),
        (br#"{"messages":[],"MODEL":"b"}"#, "duplicate_key", "The key \"MODEL\""),
        (br#"{"messages":[],"\u004dodel":"b"}"#, "duplicate_key", "The key \"Model\""),
        ("{\"me\u{17f}\u{17f}ages\":[]}".as_bytes(), "duplicate_key", "from \"messages\""),
        (br#"{"messages":[],"\u017ftream":true}"#, "duplicate_key", "from \"stream\""),
        (br#"{"messages":[],"model":7}"#, "invalid_type", "\"model\""),
        (br#"{"messages":[],"stream":"yes"}"#, "invalid_type", "\"stream\""),
        (br#"{"model":"a"}"#, "missing_messages", "\"messages\""),
        (br#"{"messages":{}}"#, "missing_messages", "\"messages\""),
    ] {
        let answer = zap.chat(body);
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        assert_eq!((answer.status, answer.code().as_str()), (400, code), "{shown}");
        let error = &answer.json()["error"];
        assert!(error["message"].as_str().unwrap().contains(hint), "{shown}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    assert_eq!(provider.count(), 0);
    zap.wait_until_idle();
}

#[test]
fn the_connection_survives_an_invalid_body() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "")]);
    let mut client = zap.client();
    assert_eq!(client.chat("", "{").status, 400);
    assert_eq!(client.chat("", CHAT).text(), CHAT);
}

#[test]
fn a_body_over_the_limit_is_refused_as_soon_as_its_size_is_known() {
    let provider = Provider::echo();
    let zap = Zap::with("[server]\nmax_body_bytes = 2048", &[provider.backend("a", "")]);
    let mut announced = zap.client();
    announced.send("POST /chat HTTP/1.1\r\nhost: zap\r\ncontent-length: 2049\r\n\r\n");
    let answer = announced.response();
    assert_eq!((answer.status, answer.code().as_str()), (413, "request_too_large"));
    assert_eq!(answer.header("connection"), Some("close"));

    let mut endless = zap.client();
    endless.send(
        "POST /chat HTTP/1.1\r\nhost: zap\r\ntransfer-encoding: chunked\r\n\r\n400\r\n{\"messages\":\"",
    );
    endless.send(format!("{}\r\n", "x".repeat(1011)));
    for _ in 0..100 {
        if !endless.try_send(format!("400\r\n{}\r\n", "x".repeat(1024))) {
            break;
        }
    }
    assert_eq!(endless.response().code(), "request_too_large");

    let exact = format!("{{\"messages\":[\"{}\"]}}", "x".repeat(2048 - 17));
    assert_eq!(exact.len(), 2048);
    assert!(zap.chat(&exact).text() == exact, "a body of exactly the limit must pass unchanged");
    assert_eq!(provider.count(), 1);
    zap.wait_until_idle();
}

#[test]
fn encodings_and_expectations_are_checked_before_the_body() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "")]);
    let gzip = zap.client().chat("content-encoding: gzip\r\n", CHAT);
    assert_eq!((gzip.status, gzip.code().as_str()), (415, "unsupported_content_encoding"));
    let odd = zap.client().chat("expect: 200-ok\r\n", CHAT);
    assert_eq!((odd.status, odd.code().as_str()), (417, "expectation_failed"));
    assert_eq!(zap.client().chat("content-encoding: identity\r\n", CHAT).status, 200);

    let mut polite = zap.client();
    polite.send(format!(
        "POST /chat HTTP/1.1\r\nhost: zap\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n",
        CHAT.len()
    ));
    assert_eq!(polite.head().status, 100);
    polite.send(CHAT);
    assert_eq!(polite.response().text(), CHAT);
    assert_eq!(provider.count(), 2);
}

#[test]
fn a_chunked_body_arrives_complete_and_without_its_trailers() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "default_model = \"m\"")]);
    let mut client = zap.client();
    client.send("POST /chat HTTP/1.1\r\nhost: zap\r\ntransfer-encoding: chunked\r\ntrailer: x-t\r\n\r\n");
    for byte in CHAT.as_bytes() {
        client.send(format!("1\r\n{}\r\n", *byte as char));
    }
    client.send("0\r\nx-t: secret\r\n\r\n");
    let answer = client.response();
    assert_eq!(answer.text(), format!("{{\"model\":\"m\",{}", &CHAT[1..]));
    assert_eq!(answer.header("connection"), None);
    let seen = &provider.seen()[0];
    assert_eq!(
        (seen.header("x-t"), seen.header("transfer-encoding"), seen.header("trailer")),
        (None, None, None)
    );
}

#[test]
fn a_large_body_passes_byte_for_byte() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "default_model = \"m\"")]);
    let text: String = (0..400_000).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
    let body = format!("{{\"messages\":[\"{text}é中😀\"],\"model\":null}}");
    assert_eq!(zap.chat(&body).text(), body.replace("null", "\"m\""));
}

#[test]
fn a_client_that_disconnects_in_its_body_is_counted() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "")]);
    for (n, framing) in
        [(1.0, "content-length: 100\r\n\r\n"), (2.0, "transfer-encoding: chunked\r\n\r\n40\r\n")]
    {
        let mut client = zap.client();
        client.send(format!("POST /chat HTTP/1.1\r\nhost: zap\r\n{framing}{{\"mess"));
        drop(client);
        eventually("the disconnect is counted", || {
            zap.metric("zap_client_disconnects_total{phase=\"body\"}") == n
        });
    }
    assert_eq!(zap.metric("zap_requests_total{endpoint=\"chat\",backend=\"\",status=\"499\"}"), 2.0);
    assert_eq!(provider.count(), 0);
    zap.wait_until_idle();
}

#[test]
fn the_clock_of_a_request_starts_when_its_body_is_whole() {
    let provider = Provider::echo();
    let zap = Zap::with("[queue]\ntimeout_secs = 1", &[provider.backend("a", "")]);
    let mut client = zap.client();
    client.send(format!("POST /chat HTTP/1.1\r\nhost: zap\r\ncontent-length: {}\r\n\r\n", CHAT.len()));
    let (first, rest) = CHAT.split_at(CHAT.len() / 2);
    client.send(first);
    std::thread::sleep(Duration::from_millis(1_100));
    assert!(client.is_quiet());
    client.send(rest);
    assert_eq!(client.response().text(), CHAT);
    zap.wait_until_idle();
}

#[test]
fn a_stalled_body_gets_a_408() {
    let provider = Provider::echo();
    // The clock of a request does not run yet: an upload has only its own rule, 1 KiB in 30 s.
    let zap = Zap::with("[queue]\ntimeout_secs = 1", &[provider.backend("a", "")]);
    let mut client = zap.client();
    let since = Instant::now();
    client.send("POST /chat HTTP/1.1\r\nhost: zap\r\ncontent-length: 100\r\n\r\n{\"mess");
    within(Duration::from_secs(35), "the body is refused", || !client.is_quiet());
    assert!(since.elapsed() > Duration::from_secs(29), "{:?}", since.elapsed());
    let answer = client.response();
    assert_eq!((answer.status, answer.code().as_str()), (408, "request_timeout"));
    assert_eq!(answer.header("connection"), Some("close"));
    client.half_close();
    assert_eq!(client.rest().0, b"");
    assert_eq!(provider.count(), 0);
    zap.wait_until_idle();
}

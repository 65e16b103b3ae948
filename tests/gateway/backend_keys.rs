//! Keys of backends: a provider that refuses one, and what the client and the log see of it.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::provider::{After, reply};
use crate::support::{CHAT, Provider, Zap, eventually};

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

//! The JSON endpoints other than chat: the same rules, each with its own path.

use crate::support::provider::{After, chunk, end_chunks, start_events};
use crate::support::{Provider, Zap};

const FORWARDED: [(&str, &str); 9] = [
    ("/v1/audio/speech", "speech"),
    ("/v1/completions", "completions"),
    ("/v1/embeddings", "embeddings"),
    ("/v1/images/generations", "images"),
    ("/v1/moderations", "moderations"),
    ("/v1/rerank", "rerank"),
    ("/v1/responses", "responses"),
    ("/v1/responses/compact", "compact"),
    ("/v1/responses/input_tokens", "input_tokens"),
];

#[test]
fn a_websocket_upgrade_is_refused_with_a_hint_to_use_http() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let ask = |line: &str, headers: &str| {
        let mut client = zap.client();
        client.send(format!("{line} HTTP/1.1\r\nhost: zap\r\n{headers}\r\n"));
        client.response()
    };
    for headers in [
        "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n",
        "connection: keep-alive, upgrade\r\nupgrade: h2c, WebSocket\r\n",
    ] {
        for path in ["/v1/responses", "/v1/chat/completions", "/chat"] {
            let answer = ask(&format!("GET {path}"), headers);
            assert_eq!((answer.status, answer.code().as_str()), (426, "upgrade_required"), "{path}");
            assert_eq!(answer.header("upgrade"), Some("HTTP/1.1"), "RFC 9110, section 15.5.22");
            assert_eq!(answer.header("connection"), Some("upgrade"), "RFC 9110, section 7.8");
        }
        let posted = ask("DELETE /v1/responses", headers);
        assert_eq!(posted.status, 405);
    }
    assert_eq!(ask("GET /v1/responses", "").status, 405);
    assert_eq!(ask("GET /v1/responses", "connection: upgrade\r\nupgrade: h2c\r\n").status, 405);
    assert_eq!(ask("GET /health", "connection: upgrade\r\nupgrade: websocket\r\n").status, 200);
    assert_eq!(zap.metric("zap_rejected_total{reason=\"upgrade_required\"}"), 6.0);
}

#[test]
fn each_endpoint_goes_to_its_path_under_the_api_base_byte_for_byte() {
    let a = Provider::echo();
    let more = "chat_path = \"/api/v2/chat/completions\"\napi_key = \"sk-a\"";
    let zap = Zap::with("[rate_limit]\nrequests_per_minute = 100", &[a.backend("a", more)]);
    let mut client = zap.client();
    let body = r#"{ "input":[1,2e5],"model":"m" }"#;
    for (path, name) in FORWARDED {
        client.post(path, "", body);
        let answer = client.response();
        assert_eq!((answer.status, answer.text()), (200, body), "{path}");
        assert_eq!(answer.header("x-ratelimit-limit-requests"), Some("100"));
        let seen = a.seen().pop().unwrap();
        let tail = path.strip_prefix("/v1").unwrap();
        assert_eq!(seen.line, format!("POST /api/v2{tail} HTTP/1.1"));
        assert_eq!(seen.header("authorization"), Some("Bearer sk-a"));
        let series = format!("zap_requests_total{{endpoint=\"{name}\",backend=\"a\",status=\"200\"}}");
        assert_eq!(zap.metric(&series), 1.0, "{name}");
        let wrong = client.get(path);
        assert_eq!((wrong.status, wrong.header("allow")), (405, Some("POST")), "{path}");
    }
}

#[test]
fn the_default_model_is_inserted_for_completions_and_responses_only() {
    let a = Provider::echo();
    let zap = Zap::with("", &[a.backend("a", "default_model = \"d\"")]);
    let mut client = zap.client();
    for (path, _) in FORWARDED {
        client.post(path, "", r#"{"input":"x","model":null}"#);
        let answer = client.response();
        if path == "/v1/completions" || path.starts_with("/v1/responses") {
            assert_eq!((answer.status, answer.text()), (200, r#"{"input":"x","model":"d"}"#), "{path}");
        } else {
            assert_eq!((answer.status, answer.code().as_str()), (400, "missing_model"), "{path}");
        }
        client.post(path, "", r#"{"model":"m","stream":1}"#);
        assert_eq!(client.response().code(), "invalid_type", "{path}");
    }
}

#[test]
fn a_path_without_v1_is_the_same_endpoint() {
    let a = Provider::echo();
    let keys = "[[client_keys]]\nname = \"c\"\nkey = \"sk-c\"\n";
    let zap = Zap::with("", &[a.backend("a", "models = [\"m\"]"), keys.into()]);
    let mut client = zap.client();
    let body = r#"{"messages":[],"model":"m"}"#;
    let paths = FORWARDED.iter().chain(&[("/v1/chat/completions", "chat")]);
    for (path, name) in paths {
        let short = path.strip_prefix("/v1").unwrap();
        client.post(short, "", body);
        assert_eq!(client.response().status, 401, "{short} needs a key");
        client.post(short, "authorization: Bearer sk-c\r\n", body);
        assert_eq!(
            (client.response().text(), a.seen().pop().unwrap().line),
            (body, format!("POST {path} HTTP/1.1"))
        );
        let series = format!("zap_requests_total{{endpoint=\"{name}\",backend=\"a\",status=\"200\"}}");
        assert_eq!(zap.metric(&series), 1.0, "{name}");
    }
    let mut get = |path: &str, key: &str| {
        client.send(format!("GET {path} HTTP/1.1\r\nhost: zap\r\nauthorization: Bearer {key}\r\n\r\n"));
        client.response()
    };
    assert_eq!(get("/models", "wrong").status, 401);
    assert_eq!(get("/models", "sk-c").json(), get("/v1/models", "sk-c").json());
    assert_eq!(get("/models/m", "sk-c").json()["id"], "m");
}

#[test]
fn the_state_of_a_provider_is_refused_with_a_sentence_that_says_so() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let paths = [
        "/v1/files",
        "/files/f/content",
        "/v1/batches",
        "/v1/realtime",
        "/v1/assistants",
        "/v1/messages/batches",
    ];
    for path in paths {
        let mut client = zap.client();
        client.post(path, "", "{}");
        for answer in [client.response(), client.get(path)] {
            assert_eq!((answer.status, answer.code().as_str()), (404, "unknown_url"), "{path}");
            assert!(answer.text().contains("one provider's state"), "{}", answer.text());
        }
    }
    let other = zap.client().get("/v1/other");
    assert!(!other.text().contains("one provider's state"));
    assert!(other.text().contains("POST /v1/chat/completions, messages at POST /v1/messages"));
    assert_eq!(a.count(), 0);
}

#[test]
fn a_backend_with_a_custom_chat_path_serves_chat_only() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let zap = Zap::with("", &[a.backend("a", "weight = 9\nchat_path = \"/talk\""), b.backend("b", "")]);
    for _ in 0..4 {
        let mut client = zap.client();
        client.post("/v1/embeddings", "", r#"{"model":"m"}"#);
        assert_eq!(client.response().text(), "b");
    }
    let zap = Zap::with("", &[a.backend("a", "chat_path = \"/talk\"")]);
    let mut client = zap.client();
    client.post("/v1/embeddings", "", r#"{"model":"m"}"#);
    assert_eq!(client.response().code(), "no_backend");
    assert_eq!(a.count(), 0);
}

#[test]
fn a_v1_responses_stream_ends_without_done() {
    let a = Provider::start(|_, stream| {
        start_events(stream);
        chunk(stream, "event: response.completed\ndata: {}\n\n");
        end_chunks(stream);
        After::Keep
    });
    let zap = Zap::with("", &[a.backend("a", "")]);
    for (path, interrupted) in [("/v1/responses", 0.0), ("/v1/completions", 1.0)] {
        let mut client = zap.client();
        client.post(path, "", r#"{"model":"m","stream":true}"#);
        let answer = client.response();
        assert_eq!(answer.whole, interrupted == 0.0, "{path}");
        assert_eq!(answer.text().contains("stream_interrupted"), interrupted == 1.0, "{path}");
        assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), interrupted, "{path}");
    }
}

#[test]
fn the_root_says_what_is_here() {
    let a = Provider::named("a");
    let zap = Zap::with("[[client_keys]]\nname = \"team\"\nkey = \"zk\"\n", &[a.backend("a", "")]);
    let page = zap.client().get("/");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/plain; charset=utf-8")));
    assert!(page.text().starts_with("Zap ") && page.text().contains("/status"), "{}", page.text());
    assert!(page.text().contains("/v1 for OpenAI's SDKs, / for Anthropic's"), "{}", page.text());
    assert_eq!(zap.client().chat("", "{}").status, 401);
}

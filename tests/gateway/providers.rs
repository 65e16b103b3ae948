//! Options for providers that differ from the rest: key headers, paths, extra headers, dropped fields.

use crate::support::{CHAT, Provider, Zap, eventually};

#[test]
fn auth_header_names_the_header_of_the_key() {
    let a = Provider::named("a");
    let more = "api_key = \"sk-CANARY\"\nauth_header = \"api-key\"";
    let zap = Zap::with("", &[a.backend("a", more)]);
    eventually("the backend is probed", || !a.probes().is_empty());
    assert_eq!(a.probes()[0].header("api-key"), Some("sk-CANARY"));
    zap.client().chat("api-key: client\r\nauthorization: Bearer client\r\n", CHAT);
    let seen = a.seen().remove(0);
    assert_eq!((seen.header("api-key"), seen.header("authorization")), (Some("sk-CANARY"), None));
}

#[test]
fn with_auth_header_authorization_the_key_has_no_scheme() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "api_key = \"sk-CANARY\"\nauth_header = \"Authorization\"")]);
    eventually("the backend is probed", || !a.probes().is_empty());
    assert_eq!(a.probes()[0].header("authorization"), Some("sk-CANARY"));
    zap.client().chat("authorization: Bearer client\r\n", CHAT);
    let keys: Vec<_> = a.seen().remove(0).headers.into_iter().filter(|(n, _)| n == "authorization").collect();
    assert_eq!(keys, [("authorization".to_owned(), "sk-CANARY".to_owned())]);
}

#[test]
fn a_key_in_a_custom_header_is_redacted_and_its_401_handled_like_any_other() {
    let a = Provider::fixed(400, "", "bad sk-CANARY");
    let more = "api_key = \"sk-CANARY\"\nauth_header = \"api-key\"";
    assert_eq!(Zap::with("", &[a.backend("a", more)]).chat(CHAT).text(), "bad ***");
    let b = Provider::fixed(401, "", "sk-CANARY");
    assert_eq!(Zap::with("", &[b.backend("b", more)]).chat(CHAT).code(), "upstream_auth_error");
}

#[test]
fn extra_headers_replace_those_of_the_client() {
    let a = Provider::named("a");
    let more = "extra_headers = { HTTP-Referer = \"https://example.org\", user-agent = \"own\" }";
    let zap = Zap::with("", &[a.backend("a", more)]);
    eventually("the backend is probed", || !a.probes().is_empty());
    assert_eq!(a.probes()[0].header("http-referer"), Some("https://example.org"));
    zap.client().chat("http-referer: x\r\nuser-agent: client\r\n", CHAT);
    let seen = a.seen().remove(0);
    assert_eq!(seen.header("http-referer"), Some("https://example.org"));
    let agents: Vec<_> = seen.headers.iter().filter(|(n, _)| n == "user-agent").collect();
    assert_eq!(agents, [&("user-agent".to_owned(), "own".to_owned())]);
}

#[test]
fn a_query_in_the_chat_path_is_sent_on_every_endpoint() {
    let a = Provider::named("a");
    let more = "chat_path = \"/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21\"";
    let zap = Zap::with("", &[a.backend("a", more)]);
    let mut client = zap.client();
    client.post("/v1/chat/completions?mine=1", "", CHAT);
    assert_eq!(client.response().status, 200);
    client.post("/v1/embeddings", "", "{\"model\":\"e\"}");
    assert_eq!(client.response().status, 200);
    let lines: Vec<_> = a.seen().iter().map(|seen| seen.line.clone()).collect();
    let base = "POST /openai/deployments/gpt-4o";
    let query = "?api-version=2024-10-21 HTTP/1.1";
    assert_eq!(lines, [format!("{base}/chat/completions{query}"), format!("{base}/embeddings{query}")]);
}

#[test]
fn a_base_url_that_ends_in_v1_does_not_repeat_v1() {
    for (base, more, chat, embeddings, health) in [
        ("", "", "/v1/chat/completions", "/v1/embeddings", "/health"),
        ("/v1", "", "/v1/chat/completions", "/v1/embeddings", "/health"),
        ("/v1", "health_path = \"/models\"", "/v1/chat/completions", "/v1/embeddings", "/v1/models"),
        ("/v1/", "health_path = \"/v1/models\"", "/v1/chat/completions", "/v1/embeddings", "/v1/models"),
        ("/api/v1", "", "/api/v1/chat/completions", "/api/v1/embeddings", "/api/health"),
        ("/openai", "", "/openai/v1/chat/completions", "/openai/v1/embeddings", "/openai/health"),
        (
            "/openai/v1",
            "chat_path = \"/chat/completions?a=b\"",
            "/openai/v1/chat/completions?a=b",
            "/openai/v1/embeddings?a=b",
            "/openai/health",
        ),
        (
            "/v1",
            "chat_path = \"/v1/chat/completions?a=b\"",
            "/v1/chat/completions?a=b",
            "/v1/embeddings?a=b",
            "/health",
        ),
        (
            "/v1",
            "chat_path = \"/v1beta/chat/completions\"",
            "/v1/v1beta/chat/completions",
            "/v1/v1beta/embeddings",
            "/health",
        ),
        ("/xv1", "", "/xv1/v1/chat/completions", "/xv1/v1/embeddings", "/xv1/health"),
        ("/v1/x", "", "/v1/x/v1/chat/completions", "/v1/x/v1/embeddings", "/v1/x/health"),
    ] {
        let a = Provider::named("a");
        let address = a.backend("a", more).replacen("\"\nweight", &format!("{base}\"\nweight"), 1);
        let zap = Zap::with("", &[address]);
        eventually("the backend is probed", || !a.probes().is_empty());
        let mut client = zap.client();
        assert_eq!(client.chat("", CHAT).status, 200);
        client.post("/v1/embeddings", "", "{\"model\":\"e\"}");
        assert_eq!(client.response().status, 200);
        let lines: Vec<_> = a.seen().iter().map(|seen| seen.line.clone()).collect();
        let want = [chat, embeddings].map(|path| format!("POST {path} HTTP/1.1"));
        assert_eq!(lines, want, "{base}, {more}");
        assert_eq!(a.probes()[0].line, format!("GET {health} HTTP/1.1"), "{base}, {more}");
    }
}

#[test]
fn drop_fields_removes_members_for_that_backend_only() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let backends = [
        a.backend("a", "drop_fields = [\"store\", \"logprobs\"]\ndefault_model = \"m\""),
        b.backend("b", "drop_fields = [\"user\"]"),
    ];
    let zap = Zap::with("", &backends);
    let body = "{ \"store\":true , \"messages\":[{\"store\":1}],\"user\":\"u\", \"logprobs\" : [1,{}] }";
    (0..2).for_each(|_| assert_eq!(zap.chat(body).status, 200));
    let sent = |p: &Provider| String::from_utf8(p.seen()[0].body.clone()).unwrap();
    assert_eq!(sent(&a), "{\"model\":\"m\",  \"messages\":[{\"store\":1}],\"user\":\"u\" }");
    assert_eq!(sent(&b), "{ \"store\":true , \"messages\":[{\"store\":1}], \"logprobs\" : [1,{}] }");
    let twice = zap.chat("{\"messages\":[],\"store\":1,\"st\\u006fre\":2}");
    assert_eq!((twice.status, twice.code().as_str()), (400, "duplicate_key"));
    assert_eq!(twice.json()["error"]["param"], "store");
    let other_case = zap.chat("{\"messages\":[],\"Store\":1}");
    assert_eq!((other_case.status, other_case.code().as_str()), (400, "duplicate_key"));
    assert_eq!(other_case.json()["error"]["param"], "Store");
    assert_eq!(zap.chat("{\"messages\":[],\"Stores\":1}").status, 200);
}

#[test]
fn one_provider_with_several_keys_is_several_backends() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("one", "api_key = \"k1\""), a.backend("two", "api_key = \"k2\"")]);
    (0..4).for_each(|_| assert_eq!(zap.chat(CHAT).status, 200));
    let keys: Vec<_> = a.seen().iter().map(|s| s.header("authorization").unwrap().to_owned()).collect();
    assert_eq!(keys, ["Bearer k1", "Bearer k2", "Bearer k1", "Bearer k2"]);
}

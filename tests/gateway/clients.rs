//! Client keys: authentication, allowed models, rate limits.

use crate::support::{CHAT, Provider, Response, Zap};

const KEYS: &str = "[rate_limit]\nrequests_per_minute = 2\n\
    [[client_keys]]\nname = \"search\"\nkey = \"zk-search\"\nrequests_per_minute = 3\nmodels = [\"cheap\", \"gpt-*\"]\n\
    [[client_keys]]\nname = \"batch\"\nsha256 = \"2c7225aeb459ea4f342eaaca79a86dd40fc33f30e399f787624ab48aa2aed209\"\n";

fn start() -> (Provider, Zap) {
    let a = Provider::named("a");
    let routes = "[models.cheap]\ntargets = [{ backend = \"a\", model = \"own\" }]\n";
    let zap = Zap::with(
        &format!("{KEYS}{routes}"),
        &[a.backend("a", "models = [\"gpt-4o\", \"llama\"]\ndefault_model = \"llama\"")],
    );
    (a, zap)
}

fn ask(zap: &Zap, key: &str, model: &str) -> Response {
    let headers = format!("authorization: Bearer {key}\r\n");
    zap.client().chat(&headers, format!("{{\"messages\":[],\"model\":\"{model}\"}}"))
}

#[test]
fn a_missing_or_unknown_key_is_refused_on_every_v1_path() {
    let (a, zap) = start();
    for (path, method) in [
        ("/chat", "POST"),
        ("/v1/chat/completions", "POST"),
        ("/v1/embeddings", "POST"),
        ("/v1/models", "GET"),
        ("/v1/models/cheap", "GET"),
        ("/v1/nothing", "GET"),
        ("/chat", "DELETE"),
    ] {
        for headers in [
            "",
            "authorization: Bearer nope\r\n",
            "authorization: Basic zk-search\r\n",
            "x-api-key: nope\r\n",
        ] {
            let mut client = zap.client();
            client.send(format!(
                "{method} {path} HTTP/1.1\r\nhost: z\r\ncontent-length: 2\r\n{headers}\r\n{{}}"
            ));
            let refused = client.response();
            assert_eq!(
                (refused.status, refused.code().as_str()),
                (401, "invalid_api_key"),
                "{path} {headers}"
            );
            assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
            assert_eq!(refused.json()["error"]["type"], "authentication_error");
        }
    }
    for path in ["/health", "/ready", "/metrics", "/status"] {
        assert_eq!(zap.client().get(path).status, 200, "{path}");
    }
    assert_eq!(zap.client().get("/nothing").status, 404);
    assert_eq!(a.count(), 0);
    assert_eq!(zap.metric("zap_rejected_total{reason=\"invalid_api_key\"}"), 28.0);
    zap.wait_until_idle();
}

#[test]
fn a_repeated_credential_header_is_refused() {
    let a = Provider::named("a");
    let open = Zap::with("", &[a.backend("a", "forward_authorization = true")]);
    let keyed = Zap::with(KEYS, &[a.backend("a", "")]);
    for zap in [&open, &keyed] {
        for name in ["authorization", "api-key", "x-api-key", "x-goog-api-key"] {
            let scheme = if name == "authorization" { "Bearer " } else { "" };
            let twice = format!("{name}: {scheme}zk-search\r\nx-a: b\r\n{name}: {scheme}zk-batch\r\n");
            let answer = zap.client().chat(&twice, CHAT);
            assert_eq!((answer.status, answer.code().as_str()), (400, "bad_request"), "{twice}");
            assert!(answer.text().contains("repeated"), "{}", answer.text());
            let with_bearer =
                format!("authorization: Bearer zk-search\r\n{name}: {scheme}x\r\n{name}: {scheme}y\r\n");
            assert_eq!(zap.client().chat(&with_bearer, CHAT).status, 400, "{with_bearer}");
            let mut client = zap.client();
            client.send(format!("GET /v1/models HTTP/1.1\r\nhost: z\r\n{twice}\r\n"));
            assert_eq!(client.response().status, 400, "{twice}");
            client.close_within(std::time::Duration::from_secs(2));
        }
    }
    assert_eq!(a.count(), 0);
    let two_kinds = "authorization: Bearer zk-search\r\nx-api-key: other\r\nx-a: 1\r\nx-a: 2\r\n";
    assert_eq!(open.client().chat(two_kinds, CHAT).status, 200);
    assert_eq!(a.seen()[0].header("authorization"), Some("Bearer zk-search"));
}

#[test]
fn a_key_may_use_and_list_its_own_models_only() {
    let (a, zap) = start();
    assert_eq!(ask(&zap, "zk-search", "cheap").status, 200);
    assert_eq!(ask(&zap, "zk-search", "gpt-4o").status, 200);
    let refused = ask(&zap, "zk-search", "llama");
    assert_eq!((refused.status, refused.code().as_str()), (404, "model_not_found"));
    assert!(!refused.text().contains("near it"), "the error must not name other models: {}", refused.text());
    let zap = start().1;
    let refused = zap.client().chat("authorization: Bearer zk-search\r\n", CHAT);
    assert_eq!((refused.status, refused.code().as_str()), (400, "missing_model"));
    for body in [
        r#"{"messages":[],"model":"cheap","Model":"llama"}"#,
        r#"{"messages":[],"Model":"llama","model":"cheap"}"#,
        r#"{"messages":[],"Model":"llama"}"#,
    ] {
        let (provider, zap) = start();
        let refused = zap.client().chat("authorization: Bearer zk-search\r\n", body);
        assert_eq!((refused.status, refused.code().as_str()), (400, "duplicate_key"), "{body}");
        assert_eq!(provider.count(), 0, "the key may use cheap only: {body}");
    }
    let listed = |key: &str| {
        let mut client = zap.client();
        client.send(format!("GET /v1/models HTTP/1.1\r\nhost: z\r\nx-api-key: {key}\r\n\r\n"));
        let list = client.response().json();
        let ids = list["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap().to_owned());
        ids.collect::<Vec<_>>()
    };
    assert_eq!(listed("zk-search"), ["cheap", "gpt-4o"]);
    assert_eq!(listed("zk-batch"), ["cheap", "gpt-4o", "llama"]);
    assert_eq!(a.count(), 2);
}

#[test]
fn a_key_without_a_model_list_may_use_all_models_and_the_default() {
    let (a, zap) = start();
    assert_eq!(zap.client().chat("authorization: Bearer zk-batch\r\n", CHAT).status, 200);
    assert_eq!(ask(&zap, "zk-batch", "llama").status, 200);
    assert_eq!(a.count(), 2);
}

#[test]
fn each_key_has_its_own_limit_and_model_lists_do_not_count() {
    let (_a, zap) = start();
    let mut client = zap.client();
    for _ in 0..5 {
        client.send("GET /v1/models HTTP/1.1\r\nhost: z\r\napi-key: zk-search\r\n\r\n");
        assert_eq!(client.response().status, 200);
    }
    for (key, limit) in [("zk-search", 3), ("zk-batch", 2)] {
        for left in (0..limit).rev() {
            let answer = ask(&zap, key, "cheap");
            assert_eq!(answer.status, 200);
            assert_eq!(answer.header("x-ratelimit-limit-requests"), Some(limit.to_string().as_str()));
            assert_eq!(answer.header("x-ratelimit-remaining-requests"), Some(left.to_string().as_str()));
        }
        let refused = ask(&zap, key, "cheap");
        assert_eq!((refused.status, refused.code().as_str()), (429, "rate_limit_exceeded"));
    }
    assert_eq!(zap.metric("zap_client_requests_total{client=\"search\"}"), 9.0);
    assert_eq!(zap.metric("zap_client_requests_total{client=\"batch\"}"), 3.0);
}

#[test]
fn with_both_limits_used_up_the_later_reset_is_reported() {
    let a = Provider::named("a");
    let settings = "[server]\ntrusted_proxies = [\"127.0.0.1\"]\n\
        [rate_limit]\nrequests_per_minute = 1\nrequests_per_minute_per_address = 1\n";
    let zap = Zap::with(settings, &[a.backend("a", "")]);
    let ask = |key: &str, address: &str| {
        let headers = format!("authorization: Bearer {key}\r\nx-forwarded-for: {address}\r\n");
        zap.client().chat(&headers, CHAT)
    };
    let reset = |answer: &crate::support::Response| {
        let reset = answer.header("x-ratelimit-reset-requests").unwrap().strip_suffix('s').unwrap();
        (reset.parse::<f64>().unwrap(), answer.header("retry-after").unwrap().parse::<f64>().unwrap())
    };
    assert_eq!(ask("early", "1.1.1.1").status, 200);
    let since = std::time::Instant::now();
    std::thread::sleep(std::time::Duration::from_millis(500));
    let gap = since.elapsed().as_secs_f64();
    assert_eq!(ask("late", "2.2.2.2").status, 200);
    let mixed = [("late", "1.1.1.1"), ("early", "2.2.2.2")].map(|(key, address)| {
        let refused = ask(key, address);
        assert_eq!(refused.status, 429);
        let (reset, after) = reset(&refused);
        assert!(reset <= 60.0 && after >= reset, "{key} from {address}: {reset} {after}");
        reset
    });
    // It is asked last, so that a slow machine only adds to the difference. A reset is a number of milliseconds.
    let (early, _) = reset(&ask("early", "1.1.1.1"));
    assert!(mixed.iter().all(|mixed| mixed - early >= gap - 0.001), "{mixed:?} {early} {gap}");
}

#[test]
fn without_client_keys_addresses_are_limited_too_and_refusals_do_not_count() {
    let a = Provider::named("a");
    let settings = "[server]\ntrusted_proxies = [\"127.0.0.1\"]\n\
        [rate_limit]\nrequests_per_minute = 2\nrequests_per_minute_per_address = 3\n";
    let zap = Zap::with(settings, &[a.backend("a", "")]);
    let ask = |key: &str, address: &str| {
        let headers = format!("authorization: Bearer {key}\r\nx-forwarded-for: 6.6.6.6, {address}\r\n");
        let answer = zap.client().chat(&headers, CHAT);
        let header = |name: &str| answer.header(&format!("x-ratelimit-{name}-requests")).unwrap().to_owned();
        (answer.status, header("limit"), header("remaining"))
    };
    let want = |status, limit: &str, remaining: &str| (status, limit.to_owned(), remaining.to_owned());
    assert_eq!(ask("k1", "1.1.1.1"), want(200, "2", "1"));
    assert_eq!(ask("k1", "1.1.1.1"), want(200, "2", "0"));
    assert_eq!(ask("k1", "1.1.1.1"), want(429, "2", "0"));
    assert_eq!(
        ask("k2", "1.1.1.1"),
        want(200, "3", "0"),
        "the earlier refusal does not count for the address"
    );
    assert_eq!(
        ask("k3", "1.1.1.1"),
        want(429, "3", "0"),
        "a new key does not bypass the limit of the address"
    );
    assert_eq!(ask("k3", "2.2.2.2"), want(200, "2", "1"));
    assert_eq!(ask("k4", "2.2.2.2:1111"), want(200, "3", "1"), "the port is not part of the address");
    assert_eq!(ask("k5", "[2001:db8::1]:443"), want(200, "2", "1"));
    assert_eq!(ask("k6", "\"[2001:db8::2]\""), want(200, "3", "1"), "the same /64 network");
    assert_eq!(a.count(), 7);

    let zap = Zap::with("[rate_limit]\nrequests_per_minute_per_address = 1\n", &[a.backend("a", "")]);
    let passed =
        (0..5).filter(|i| zap.client().chat(&format!("x-forwarded-for: 1.1.1.{i}\r\n"), CHAT).status == 200);
    assert_eq!(passed.count(), 1, "x-forwarded-for of an untrusted peer must be ignored");
}

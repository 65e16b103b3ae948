//! Which headers Zap forwards, in both directions.

use crate::support::provider::{After, reply};
use crate::support::{CHAT, Provider, Zap};

const CREDENTIALS: &str = "authorization: Bearer sk-client\r\nx-api-key: sk-client\r\napi-key: sk-client\r\n\
    x-goog-api-key: sk-client\r\ncookie: sk-client\r\nproxy-authorization: sk-client\r\n";

#[test]
fn a_backend_gets_its_own_key_and_never_the_client_key() {
    let provider = Provider::named("ok");
    let zap = Zap::with("", &[provider.backend("a", "api_key = \"sk-CANARY\"")]);
    let more = "x-forwarded-for: 1.2.3.4\r\nx-stainless-lang: rust\r\nopenai-organization: o\r\n\
        accept-encoding: gzip\r\nconnection: x-hop\r\nx-hop: 1\r\nx-request-id: id-1\r\ntraceparent: 00-ab\r\n\
        user-agent: test\r\naccept: application/json\r\ncontent-type: application/json; charset=utf-8\r\n";
    let answer = zap.client().chat(&format!("{CREDENTIALS}{more}"), CHAT);
    assert_eq!(answer.status, 200);
    let seen = provider.seen().remove(0);
    let mut got: Vec<_> = seen.headers.iter().map(|(n, v)| format!("{n}: {v}")).collect();
    got.sort();
    let want = [
        "accept-encoding: identity".to_owned(),
        "accept: application/json".to_owned(),
        "authorization: Bearer sk-CANARY".to_owned(),
        format!("content-length: {}", CHAT.len()),
        "content-type: application/json".to_owned(),
        format!("host: {}", provider.address),
        "traceparent: 00-ab".to_owned(),
        "user-agent: test".to_owned(),
        "x-request-id: id-1".to_owned(),
        "x-stainless-lang: rust".to_owned(),
    ];
    assert_eq!(got, want);
    assert_eq!(seen.line, "POST /v1/chat/completions HTTP/1.1");
}

#[test]
fn a_backend_without_a_key_gets_no_key() {
    let provider = Provider::named("ok");
    let zap = Zap::with("", &[provider.backend("a", "")]);
    zap.client().chat(CREDENTIALS, CHAT);
    assert!(provider.seen()[0].headers.iter().all(|(_, v)| !v.contains("sk-client")));
}

#[test]
fn the_client_bearer_is_forwarded_only_if_configured() {
    let provider = Provider::named("ok");
    let zap = Zap::with("", &[provider.backend("a", "forward_authorization = true")]);
    zap.client().chat(&format!("{CREDENTIALS}openai-project: p\r\n"), CHAT);
    let seen = provider.seen().remove(0);
    assert_eq!(seen.header("authorization"), Some("Bearer sk-client"));
    assert_eq!(seen.header("openai-project"), Some("p"));
    assert_eq!((seen.header("cookie"), seen.header("x-api-key")), (None, None));
}

#[test]
fn the_backend_path_is_used_and_the_client_query_dropped() {
    let provider = Provider::named("ok");
    let text = format!(
        "[health]\ninterval_secs = 1\n[[backends]]\nname = \"a\"\nurl = \"http://{}/base/\"\nweight = 1\nchat_path = \"/x/chat\"\nhealth_path = \"/x/health\"\n",
        provider.address
    );
    let zap = Zap::start(&text);
    let mut client = zap.client();
    client.post("/v1/chat/completions?api_base=http://evil/", "", CHAT);
    assert_eq!(client.response().status, 200);
    assert_eq!(provider.seen()[0].line, "POST /base/x/chat HTTP/1.1");
    crate::support::eventually("the backend is probed", || !provider.probes().is_empty());
    assert_eq!(provider.probes()[0].line, "GET /base/x/health HTTP/1.1");
}

#[test]
fn a_client_gets_the_upstream_headers_except_hop_by_hop_ones() {
    let provider = Provider::start(|_, stream| {
        let headers = "content-type: application/json\r\nset-cookie: a=b\r\nalt-svc: h3\r\nkeep-alive: timeout=5\r\n\
            connection: keep-alive, x-hop\r\nx-hop: 1\r\nopenai-processing-ms: 7\r\nx-ratelimit-limit-requests: 9\r\n\
            x-request-id: upstreams\r\nx-zap-backend: forged\r\nx-zap-attempts: 99\r\n";
        reply(stream, 200, headers, b"{}");
        After::Keep
    });
    let zap = Zap::with("", &[provider.backend("a", "")]);
    let answer = zap.client().chat("x-request-id: mine\r\n", CHAT);
    let names: Vec<_> = answer.headers.iter().map(|(n, _)| n.as_str()).filter(|n| *n != "date").collect();
    let want = [
        "content-length",
        "content-type",
        "openai-processing-ms",
        "x-ratelimit-limit-requests",
        "x-request-id",
        "x-upstream-request-id",
        "x-zap-backend",
        "x-zap-attempts",
    ];
    let mut sorted = names.clone();
    sorted.sort_unstable();
    let mut want_sorted = want.to_vec();
    want_sorted.sort_unstable();
    assert_eq!(sorted, want_sorted);
    assert_eq!(answer.header("x-request-id"), Some("mine"));
    assert_eq!((answer.header("x-zap-backend"), answer.header("x-zap-attempts")), (Some("a"), Some("1")));
}

#[test]
fn headers_about_the_provider_site_are_dropped() {
    let provider = Provider::start(|_, stream| {
        let headers = "access-control-allow-origin: *\r\nAccess-Control-Expose-Headers: x\r\naccess-control-new: 1\r\n\
            strict-transport-security: max-age=9\r\nclear-site-data: \"*\"\r\npublic-key-pins: a\r\n\
            public-key-pins-report-only: a\r\nexpect-ct: a\r\nnel: {}\r\nreport-to: {}\r\naccess-controlled: 1\r\n";
        reply(stream, 200, headers, b"{}");
        After::Keep
    });
    let answer = Zap::with("", &[provider.backend("a", "")]).chat(CHAT);
    let names: Vec<_> =
        answer.headers.iter().map(|(n, _)| n.as_str()).filter(|n| !n.starts_with("x-")).collect();
    let mut names: Vec<_> = names.into_iter().filter(|n| *n != "date").collect();
    names.sort_unstable();
    assert_eq!(names, ["access-controlled", "content-length"]);
}

#[test]
fn the_provider_request_id_is_kept_beside_the_one_of_zap() {
    let long = format!("x-request-id: {}\r\n", "x".repeat(129)).leak();
    for (status, headers, want) in [
        (200, "x-request-id: req_1\r\n", Some("req_1")),
        (400, "x-request-id: req_1\r\nrequest-id: req_2\r\n", Some("req_1")),
        (200, "request-id: req_2\r\n", Some("req_2")),
        (200, "x-request-id: mine\r\n", Some("mine")),
        (200, "x-request-id: a b\r\n", None),
        (200, "x-request-id: \r\n", None),
        (200, &*long, None),
        (200, "", None),
        (200, "x-request-id: id-sk-CANARY-9\r\n", None),
        (400, "request-id: sk-CANARY\r\n", None),
    ] {
        let provider = Provider::fixed(status, headers, "{}");
        let zap = Zap::with("", &[provider.backend("a", "api_key = \"sk-CANARY\"")]);
        let answer = zap.client().chat("x-request-id: mine\r\n", CHAT);
        assert_eq!(answer.header("x-upstream-request-id"), want, "{headers}");
        assert_eq!(answer.header("x-request-id"), Some("mine"), "{headers}");
    }
}

#[test]
fn a_valid_request_id_of_the_client_is_kept_and_any_other_replaced() {
    let provider = Provider::named("ok");
    let zap = Zap::with("", &[provider.backend("a", "")]);
    let id = |headers: &str| zap.client().chat(headers, CHAT).header("x-request-id").unwrap().to_owned();
    assert_eq!(id("x-request-id: abc\r\n"), "abc");
    let fresh = [id(""), id("x-request-id: a b\r\n"), id(&format!("x-request-id: {}\r\n", "x".repeat(129)))];
    for id in &fresh {
        assert!(id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()), "{id}");
    }
    assert_ne!(fresh[0], fresh[1]);
    let sent =
        provider.seen().iter().map(|s| s.header("x-request-id").unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(sent[1..], fresh);
}

#[test]
fn configured_headers_pass_beside_the_standard_list_and_others_are_taken_away() {
    let provider = Provider::named("ok");
    let more = "forward_headers = [\"X-Title\", \"x-codex-*\", \"accept-language\"]\n\
        drop_headers = [\"X-Stainless-*\", \"user-agent\", \"x-codex-noise\"]\nextra_headers = { x-codex-own = \"mine\" }";
    let zap = Zap::with("", &[provider.backend("a", more)]);
    let client = "x-title: t\r\nX-CODEX-Turn: 1\r\nx-codex-turn: 2\r\nx-codex-own: theirs\r\nx-codex-noise: n\r\nx-codex-token: sk-client\r\n\
        x-stainless-lang: rust\r\nUser-Agent: test\r\naccept-language: en\r\nx-other: no\r\nopenai-beta: b\r\n";
    zap.client().chat(&format!("{CREDENTIALS}{client}"), CHAT);
    let seen = provider.seen().remove(0);
    let skipped = ["accept", "accept-encoding", "content-length", "content-type", "host", "x-request-id"];
    let mut got: Vec<_> = seen.headers.iter().filter(|(n, _)| !skipped.contains(&n.as_str())).collect();
    got.sort();
    let got: Vec<_> = got.iter().map(|(n, v)| format!("{n}: {v}")).collect();
    let want = [
        "accept-language: en",
        "openai-beta: b",
        "user-agent: zap",
        "x-codex-own: mine",
        "x-codex-turn: 1",
        "x-codex-turn: 2",
        "x-title: t",
    ];
    assert_eq!(got, want);
}

//! Rate limits per client key.

use crate::support::provider::{backend, blackhole};
use crate::support::{CHAT, Provider, Zap};

fn start(limit: u32) -> (Provider, Zap) {
    let provider =
        Provider::fixed(200, "x-ratelimit-remaining-requests: 77\r\nx-ratelimit-limit-tokens: 5\r\n", "ok");
    let zap =
        Zap::with(&format!("[rate_limit]\nrequests_per_minute = {limit}"), &[provider.backend("a", "")]);
    (provider, zap)
}

#[test]
fn exactly_the_limit_passes_for_each_key_under_concurrency() {
    let (provider, zap) = start(5);
    let passed: usize = std::thread::scope(|s| {
        let ask = |i: usize| {
            let key = format!("authorization: Bearer k{}\r\n", i % 3);
            (0..3).filter(|_| zap.client().chat(&key, CHAT).status == 200).count()
        };
        let threads: Vec<_> = (0..12).map(|i| s.spawn(move || ask(i))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert_eq!((passed, provider.count()), (15, 15));
    assert_eq!(zap.metric("zap_rate_limit_keys"), 3.0);
    assert_eq!(zap.metric("zap_rejected_total{reason=\"rate_limit_exceeded\"}"), 21.0);
}

#[test]
fn every_response_under_a_limit_has_the_rate_limit_headers() {
    let (_provider, zap) = start(2);
    let headers = |r: &crate::support::Response| {
        ["limit", "remaining", "reset"]
            .map(|n| r.header(&format!("x-ratelimit-{n}-requests")).unwrap().to_owned())
    };
    let mut client = zap.client();
    let first = client.chat("", CHAT);
    assert_eq!(headers(&first), ["2", "1", "0s"]);
    assert_eq!(
        first.header("x-ratelimit-limit-tokens"),
        Some("5"),
        "other limit headers of the upstream pass"
    );
    let second = client.chat("", CHAT);
    assert_eq!(headers(&second)[..2], ["2", "0"]);
    let refused = client.chat("", CHAT);
    assert_eq!((refused.status, refused.code().as_str()), (429, "rate_limit_exceeded"));
    assert_eq!(headers(&refused)[..2], ["2", "0"]);
    let reset: f64 = headers(&refused)[2].strip_suffix('s').unwrap().parse().unwrap();
    let after: f64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!(reset > 55.0 && reset <= after && after <= 60.0, "{reset} {after}");
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    // A request that is refused for its body has these headers too, and counts.
    let bad = zap.client().chat("authorization: Bearer other\r\n", "{");
    assert_eq!((bad.status, headers(&bad)[1].as_str()), (400, "1"));
}

#[test]
fn the_key_is_the_bearer_then_an_api_key_header_then_anonymous() {
    let (_provider, zap) = start(1);
    let status = |headers: &str| zap.client().chat(headers, CHAT).status;
    assert_eq!(status(""), 200);
    assert_eq!(status("authorization: Basic x\r\n"), 429, "without a bearer the client is anonymous");
    assert_eq!(status("authorization: Bearer one\r\n"), 200);
    assert_eq!(status("x-api-key: one\r\n"), 429, "the same credential counts once, in any header");
    assert_eq!(status("authorization: Bearer two\r\nx-api-key: one\r\n"), 200);
    assert_eq!(status("x-goog-api-key: three\r\n"), 200);
}

#[test]
fn only_posts_count_and_the_body_of_a_refused_post_is_not_read() {
    let (provider, zap) = start(1);
    let mut client = zap.client();
    for path in ["/health", "/metrics", "/status", "/chat", "/nothing"] {
        let answer = client.get(path);
        assert!(answer.header("x-ratelimit-limit-requests").is_none(), "{path}");
    }
    assert_eq!(client.chat("", CHAT).status, 200);
    let mut early = zap.client();
    early.send("POST /chat HTTP/1.1\r\nhost: zap\r\ncontent-length: 1000\r\n\r\n");
    assert_eq!(early.response().status, 429);
    assert_eq!(provider.count(), 1);
}

#[test]
fn without_a_limit_the_rate_limit_headers_of_the_upstream_pass() {
    let provider = Provider::fixed(200, "x-ratelimit-remaining-requests: 77\r\n", "ok");
    let zap = Zap::with("", &[provider.backend("a", "")]);
    assert_eq!(zap.chat(CHAT).header("x-ratelimit-remaining-requests"), Some("77"));
}

#[test]
fn a_request_that_no_backend_answers_gives_its_place_back() {
    let (silent, _held) = blackhole();
    let model = |name: &str| format!("models = [\"{name}\"]");
    let backends = [
        backend(silent, "silent", &model("silent")),
        backend(Provider::closed_port(), "closed", &model("closed")),
        backend(Provider::closed_port(), "drained", &format!("{}\nweight = 0", model("drained"))),
    ];
    let settings = "[timeouts]\nconnect_ms = 100\n[retry]\nmax_retries = 0\n\
        [[client_keys]]\nname = \"team\"\nkey = \"zk-team\"\nrequests_per_minute = 2\n";
    let zap = Zap::with(settings, &backends);
    for (model, status, code) in [
        ("drained", 503, "no_backend"),
        ("closed", 502, "upstream_unreachable"),
        ("silent", 504, "upstream_timeout"),
    ] {
        let body = CHAT.replacen('{', &format!("{{\"model\":\"{model}\","), 1);
        let refused = zap.client().chat("authorization: Bearer zk-team\r\n", body);
        assert_eq!((refused.status, refused.code().as_str()), (status, code));
        assert_eq!(refused.header("x-ratelimit-remaining-requests"), Some("2"), "{code}");
    }
}

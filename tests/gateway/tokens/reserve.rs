//! What a request reserves, by its endpoint; and whose limit makes Zap ask for the tokens of a stream.

use super::*;

#[test]
fn each_endpoint_reserves_the_output_that_it_may_have() {
    // A refusal uses nothing, and no estimate follows from it.
    let a = Provider::fixed(400, JSON, "{}");
    let zap = Zap::with(&keys("tokens_per_minute = 10000"), &[a.backend("a", "models = [\"m\"]")]);
    let mut client = zap.client();
    for (api, members, output) in [
        (Api::Chat, ",\"max_tokens\":50,\"n\":3", 150),
        (Api::Completions, ",\"max_tokens\":50", 50),
        (Api::Completions, ",\"max_tokens\":50,\"best_of\":3", 150),
        (Api::Completions, ",\"max_tokens\":50,\"n\":2,\"best_of\":4", 200),
        (Api::Completions, "", 512),
        (Api::Responses, ",\"max_output_tokens\":70", 70),
        (Api::Responses, ",\"max_output_tokens\":70,\"max_tokens\":60", 60),
        (Api::Responses, "", 512),
        (Api::Embeddings, ",\"max_tokens\":50", 0),
        (Api::Rerank, ",\"max_tokens\":50", 0),
        (Api::Images, ",\"n\":3", 0),
    ] {
        let ask = ask(api, false);
        let body = ask.body("m", members);
        client.post(ask.path(), "authorization: Bearer zk-team\r\n", &body);
        let answer = client.response();
        let left = 10_000 - body.len().div_ceil(4) as u64 - output;
        assert_eq!(
            (answer.status, token_headers(&answer)[1].as_str()),
            (400, &*left.to_string()),
            "{ask:?} {members}"
        );
    }
}

#[test]
fn a_count_of_input_tokens_needs_no_tokens() {
    let a = Provider::fixed(200, JSON, "{\"object\":\"response.input_tokens\",\"input_tokens\":14}");
    let zap = Zap::with_log(&keys("tokens_per_minute = 5"), &[a.backend("a", "models = [\"m\"]")]);
    let body = ask(Api::Responses, false).body("m", ",\"max_output_tokens\":100");
    for (path, status) in [("/v1/responses/input_tokens", 200), ("/v1/responses", 429)] {
        let mut client = zap.client();
        client.post(path, "authorization: Bearer zk-team\r\n", &body);
        assert_eq!(client.response().status, status, "{path}");
    }
    assert_eq!(left(&zap, "clients", "team"), 5);
    assert_eq!(logged(&zap.lines(2)[0]), None, "a count is not metered");
}

#[test]
fn a_key_without_a_limit_of_tokens_has_the_one_of_all_keys() {
    let a = Provider::start(answer);
    let settings = [
        "[rate_limit]\ntokens_per_minute = 300\n",
        &keys("tokens_per_minute = 1000"),
        "[[client_keys]]\nname = \"third\"\nkey = \"zk-third\"\n",
    ]
    .concat();
    let zap = Zap::with(&settings, &[a.backend("a", "models = [\"m\"]")]);
    let mut client = zap.client();
    for key in ["zk-other", "zk-third"] {
        let first = post(&mut client, key, &body(100, &max(200)));
        assert_eq!(
            (first.status, &token_headers(&first)[..2]),
            (200, &["300".into(), "0".into()][..]),
            "{key}"
        );
        let refused = post(&mut client, key, &body(1, &max(1)));
        assert_eq!((refused.status, refused.code().as_str()), (429, "rate_limit_exceeded"), "{key}");
    }
    let own = post(&mut client, "zk-team", &body(100, &max(200)));
    assert_eq!((own.status, &token_headers(&own)[..2]), (200, &["1000".into(), "700".into()][..]));
    assert_eq!(["team", "other", "third"].map(|name| left(&zap, "clients", name)), [800, 100, 100]);
}

#[test]
fn a_stream_is_asked_for_its_tokens_wherever_a_limit_or_a_budget_needs_them() {
    let a = Provider::start(answer);
    let day = budget("1", "day");
    for (settings, more, is_asked) in [
        ("", "", false),
        ("[rate_limit]\nrequests_per_minute = 9", "requests_per_minute = 9", false),
        ("[rate_limit]\ntokens_per_minute = 1000", "", true),
        ("", "tokens_per_minute = 1000", true),
        (&*keys("tokens_per_minute = 1000"), "", true),
        (&*keys(&day), PRICES, true),
        ("", &*format!("{PRICES}{day}"), true),
    ] {
        let models = if more.contains("models") { "" } else { "models = [\"m\"]\n" };
        let zap = Zap::with(settings, &[a.backend("a", &format!("{models}{more}"))]);
        let answer = post(&mut zap.client(), "zk-team", &body(5, ",\"stream\":true,\"max_tokens\":9"));
        assert!(answer.whole && !answer.text().contains("usage"), "{settings} {more}: {}", answer.text());
        assert_eq!(has(&a.seen().pop().unwrap().body, ASKS), is_asked, "{settings} {more}");
    }
}

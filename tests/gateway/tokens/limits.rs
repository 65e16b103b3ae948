//! Limits by tokens of clients and of backends, and requests at once of a client.

use std::time::{Duration, Instant};

use super::*;
use crate::support::assert_wait;
use crate::support::provider::wait_closed;

#[test]
fn a_client_reserves_what_it_may_use_and_pays_what_it_used() {
    let a = Provider::start(answer);
    let zap = Zap::with(
        &keys("requests_per_minute = 5\ntokens_per_minute = 1000"),
        &[a.backend("a", "models = [\"m\"]")],
    );
    let mut client = zap.client();
    let since = Instant::now();
    let first = post(&mut client, "zk-team", &body(50, &max(400)));
    assert_eq!(token_headers(&first), ["1000", "500", "60s"], "100 and 400 are reserved");
    assert_eq!(left(&zap, "clients", "team"), 850, "100 and 50 are used");
    let before = Instant::now();
    let second = post(&mut client, "zk-team", &body(550, &max(750)));
    assert_eq!((second.status, &token_headers(&second)[1][..]), (200, "0"));
    assert_eq!(left(&zap, "clients", "team"), 200);
    let refused = post(&mut client, "zk-team", &body(1, &max(101)));
    assert_eq!((refused.status, refused.code().as_str()), (429, "rate_limit_exceeded"));
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    assert!(refused.text().contains("1000 tokens per minute"), "{}", refused.text());
    // The first request's tokens expire 60 s after it.
    assert_wait(&refused, 60, since);
    assert_eq!(refused.header("x-should-retry"), None);
    assert_eq!(token_headers(&refused)[..2], ["1000", "200"]);
    let reset: f64 = token_headers(&refused)[2].strip_suffix('s').unwrap().parse().unwrap();
    let (latest, passed) = (60.0, before.elapsed().as_secs_f64());
    assert!((latest - passed..=latest).contains(&reset), "the second request's tokens expire last: {reset}");
    assert_eq!(refused.header("x-ratelimit-remaining-requests"), Some("3"), "its place is given back");
    let third = post(&mut client, "zk-team", &body(100, &max(100)));
    assert_eq!((third.status, third.header("x-ratelimit-remaining-requests")), (200, Some("2")));
    assert_eq!(left(&zap, "clients", "team"), 0);
    let other = post(&mut client, "zk-other", &body(1, ""));
    assert_eq!((other.status, token_headers(&other)[0].as_str()), (200, "none"), "it has no limit");
    assert_eq!(a.count(), 4);
    assert_eq!(zap.metric("zap_token_overrun_total{client=\"team\"}"), 0.0);
}

#[test]
fn what_is_used_beyond_the_reservation_counts_and_is_reported() {
    let a = Provider::start(answer);
    let zap = Zap::with(&keys("tokens_per_minute = 1000"), &[a.backend("a", "models = [\"m\"]")]);
    let mut client = zap.client();
    assert_eq!(post(&mut client, "zk-team", &body(700, &max(200))).status, 200);
    assert_eq!(zap.metric("zap_token_overrun_total{client=\"team\"}"), 500.0);
    assert_eq!(left(&zap, "clients", "team"), 200);
    assert_eq!(post(&mut client, "zk-team", &body(1, &max(101))).status, 429);
}

#[test]
fn without_a_maximum_the_mean_of_the_outputs_is_reserved_and_fits_into_an_empty_window() {
    let a = Provider::start(answer);
    let zap = Zap::with(&keys("tokens_per_minute = 1000"), &[a.backend("a", "models = [\"m\"]")]);
    let mut client = zap.client();
    let first = post(&mut client, "zk-team", &body(30, ""));
    assert_eq!(token_headers(&first)[1], "388", "100 and 512 are reserved");
    let second = post(&mut client, "zk-team", &body(70, ""));
    assert_eq!(token_headers(&second)[1], "740", "130 are used, 100 and 30 are reserved");
    let third = post(&mut client, "zk-team", &body(1, ""));
    assert_eq!(token_headers(&third)[1], "550", "130 and 170 are used, 100 and 50 are reserved");
    let small = Zap::with(&keys("tokens_per_minute = 150"), &[a.backend("a", "models = [\"m\"]")]);
    let first = post(&mut small.client(), "zk-team", &body(60, ""));
    assert_eq!((first.status, token_headers(&first)[1].as_str()), (200, "0"), "the whole limit is reserved");
    assert_eq!(post(&mut small.client(), "zk-team", &body(1, "")).status, 429);
    assert_eq!(small.metric("zap_token_overrun_total{client=\"team\"}"), 10.0);
}

#[test]
fn a_request_that_can_never_fit_is_refused_at_once_and_not_retried() {
    let a = Provider::start(answer);
    let b = Provider::start(answer);
    let more = |limit: u64| format!("models = [\"m\"]\ntokens_per_minute = {limit}");
    let zap = Zap::with(
        &keys("tokens_per_minute = 1000"),
        &[a.backend("a", &more(300)), b.backend("b", &more(600))],
    );
    for (key, members, limit) in [
        ("zk-team", max(901), 1000),
        ("zk-team", ",\"max_completion_tokens\":400,\"n\":3".to_owned(), 1000),
        ("zk-other", max(501), 600),
        // The input alone: 16,000 bytes, without spaces.
        ("zk-team", format!(",\"n\":1,\"metadata\":\"{}\"", "x".repeat(16_000)), 1000),
    ] {
        let refused = post(&mut zap.client(), key, &body(1, &members));
        assert_eq!(
            (refused.status, refused.code().as_str()),
            (429, "request_too_large_for_limit"),
            "{members}"
        );
        assert_eq!(refused.header("x-should-retry"), Some("false"));
        assert_eq!(refused.header("retry-after"), None);
        assert!(refused.text().contains(&format!("{limit} tokens per minute")), "{}", refused.text());
        let all_is_free = if key == "zk-team" { ["1000", "1000", "0s"] } else { ["none"; 3] };
        assert_eq!(token_headers(&refused), all_is_free);
    }
    for _ in 0..3 {
        // It fits into b alone.
        assert_eq!(post(&mut zap.client(), "zk-other", &body(1, &max(250))).status, 200);
    }
    assert_eq!((a.count(), b.count()), (0, 3));
}

#[test]
fn an_answer_that_failed_costs_nothing_and_leaves_nothing_reserved() {
    let a = Provider::start(|seen, stream| match used(seen) {
        1 => {
            reply(stream, 500, JSON, b"{\"error\":{\"message\":\"broken\"}}");
            After::Keep
        }
        2 => After::Close,
        3 => {
            reply(stream, 400, JSON, b"{\"error\":{\"message\":\"no\"}}");
            After::Keep
        }
        _ => {
            // The client leaves before the head.
            wait_closed(stream);
            After::Close
        }
    });
    let zap = Zap::with(
        &format!("[retry]\nmax_retries = 0\n{}", keys("tokens_per_minute = 1000\nmax_in_flight = 2")),
        &[a.backend("a", "models = [\"m\"]\ntokens_per_minute = 2000")],
    );
    for (fate, status) in [(1, 500), (2, 502), (3, 400)] {
        assert_eq!(post(&mut zap.client(), "zk-team", &body(fate, &max(100))).status, status);
    }
    let mut client = zap.client();
    client.post("/chat", "authorization: Bearer zk-team\r\n", body(4, &max(100)));
    eventually("the request is at the backend", || a.seen().iter().any(|seen| used(seen) == 4));
    drop(client);
    zap.wait_until_idle();
    eventually("nothing is reserved", || {
        left(&zap, "clients", "team") == 1000 && left(&zap, "backends", "a") == 2000
    });
    let status = zap.client().get("/status").json();
    assert_eq!(status["clients"][0]["in_flight"], 0);
}

#[test]
fn four_hundred_requests_at_once_never_have_more_than_the_limit() {
    const LIMIT: u64 = 30_000;
    /// Input and maximum of output of each request.
    const MOST: u64 = INPUT + 200;
    let sum = Arc::new(AtomicUsize::new(0));
    let (at_work, most) = (sum.clone(), Arc::new(AtomicUsize::new(0)));
    let seen_most = most.clone();
    let a = Provider::start(move |seen, stream| {
        // What is reserved here, and what was used before. The answer gives back what it does not use.
        let now = at_work.fetch_add(MOST as usize, Ordering::SeqCst) + MOST as usize;
        seen_most.fetch_max(now, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(used(seen) % 7));
        at_work.fetch_sub((200 - used(seen)) as usize, Ordering::SeqCst);
        answer(seen, stream)
    });
    let zap = Zap::with(
        &format!("[server]\nworkers = 2\n{}", keys(&format!("tokens_per_minute = {LIMIT}"))),
        &[a.backend("a", "models = [\"m\"]")],
    );
    let began = Instant::now();
    let served: u64 = thread::scope(|s| {
        let run = |i: u64| {
            let zap = &zap;
            move || {
                let (mut client, mut mine) = (zap.client(), 0);
                for round in 0.. {
                    let n = (i * 31 + round * 17) % 200;
                    let response = post(&mut client, "zk-team", &body(n, &max(200)));
                    match (response.status, response.header("retry-after")) {
                        (200, _) => mine += INPUT + n,
                        // Only reservations are in the way: try again.
                        (429, Some("1")) => thread::sleep(Duration::from_millis(20)),
                        (429, _) => break,
                        other => panic!("{other:?}: {}", response.text()),
                    }
                }
                mine
            }
        };
        let threads: Vec<_> = (0..400).map(|i| s.spawn(run(i))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert!(began.elapsed() < Duration::from_secs(50), "all of it is in one window");
    assert!(most.load(Ordering::SeqCst) as u64 <= LIMIT, "{most:?}");
    assert!((LIMIT * 97 / 100..=LIMIT).contains(&served), "{served}");
    zap.wait_until_idle();
    assert_eq!(left(&zap, "clients", "team"), LIMIT - served, "nothing is reserved any more");
}

#[test]
fn in_open_mode_each_credential_has_its_own_limit_of_tokens() {
    let a = Provider::start(answer);
    let zap = Zap::with("[rate_limit]\ntokens_per_minute = 300", &[a.backend("a", "models = [\"m\"]")]);
    let mut client = zap.client();
    for key in ["one", "two"] {
        assert_eq!(post(&mut client, key, &body(100, &max(200))).status, 200, "{key}");
        assert_eq!(post(&mut client, key, &body(1, &max(1))).status, 429, "{key}");
    }
    assert_eq!(client.chat("", body(1, &max(200))).status, 200, "no credential");
}

#[test]
fn a_stream_under_a_limit_is_asked_for_its_tokens_and_the_client_does_not_see_them() {
    let a = Provider::start(answer);
    let zap = Zap::with(&keys("tokens_per_minute = 1000"), &[a.backend("a", "models = [\"m\"]")]);
    let response = post(&mut zap.client(), "zk-team", &body(50, ",\"stream\":true,\"max_tokens\":60"));
    assert!(response.whole && !response.text().contains("usage"), "{}", response.text());
    assert!(has(&a.seen()[0].body, ASKS));
    assert_eq!(left(&zap, "clients", "team"), 850, "before the client asks again");
}

#[test]
fn a_limit_that_is_hidden_by_its_case_is_refused() {
    let a = Provider::start(answer);
    let zap = Zap::with(&keys("tokens_per_minute = 1000"), &[a.backend("a", "models = [\"m\"]")]);
    for members in [",\"Max_Tokens\":5,\"max_tokens\":6", ",\"max_tokens\":1,\"max_tokens\":900"] {
        let refused = post(&mut zap.client(), "zk-team", &body(1, members));
        assert_eq!((refused.status, refused.code().as_str()), (400, "duplicate_key"), "{members}");
    }
}

#[test]
fn a_backend_gets_no_more_tokens_than_its_quota_and_others_take_the_rest() {
    let (a, b) = (Provider::start(answer), Provider::start(answer));
    let zap = Zap::with_log(
        "",
        &[
            a.backend("a", "models = [\"m\"]\ntokens_per_minute = 500"),
            b.backend("b", "models = [\"m\"]\npriority = 1"),
        ],
    );
    let mut client = zap.client();
    for _ in 0..3 {
        assert_eq!(client.chat("", body(100, &max(150))).status, 200);
    }
    assert_eq!((a.count(), b.count()), (2, 1), "400 tokens are used, and the third request needs 250");
    assert_eq!(client.chat("", body(0, &max(0))).header("x-zap-backend"), Some("a"), "100 tokens are left");
    let lines = zap.lines(4);
    let passed = lines[2]["passed"].to_string();
    assert!(passed.contains("[\"a\",\"quota "), "{passed}");
    let status = zap.client().get("/status").json();
    assert_eq!(status["backends"][0]["tokens_per_minute"], serde_json::json!({ "limit": 500, "left": 0 }));
    assert_eq!(status["backends"][0]["used"]["tokens_last_minute"], 500);
}

#[test]
fn a_request_waits_for_reserved_tokens_and_is_woken_by_their_refund() {
    let gate = Gate::default();
    let a = holding(&gate, 0..10);
    let zap = Zap::with("", &[a.backend("a", "models = [\"m\"]\ntokens_per_minute = 1000")]);
    let mut clients = [zap.client(), zap.client(), zap.client()];
    clients[0].post("/chat", "", body(1, &max(800)));
    eventually("900 tokens are reserved", || gate.waiting() == 1);
    clients[1].post("/chat", "", body(50, &max(690)));
    eventually("a large request waits", || zap.metric("zap_queue_depth") == 1.0);
    clients[2].post("/chat", "", body(60, &max(100)));
    eventually("a small one waits behind it", || zap.metric("zap_queue_depth") == 2.0);
    gate.open(1);
    for client in &mut clients {
        assert_eq!(client.response().status, 200);
    }
    let order: Vec<u64> = a.seen().iter().map(used).collect();
    assert_eq!(order, [1, 50, 60]);
    zap.wait_until_idle();
}

#[test]
fn waiting_requests_are_served_by_whichever_backend_frees_its_tokens() {
    let gates = [Gate::default(), Gate::default()];
    let [a, b] = gates.each_ref().map(|gate| holding(gate, 0..u64::MAX));
    let more = "models = [\"m\"]\ntokens_per_minute = 1000";
    let zap = Zap::with("", &[a.backend("a", more), b.backend("b", more)]);
    let mut clients = [zap.client(), zap.client(), zap.client()];
    for (i, client) in clients.iter_mut().enumerate() {
        client.post("/chat", "", body(i as u64, &max(700)));
        eventually("the request is there", || {
            (a.count() + b.count()) as f64 + zap.metric("zap_queue_depth") == (i + 1) as f64
        });
    }
    gates[1].open(2);
    eventually("the third request is at b", || b.count() == 2);
    gates[0].open(1);
    clients.iter_mut().for_each(|client| assert_eq!(client.response().status, 200));
    zap.wait_until_idle();
}

#[test]
fn with_all_quotas_of_tokens_used_a_request_is_told_when_to_come_back() {
    let a = Provider::start(answer);
    let zap = Zap::with("", &[a.backend("a", "models = [\"m\"]\ntokens_per_minute = 300")]);
    let mut client = zap.client();
    let since = Instant::now();
    assert_eq!(client.chat("", body(200, &max(200))).status, 200);
    let refused = client.chat("", body(1, &max(1)));
    assert_eq!((refused.status, refused.code().as_str()), (429, "upstream_rate_limited"));
    assert_wait(&refused, 59, since);
}

#[test]
fn a_client_has_no_more_requests_at_once_than_its_limit() {
    let gate = Gate::default();
    let a = holding(&gate, 0..u64::MAX);
    let zap = Zap::with(
        &format!("[queue]\nmax_size = 2\n{}", keys("max_in_flight = 2\nrequests_per_minute = 100")),
        &[a.backend("a", "models = [\"m\"]")],
    );
    let mut clients: Vec<Client> = (0..5).map(|_| zap.client()).collect();
    for client in &mut clients[..4] {
        client.post("/chat", "authorization: Bearer zk-team\r\n", body(1, ""));
    }
    eventually("two are served, two wait", || gate.waiting() == 2 && zap.metric("zap_queue_depth") == 2.0);
    let refused = post(&mut clients[4], "zk-team", &body(1, ""));
    assert_eq!((refused.status, refused.code().as_str()), (503, "queue_full"));
    assert_eq!(refused.header("x-ratelimit-remaining-requests"), Some("96"), "its place is given back");
    clients[4].post("/chat", "authorization: Bearer zk-other\r\n", body(1, ""));
    eventually("another client does not wait", || gate.waiting() == 3);
    gate.open(5);
    clients.iter_mut().for_each(|client| assert_eq!(client.response().status, 200));
    zap.wait_until_idle();
    assert_eq!(zap.metric("zap_queue_depth"), 0.0);
}

#[test]
fn a_reload_applies_new_limits_and_keeps_what_is_used() {
    let a = Provider::start(answer);
    let file = crate::support::File::new();
    let backend = |limit: u64| a.backend("a", &format!("models = [\"m\"]\ntokens_per_minute = {limit}"));
    let zap = Zap::with_file(&file, &keys("tokens_per_minute = 1000"), &[backend(2000)]);
    assert_eq!(post(&mut zap.client(), "zk-team", &body(400, &max(400))).status, 200);
    file.write(&keys("tokens_per_minute = 700"), &[backend(600)]);
    assert!(zap.reload());
    assert_eq!((left(&zap, "clients", "team"), left(&zap, "backends", "a")), (200, 100));
    assert_eq!(post(&mut zap.client(), "zk-team", &body(1, &max(101))).status, 429);
}

#[test]
fn a_line_of_reservations_is_served_as_they_end() {
    let a = Provider::start(|seen, stream| {
        thread::sleep(Duration::from_millis(50));
        answer(seen, stream)
    });
    let zap = Zap::with("", &[a.backend("a", "models = [\"m\"]\ntokens_per_minute = 10000")]);
    // Each reserves 1000 and uses 110: together four windows of reservations, and less than half a window of use.
    let mut clients: Vec<_> = (0..40).map(|_| zap.client()).collect();
    clients.iter_mut().for_each(|client| client.post("/chat", "", body(10, &max(900))));
    let statuses: Vec<u16> = clients.iter_mut().map(|client| client.response().status).collect();
    assert_eq!(statuses, [200; 40]);
    assert_eq!(left(&zap, "backends", "a"), 10_000 - 40 * 110);
    zap.wait_until_idle();
}

#[test]
fn a_maximum_that_the_backend_is_not_sent_does_not_count() {
    let a = Provider::start(answer);
    let more = "models = [\"m\"]\ndrop_fields = [\"max_tokens\"]";
    let zap = Zap::with(&keys("tokens_per_minute = 1000"), &[a.backend("a", more)]);
    let response = post(&mut zap.client(), "zk-team", &body(1, &max(1)));
    assert_eq!(token_headers(&response)[1], "388", "100 and 512 are reserved");
    assert!(!has(&a.seen()[0].body, "max_tokens"));
}

#[test]
fn a_request_for_a_drained_target_and_another_of_one_backend_waits_and_is_served() {
    let gate = Gate::default();
    let a = holding(&gate, 1..2);
    let route = "[models.m]\ntargets = [{ backend = \"a\", model = \"small\", weight = 0 }, { backend = \"a\", model = \"big\" }]\n";
    let zap = Zap::with(route, &[a.backend("a", "tokens_per_minute = 1000")]);
    let mut clients = [zap.client(), zap.client()];
    clients[0].post("/chat", "", body(1, &max(800)));
    eventually("900 tokens are reserved", || gate.waiting() == 1);
    clients[1].post("/chat", "", body(2, &max(500)));
    eventually("a request waits", || zap.metric("zap_queue_depth") == 1.0);
    gate.open(1);
    clients.iter_mut().for_each(|client| assert_eq!(client.response().status, 200));
    zap.wait_until_idle();
}

#[test]
fn a_reload_that_removes_a_limit_lets_its_waiting_requests_go() {
    let gate = Gate::default();
    let a = holding(&gate, 1..2);
    let file = crate::support::File::new();
    let backend = |more: &str| a.backend("a", &format!("models = [\"m\"]\n{more}"));
    let zap = Zap::with_file(&file, &keys("max_in_flight = 1"), &[backend("tokens_per_minute = 1000")]);
    let (mut first, mut second, mut third) = (zap.client(), zap.client(), zap.client());
    first.post("/chat", "authorization: Bearer zk-team\r\n", body(1, &max(800)));
    eventually("900 tokens are reserved", || gate.waiting() == 1);
    second.post("/chat", "authorization: Bearer zk-other\r\n", body(2, &max(800)));
    third.post("/chat", "authorization: Bearer zk-team\r\n", body(3, ""));
    eventually("one waits for tokens, one for its key", || zap.metric("zap_queue_depth") == 2.0);
    file.write(&keys(""), &[backend("")]);
    assert!(zap.reload());
    assert_eq!((second.response().status, third.response().status), (200, 200));
    gate.open(1);
    assert_eq!(first.response().status, 200);
    zap.wait_until_idle();
}

/// Answers as Anthropic's API does, with 100 input tokens and as many output tokens as the request asks for.
fn message(seen: &Seen, stream: &mut TcpStream) -> After {
    let (input, output) = (INPUT, used(seen));
    let answer = match seen.line.contains("count_tokens") {
        true => format!("{{\"input_tokens\":{input}}}"),
        false => format!(
            "{{\"type\":\"message\",\"content\":[],\"usage\":{{\"input_tokens\":{input},\"output_tokens\":{output}}}}}"
        ),
    };
    reply(stream, 200, JSON, answer.as_bytes());
    After::Keep
}

fn post_message(zap: &Zap, path: &str, body: &str) -> Response {
    let mut client = zap.client();
    client.post(path, "x-api-key: zk-team\r\n", body);
    client.response()
}

/// The type and the code of an error in the shape of Anthropic's API.
fn message_error(response: &Response) -> (String, String) {
    let json = response.json();
    assert_eq!((response.status, &json["type"]), (429, &"error".into()), "{}", response.text());
    let text = |name: &str| json["error"][name].as_str().unwrap().to_owned();
    (text("type"), text("code"))
}

#[test]
fn limits_hold_for_messages_and_refuse_in_the_shape_of_their_api() {
    const MESSAGES: &str = "/v1/messages";
    let (a, other) = (Provider::start(message), Provider::named("other"));
    let zap = Zap::with(
        &keys("tokens_per_minute = 1000"),
        &[
            other.backend("other", "models = [\"m\"]"),
            a.backend("a", "models = [\"m\"]\nprotocols = [\"anthropic\"]\ntokens_per_minute = 950"),
        ],
    );
    let since = Instant::now();
    let first = post_message(&zap, MESSAGES, &body(50, &max(400)));
    assert_eq!((first.status, &token_headers(&first)[1][..]), (200, "500"), "100 and 400 are reserved");
    assert_eq!(left(&zap, "clients", "team"), 850, "100 and 50 are used");

    let refused = post_message(&zap, MESSAGES, &body(1, &max(751)));
    let limit = ("rate_limit_error".to_owned(), "rate_limit_exceeded".to_owned());
    assert_eq!(message_error(&refused), limit);
    assert_wait(&refused, 60, since);
    assert_eq!(refused.header("x-should-retry"), None);

    // The other backend has no limit, but does not speak the protocol.
    let large = post_message(&zap, MESSAGES, &body(1, &max(851)));
    let too_large = ("rate_limit_error".to_owned(), "request_too_large_for_limit".to_owned());
    assert_eq!(message_error(&large), too_large);
    assert!(large.text().contains("950 tokens per minute"), "{}", large.text());
    assert_eq!((large.header("x-should-retry"), large.header("retry-after")), (Some("false"), None));

    let counted = post_message(&zap, "/v1/messages/count_tokens", &body(1, &max(751)));
    assert_eq!((counted.status, counted.text()), (200, "{\"input_tokens\":100}"));
    assert_eq!(left(&zap, "clients", "team"), 850, "a count uses nothing");
    assert_eq!((a.count(), other.count()), (2, 0));

    let prices = "models = [\"m\"]\nprotocols = [\"anthropic\"]\nprices = { m = { input = 1, output = 10 } }";
    let zap = Zap::with(&keys("budget = { usd = 0.0041, per = \"month\" }"), &[a.backend("a", prices)]);
    assert_eq!(post_message(&zap, MESSAGES, &body(300, &max(400))).status, 200, "0.0031 USD");
    let spent = post_message(&zap, MESSAGES, &body(1, &max(100)));
    let counted = post_message(&zap, "/v1/messages/count_tokens", &body(1, &max(100)));
    assert_eq!(counted.status, 200, "a count costs nothing");
    let quota = ("rate_limit_error".to_owned(), "insufficient_quota".to_owned());
    assert_eq!(message_error(&spent), quota);
    assert_eq!((spent.header("retry-after"), spent.header("x-should-retry")), (Some("59"), Some("false")));

    let limits = format!("{prices}\ntokens_per_minute = 400\nbudget = {{ usd = 0.0031, per = \"month\" }}");
    let zap = Zap::with("", &[a.backend("a", &limits)]);
    assert_eq!(post_message(&zap, MESSAGES, &body(300, &max(300))).status, 200, "400 tokens, 0.0031 USD");
    let counted = post_message(&zap, "/v1/messages/count_tokens", &body(1, &max(100)));
    assert_eq!((counted.status, counted.text()), (200, "{\"input_tokens\":100}"), "its backend is used up");
}

#[test]
fn a_file_in_a_form_is_no_text_and_does_not_count_against_a_limit_of_tokens() {
    let a =
        Provider::fixed(200, JSON, "{\"text\":\"hi\",\"usage\":{\"input_tokens\":14,\"output_tokens\":6}}");
    let zap = Zap::with(&keys("tokens_per_minute = 1000"), &[a.backend("a", "models = [\"m\"]")]);
    let form = |size: usize| {
        format!(
            "--b\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nm\r\n--b\r\n\
             content-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n{}\r\n--b--\r\n",
            "a ".repeat(size / 2)
        )
    };
    let headers = "authorization: Bearer zk-team\r\ncontent-type: multipart/form-data; boundary=b\r\n";
    let mut client = zap.client();
    for left_over in [980, 960] {
        client.post("/v1/audio/transcriptions", headers, form(100_000));
        let answer = client.response();
        assert_eq!((answer.status, &token_headers(&answer)[0][..]), (200, "1000"), "{}", answer.text());
        assert_eq!(left(&zap, "clients", "team"), left_over, "what the provider tells counts");
    }
}

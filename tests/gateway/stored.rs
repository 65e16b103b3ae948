//! Responses that a provider stores: later requests that refer to them reach the backend that made them.

use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::support::provider::{After, Gate, Seen, chunk, end_chunks, reply, start_events};
use crate::support::{Client, File, Provider, Response, Zap, eventually};

const JSON: &str = "content-type: application/json\r\n";
const NO_CHECKS: &str = "[health]\ninterval_secs = 600\n";
const RESPONSES: &str = "/v1/responses";

/// A provider that stores the responses it makes, with an item and a conversation each. A request for another one's
/// gets 404, or 400 as OpenAI answers it.
fn storing(name: &'static str) -> Provider {
    let (made, known) = (AtomicUsize::new(0), Mutex::new(Vec::<String>::new()));
    Provider::start(move |seen, stream| {
        let (method, path) = seen.line.split_once(' ').unwrap();
        let path = path.split_whitespace().next().unwrap();
        let knows = |id: &str| known.lock().unwrap().iter().any(|known| known == id);
        if let Some(asked) =
            path.split_once("/responses/").map(|(_, asked)| asked).filter(|a| a.contains("resp_"))
        {
            let id = asked.split(['/', '?']).next().unwrap();
            let body = json!({ "id": id, "object": "response", "asked": format!("{method} {path}") });
            match knows(id) {
                true => reply(stream, 200, JSON, body.to_string().as_bytes()),
                false => reply(stream, 404, JSON, b"{\"error\":{\"message\":\"no such response\"}}"),
            }
            return After::Keep;
        }
        let body: Value = serde_json::from_slice(&seen.body).unwrap();
        let conversation = &body["conversation"];
        let items = body["input"].as_array().into_iter().flatten().map(|item| &item["id"]);
        let ids = [&body["previous_response_id"], conversation, &conversation["id"]].into_iter().chain(items);
        if ids.filter_map(Value::as_str).any(|id| !knows(id)) {
            reply(stream, 400, JSON, b"{\"error\":{\"code\":\"previous_response_not_found\"}}");
            return After::Keep;
        }
        let n = made.fetch_add(1, Ordering::SeqCst);
        let [id, item, conversation] = ["resp", "msg", "conv"].map(|kind| format!("{kind}_{name}_{n}"));
        known.lock().unwrap().extend([id.clone(), item.clone(), conversation.clone()]);
        answer(stream, &body, [id, item, conversation]);
        After::Keep
    })
}

/// Answers with a response that has these ids, as a stream if the request asks for one.
fn answer(stream: &mut TcpStream, body: &Value, [id, item, conversation]: [String; 3]) {
    let output =
        json!({ "type": "message", "id": item, "content": [{ "type": "output_text", "text": "hi" }] });
    let filler = if body["user"] == "large" { "x".repeat(200_000) } else { String::new() };
    let mut response = json!({ "id": id, "object": "response", "a_filler": filler,
        "conversation": { "id": conversation }, "output": [output] });
    if body["stream"] != true {
        reply(stream, 200, JSON, response.to_string().as_bytes());
        return;
    }
    start_events(stream);
    response["output"] = json!([]);
    for event in [
        json!({ "type": "response.created", "response": response }),
        json!({ "type": "response.output_item.added", "item": output }),
        json!({ "type": "response.output_text.delta", "delta": "hi", "item_id": item }),
        json!({ "type": "response.completed", "response": response }),
    ] {
        let event = format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap());
        // In pieces.
        let middle = event.len() / 2;
        chunk(stream, &event[..middle]);
        chunk(stream, &event[middle..]);
    }
    end_chunks(stream);
}

fn post(client: &mut Client, key: &str, body: &Value) -> Response {
    client.post(RESPONSES, &format!("authorization: Bearer {key}\r\n"), body.to_string());
    client.response()
}

/// Makes a response. Returns the backend, and the number in its ids.
fn make(client: &mut Client, key: &str, more: Value) -> (String, String) {
    let mut body = json!({ "model": "m", "input": "hi" });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let made = post(client, key, &body);
    assert_eq!((made.status, made.whole), (200, true), "{}", made.text());
    let backend = made.header("x-zap-backend").unwrap().to_owned();
    let text = made.text();
    let (_, id) = text.split_once(&format!("resp_{backend}_")).unwrap();
    (backend, id.split('"').next().unwrap().to_owned())
}

fn send(client: &mut Client, line: &str, headers: &str) -> Response {
    client.send(format!("{line} HTTP/1.1\r\nhost: zap\r\n{headers}\r\n"));
    client.response()
}

fn backends(all: &[(&'static str, Provider)], more: &str) -> Vec<String> {
    all.iter().map(|(name, provider)| provider.backend(name, more)).collect()
}

fn three() -> [(&'static str, Provider); 3] {
    ["a", "b", "c"].map(|name| (name, storing(name)))
}

#[test]
fn a_follow_up_reaches_the_backend_that_made_the_response_under_every_strategy_and_after_a_reload() {
    let mut followed = 0;
    for strategy in ["round_robin", "least_loaded", "prefix_hash"] {
        let (all, file) = (three(), File::new());
        let settings = format!("{NO_CHECKS}[load_balancer]\nstrategy = \"{strategy}\"\n");
        let zap = Zap::with_file(&file, &settings, &backends(&all, ""));
        let mut client = zap.client();
        let more = |n: usize| json!({ "stream": n.is_multiple_of(2), "user": format!("{n}") });
        let made: Vec<_> = (0..170).map(|n| make(&mut client, "any", more(n))).collect();
        for (name, _) in &all {
            assert!(
                made.iter().filter(|(backend, _)| backend == name).count() > 20,
                "{strategy}: all make some"
            );
        }
        for weight in [2, 1] {
            for (i, (backend, id)) in made.iter().enumerate() {
                let body = json!({ "model": "m", "input": "and?", "stream": i % 3 == 0,
                    "previous_response_id": format!("resp_{backend}_{id}") });
                let answer = post(&mut client, "any", &body);
                assert_eq!(answer.status, 200, "{strategy}: {}", answer.text());
                assert_eq!(answer.header("x-zap-backend"), Some(&**backend), "{strategy}");
                assert_eq!(answer.header("x-zap-attempts"), Some("1"), "{strategy}");
                followed += 1;
            }
            // Every target has another weight.
            file.write(&settings, &backends(&all, &format!("weight = {weight}")));
            assert!(zap.reload());
        }
        assert!(zap.metric("zap_known_ids") >= 3.0 * 170.0);
    }
    assert!(followed >= 1000, "{followed}");
}

#[test]
fn a_stored_response_is_asked_for_at_the_backend_that_made_it() {
    let all = three();
    let more = "api_key = \"sk-own\"\nchat_path = \"/api/chat/completions?version=1\"\nmodels = [\"m\"]";
    let zap = Zap::with(NO_CHECKS, &backends(&all, more));
    let mut client = zap.client();
    for _ in 0..4 {
        let (backend, id) = make(&mut client, "any", json!({}));
        let id = format!("resp_{backend}_{id}");
        for (method, tail, asked) in [
            ("GET", "", "?version=1"),
            ("GET", "?include=a&stream=false", "?version=1&include=a&stream=false"),
            ("GET", "/input_items?limit=2", "/input_items?version=1&limit=2"),
            ("POST", "/cancel", "/cancel?version=1"),
            ("DELETE", "", "?version=1"),
        ] {
            let line = format!("{method} /v1/responses/{id}{tail}");
            let answer = send(&mut client, &line, "authorization: Bearer any\r\ncontent-length: 0\r\n");
            assert_eq!((answer.status, answer.header("x-zap-backend")), (200, Some(&*backend)), "{line}");
            assert_eq!(answer.json()["asked"], format!("{method} /api/responses/{id}{asked}"), "{line}");
        }
        let provider = &all.iter().find(|(name, _)| *name == backend).unwrap().1;
        let seen = provider.seen().pop().unwrap();
        assert_eq!((seen.header("authorization"), seen.body.len()), (Some("Bearer sk-own"), 0));
    }
    let status = |client: &mut Client, line: &str| {
        let answer = send(client, line, "");
        (answer.status, answer.header("allow").map(str::to_owned))
    };
    for (line, want) in [
        ("PUT /v1/responses/resp_1", (405, Some("GET, DELETE"))),
        ("GET /v1/responses/resp_1/cancel", (405, Some("POST"))),
        ("DELETE /responses/resp_1/input_items", (405, Some("GET"))),
        ("GET /v1/responses/resp_1/other", (404, None)),
        ("GET /v1/responses/..%2fmodels", (404, None)),
        ("GET /v1/responses/", (404, None)),
    ] {
        assert_eq!(status(&mut client, line), (want.0, want.1.map(str::to_owned)), "{line}");
    }
}

#[test]
fn a_response_belongs_to_the_client_key_that_made_it() {
    let all = three();
    let keys = "[[client_keys]]\nname = \"one\"\nkey = \"zk-one\"\n[[client_keys]]\nname = \"two\"\nkey = \"zk-two\"\nmodels = [\"m\"]\n";
    let file = File::new();
    let zap = Zap::with_file(&file, &format!("{NO_CHECKS}{keys}"), &backends(&all, ""));
    let mut client = zap.client();
    let (backend, id) = make(&mut client, "zk-two", json!({}));
    let sum = || all.iter().map(|(_, provider)| provider.count()).sum::<usize>();
    file.write(&format!("{NO_CHECKS}{keys}[retry]\nmax_retries = 1\n"), &backends(&all, ""));
    assert!(zap.reload());
    for id in ["resp", "msg", "conv"].map(|kind| format!("{kind}_{backend}_{id}")) {
        let before = sum();
        let bodies = [
            json!({ "model": "m", "input": "x", "previous_response_id": id }),
            json!({ "model": "m", "input": "x", "conversation": { "id": id } }),
            json!({ "model": "m", "input": [{ "type": "item_reference", "id": id }] }),
        ];
        for body in &bodies {
            let refused = post(&mut client, "zk-one", body);
            assert_eq!((refused.status, refused.code().as_str()), (404, "response_not_found"), "{body}");
        }
        for line in [format!("GET /v1/responses/{id}"), format!("DELETE /v1/responses/{id}")] {
            let refused = send(&mut client, &line, "authorization: Bearer zk-one\r\n");
            assert_eq!((refused.status, refused.code().as_str()), (404, "response_not_found"), "{line}");
        }
        assert_eq!(sum(), before, "no backend is asked");
        for body in &bodies {
            assert_eq!(post(&mut client, "zk-two", body).status, 200, "{body}");
        }
    }
    let own = send(
        &mut client,
        &format!("GET /v1/responses/resp_{backend}_{id}"),
        "authorization: Bearer zk-two\r\n",
    );
    assert_eq!(own.status, 200, "a key for some models may read its own responses");
    let unknown = send(&mut client, "GET /v1/responses/resp_a_0", "");
    assert_eq!(unknown.status, 401);
    // What only looks like the member would pass by the check.
    for body in [
        "{\"model\":\"m\",\"Previous_Response_Id\":\"x\"}",
        "{\"model\":\"m\",\"previous_response_id\":\"x\",\"previous\\u005fresponse_id\":\"y\"}",
    ] {
        client.post(RESPONSES, "authorization: Bearer zk-one\r\n", body);
        assert_eq!(client.response().code(), "duplicate_key", "{body}");
    }
}

#[test]
fn with_an_unknown_id_the_targets_are_asked_in_turn() {
    let all = three();
    let maker = Zap::with(NO_CHECKS, &backends(&all, ""));
    let mut client = maker.client();
    let made: Vec<_> = (0..6).map(|_| make(&mut client, "any", json!({}))).collect();
    // Another process, which has learnt nothing, and makes no second try.
    let zap = Zap::with(&format!("{NO_CHECKS}[retry]\nmax_retries = 0\n"), &backends(&all, ""));
    let mut client = zap.client();
    let mut attempts = Vec::new();
    for (backend, id) in &made {
        let answer = send(&mut client, &format!("GET /v1/responses/resp_{backend}_{id}"), "");
        assert_eq!((answer.status, answer.header("x-zap-backend")), (200, Some(&**backend)));
        attempts.push(answer.header("x-zap-attempts").unwrap().to_owned());
        let again = send(&mut client, &format!("GET /v1/responses/resp_{backend}_{id}"), "");
        assert_eq!(again.header("x-zap-attempts"), Some("1"), "it is known now");
    }
    assert!(attempts.iter().any(|n| n == "3"), "{attempts:?}");
    let zap = Zap::with(&format!("{NO_CHECKS}[retry]\nmax_retries = 0\n"), &backends(&all, ""));
    let mut client = zap.client();
    for (backend, id) in &made {
        let body =
            json!({ "model": "m", "input": "x", "previous_response_id": format!("resp_{backend}_{id}") });
        let answer = post(&mut client, "any", &body);
        assert_eq!(
            (answer.status, answer.header("x-zap-backend")),
            (200, Some(&**backend)),
            "{}",
            answer.text()
        );
    }
    // Nobody has it: the provider's own answer goes out, and nobody is blamed.
    let body = json!({ "model": "m", "input": "x", "previous_response_id": "resp_x" });
    for _ in 0..5 {
        let nowhere = post(&mut client, "any", &body);
        assert_eq!((nowhere.status, nowhere.code().as_str()), (400, "previous_response_not_found"));
        let nowhere = send(&mut client, "GET /v1/responses/resp_x", "");
        assert_eq!((nowhere.status, nowhere.header("x-zap-attempts")), (404, Some("3")));
    }
    let status = zap.client().get("/status").json();
    let states: Vec<_> = status["backends"].as_array().unwrap().iter().map(|b| b["state"].clone()).collect();
    assert_eq!(states, ["healthy"; 3]);
}

#[test]
fn a_follow_up_waits_for_the_backend_that_made_the_response() {
    let gate = Gate::default();
    let held = gate.clone();
    let a = Provider::start(move |seen: &Seen, stream| {
        let body: Value = serde_json::from_slice(&seen.body).unwrap();
        if body["user"] == "slow" {
            held.pass();
        }
        answer(stream, &body, ["resp_a_0", "msg_a_0", "conv_a_0"].map(str::to_owned));
        After::Keep
    });
    let b = storing("b");
    let zap = Zap::with(NO_CHECKS, &[a.backend("a", "max_in_flight = 1"), b.backend("b", "priority = 1")]);
    let mut clients = [zap.client(), zap.client(), zap.client()];
    assert_eq!(make(&mut clients[0], "any", json!({})).0, "a");
    clients[0].post(RESPONSES, "", json!({ "model": "m", "input": "x", "user": "slow" }).to_string());
    eventually("the backend is full", || gate.waiting() == 1);
    let body = json!({ "model": "m", "input": "x", "previous_response_id": "resp_a_0" });
    clients[1].post(RESPONSES, "", body.to_string());
    eventually("the follow-up waits", || zap.metric("zap_queue_depth") == 1.0);
    assert_eq!(make(&mut clients[2], "any", json!({})).0, "b", "others do not");
    gate.open(1);
    let answer = clients[1].response();
    assert_eq!((answer.status, answer.header("x-zap-backend")), (200, Some("a")));
    assert_eq!(clients[0].response().status, 200);
}

#[test]
fn ids_are_learnt_from_large_answers_and_with_few_ids_the_oldest_are_forgotten() {
    let all = three();
    let zap = Zap::with(NO_CHECKS, &backends(&all, ""));
    let mut client = zap.client();
    for is_stream in [false, true] {
        let (backend, id) = make(&mut client, "any", json!({ "user": "large", "stream": is_stream }));
        let body = json!({ "model": "m", "input": [{ "type": "item_reference", "id": format!("msg_{backend}_{id}") }] });
        let answer = post(&mut client, "any", &body);
        assert_eq!(answer.header("x-zap-attempts"), Some("1"), "{is_stream}");
        assert_eq!(answer.header("x-zap-backend"), Some(&*backend), "{is_stream}");
    }
    // The table has parts, and with so few ids a part holds one.
    let zap = Zap::with(&format!("{NO_CHECKS}[affinity]\nmax_ids = 16\n"), &backends(&all, ""));
    let mut client = zap.client();
    (0..50).for_each(|_| drop(make(&mut client, "any", json!({}))));
    assert!(zap.metric("zap_known_ids") <= 16.0);
}

#[test]
fn an_unknown_id_is_looked_for_with_all_keys_and_at_full_backends_and_a_backend_that_is_down_is_no_404() {
    let has = |seen: &Seen| seen.header("authorization") == Some("Bearer k3");
    let a = Provider::start(move |seen, stream| {
        match has(seen) {
            true => reply(stream, 200, JSON, b"{\"id\":\"resp_1\"}"),
            false => reply(stream, 404, JSON, b"{\"error\":{}}"),
        }
        After::Keep
    });
    let zap = Zap::with(NO_CHECKS, &[a.backend("a", "api_keys = [\"k1\", \"k2\", \"k3\"]")]);
    let found = send(&mut zap.client(), "GET /v1/responses/resp_1", "");
    assert_eq!((found.status, found.header("x-zap-backend")), (200, Some("a#3")));

    let gate = Gate::default();
    let held = gate.clone();
    let full = Provider::start(move |seen: &Seen, stream| {
        if seen.line.starts_with("POST") {
            held.pass();
        }
        reply(stream, 200, JSON, b"{\"id\":\"resp_2\"}");
        After::Keep
    });
    let empty = Provider::fixed(404, JSON, "{\"error\":{}}");
    let backends = [
        full.backend("full", "max_in_flight = 1\nmodels = [\"m\"]"),
        empty.backend("empty", "models = [\"other\"]"),
    ];
    let zap = Zap::with(NO_CHECKS, &backends);
    let (mut first, mut second) = (zap.client(), zap.client());
    first.post(RESPONSES, "", json!({ "model": "m", "input": "x" }).to_string());
    eventually("the backend is full", || gate.waiting() == 1);
    second.send("GET /v1/responses/resp_2 HTTP/1.1\r\nhost: zap\r\n\r\n");
    eventually("the request waits", || zap.metric("zap_queue_depth") == 1.0);
    gate.open(1);
    let found = second.response();
    assert_eq!((found.status, found.header("x-zap-backend")), (200, Some("full")));

    let down = crate::support::provider::backend(Provider::closed_port(), "down", "");
    let zap = Zap::with(
        &format!("{NO_CHECKS}[retry]\nbase_delay_ms = 1\nmax_delay_ms = 1\n"),
        &[down, empty.backend("empty", "")],
    );
    let answer = send(&mut zap.client(), "GET /v1/responses/resp_2", "");
    assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_unreachable"), "it may be there");
}

#[test]
fn a_stream_of_a_stored_response_has_its_own_time_for_its_first_token() {
    let a = Provider::start(|seen, stream| {
        assert!(seen.line.contains("?stream=true") && seen.header("content-type").is_none());
        assert_eq!(seen.header("content-length"), None);
        answer(stream, &json!({ "stream": true }), ["resp_a_0", "msg_a_0", "conv_a_0"].map(str::to_owned));
        After::Keep
    });
    let b = storing("b");
    let zap = Zap::with_log(
        &format!("{NO_CHECKS}[timeouts]\nfirst_token_secs = 1\n"),
        &[a.backend("a", ""), b.backend("b", "priority = 1")],
    );
    let started = zap.metric("process_start_time_seconds");
    let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    eventually("the process is older than the limit", || now() > started + 2.0);
    let answer = send(&mut zap.client(), "GET /v1/responses/resp_a_0?stream=true", "");
    assert_eq!((answer.status, answer.header("x-zap-attempts"), answer.whole), (200, Some("1"), true));
    assert_eq!(zap.lines(1)[0]["stream"], true);
}

#[test]
fn a_client_that_reads_an_unknown_id_does_not_take_it_from_its_owner() {
    let all = three();
    let keys = "[[client_keys]]\nname = \"one\"\nkey = \"zk-one\"\n[[client_keys]]\nname = \"two\"\nkey = \"zk-two\"\n";
    let zap = Zap::with(&format!("{NO_CHECKS}{keys}"), &backends(&all, ""));
    let (backend, id) = make(&mut zap.client(), "zk-one", json!({}));
    // Another process has learnt nothing.
    let zap = Zap::with(&format!("{NO_CHECKS}{keys}"), &backends(&all, ""));
    let mut client = zap.client();
    let line = format!("GET /v1/responses/resp_{backend}_{id}");
    for key in ["zk-two", "zk-one", "zk-two"] {
        assert_eq!(
            send(&mut client, &line, &format!("authorization: Bearer {key}\r\n")).status,
            200,
            "{key}"
        );
    }
}

#[test]
fn a_drained_backend_still_has_its_responses() {
    let (all, file) = (three(), File::new());
    let zap = Zap::with_file(&file, NO_CHECKS, &backends(&all, ""));
    let mut client = zap.client();
    let (backend, id) = make(&mut client, "any", json!({}));
    let drained: Vec<_> = all
        .iter()
        .map(|(name, provider)| provider.backend(name, if *name == backend { "weight = 0" } else { "" }))
        .collect();
    file.write(NO_CHECKS, &drained);
    assert!(zap.reload());
    let stored = send(&mut client, &format!("GET /v1/responses/resp_{backend}_{id}"), "");
    assert_eq!((stored.status, stored.header("x-zap-backend")), (200, Some(&*backend)));
    let body = json!({ "model": "m", "input": "x", "previous_response_id": format!("resp_{backend}_{id}") });
    let refused = post(&mut client, "any", &body);
    assert_eq!((refused.status, refused.code().as_str()), (503, "no_backend"), "others do not have it");
}

//! Anthropic's Messages API: the dialect passes byte for byte, and its streams, token counts and errors are those of
//! the dialect.

use serde_json::{Value, json};

use crate::support::provider::{After, Gate, chunk, end_chunks, reply, start_events, wait_closed};
use crate::support::{Client, Provider, Response, Zap, eventually};

const SPEAKS: &str = "protocols = [\"anthropic\"]";

const JSON: &str = "content-type: application/json\r\n";

const ASK: &str = r#"{ "model":"claude","max_tokens":9,"messages":[{"role":"user","content":"hi"}] }"#;

const ASK_STREAM: &str =
    r#"{"model":"claude","max_tokens":9,"stream":true,"messages":[{"role":"user","content":"hi"}]}"#;

const ANSWER: &str = r#"{"id":"msg_1","type":"message","role":"assistant","content":[{"type":"text","text":"Hello!"}],"model":"claude","stop_reason":"end_turn","stop_sequence":null,"usage":{"input_tokens":10,"cache_creation_input_tokens":200,"cache_read_input_tokens":3000,"output_tokens":7}}"#;

const START: &str = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_1\",\"type\":\"message\",\"role\":\"assistant\",\"content\":[],\"model\":\"claude\",\"stop_reason\":null,\"stop_sequence\":null,\"usage\":{\"input_tokens\":25,\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":100,\"output_tokens\":1}}}\n\n";
const BLOCK: &str = "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n";
const PING: &str = "event: ping\ndata: {\"type\": \"ping\"}\n\n";
const HELLO: &str = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"Hello\"}}\n\n";
const BANG: &str = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"!\"}}\n\n";
const BLOCK_STOP: &str = "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n";
const DELTA: &str = "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\",\"stop_sequence\":null},\"usage\":{\"output_tokens\":15}}\n\n";
const STOP: &str = "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
const OVERLOADED: &str = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"}}\n\n";

const WHOLE: [&str; 8] = [START, BLOCK, PING, HELLO, BANG, BLOCK_STOP, DELTA, STOP];

/// What a provider does behind its events.
#[derive(Clone, Copy)]
enum Ending {
    Clean,
    Cut,
}

fn stream_of(events: &'static [&'static str], ending: Ending) -> Provider {
    Provider::start(move |_, stream| {
        start_events(stream);
        events.iter().for_each(|event| assert!(chunk(stream, event)));
        match ending {
            Ending::Clean => end_chunks(stream),
            Ending::Cut => return After::Close,
        }
        After::Keep
    })
}

fn ask(zap: &Zap, path: &str, headers: &str, body: &str) -> Response {
    let mut client: Client = zap.client();
    client.post(path, headers, body);
    client.response()
}

fn tokens(line: &Value) -> Value {
    ["input", "cached", "output", "source"].map(|kind| line["tokens"][kind].clone()).to_vec().into()
}

#[test]
fn a_message_passes_byte_for_byte_with_the_headers_of_the_dialect() {
    let a = Provider::fixed(200, JSON, ANSWER);
    let more = format!("{SPEAKS}\napi_key = \"sk-ant\"\nhealth_path = \"/v1/models\"");
    let zap = Zap::with_log("", &[a.backend("a", &more)]);
    eventually("the backend is checked", || !a.probes().is_empty());
    let headers = "x-api-key: mine\r\nanthropic-version: 2023-06-01\r\nanthropic-beta: one,two\r\nanthropic-other: no\r\nopenai-beta: no\r\n";
    for path in ["/v1/messages", "/messages"] {
        let answer = ask(&zap, path, headers, ASK);
        assert_eq!((answer.status, answer.text()), (200, ANSWER), "{path}");
        let seen = a.seen().pop().unwrap();
        assert_eq!((&*seen.line, &*seen.body), ("POST /v1/messages HTTP/1.1", ASK.as_bytes()));
        assert_eq!(seen.header("x-api-key"), Some("sk-ant"));
        assert_eq!(seen.header("anthropic-version"), Some("2023-06-01"));
        assert_eq!(seen.header("anthropic-beta"), Some("one,two"));
        for name in ["authorization", "anthropic-other", "openai-beta"] {
            assert_eq!(seen.header(name), None, "{name}");
        }
    }
    let counted = "{\"input_tokens\":14}";
    let b = Provider::fixed(200, JSON, counted);
    let other = Zap::with_log("", &[b.backend("b", SPEAKS)]);
    let answer = ask(&other, "/v1/messages/count_tokens", "", ASK);
    assert_eq!((answer.text(), &*b.seen()[0].line), (counted, "POST /v1/messages/count_tokens HTTP/1.1"));
    assert_eq!(other.lines(1)[0]["tokens"], Value::Null, "a count is not metered");

    let probe = a.probes().pop().unwrap();
    assert_eq!(probe.line, "GET /v1/models HTTP/1.1");
    assert_eq!(probe.header("anthropic-version"), Some("2023-06-01"));
    assert_eq!((probe.header("x-api-key"), probe.header("authorization")), (Some("sk-ant"), None));
    let series = "zap_requests_total{endpoint=\"messages\",backend=\"a\",status=\"200\"}";
    assert_eq!(zap.metric(series), 2.0);
    assert_eq!(tokens(&zap.lines(1)[0]), json!([3210, 3000, 7, "provider"]));
    // No model is configured by name.
    let input = "zap_tokens_total{backend=\"a\",model=\"other\",type=\"input\"}";
    assert_eq!(zap.metric(input), 2.0 * 3210.0);
}

#[test]
fn the_rules_of_chat_hold_for_messages() {
    let a = Provider::start(|seen, stream| {
        reply(stream, 200, JSON, &seen.body);
        After::Keep
    });
    let more = format!(
        "{SPEAKS}\nmodels = {{ fast = \"claude-3\" }}\ndefault_model = \"claude-4\"\ndrop_fields = [\"x\"]"
    );
    let zap = Zap::with("", &[a.backend("a", &more)]);
    for (body, want) in [
        (r#"{"messages":[]}"#, r#"{"model":"claude-4","messages":[]}"#),
        (r#"{"model":"fast","messages":[],"x":1}"#, r#"{"model":"claude-3","messages":[]}"#),
    ] {
        for path in ["/v1/messages", "/v1/messages/count_tokens"] {
            let answer = ask(&zap, path, "", body);
            assert_eq!((answer.status, answer.text()), (200, want), "{path}: {body}");
        }
    }
}

#[test]
fn only_a_backend_that_speaks_the_protocol_is_a_target() {
    let (a, b) = (Provider::named("a"), Provider::fixed(200, JSON, ANSWER));
    let both = "protocols = [\"openai\", \"anthropic\"]\nweight = 1";
    let zap = Zap::with("", &[a.backend("a", "weight = 9"), b.backend("b", both)]);
    for _ in 0..4 {
        assert_eq!(ask(&zap, "/v1/messages", "", ASK).text(), ANSWER);
    }
    assert_eq!((a.count(), b.count()), (0, 4));

    let zap = Zap::with(
        "",
        &[a.backend("a", "models = [\"m\"]"), b.backend("b", &format!("{SPEAKS}\nmodels = [\"claude\"]"))],
    );
    assert_eq!(ask(&zap, "/v1/messages", "", ASK).status, 200);
    assert_eq!(ask(&zap, "/v1/chat/completions", "", &ASK.replace("claude", "m")).text(), "a");
    let answer = ask(&zap, "/v1/messages", "", &ASK.replace("claude", "m"));
    assert_eq!((answer.status, answer.code().as_str()), (404, "model_not_found"));
    assert_eq!(answer.json()["error"]["type"], "not_found_error");
    assert!(answer.text().contains("speaks the Anthropic API"), "{}", answer.text());
    let answer = ask(&zap, "/v1/chat/completions", "", ASK);
    assert_eq!((answer.status, answer.code().as_str()), (404, "model_not_found"));
    assert_eq!(answer.json()["error"]["param"], "model", "the shape of OpenAI's API");
    let alone = Zap::with("", &[a.backend("a", "")]);
    assert_eq!(ask(&alone, "/v1/messages", "", ASK).status, 404);
    let drained = Zap::with("", &[b.backend("b", &format!("{SPEAKS}\nweight = 0"))]);
    let answer = ask(&drained, "/v1/messages", "", ASK);
    assert_eq!((answer.status, answer.code().as_str()), (529, "no_backend"));
}

#[test]
fn errors_of_zaps_own_have_the_shape_and_the_status_of_the_dialect() {
    let a = Provider::named("a");
    let keys = "[[client_keys]]\nname = \"c\"\nkey = \"sk-client\"\nrequests_per_minute = 4\n";
    let zap = Zap::with("", &[a.backend("a", &format!("{SPEAKS}\nmodels = [\"claude\"]")), keys.into()]);
    for (path, key, body, status, kind, code) in [
        ("/v1/messages", "wrong", ASK, 401, "authentication_error", "invalid_api_key"),
        ("/messages/count_tokens", "wrong", ASK, 401, "authentication_error", "invalid_api_key"),
        ("/v1/messages", "sk-client", "{}", 400, "invalid_request_error", "missing_messages"),
        ("/v1/messages", "sk-client", "[", 400, "invalid_request_error", "invalid_json"),
        (
            "/v1/messages",
            "sk-client",
            r#"{"model":"x","messages":[]}"#,
            404,
            "not_found_error",
            "model_not_found",
        ),
        ("/v1/messages", "sk-client", ASK, 200, "", ""),
        ("/v1/messages", "sk-client", ASK, 429, "rate_limit_error", "rate_limit_exceeded"),
    ] {
        let answer = ask(&zap, path, &format!("x-api-key: {key}\r\n"), body);
        assert_eq!(answer.status, status, "{code}");
        if status == 200 {
            continue;
        }
        let json = answer.json();
        assert_eq!((&json["type"], &json["error"]["type"]), (&"error".into(), &kind.into()));
        assert_eq!(json["error"]["code"], code);
        assert!(json["error"]["message"].as_str().is_some_and(|text| !text.is_empty()));
    }
    let get = zap.client().get("/v1/messages");
    assert_eq!(get.status, 401, "a key is asked for first");

    let gone = Provider::closed_port();
    let down = format!("[[backends]]\nurl = \"http://{gone}\"\nweight = 1\n{SPEAKS}\n");
    let answer = ask(&Zap::with("", &[down]), "/v1/messages", "", ASK);
    assert_eq!((answer.status, answer.json()["error"]["type"].as_str()), (502, Some("api_error")));
}

#[test]
#[cfg(debug_assertions)]
fn a_request_that_panicked_is_answered_in_the_shape_of_the_dialect() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", SPEAKS)]);
    zap::internals::failpoint::arm_panic("try", http::HeaderValue::from_static("bug-dialect"));
    let answer = ask(&zap, "/v1/messages", "x-request-id: bug-dialect\r\n", ASK);
    assert_eq!((answer.status, answer.code().as_str()), (500, "internal_error"));
    assert_eq!(
        (&answer.json()["type"], &answer.json()["error"]["type"]),
        (&"error".into(), &"api_error".into())
    );
    zap.wait_until_idle();
}

#[test]
fn a_stream_passes_unchanged_and_its_parts_are_counted() {
    let a = stream_of(&WHOLE, Ending::Clean);
    let zap = Zap::with_log("", &[a.backend("a", &format!("{SPEAKS}\nusage = \"inject\""))]);
    let answer = ask(&zap, "/v1/messages", "", ASK_STREAM);
    assert_eq!((answer.status, answer.text(), answer.whole), (200, &*WHOLE.concat(), true));
    assert_eq!(a.seen()[0].body, ASK_STREAM.as_bytes(), "nothing is put into a request for a message");
    let line = &zap.lines(1)[0];
    assert_eq!(tokens(line), json!([125, 100, 15, "provider"]));
    assert_eq!(line["end"], "complete");
    assert!(line["ttft_ms"].is_number());
    zap.wait_until_idle();
}

#[test]
fn a_message_is_over_at_its_stop_and_the_connection_that_stays_open_is_nobodys_fault() {
    let a = Provider::start(|_, stream| {
        start_events(stream);
        WHOLE.iter().for_each(|event| assert!(chunk(stream, event)));
        wait_closed(stream);
        After::Close
    });
    let zap = Zap::with_log("", &[a.backend("a", SPEAKS)]);
    let answer = ask(&zap, "/v1/messages", "", ASK_STREAM);
    assert_eq!((answer.text(), answer.whole), (&*WHOLE.concat(), true));
    assert_eq!(zap.lines(1)[0]["end"], "complete");
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 0.0);
}

#[test]
fn before_content_an_error_a_cut_or_an_empty_message_goes_to_the_next_backend() {
    for (events, ending, reason) in [
        (&[OVERLOADED][..], Ending::Clean, "error_event"),
        (&[START, PING, BLOCK, OVERLOADED], Ending::Clean, "error_event"),
        (&[START, BLOCK], Ending::Cut, "cut"),
        (&[START, STOP], Ending::Clean, "empty"),
    ] {
        let (a, b) = (stream_of(events, ending), stream_of(&WHOLE, Ending::Clean));
        let first = format!("{SPEAKS}\npriority = 0");
        let second = format!("{SPEAKS}\npriority = 1");
        let zap = Zap::with_log("", &[a.backend("a", &first), b.backend("b", &second)]);
        let answer = ask(&zap, "/v1/messages", "", ASK_STREAM);
        assert_eq!((answer.status, answer.text()), (200, &*WHOLE.concat()), "{reason}");
        assert_eq!((a.count(), b.count(), answer.header("x-zap-backend")), (1, 1, Some("b")));
        let series = format!("zap_prelude_failovers_total{{backend=\"a\",reason=\"{reason}\"}}");
        assert_eq!(zap.metric(&series), 1.0, "{reason}");
        assert_eq!(tokens(&zap.lines(1)[0])[2], 15, "the failed try costs nothing");
    }
}

#[test]
fn the_last_error_of_a_provider_goes_to_the_client_as_it_came() {
    let error = r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#;
    // In one piece: without another target, a stream is held only until its first event.
    let a = Provider::start(|_, stream| {
        start_events(stream);
        let _ = chunk(stream, &[START, OVERLOADED].concat());
        end_chunks(stream);
        After::Keep
    });
    let answer = ask(
        &Zap::with("[retry]\nmax_retries = 0", &[a.backend("a", SPEAKS)]),
        "/v1/messages",
        "",
        ASK_STREAM,
    );
    assert_eq!(answer.json()["error"]["type"], "overloaded_error");
    for status in [400, 413, 529] {
        let a = Provider::start(move |_, stream| {
            reply(stream, status, JSON, error.as_bytes());
            After::Keep
        });
        let zap = Zap::with("[retry]\nmax_retries = 0", &[a.backend("a", SPEAKS)]);
        let answer = ask(&zap, "/v1/messages", "", ASK);
        assert_eq!((answer.status, answer.text()), (status, error));
    }
}

#[test]
fn without_another_backend_an_error_behind_the_first_event_passes_in_the_stream() {
    let gate = Gate::default();
    let theirs = gate.clone();
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        let _ = chunk(stream, START);
        theirs.pass();
        let _ = chunk(stream, OVERLOADED);
        end_chunks(stream);
        After::Keep
    });
    let zap = Zap::with("[retry]\nmax_retries = 0", &[a.backend("a", SPEAKS)]);
    let mut client = zap.client();
    client.post("/v1/messages", "", ASK_STREAM);
    assert_eq!(client.head().status, 200);
    assert_eq!(client.chunk().unwrap(), START.as_bytes(), "the start has gone out before the error comes");
    gate.open(1);
    assert_eq!(client.chunk().unwrap(), OVERLOADED.as_bytes());
    assert_eq!(client.chunk().unwrap(), b"", "a clean end");
}

#[test]
fn a_cut_message_ends_with_an_error_event_and_cleanly() {
    for (events, ending) in [
        (&[START, BLOCK, HELLO][..], Ending::Cut),
        (&[START, BLOCK, HELLO, "event: content_block_del"], Ending::Cut),
        (&[START, BLOCK, HELLO], Ending::Clean),
    ] {
        let a = stream_of(events, ending);
        let zap = Zap::with_log("", &[a.backend("a", SPEAKS)]);
        let answer = ask(&zap, "/v1/messages", "", ASK_STREAM);
        let rest = answer.text().strip_prefix(&*[START, BLOCK, HELLO].concat()).unwrap();
        let data = rest.strip_prefix("event: error\ndata: ").unwrap().strip_suffix("\n\n").unwrap();
        let json: Value = serde_json::from_str(data).unwrap();
        assert_eq!((&json["type"], &json["error"]["type"]), (&"error".into(), &"api_error".into()));
        assert_eq!(json["error"]["code"], "stream_interrupted");
        assert!(answer.whole, "a client drops the last event of a stream that is cut");
        let line = &zap.lines(1)[0];
        assert_eq!(line["end"], "upstream_error");
        // The start told the input; of the output there are five bytes.
        assert_eq!(tokens(line), json!([125, 100, 2, "estimate"]));
        assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 1.0);
    }
}

#[test]
fn an_error_event_behind_content_is_the_end_and_nothing_is_added() {
    let a = stream_of(&[START, BLOCK, HELLO, OVERLOADED], Ending::Clean);
    let zap = Zap::with_log("", &[a.backend("a", SPEAKS)]);
    let answer = ask(&zap, "/v1/messages", "", ASK_STREAM);
    assert_eq!(answer.text(), [START, BLOCK, HELLO, OVERLOADED].concat());
    assert_eq!(zap.lines(1)[0]["end"], "upstream_error_event");
}

//! Traces by OTLP, as a collector receives them: read with the crate that has the whole schema.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use zap::internals::Order;

use crate::support::provider::{After, Seen, chunk, end_chunks, reply, start_events, wait_closed};
use crate::support::{CHAT, File, Provider, Zap, eventually, within};

const SERVER: i32 = 2;
const CLIENT: i32 = 3;
const ERROR: i32 = 2;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

const ANSWER: &str = r#"{"id":"x","model":"m-2026","choices":[{"message":{"content":"CONTENT-OUT"},"finish_reason":"stop"}],"usage":{"prompt_tokens":11,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":3}}}"#;

/// A collector that takes traces.
struct Collector {
    provider: Provider,
    status: Arc<AtomicU16>,
}

impl Collector {
    fn start() -> Self {
        let status = Arc::new(AtomicU16::new(200));
        let theirs = status.clone();
        let provider = Provider::start(move |_, stream| {
            reply(stream, theirs.load(Ordering::SeqCst), "content-type: application/x-protobuf\r\n", b"");
            After::Keep
        });
        Collector { provider, status }
    }

    fn settings(&self, more: &str) -> String {
        format!("[otlp]\nendpoint = \"http://{}\"\n{more}\n", self.provider.address)
    }

    fn requests(&self) -> Vec<ExportTraceServiceRequest> {
        let read = |seen: Seen| ExportTraceServiceRequest::decode(&seen.body[..]).unwrap();
        self.provider.seen().into_iter().map(read).collect()
    }

    fn spans_now(&self) -> Vec<Span> {
        let scopes = self.requests().into_iter().flat_map(|request| request.resource_spans);
        scopes.flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans).collect()
    }

    /// Waits for `count` spans; there must be no more.
    fn spans(&self, count: usize) -> Vec<Span> {
        eventually("the spans have come", || self.spans_now().len() >= count);
        let spans = self.spans_now();
        assert_eq!(spans.len(), count, "{spans:#?}");
        spans
    }
}

fn text(value: &AnyValue) -> String {
    match value.value.as_ref().unwrap() {
        Value::StringValue(text) => text.clone(),
        Value::BoolValue(flag) => flag.to_string(),
        Value::IntValue(number) => number.to_string(),
        Value::DoubleValue(number) => format!("{number:?}"),
        Value::ArrayValue(list) => list.values.iter().map(text).collect::<Vec<_>>().join(","),
        other => panic!("{other:?}"),
    }
}

fn pairs(attributes: &[KeyValue]) -> BTreeMap<&str, String> {
    let map: BTreeMap<_, _> =
        attributes.iter().map(|pair| (&*pair.key, text(pair.value.as_ref().unwrap()))).collect();
    assert_eq!(map.len(), attributes.len(), "a key is there twice");
    map
}

/// The attributes of a span, without those whose value is not the same in each run.
fn fixed(span: &Span) -> BTreeMap<&str, String> {
    let mut pairs = pairs(&span.attributes);
    pairs.remove("server.port").unwrap();
    let queued: f64 = pairs.remove("zap.queue_ms").unwrap_or("0.0".to_owned()).parse().unwrap();
    assert!((0.0..1000.0).contains(&queued));
    pairs
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The span of the request, and those of its tries in their order.
fn tree(spans: &[Span]) -> (&Span, Vec<&Span>) {
    let servers: Vec<&Span> = spans.iter().filter(|span| span.kind == SERVER).collect();
    let [server] = servers[..] else { panic!("{} server spans", servers.len()) };
    let mut tries: Vec<&Span> = spans.iter().filter(|span| span.kind == CLIENT).collect();
    tries.sort_by_key(|span| pairs(&span.attributes)["zap.attempt"].parse::<u32>().unwrap());
    for one in &tries {
        assert_eq!((&one.trace_id, &one.parent_span_id), (&server.trace_id, &server.span_id));
        assert_eq!((one.trace_id.len(), one.span_id.len()), (16, 8));
        assert!(server.start_time_unix_nano <= one.start_time_unix_nano);
        assert!(one.start_time_unix_nano <= one.end_time_unix_nano);
        assert!(one.end_time_unix_nano <= server.end_time_unix_nano);
    }
    (server, tries)
}

fn is_error(span: &Span) -> bool {
    span.status.as_ref().is_some_and(|status| status.code == ERROR)
}

fn traceparent(seen: &Seen) -> &str {
    let all: Vec<_> = seen.headers.iter().filter(|(name, _)| name == "traceparent").collect();
    assert_eq!(all.len(), 1, "{all:?}");
    &all[0].1
}

fn model_chat(model: &str) -> String {
    format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"CONTENT-IN"}}]}}"#)
}

#[test]
fn a_request_has_a_span_and_its_try_another_with_what_the_answer_tells() {
    let (a, collector) = (Provider::named(ANSWER), Collector::start());
    let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    let more = "headers = { Authorization = \"Bearer sk-CANARY-otlp\", x-tenant = \"t\" }";
    let backend = a.backend("main", "api_key = \"sk-CANARY-key\"\nmodels = { \"public\" = \"own\" }");
    let zap = Zap::with(&collector.settings(more), &[backend]);
    let mut client = zap.client();
    let credential = "authorization: Bearer sk-CANARY-client\r\nhost: zap.example:81\r\n";
    client.send(format!(
        "POST /v1/chat/completions?x=QUERY HTTP/1.1\r\n{credential}content-length: {}\r\n\r\n{}",
        model_chat("public").len(),
        model_chat("public")
    ));
    assert_eq!(client.response().status, 200);
    let spans = collector.spans(2);
    let (server, tries) = tree(&spans);
    assert_eq!((&*server.name, &*tries[0].name), ("POST /v1/chat/completions", "chat own"));
    assert!(server.parent_span_id.is_empty() && !is_error(server) && !is_error(tries[0]));
    assert!(u128::from(server.start_time_unix_nano) + 100_000_000 >= before);
    let want = |pairs: &[(&'static str, &str)]| -> BTreeMap<&'static str, String> {
        pairs.iter().map(|(key, value)| (*key, (*value).to_owned())).collect()
    };
    assert_eq!(
        fixed(server),
        want(&[
            ("gen_ai.operation.name", "chat"),
            ("gen_ai.request.model", "public"),
            ("http.request.method", "POST"),
            ("http.response.status_code", "200"),
            ("http.route", "/v1/chat/completions"),
            ("server.address", "zap.example"),
            ("url.path", "/v1/chat/completions"),
        ])
    );
    assert_eq!(
        fixed(tries[0]),
        want(&[
            ("gen_ai.operation.name", "chat"),
            ("gen_ai.provider.name", "openai"),
            ("gen_ai.request.model", "own"),
            ("gen_ai.response.finish_reasons", "stop"),
            ("gen_ai.response.model", "m-2026"),
            ("gen_ai.usage.cache_read.input_tokens", "3"),
            ("gen_ai.usage.input_tokens", "11"),
            ("gen_ai.usage.output_tokens", "7"),
            ("http.request.method", "POST"),
            ("http.response.status_code", "200"),
            ("server.address", "127.0.0.1"),
            ("zap.attempt", "1"),
            ("zap.backend", "main"),
        ])
    );
    assert_eq!(pairs(&server.attributes)["server.port"], "81");
    let seen = collector.provider.seen();
    assert_eq!(seen[0].line, "POST /v1/traces HTTP/1.1");
    for (name, value) in [
        ("content-type", "application/x-protobuf"),
        ("authorization", "Bearer sk-CANARY-otlp"),
        ("x-tenant", "t"),
    ] {
        assert_eq!(seen[0].header(name), Some(value));
    }
    let body = String::from_utf8_lossy(&seen[0].body).into_owned();
    for secret in ["CANARY", "CONTENT", "QUERY"] {
        assert!(!body.contains(secret), "{secret} is exported");
    }
    let resource = collector.requests()[0].resource_spans[0].resource.clone().unwrap();
    assert_eq!(pairs(&resource.attributes)["service.name"], "zap");
    // The backend continues the trace of its own try.
    let context = format!("00-{}-{}-01", hex(&server.trace_id), hex(&tries[0].span_id));
    assert_eq!(traceparent(&a.seen()[0]), context);
    eventually("the spans are counted", || zap.metric("zap_otlp_spans_sent_total") == 2.0);
}

#[test]
fn each_try_has_a_span_with_its_own_backend_and_cause() {
    let (a, b, collector) = (Provider::fixed(503, "", "no"), Provider::named(ANSWER), Collector::start());
    let closed = crate::support::provider::backend(Provider::closed_port(), "closed", "");
    let settings =
        format!("{}[health]\nfailure_threshold = 1000\n[retry]\nbase_delay_ms = 1", collector.settings(""));
    let zap = Zap::with(&settings, &[a.backend("a", ""), closed, b.backend("b", "priority = 1")]);
    assert_eq!(zap.chat(model_chat("m")).status, 200);
    let spans = collector.spans(4);
    let (server, tries) = tree(&spans);
    assert!(!is_error(server) && !pairs(&server.attributes).contains_key("error.type"));
    let facts = |span: &Span| {
        let pairs = pairs(&span.attributes);
        let of = |key: &str| pairs.get(key).cloned().unwrap_or_default();
        let message = span.status.clone().unwrap_or_default().message;
        (of("zap.backend"), of("error.type"), of("http.response.status_code"), message)
    };
    let mut found: Vec<_> = tries[..2].iter().map(|one| facts(one)).collect();
    found.sort();
    let fact = |a: &str, b: &str, c: &str, d: &str| (a.to_owned(), b.to_owned(), c.to_owned(), d.to_owned());
    assert_eq!(
        found,
        [
            fact("a", "upstream_error", "503", "HTTP 503"),
            fact("closed", "upstream_unreachable", "", "connection refused"),
        ]
    );
    assert_eq!(facts(tries[2]), fact("b", "", "200", ""));
    assert!(tries[..2].iter().all(|one| is_error(one)) && !is_error(tries[2]));
    assert!(
        tries.iter().zip(&tries[1..]).all(|(one, next)| one.end_time_unix_nano <= next.start_time_unix_nano)
    );
    let ids = [&a.seen()[0], &b.seen()[0]].map(|seen| traceparent(seen)[36..52].to_owned());
    let of = |name: &str| {
        let one = tries.iter().find(|one| pairs(&one.attributes)["zap.backend"] == name);
        hex(&one.unwrap().span_id)
    };
    assert_eq!(ids, [of("a"), of("b")]);
    // Tokens are those of the try that answered.
    let has_tokens = |one: &&Span| pairs(&one.attributes).contains_key("gen_ai.usage.output_tokens");
    assert_eq!(tries.iter().map(has_tokens).collect::<Vec<_>>(), [false, false, true]);
}

#[test]
fn a_stream_has_its_end_and_one_that_breaks_off_its_fault() {
    let a = Provider::start(|seen, stream| {
        start_events(stream);
        let event = |delta: &str, finish: &str| {
            format!(
                "data: {{\"model\":\"m-1\",\"choices\":[{{\"delta\":{delta},\"finish_reason\":{finish}}}]}}\n\n"
            )
        };
        for word in ["CONTENT-A", "CONTENT-B", "CONTENT-C"] {
            chunk(stream, &event(&format!("{{\"content\":\"{word}\"}}"), "null"));
        }
        if String::from_utf8_lossy(&seen.body).contains("broken") {
            return After::Close;
        }
        chunk(stream, &event("{}", "\"length\""));
        chunk(stream, "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":3}}\n\n");
        chunk(stream, "data: [DONE]\n\n");
        end_chunks(stream);
        After::Keep
    });
    let collector = Collector::start();
    let zap = Zap::with(&collector.settings(""), &[a.backend("a", "")]);
    let ask = |model: &str| {
        zap.chat(model_chat(model).replace('{', "{\"stream\":true,").replacen(
            "{\"stream\":true,\"role",
            "{\"role",
            1,
        ))
    };
    assert_eq!(ask("good").status, 200);
    let spans = collector.spans(2);
    let (server, tries) = tree(&spans);
    let of = pairs(&tries[0].attributes);
    assert_eq!(
        [
            "gen_ai.response.model",
            "gen_ai.response.finish_reasons",
            "gen_ai.usage.input_tokens",
            "gen_ai.usage.output_tokens",
            "gen_ai.request.stream"
        ]
        .map(|key| &*of[key]),
        ["m-1", "length", "5", "3", "true"]
    );
    let first: f64 = of["gen_ai.response.time_to_first_chunk"].parse().unwrap();
    assert!((0.0..10.0).contains(&first));
    assert!(!is_error(server) && !is_error(tries[0]));
    assert_eq!(tries[0].name, "chat good");

    ask("broken");
    let spans = collector.spans(4);
    let (server, tries) = tree(&spans[2..]);
    assert!(is_error(server) && is_error(tries[0]));
    assert_eq!(pairs(&server.attributes)["error.type"], "upstream_error");
    assert_eq!(pairs(&tries[0].attributes)["error.type"], "stream_interrupted");
    assert_eq!(pairs(&tries[0].attributes)["http.response.status_code"], "200");
    let bodies: Vec<u8> = collector.provider.seen().into_iter().flat_map(|seen| seen.body).collect();
    assert!(!String::from_utf8_lossy(&bodies).contains("CONTENT"));
}

#[test]
fn a_refusal_has_its_code_and_a_client_that_leaves_is_no_fault() {
    let a = Provider::start(|_, stream| {
        wait_closed(stream);
        After::Close
    });
    let collector = Collector::start();
    let keys = "[[client_keys]]\nname = \"team\"\nkey = \"sk-CANARY-1\"\n";
    let zap = Zap::with(&format!("{}{keys}", collector.settings("")), &[a.backend("a", "")]);
    assert_eq!(zap.chat(CHAT).status, 401);
    // What backends do not serve is in no trace.
    assert_eq!(zap.client().get("/health").status, 200);
    assert_eq!(zap.client().get("/nothing").status, 404);
    let spans = collector.spans(1);
    let of = pairs(&spans[0].attributes);
    assert_eq!((&*of["error.type"], &*of["http.response.status_code"]), ("invalid_api_key", "401"));
    assert!(!is_error(&spans[0]));

    let mut client = zap.client();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-CANARY-1\r\n";
    client.send(format!("{head}content-length: {}\r\n\r\n{CHAT}", CHAT.len()));
    eventually("the backend has the request", || a.count() == 1);
    drop(client);
    let spans = collector.spans(3);
    let (server, tries) = tree(&spans[1..]);
    for span in [server, tries[0]] {
        assert_eq!(pairs(&span.attributes)["error.type"], "client_gone");
        assert!(!is_error(span));
    }
}

/// Sends a chat with these headers; returns the trace headers that the backend got.
fn pass(zap: &Zap, a: &Provider, headers: &str) -> Vec<(String, String)> {
    let before = a.count();
    assert_eq!(zap.client().chat(headers, CHAT).status, 200);
    let seen = a.seen()[before].headers.clone();
    seen.into_iter().filter(|(name, _)| name.starts_with("trace")).collect()
}

#[test]
fn the_caller_decides_whether_its_trace_is_recorded() {
    let (a, collector) = (Provider::named(ANSWER), Collector::start());
    for (ratio, flags) in [("1", "00"), ("0", "01")] {
        let zap = Zap::with(&collector.settings(&format!("sample_ratio = {ratio}")), &[a.backend("a", "")]);
        let headers = format!("traceparent: 00-{TRACE}-{PARENT}-{flags}\r\ntracestate: v=STATE\r\n");
        let got = pass(&zap, &a, &headers);
        let got: BTreeMap<_, _> = got.iter().map(|(name, value)| (&**name, &**value)).collect();
        assert_eq!(got["tracestate"], "v=STATE");
        let parent = got["traceparent"];
        assert!(parent.starts_with(&format!("00-{TRACE}-")) && parent.ends_with(&format!("-{flags}")));
        assert!(!parent.contains(PARENT), "the parent of the backend is the try");
        // Without a valid trace of the client, the ratio decides.
        for malformed in ["", "traceparent: 00-zz\r\ntracestate: v=STATE\r\n"] {
            let got = pass(&zap, &a, malformed);
            assert_eq!(got.len(), 1, "{got:?}");
            assert!(got[0].1.ends_with(if ratio == "1" { "-01" } else { "-00" }), "{got:?}");
            assert!(!got[0].1.contains(TRACE));
        }
        zap.order(Order::Drain);
        assert!(zap.join());
    }
    let spans = collector.spans(2 * 2 + 2);
    let of_caller: Vec<&Span> = spans.iter().filter(|span| hex(&span.trace_id) == TRACE).collect();
    let (server, tries) = tree(&spans[4..]);
    assert_eq!((of_caller.len(), tries.len()), (2, 1));
    assert_eq!(hex(&server.parent_span_id), PARENT);
    assert!(spans[..4].iter().all(|span| hex(&span.trace_id) != TRACE));
}

#[test]
fn without_traces_the_header_passes_byte_by_byte() {
    let a = Provider::named(ANSWER);
    let zap = Zap::with("", &[a.backend("a", "")]);
    for value in [&*format!("00-{TRACE}-{PARENT}-01"), "garbage", "00-x"] {
        let got = pass(&zap, &a, &format!("tracestate: v=STATE\r\ntraceparent: {value}\r\n"));
        let want = [("tracestate", "v=STATE"), ("traceparent", value)];
        assert_eq!(got.iter().map(|(name, value)| (&**name, &**value)).collect::<Vec<_>>(), want);
    }
    assert_eq!(pass(&zap, &a, ""), []);
}

#[test]
fn a_backend_that_is_to_get_no_trace_gets_none() {
    let (a, b, collector) = (Provider::named(ANSWER), Provider::named(ANSWER), Collector::start());
    let zap = Zap::with(&collector.settings(""), &[a.backend("a", "drop_headers = [\"trace*\"]")]);
    let headers = format!("traceparent: 00-{TRACE}-{PARENT}-01\r\ntracestate: a=b\r\n");
    assert_eq!(pass(&zap, &a, &headers), []);
    let more = "extra_headers = { traceparent = \"fixed\" }\nforward_headers = [\"trace*\"]";
    let zap = Zap::with(&collector.settings(""), &[b.backend("b", more)]);
    let got = pass(&zap, &b, &headers);
    assert_eq!(got.iter().filter(|(name, _)| name == "traceparent").count(), 1, "{got:?}");
}

#[test]
fn the_environment_is_used_where_the_file_says_nothing() {
    let (a, collector) = (Provider::named(ANSWER), Collector::start());
    let endpoint = format!("http://{}/otlp/", collector.provider.address);
    let env = move |name: &str| match name {
        "OTEL_EXPORTER_OTLP_ENDPOINT" => Some(endpoint.clone()),
        "OTEL_EXPORTER_OTLP_HEADERS" => Some("x-key=a%20b".to_owned()),
        "OTEL_SERVICE_NAME" => Some("edge".to_owned()),
        "OTEL_RESOURCE_ATTRIBUTES" => Some("deployment.environment.name=test".to_owned()),
        _ => None,
    };
    let zap = Zap::start_in(&a.backend("a", ""), &env);
    assert_eq!(zap.chat(CHAT).status, 200);
    collector.spans(2);
    let seen = &collector.provider.seen()[0];
    assert_eq!((&*seen.line, seen.header("x-key")), ("POST /otlp/v1/traces HTTP/1.1", Some("a b")));
    let resource = collector.requests()[0].resource_spans[0].resource.clone().unwrap();
    let resource = pairs(&resource.attributes);
    assert_eq!((&*resource["service.name"], &*resource["deployment.environment.name"]), ("edge", "test"));
}

#[test]
fn a_collector_that_is_busy_gets_the_same_spans_again() {
    let (a, collector) = (Provider::named(ANSWER), Collector::start());
    collector.status.store(503, Ordering::SeqCst);
    let zap = Zap::with(&collector.settings(""), &[a.backend("a", "")]);
    assert_eq!(zap.chat(CHAT).status, 200);
    eventually("the collector was asked twice", || collector.provider.count() >= 2);
    collector.status.store(200, Ordering::SeqCst);
    eventually("the spans are taken", || zap.metric("zap_otlp_spans_sent_total") == 2.0);
    let requests = collector.requests();
    assert!(requests.iter().all(|request| *request == requests[0]));
    // One connection serves all requests.
    assert_eq!(collector.provider.connections(), 1);
}

fn dropped(zap: &Zap, cause: &str) -> f64 {
    zap.metric(&format!("zap_otlp_spans_dropped_total{{cause=\"{cause}\"}}"))
}

#[test]
fn what_a_collector_refuses_is_counted_and_not_sent_again() {
    let a = Provider::named(ANSWER);
    let rejects = Arc::new(Mutex::new(false));
    let theirs = rejects.clone();
    let collector = Provider::start(move |_, stream| {
        if *theirs.lock().unwrap() {
            let partial = ExportTracePartialSuccess { rejected_spans: 1, error_message: "no".to_owned() };
            let response = ExportTraceServiceResponse { partial_success: Some(partial) };
            reply(stream, 200, "", &response.encode_to_vec());
        } else {
            reply(stream, 400, "", b"no");
        }
        After::Keep
    });
    let settings = format!("[otlp]\nendpoint = \"http://{}\"\n", collector.address);
    let zap = Zap::with_log(&settings, &[a.backend("a", "")]);
    assert_eq!(zap.chat(CHAT).status, 200);
    eventually("the spans are refused", || dropped(&zap, "refused") == 2.0);
    assert_eq!(collector.count(), 1);
    *rejects.lock().unwrap() = true;
    assert_eq!(zap.chat(CHAT).status, 200);
    eventually("a span is rejected", || dropped(&zap, "refused") == 3.0);
    assert_eq!(zap.metric("zap_otlp_spans_sent_total"), 1.0);
    let log = zap.log();
    let at = collector.address;
    assert!(log.contains(&format!("the collector at {at} does not take spans: HTTP 400")), "{log}");
    assert!(log.contains(&format!("the collector at {at} takes spans again")), "{log}");
}

#[test]
fn a_collector_that_hangs_or_is_gone_costs_no_request_anything() {
    let hangs = Provider::start(|_, stream| {
        wait_closed(stream);
        After::Close
    });
    for address in [hangs.address, Provider::closed_port()] {
        let a = Provider::named(ANSWER);
        let settings = format!("[otlp]\nendpoint = \"http://{address}\"\n");
        let zap = Zap::with_log(&settings, &[a.backend("a", "")]);
        let mut client = zap.client();
        let since = Instant::now();
        assert_eq!(client.chat("", CHAT).status, 200);
        (0..100).for_each(|_| assert_eq!(client.chat("", CHAT).status, 200));
        assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
        within(Duration::from_secs(40), "spans are dropped", || dropped(&zap, "unreachable") >= 2.0);
        assert_eq!(client.chat("", CHAT).status, 200);
        // The exit waits for the collector, but not for long.
        let since = Instant::now();
        zap.order(Order::Drain);
        let log = zap.log_at_end();
        assert!(since.elapsed() < Duration::from_secs(8), "{:?}", since.elapsed());
        assert!(log.contains("does not take spans: "), "{log}");
    }
}

#[test]
fn a_flood_fills_the_queue_and_no_more() {
    let hangs = Provider::start(|_, stream| {
        wait_closed(stream);
        After::Close
    });
    let a = Provider::named(ANSWER);
    let settings = format!("[otlp]\nendpoint = \"http://{}\"\n", hangs.address);
    let zap = Zap::with(&settings, &[a.backend("a", "models = [\"known\"]")]);
    // Refusals are the cheapest traces. The queue has room for 8192, and two batches may be on their way.
    let body = model_chat("unknown");
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut client = zap.client();
    for _ in 0..200 {
        client.send(request.repeat(50));
        (0..50).for_each(|_| assert_eq!(client.response().status, 404));
    }
    let lost = dropped(&zap, "queue_full") + dropped(&zap, "unreachable");
    assert!((10_000.0 - 8192.0 - 1024.0..10_000.0).contains(&lost), "{lost}");
    assert!(dropped(&zap, "queue_full") > 0.0);
}

#[test]
fn what_is_left_at_the_end_is_sent_before_the_exit() {
    let (a, collector) = (Provider::named(ANSWER), Collector::start());
    let zap = Zap::with(&collector.settings(""), &[a.backend("a", "")]);
    (0..3).for_each(|_| assert_eq!(zap.chat(CHAT).status, 200));
    zap.order(Order::Drain);
    assert!(zap.join());
    assert_eq!(collector.spans_now().len(), 6);
}

#[test]
fn a_reload_switches_traces_on_off_and_to_another_collector() {
    let (a, first, second) = (Provider::named(ANSWER), Collector::start(), Collector::start());
    let file = File::new();
    let backends = [a.backend("a", "")];
    let zap = Zap::with_file(&file, "", &backends);
    assert_eq!(zap.chat(CHAT).status, 200);
    for (settings, in_first, in_second) in [
        (first.settings(""), 2, 0),
        (second.settings(""), 2, 2),
        (String::new(), 2, 2),
        (first.settings(""), 4, 2),
    ] {
        file.write(&settings, &backends);
        assert!(zap.reload());
        assert_eq!(zap.chat(CHAT).status, 200);
        eventually("the spans have come", || {
            (first.spans_now().len(), second.spans_now().len()) == (in_first, in_second)
        });
    }
    file.write("[otlp]\nendpoint = \"collector\"\n", &backends);
    assert!(!zap.reload());
    assert_eq!(zap.chat(CHAT).status, 200);
    first.spans(6);
}

#[test]
fn a_response_in_pieces_does_not_hold_the_next_request_up() {
    let a = Provider::named(ANSWER);
    let collector = Provider::start(|_, stream| {
        // A body without an end: the collector closes in the middle of it.
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nx");
        After::Close
    });
    let settings = format!("[otlp]\nendpoint = \"http://{}\"\n", collector.address);
    let zap = Zap::with(&settings, &[a.backend("a", "")]);
    assert_eq!(zap.chat(CHAT).status, 200);
    eventually("the request is sent again", || collector.count() >= 2);
}

//! Tokens and money: what providers tell is counted exactly, what they do not tell is estimated, and Zap's own question
//! for the token counts of a stream is invisible to the client.

mod asking;
mod budgets;
mod dialects;
mod ends;
mod limits;
mod mixed;
mod reserve;
mod waits;

use std::collections::HashMap;
use std::io::Write;
use std::net::TcpStream;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::Value;

use self::dialects::{ALL, Api, Ask, BOTH, ESTIMATED, STREAMS, ask};
use crate::support::provider::{After, Gate, Seen, chunk, end_chunks, reply, start_events, wait_closed};
use crate::support::{Client, Provider, Response, Zap, eventually};

/// Input, cached, output and reasoning tokens.
type Counts = [u64; 4];

const KINDS: [&str; 4] = ["input", "cached", "output", "reasoning"];

const JSON: &str = "content-type: application/json\r\n";

const EVENTS: &str = "content-type: text/event-stream\r\n";

/// The member that asks for the token counts.
const ASKS: &str = "\"stream_options\":{\"include_usage\":true}";

const DONE: &str = "data: [DONE]\n\n";

/// Input tokens of each [`body`] of 400 bytes, at four bytes a token.
const INPUT: u64 = 100;

/// 100 input tokens cost 0.1 USD, and so do 10 output tokens.
const PRICES: &str = "models = [\"m\"]\nprices = { \"*\" = { input = 1000, output = 10000 } }\n";

fn has(body: &[u8], what: &str) -> bool {
    memchr::memmem::find(body, what.as_bytes()).is_some()
}

/// Answers as a provider does that gives the token counts of a stream only if asked.
fn serve(seen: &Seen, stream: &mut TcpStream, text: &str, counts: Option<Counts>) -> After {
    let ask = Ask::of(seen);
    let answer = ask.answer(text, has(&seen.body, "\"include_usage\":true"), counts);
    if !ask.is_stream {
        reply(stream, 200, JSON, answer.as_bytes());
        return After::Keep;
    }
    start_events(stream);
    for event in answer.split_inclusive("\n\n") {
        chunk(stream, event);
    }
    end_chunks(stream);
    After::Keep
}

/// The number in the id of a request, `mixed-N`.
fn number_of(seen: &Seen) -> usize {
    seen.header("x-request-id").unwrap().strip_prefix("mixed-").unwrap().parse().unwrap()
}

/// A provider that answers each request with `text` and these counts.
fn teller(text: &'static str, counts: Option<Counts>) -> Provider {
    Provider::start(move |seen, stream| serve(seen, stream, text, counts))
}

/// A body of 400 bytes with these members. A request for `use-N` uses N output tokens.
fn body(used: u64, more: &str) -> String {
    let head = format!("{{\"model\":\"m\",\"user\":\"use-{used}\"{more},\"messages\":[{{\"content\":\"");
    let tail = "\"}]}";
    let room = (4 * INPUT as usize).saturating_sub(head.len() + tail.len());
    format!("{head}{}{tail}", "a ".repeat(room / 2) + if room % 2 == 1 { "b" } else { "" })
}

/// The member that states a maximum of output tokens.
fn max(tokens: u64) -> String {
    format!(",\"max_tokens\":{tokens}")
}

/// The output tokens that a request is to use.
fn used(seen: &Seen) -> u64 {
    let text = String::from_utf8_lossy(&seen.body);
    let (_, rest) = text.split_once("use-").unwrap();
    rest.split('"').next().unwrap().parse().unwrap()
}

/// Answers with 100 input tokens and as many output tokens as the request asks for.
fn answer(seen: &Seen, stream: &mut TcpStream) -> After {
    serve(seen, stream, "some text", Some([INPUT, 0, used(seen), 0]))
}

/// A provider that [answers](answer), and holds the requests that use so many output tokens until `gate` is opened.
fn holding(gate: &Gate, uses: Range<u64>) -> Provider {
    let gate = gate.clone();
    Provider::start(move |seen, stream| {
        if uses.contains(&used(seen)) {
            gate.pass();
        }
        answer(seen, stream)
    })
}

/// Posts a chat with this key.
fn post(client: &mut Client, key: &str, body: &str) -> Response {
    client.chat(&format!("authorization: Bearer {key}\r\n"), body)
}

/// The client keys `zk-team` with these limits, and `zk-other` without.
fn keys(limits: &str) -> String {
    format!(
        "[[client_keys]]\nname = \"team\"\nkey = \"zk-team\"\n{limits}\n[[client_keys]]\nname = \"other\"\nkey = \"zk-other\"\n"
    )
}

/// The member of a budget of so many USD.
fn budget(usd: &str, per: &str) -> String {
    format!("budget = {{ usd = {usd}, per = \"{per}\" }}")
}

/// Limit, remaining and reset of the tokens in a response.
fn token_headers(response: &Response) -> [String; 3] {
    ["limit", "remaining", "reset"]
        .map(|what| response.header(&format!("x-ratelimit-{what}-tokens")).unwrap_or("none").to_owned())
}

/// What is left of a limit in `/status`.
fn left(zap: &Zap, owners: &str, name: &str) -> u64 {
    let status = zap.client().get("/status").json();
    let owner = status[owners].as_array().unwrap().iter().find(|owner| owner["name"] == name).unwrap();
    owner["tokens_per_minute"]["left"].as_u64().unwrap()
}

/// What `/status` shows of a budget: what is spent and what is left.
fn state(zap: &Zap, owners: &str, name: &str) -> (String, String) {
    let status = zap.client().get("/status").json();
    let owner = status[owners].as_array().unwrap().iter().find(|owner| owner["name"] == name).unwrap();
    let text = |what: &str| owner["budget"][what].as_str().unwrap().to_owned();
    (text("spent_usd"), text("left_usd"))
}

fn send(client: &mut Client, ask: Ask, body: &str) -> Response {
    client.post(ask.path(), ask.headers(), body);
    client.response()
}

/// The samples of `zap_tokens_total` of a backend and a model; zeros if there are none.
fn tokens(metrics: &HashMap<String, f64>, backend: &str, model: &str) -> Counts {
    let series =
        |kind| format!("zap_tokens_total{{backend=\"{backend}\",model=\"{model}\",type=\"{kind}\"}}");
    KINDS.map(|kind| metrics.get(&series(kind)).map_or(0, |n| *n as u64))
}

fn client_tokens(metrics: &HashMap<String, f64>, client: &str) -> Counts {
    KINDS.map(|kind| {
        metrics[&format!("zap_client_tokens_total{{client=\"{client}\",type=\"{kind}\"}}")] as u64
    })
}

/// The tokens of a log line; `None` if it has none.
fn logged(line: &Value) -> Option<(Counts, String)> {
    let tokens = &line["tokens"];
    let source = tokens["source"].as_str()?.to_owned();
    Some((KINDS.map(|kind| tokens[kind].as_u64().unwrap()), source))
}

fn add(sum: &mut Counts, counts: Counts) {
    sum.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
}

fn provider(counts: Counts) -> Option<(Counts, String)> {
    Some((counts, "provider".to_owned()))
}

#[test]
fn the_usage_of_every_dialect_is_counted_and_logged() {
    let counts = [1000, 400, 77, 30];
    let a = teller("four words are enough", Some(counts));
    let names: Vec<_> = (0..ALL.len()).map(|i| format!("\"m{i}\" = \"own-{i}\"")).collect();
    let more = format!(
        "{BOTH}models = {{ {} }}\nprices = {{ \"own-*\" = {{ input = 1, cached = 0.5, output = 2 }} }}",
        names.join(", ")
    );
    let zap = Zap::with_log("", &[a.backend("a", &more)]);
    let mut client = zap.client();
    for (i, ask) in ALL.into_iter().enumerate() {
        let answer = send(&mut client, ask, &ask.body(&format!("m{i}"), ""));
        assert_eq!((answer.status, answer.whole), (200, true), "{ask:?}");
        assert_eq!(answer.text(), ask.answer("four words are enough", false, Some(counts)), "{ask:?}");
    }
    let (metrics, lines) = (zap.metrics(), zap.lines(ALL.len()));
    let mut all = Counts::default();
    for (i, (ask, line)) in ALL.into_iter().zip(&lines).enumerate() {
        let told = ask.told(counts);
        add(&mut all, told);
        assert_eq!(tokens(&metrics, "a", &format!("m{i}")), told, "{ask:?}");
        assert_eq!(logged(line), provider(told), "{ask:?}");
        assert_eq!(line["upstream_model"], format!("own-{i}"), "{ask:?}");
        assert_eq!(line["ttft_ms"].is_number(), ask.is_stream, "{ask:?}: {line}");
        // Thousandths of a thousandth of a dollar.
        let [input, cached, output, _] = told;
        let micro = (input - cached) as f64 + cached as f64 / 2.0 + 2.0 * output as f64;
        assert_eq!(line["cost_usd"].as_f64(), Some(micro / 1e6), "{ask:?}");
    }
    assert_eq!(client_tokens(&metrics, "anonymous"), all);
    assert_eq!(metrics["zap_usage_missing_total{backend=\"a\"}"], 0.0);
    assert_eq!(metrics["zap_time_to_first_token_seconds_count{backend=\"a\"}"], STREAMS.len() as f64);
    assert_eq!(metrics["zap_time_per_output_token_seconds_count{backend=\"a\"}"], STREAMS.len() as f64);
}

/// What becomes of a request of the mixed load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The whole answer with its token counts.
    Told,
    /// The same, after another provider has failed before content.
    Moved,
    /// The whole answer without token counts.
    Untold,
    /// The provider cuts the stream after content.
    Cut,
    /// The client leaves after content.
    Left,
    /// The client leaves before the head of the answer.
    Gone,
    /// The provider refuses the request.
    Refused,
}

#[test]
fn an_answer_is_counted_before_its_last_byte_goes_out() {
    let counts = [10, 0, 3, 0];
    let a = Provider::start(move |seen, stream| {
        if has(&seen.body, "no end") {
            // A stream that ends with its body.
            let (content, behind) = Ask::of(seen).events("some", true, Some(counts));
            start_events(stream);
            chunk(stream, &content);
            chunk(stream, behind.strip_suffix(DONE).unwrap());
            end_chunks(stream);
            return After::Keep;
        }
        serve(seen, stream, "some", Some(counts))
    });
    let zap = Zap::with("", &[a.backend("a", "usage = \"inject\"\nmodels = [\"m\"]")]);
    let (mut client, mut sum) = (zap.client(), Counts::default());
    // Few scrapes: a page that is asked for too often is cached.
    for round in 0..4 {
        for (ask, more) in [(ALL[0], ""), (ALL[1], ""), (ALL[5], ""), (ALL[1], ",\"user\":\"no end\"")] {
            let answer = send(&mut client, ask, &ask.body("m", more));
            assert!(answer.whole);
            add(&mut sum, counts);
            assert_eq!(tokens(&zap.metrics(), "a", "m"), sum, "{round} {ask:?} {more}");
        }
    }
}

#[test]
fn an_answer_is_counted_when_its_terminal_event_is_out_although_the_body_goes_on() {
    let (counts, gate) = ([10, 0, 3, 0], Gate::default());
    let held = gate.clone();
    let a = Provider::start(move |seen, stream| {
        start_events(stream);
        chunk(stream, &Ask::of(seen).answer("some", true, Some(counts)));
        held.pass();
        end_chunks(stream);
        After::Keep
    });
    let zap = Zap::with("", &[a.backend("a", "models = [\"m\"]")]);
    let mut client = zap.client();
    client.post(ALL[1].path(), "", ALL[1].body("m", &format!(",{ASKS}")));
    let mut answer = client.head();
    while !answer.body.ends_with(DONE.as_bytes()) {
        answer.body.extend(client.chunk().unwrap());
    }
    assert_eq!(tokens(&zap.metrics(), "a", "m"), counts);
    gate.open(1);
    zap.wait_until_idle();
}

#[test]
fn the_usage_of_a_response_that_is_incomplete_or_failed_is_counted() {
    let a = Provider::start(|seen, stream| {
        let (ask, counts) = (Ask::of(seen), [10, 2, 3, 1]);
        let answer = ask.answer("one two", false, Some(counts));
        let end = if has(&seen.body, "failed") { "failed" } else { "incomplete" };
        reply(
            stream,
            200,
            EVENTS,
            answer.replace("response.completed", &format!("response.{end}")).as_bytes(),
        );
        After::Keep
    });
    let zap = Zap::with_log("", &[a.backend("a", "models = [\"m\"]")]);
    let mut client = zap.client();
    for end in ["incomplete", "failed"] {
        let answer = send(&mut client, ALL[5], &ALL[5].body("m", &format!(",\"user\":\"{end}\"")));
        assert!(answer.whole && answer.text().contains(&format!("response.{end}")));
    }
    let metrics = zap.metrics();
    assert_eq!(tokens(&metrics, "a", "m"), [20, 4, 6, 2]);
    assert_eq!(metrics["zap_time_per_output_token_seconds_count{backend=\"a\"}"], 1.0, "not of an error");
    for line in zap.lines(2) {
        assert_eq!(logged(&line), provider([10, 2, 3, 1]), "{line}");
    }
}

#[test]
fn a_stream_that_is_cut_has_a_first_token_and_no_pace() {
    let a = Provider::start(|seen, stream| {
        let (content, _) = Ask::of(seen).events("some words and more", false, None);
        start_events(stream);
        chunk(stream, &content);
        After::Close
    });
    let zap = Zap::with("", &[a.backend("a", "models = [\"m\"]")]);
    let mut client = zap.client();
    assert!(!send(&mut client, ALL[1], &ALL[1].body("m", "")).whole);
    zap.wait_until_idle();
    let metrics = zap.metrics();
    let count = |what: &str| metrics[&format!("zap_time_{what}_token_seconds_count{{backend=\"a\"}}")];
    assert_eq!((count("to_first"), count("per_output")), (1.0, 0.0));
    assert!(tokens(&metrics, "a", "m")[2] > 1, "the output is estimated");
}

#[test]
fn a_backend_whose_usage_is_off_counts_nothing() {
    let a = teller("one", Some([10, 2, 3, 1]));
    let zap = Zap::with_log("", &[a.backend("a", &format!("{BOTH}usage = \"off\"\nmodels = [\"m\"]"))]);
    let mut client = zap.client();
    for ask in ALL {
        assert_eq!(send(&mut client, ask, &ask.body("m", "")).status, 200);
    }
    let metrics = zap.metrics();
    assert!(!metrics.keys().any(|series| series.starts_with("zap_tokens_total{")));
    assert_eq!(client_tokens(&metrics, "anonymous"), Counts::default());
    assert_eq!(metrics["zap_usage_missing_total{backend=\"a\"}"], 0.0);
    assert_eq!(metrics["zap_time_to_first_token_seconds_count{backend=\"a\"}"], 0.0);
    for line in zap.lines(ALL.len()) {
        for key in ["tokens", "cost_usd", "ttft_ms"] {
            assert_eq!(line[key], Value::Null, "{key}: {line}");
        }
    }
}

/// Nano-USD as they are written.
fn usd(nano: u64) -> String {
    format!("{}.{:09}", nano / 1_000_000_000, nano % 1_000_000_000)
}

#[test]
fn a_cost_is_exact_to_the_nano_dollar_by_exact_names_and_by_patterns() {
    let a = Provider::start(|seen, stream| {
        let n = number_of(seen) as u64;
        serve(seen, stream, "one", Some([1000 + n, n, 17 * n, n]))
    });
    let more = "models = [\"m\", \"m-mini\", \"n-1\", \"free\"]\nprices = { \"m\" = { input = 2.5, cached = 1.25, output = 10 }, \
        \"m*\" = { input = 0.15, output = 0.6 }, \"n*\" = { input = 0.000001, cached = 0.000003, output = 1 }, \
        \"n\" = { input = 900, output = 900 } }";
    let keys = "[[client_keys]]\nname = \"team\"\nkey = \"zk-team\"\n[[client_keys]]\nname = \"idle\"\nkey = \"zk-idle\"\n";
    let zap = Zap::with_log(keys, &[a.backend("a", more)]);
    let (mut client, mut sums, mut costs) = (zap.client(), HashMap::<&str, u64>::new(), Vec::new());
    let mut all = Counts::default();
    for n in 0..60u64 {
        let ask = ALL[n as usize % 6];
        // Input, cached and output, in pico-USD a token.
        let (model, prices) = [
            ("m", [2_500_000, 1_250_000, 10_000_000]),
            ("m-mini", [150_000, 150_000, 600_000]),
            ("n-1", [1, 3, 1_000_000]),
            ("free", [0, 0, 0]),
        ][n as usize % 4];
        let headers = format!("authorization: Bearer zk-team\r\nx-request-id: mixed-{n}\r\n");
        client.post(ask.path(), &headers, ask.body(model, ""));
        assert_eq!(client.response().status, 200);
        let parts = [1000, n, 17 * n].into_iter().zip(prices);
        let pico: u64 = parts.map(|(tokens, price)| tokens * price).sum();
        let nano = (pico + 500) / 1000;
        *sums.entry(model).or_default() += nano;
        costs.push(usd(nano));
        add(&mut all, [1000 + n, n, 17 * n, n]);
    }
    for (model, nano) in &sums {
        let series = format!("zap_cost_usd_total{{backend=\"a\",model=\"{model}\"}}");
        assert_eq!(zap.sample(&series), Some(usd(*nano)), "{model}");
    }
    let of_client = |client: &str| zap.sample(&format!("zap_client_cost_usd_total{{client=\"{client}\"}}"));
    assert_eq!(of_client("team"), Some(usd(sums.values().sum())));
    assert_eq!(of_client("idle"), Some(usd(0)));
    let metrics = zap.metrics();
    assert_eq!(client_tokens(&metrics, "team"), all);
    assert_eq!(client_tokens(&metrics, "idle"), Counts::default());
    assert_eq!(client_tokens(&metrics, "anonymous"), Counts::default());
    for (line, cost) in zap.lines(costs.len()).iter().zip(&costs) {
        assert_eq!(line["cost_usd"].as_f64(), cost.parse().ok(), "{line}");
    }
}

#[test]
fn without_client_keys_all_tokens_are_those_of_anonymous() {
    let a = teller("one", Some([10, 2, 3, 1]));
    let zap = Zap::with("", &[a.backend("a", "prices = { \"*\" = { input = 1, output = 1 } }")]);
    for headers in ["", "authorization: Bearer one\r\n", "authorization: Bearer two\r\n"] {
        assert_eq!(zap.client().chat(headers, ALL[0].body("m", "")).status, 200);
    }
    assert_eq!(client_tokens(&zap.metrics(), "anonymous"), [30, 6, 9, 3]);
    assert_eq!(zap.sample("zap_client_cost_usd_total{client=\"anonymous\"}"), Some(usd(39_000)));
}

#[test]
fn the_usage_of_a_long_answer_in_pieces_is_counted_wherever_it_stands() {
    let numbers = "0.0123456789,".repeat(20_000);
    let data = format!(
        "\"data\":[{{\"embedding\":[{numbers}0],\"note\":\"\\\"usage\\\":{{\\\"prompt_tokens\\\":5}}\"}}]"
    );
    let usage = "\"usage\" : { \"prompt_tokens\":4321,\"total_tokens\":4321 }";
    let first = format!("{{{usage},{data}}}");
    let last = format!("{{{data},{usage}}}");
    let inside = format!("{{{data},\"meta\":{{{usage}}}}}");
    for (answer, want) in [(first, Some(4321)), (last, Some(4321)), (inside, None)] {
        let theirs = answer.clone();
        let a = Provider::start(move |_, stream| {
            let head = format!("HTTP/1.1 200 OK\r\n{JSON}transfer-encoding: chunked\r\n\r\n");
            let _ = stream.write_all(head.as_bytes());
            // The pieces cut keys and numbers apart.
            let (long, short) = theirs.split_at(theirs.len() - 100);
            long.as_bytes().chunks(7001).for_each(|piece| {
                chunk(stream, std::str::from_utf8(piece).unwrap());
            });
            short.as_bytes().chunks(3).for_each(|piece| {
                chunk(stream, std::str::from_utf8(piece).unwrap());
            });
            end_chunks(stream);
            After::Keep
        });
        let zap = Zap::with_log("", &[a.backend("a", "models = [\"m\"]")]);
        let ask = ALL[6];
        let body = ask.body("m", "");
        assert_eq!(send(&mut zap.client(), ask, &body).text(), answer);
        let counts = tokens(&zap.metrics(), "a", "m");
        let missing = zap.metric("zap_usage_missing_total{backend=\"a\"}");
        let lines = zap.lines(1);
        match want {
            Some(input) => {
                assert_eq!((counts, missing), ([input, 0, 0, 0], 0.0));
                assert_eq!(logged(&lines[0]), provider(counts));
            }
            None => {
                assert_eq!((counts, missing), ([body.len().div_ceil(4) as u64, 0, 0, 0], 1.0));
                assert_eq!(logged(&lines[0]).unwrap().1, "estimate");
            }
        }
    }
}

#[test]
fn a_usage_in_the_text_of_a_message_is_not_the_usage_of_the_answer() {
    let text = r#"\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":5}"#;
    let a = teller(text, Some([10, 0, 3, 0]));
    let b = teller(text, None);
    let zap = Zap::with("", &[a.backend("a", "models = [\"m\"]"), b.backend("b", "models = [\"n\"]")]);
    let (mut client, mut sum, mut count) = (zap.client(), Counts::default(), 0.0);
    for ask in ALL.into_iter().take(6) {
        let options = if ask.has_options() { format!(",{ASKS}") } else { String::new() };
        send(&mut client, ask, &ask.body("m", &options));
        send(&mut client, ask, &ask.body("n", &options));
        add(&mut sum, [10, 0, 3, 0]);
        count += 1.0;
    }
    let metrics = zap.metrics();
    assert_eq!(tokens(&metrics, "a", "m"), sum);
    assert_eq!(metrics["zap_usage_missing_total{backend=\"b\"}"], count);
}

#[test]
fn a_long_answer_that_is_cut_is_an_estimate() {
    let a = Provider::start(|_, stream| {
        let text = "x".repeat(100_000);
        let head = format!("HTTP/1.1 200 OK\r\n{JSON}content-length: 200000\r\n\r\n");
        let _ =
            stream.write_all(format!("{head}{{\"choices\":[{{\"message\":{{\"content\":\"{text}").as_bytes());
        After::Close
    });
    let zap = Zap::with_log("", &[a.backend("a", "models = [\"m\"]")]);
    let mut client = zap.client();
    assert!(!client.chat("", ALL[0].body("m", "")).whole);
    let (counts, source) = logged(&zap.lines(1)[0]).unwrap();
    assert_eq!((source.as_str(), counts[2] / 1000), ("estimate", 25), "{counts:?}");
    assert_eq!(tokens(&zap.metrics(), "a", "m"), counts);
}

#[test]
fn a_model_is_labelled_by_a_name_of_the_configuration_or_as_other() {
    let a = teller("one", Some([10, 2, 3, 1]));
    let routes = "[models.route]\ntargets = [{ backend = \"a\", model = \"own\" }]\n";
    let more =
        "models = { \"listed\" = \"secret\", \"pattern-*\" = \"p-*\", \"d\" = \"d\" }\ndefault_model = \"d\"";
    let b = teller("two", Some([20, 4, 6, 2]));
    let zap = Zap::with_log(routes, &[a.backend("a", more), b.backend("b", "priority = 1")]);
    let counts = [10, 2, 3, 1];
    for (model, label) in
        [("listed", "listed"), ("route", "route"), ("pattern-1", "other"), ("pattern-2", "other")]
    {
        let before = tokens(&zap.metrics(), "a", label);
        assert_eq!(zap.chat(ALL[0].body(model, "")).status, 200);
        let mut want = before;
        add(&mut want, counts);
        assert_eq!(tokens(&zap.metrics(), "a", label), want, "{model}");
    }
    assert_eq!(zap.chat("{\"messages\":[]}").status, 200);
    assert_eq!(tokens(&zap.metrics(), "a", "d"), counts, "the default model");
    assert_eq!(zap.chat(ALL[0].body("unheard-of", "")).header("x-zap-backend"), Some("b"));
    let metrics = zap.metrics();
    assert_eq!(tokens(&metrics, "b", "other"), [20, 4, 6, 2]);
    let names = ["listed", "route", "other", "d"].map(|name| format!("model=\"{name}\""));
    for series in metrics.keys().filter(|series| series.starts_with("zap_tokens_total")) {
        assert!(names.iter().any(|name| series.contains(name)), "{series}");
    }
    // A default model is known without `models` too.
    let other = Zap::with("", &[a.backend("a", "default_model = \"d\"")]);
    assert_eq!(other.chat("{\"messages\":[]}").status, 200);
    assert_eq!(other.chat(ALL[0].body("d", "")).status, 200);
    assert_eq!(tokens(&other.metrics(), "a", "d"), counts.map(|n| 2 * n));
    let own: Vec<_> = zap.lines(6).iter().map(|line| line["upstream_model"].clone()).collect();
    assert_eq!(own, ["secret", "own", "p-1", "p-2", "d", "unheard-of"]);
}

#[test]
fn an_estimate_follows_the_ratio_of_the_answers_before() {
    // Three bytes of the client's request to a token, and five bytes of text to two tokens.
    let told = |seen: &Seen, text: &str| {
        let added = if has(&seen.body, ASKS) { ASKS.len() + 1 } else { 0 };
        [(seen.body.len() - added) as u64 / 3, 0, text.len() as u64 * 2 / 5, 0]
    };
    let text_of = |seen: &Seen| {
        let n = seen.header("x-request-id").unwrap().strip_prefix("n-").unwrap().parse::<usize>().unwrap();
        "some words ".repeat(5 + n % 40)
    };
    for ask in [ALL[1], ALL[3], ALL[5], ALL[0], ALL[4]] {
        let a = Provider::start(move |seen, stream| {
            let text = text_of(seen);
            let counts = Some(told(seen, &text)).filter(|_| !has(&seen.body, "silent"));
            serve(seen, stream, &text, counts)
        });
        let zap = Zap::with_log("", &[a.backend("a", "usage = \"inject\"\nmodels = [\"m\"]")]);
        let mut client = zap.client();
        for n in 0..60 {
            let user = if n < 50 { "loud" } else { "silent" };
            let body = ask.body("m", &format!(",\"user\":\"{user}{}\"", "x".repeat(n % 50 * 10)));
            client.post(ask.path(), &format!("x-request-id: n-{n}\r\n"), body);
            assert!(client.response().whole);
        }
        let (seen, lines) = (a.seen(), zap.lines(60));
        assert_eq!(seen.len(), 60);
        for (seen, line) in seen.iter().zip(&lines).skip(50) {
            let (counts, source) = logged(line).unwrap();
            assert_eq!(source, "estimate");
            let want = told(seen, &text_of(seen));
            for (kind, what) in [(0, "input"), (2, "output")] {
                let ratio = counts[kind] as f64 / want[kind] as f64;
                assert!((0.85..=1.15).contains(&ratio), "{ask:?} {what}: {counts:?}, should be {want:?}");
            }
        }
    }
}

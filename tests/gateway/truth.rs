//! Mixed load over a provider that lies, stalls and breaks in every way, over clients whose requests every provider
//! refuses, and over slow or dead providers: who notices, and how often a provider is asked.

use std::collections::HashMap;
use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::lies::{Ask, BUSY, End, Lie, STALLS};
use crate::support::provider::{After, Seen, reply, wait_closed};
use crate::support::{Provider, Response, Zap, eventually};

/// A bad provider stays in use, and every request may be retried. A pair is ejected after 1000 failures in a row, and a
/// backend after as many of its connections: the mixed load spreads over several models, and one of them is served.
const PATIENT: &str =
    "[health]\nfailure_threshold = 1000\ninterval_secs = 600\n[retry]\nbudget_percent = 100\n";

/// What a backend needs that serves the mixed load.
const ALL_PROTOCOLS: &str = "protocols = [\"openai\", \"anthropic\"]";

/// A model for which the bad provider serves every other request, and has no room for the others.
const BUSY_MODEL: &str = "busy";

/// A model that the bad provider serves.
const FINE_MODEL: &str = "fine";

/// Models for which the bad provider lies all the time.
const MODELS: [&str; 8] = ["m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7"];

fn ask_of(seen: &Seen) -> Ask {
    Ask::of(seen.line.split(' ').nth(1).unwrap(), &seen.body)
}

fn has(seen: &Seen, what: &str) -> bool {
    memchr::memmem::find(&seen.body, what.as_bytes()).is_some()
}

fn serve(seen: &Seen, stream: &mut TcpStream) -> After {
    let _ = stream.write_all(&ask_of(seen).answer_bytes());
    After::Keep
}

fn good() -> Provider {
    Provider::start(serve)
}

fn tell(lie: &Lie, stream: &mut TcpStream) -> After {
    let _ = stream.write_all(&lie.bytes());
    match lie.end {
        End::Close => After::Close,
        End::Keep => After::Keep,
        End::Reset => After::Reset,
        End::Stall => {
            wait_closed(stream);
            After::Close
        }
    }
}

/// Plays lies in turn, for each endpoint its own.
#[derive(Default)]
struct Liar {
    turns: Mutex<HashMap<Option<Ask>, usize>>,
    /// By request id, since Zap sends a request again if a reused connection closes at once: that is the same try.
    told: Mutex<HashMap<String, Option<&'static Lie>>>,
}

impl Liar {
    fn start(self: &Arc<Self>) -> Provider {
        let liar = self.clone();
        Provider::start(move |seen, stream| match liar.pick(seen) {
            Some(lie) => tell(lie, stream),
            None => serve(seen, stream),
        })
    }

    /// The lie for this request; `None` if it is served.
    fn pick(&self, seen: &Seen) -> Option<&'static Lie> {
        let ask = ask_of(seen);
        let is_busy = has(seen, &format!("\"{BUSY_MODEL}\""));
        let id = seen.header("x-request-id").unwrap().to_owned();
        *self.told.lock().unwrap().entry(id).or_insert_with(|| {
            let mut turns = self.turns.lock().unwrap();
            let next = turns.entry((!is_busy).then_some(ask)).or_default();
            let turn = *next;
            *next += 1;
            match is_busy {
                _ if has(seen, FINE_MODEL) => None,
                true if turn.is_multiple_of(2) => None,
                true => Some(&BUSY[turn / 2 % BUSY.len()]),
                false => ask.lies().nth(turn % ask.lies().count()),
            }
        })
    }

    /// How many requests got each kind of lie, by a label of it.
    fn told<T: Eq + std::hash::Hash>(&self, label: impl Fn(&'static Lie) -> Option<T>) -> HashMap<T, usize> {
        let mut counts = HashMap::new();
        self.told
            .lock()
            .unwrap()
            .values()
            .flatten()
            .filter_map(|lie| label(lie))
            .for_each(|l| *counts.entry(l).or_default() += 1);
        counts
    }
}

/// Sends `count` requests from `clients` connections and returns their responses, in the order of `request`'s argument.
fn load(
    zap: &Zap,
    clients: usize,
    count: usize,
    request: impl Fn(usize) -> (&'static str, String) + Sync,
) -> Vec<Response> {
    let (next, responses) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                let mut client = zap.client();
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= count {
                        break;
                    }
                    let (path, body) = request(i);
                    client.post(path, "", body);
                    let response = client.response();
                    if !response.whole || response.header("connection") == Some("close") {
                        client = zap.client();
                    }
                    responses.lock().unwrap().push((i, response));
                }
            });
        }
    });
    let mut responses = responses.into_inner().unwrap();
    responses.sort_by_key(|(i, _)| *i);
    responses.into_iter().map(|(_, response)| response).collect()
}

/// Request `i` of the mixed load: its endpoint, and its model.
fn mixed(i: usize) -> (Ask, &'static str) {
    // Two of five requests are chats.
    let ask = Ask::ALL[[0, 1, 0, 1, 2, 3, 4, 5, 6, 7][i % 10]];
    let model = match i % 9 {
        0 => BUSY_MODEL,
        4 => FINE_MODEL,
        _ => MODELS[i / 10 % MODELS.len()],
    };
    (ask, model)
}

fn sent(i: usize) -> (&'static str, String) {
    let (ask, model) = mixed(i);
    (ask.path(), ask.body(model))
}

fn assert_answers(responses: &[Response], ask: impl Fn(usize) -> Ask) {
    for (i, response) in responses.iter().enumerate() {
        let text = String::from_utf8_lossy(&response.body);
        assert_eq!((response.status, response.whole), (200, true), "request {i}: {text}");
        assert_eq!(text, ask(i).answer(), "request {i}");
    }
}

/// The samples of `name` of backend `backend` above 0, by their `label`.
fn samples(zap: &Zap, name: &str, backend: &str, label: &str) -> HashMap<String, usize> {
    let prefix = format!("{name}{{backend=\"{backend}\"");
    let all = zap.metrics().into_iter().filter(|(series, n)| series.starts_with(&prefix) && *n > 0.0);
    let value = |series: &str| {
        let value = series.split(&format!("{label}=\"")).nth(1).unwrap();
        value.split('"').next().unwrap().to_owned()
    };
    all.map(|(series, n)| (value(&series), n as usize)).collect()
}

fn named(counts: HashMap<&'static str, usize>) -> HashMap<String, usize> {
    counts.into_iter().map(|(name, n)| (name.to_owned(), n)).collect()
}

fn attempts(responses: &[Response]) -> usize {
    let of = |r: &Response| r.header("x-zap-attempts").unwrap().parse::<usize>().unwrap();
    responses.iter().map(of).sum()
}

/// What the bad provider did is what Zap counts, and nothing at the other one.
fn assert_rescues_counted(zap: &Zap, liar: &Liar) {
    let told = named(liar.told(|lie| Some(lie.retry)));
    assert_eq!(samples(zap, "zap_retries_total", "bad", "reason"), told);
    let prelude = named(liar.told(|lie| lie.prelude));
    assert_eq!(samples(zap, "zap_prelude_failovers_total", "bad", "reason"), prelude);
    assert_eq!(samples(zap, "zap_retries_total", "good", "reason"), HashMap::new());
}

#[test]
fn no_request_fails_over_a_provider_that_lies_in_every_way_and_each_rescue_is_counted() {
    const REQUESTS: usize = 10_000;
    let (liar, good) = (Arc::new(Liar::default()), good());
    let bad = liar.start();
    let zap = Zap::with(PATIENT, &[bad.backend("bad", ALL_PROTOCOLS), good.backend("good", ALL_PROTOCOLS)]);
    let responses = load(&zap, 16, REQUESTS, sent);
    assert_answers(&responses, |i| mixed(i).0);
    let lies = liar.told(|lie| Some(lie.name));
    for ask in Ask::ALL {
        ask.lies().for_each(|lie| assert!(lies.contains_key(lie.name), "{ask:?}: {} was not told", lie.name));
    }
    BUSY.iter().for_each(|lie| assert!(lies.contains_key(lie.name), "{} was not told", lie.name));
    let rescued: usize = lies.values().sum();
    assert!(rescued > REQUESTS / 3, "{rescued} rescues");
    assert_rescues_counted(&zap, &liar);
    assert_eq!(attempts(&responses), REQUESTS + rescued);
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 0.0);
    zap.wait_until_idle();
}

/// Streams alone: a request that is not streamed has been paid for where it waits, so it stays there.
#[test]
fn a_stalled_stream_goes_to_another_provider_and_is_counted() {
    let told = Arc::new(Mutex::new(HashMap::<String, usize>::new()));
    let (theirs, turn, good) = (told.clone(), AtomicUsize::new(0), good());
    let bad = Provider::start(move |seen, stream| {
        let id = seen.header("x-request-id").unwrap().to_owned();
        let turn = *theirs
            .lock()
            .unwrap()
            .entry(id)
            .or_insert_with(|| turn.fetch_add(1, Ordering::Relaxed) % STALLS.len());
        tell(&STALLS[turn], stream)
    });
    let settings = format!("{PATIENT}[timeouts]\nfirst_byte_secs = 1\nfirst_token_secs = 1\n");
    let zap = Zap::with(&settings, &[bad.backend("bad", ""), good.backend("good", "")]);
    let ask = Ask::ALL[1];
    let responses = load(&zap, 16, 16, |_| (ask.path(), ask.body("m")));
    assert_answers(&responses, |_| ask);
    let told = told.lock().unwrap();
    let silent = told.values().filter(|turn| **turn > 0).count();
    assert!(silent >= 3 && silent < told.len(), "{told:?}");
    for (name, reason, n) in [
        ("zap_retries_total", "upstream_timeout", told.len()),
        ("zap_prelude_failovers_total", "timeout", silent),
    ] {
        assert_eq!(samples(&zap, name, "bad", "reason"), HashMap::from([(reason.to_owned(), n)]));
    }
    assert_eq!(attempts(&responses), 16 + told.len());
    zap.wait_until_idle();
}

/// With the defaults the bad provider is ejected; its trials are rescued like other requests.
#[test]
fn with_the_defaults_a_provider_that_lies_is_ejected_and_no_request_fails() {
    // Ten retries a second are always allowed, and so many clients cannot need more before the ejection.
    const CLIENTS: usize = 8;
    let (liar, good) = (Arc::new(Liar::default()), good());
    let bad = liar.start();
    let zap = Zap::with("", &[bad.backend("bad", ALL_PROTOCOLS), good.backend("good", ALL_PROTOCOLS)]);
    let request = |i: usize| (mixed(i).0, "m");
    let responses = load(&zap, CLIENTS, 1000, |i| {
        let (ask, model) = request(i);
        (ask.path(), ask.body(model))
    });
    assert_answers(&responses, |i| request(i).0);
    let told: usize = liar.told(|_| Some(())).values().sum();
    assert!((3..40).contains(&told), "{told} requests at a provider that should be ejected");
    // A request that waits there at the ejection goes elsewhere at once, perhaps before it is sent.
    let rescued: usize = samples(&zap, "zap_retries_total", "bad", "reason").values().sum();
    assert!((told..=told + CLIENTS).contains(&rescued), "{rescued} rescues of {told} requests");
    assert_eq!(attempts(&responses), 1000 + rescued);
    zap.wait_until_idle();
}

/// What providers answer to a poisonous request.
const POISON: [(&str, u16); 5] =
    [("flagged", 403), ("unpaid", 402), ("crashing", 500), ("unknown", 501), ("oversized", 429)];

/// The error to a poisonous request. OpenAI answers 429 to a request that alone is over the limit.
const POISON_ERROR: &[u8] = br#"{"error":{"message":"Request too large for gpt-4 on tokens per min (TPM): Limit 10000, Requested 12000.","type":"tokens","param":null,"code":"rate_limit_exceeded"}}"#;

fn picky() -> Provider {
    Provider::start(|seen, stream| {
        match POISON.iter().find(|(word, _)| has(seen, word)) {
            Some((_, status)) => reply(stream, *status, "", POISON_ERROR),
            None => return serve(seen, stream),
        }
        After::Keep
    })
}

#[test]
fn one_percent_of_poisonous_requests_changes_nothing_for_the_others() {
    const REQUESTS: usize = 3000;
    let providers = [picky(), picky(), picky()];
    let backends: Vec<_> = providers
        .iter()
        .zip(["a", "b", "c"])
        .map(|(p, name)| p.backend(name, &format!("{ALL_PROTOCOLS}\napi_key = \"sk-CANARY\"")))
        .collect();
    // One strike would eject.
    let zap = Zap::with("[health]\nfailure_threshold = 1\ninterval_secs = 600\n", &backends);
    let begun = AtomicUsize::new(0);
    let (responses, poisonous) = thread::scope(|scope| {
        // The poison comes from clients of its own, one request in each hundred of the others.
        let poison = scope.spawn(|| {
            load(&zap, 3, REQUESTS / 100, |i| {
                eventually("the others are so far", || begun.load(Ordering::Relaxed) >= i * 100);
                ("/v1/chat/completions", Ask::ALL[0].body("m").replace("hi", POISON[i % POISON.len()].0))
            })
        });
        let responses = load(&zap, 13, REQUESTS, |i| {
            begun.fetch_add(1, Ordering::Relaxed);
            let ask = mixed(i).0;
            (ask.path(), ask.body("m"))
        });
        (responses, poison.join().unwrap())
    });
    assert_answers(&responses, |i| mixed(i).0);
    let mut shares = HashMap::<&str, usize>::new();
    responses.iter().for_each(|r| *shares.entry(r.header("x-zap-backend").unwrap()).or_default() += 1);
    for (name, n) in &shares {
        let fair = REQUESTS / 3;
        assert!(n.abs_diff(fair) <= REQUESTS / 100, "{name} got {n} of {REQUESTS}, not {fair}");
    }
    assert_eq!(attempts(&responses), REQUESTS, "nobody else is sent elsewhere");
    for (i, response) in poisonous.iter().enumerate() {
        assert_eq!(response.status, POISON[i % POISON.len()].1, "poison {i}");
    }
    let status = zap.client().get("/status").json();
    for backend in status["backends"].as_array().unwrap() {
        assert_eq!(backend["state"], "healthy", "{backend}");
    }
    for name in ["a", "b", "c"] {
        assert_eq!(zap.metric(&format!("zap_backend_up{{backend=\"{name}\"}}")), 1.0);
    }
    // The pairs too: each backend gets its share of the next requests at once.
    let after = load(&zap, 1, 9, |_| ("/v1/chat/completions", Ask::ALL[0].body("m")));
    let at = |name| after.iter().filter(|r| r.header("x-zap-backend") == Some(name)).count();
    assert_eq!((at("a"), at("b"), at("c")), (3, 3, 3));
    zap.wait_until_idle();
}

/// The requests that the providers got.
fn tries(providers: &[Provider]) -> usize {
    providers.iter().map(Provider::count).sum()
}

#[test]
fn under_a_total_outage_a_request_makes_at_most_one_and_a_fifth_tries() {
    const REQUESTS: usize = 500;
    // All answer alike, so that nobody is ejected; or not, so that all are, and Zap is in panic mode.
    for statuses in [[500, 500], [500, 502]] {
        let providers = statuses.map(|status| Provider::fixed(status, "", "down"));
        let zap = Zap::with(
            "[health]\ninterval_secs = 600\n",
            &[providers[0].backend("a", ""), providers[1].backend("b", "")],
        );
        let since = Instant::now();
        let responses = load(&zap, 8, REQUESTS, |_| ("/chat", Ask::ALL[0].body("m")));
        assert!(responses.iter().all(|r| r.status == 500 || r.status == 502));
        let (tries, extra) = (tries(&providers), 10 * since.elapsed().as_secs() as usize + 10);
        // The default budget is 20 % of the requests; ten retries a second come free, in each second that was begun.
        let most = REQUESTS + REQUESTS / 5;
        println!("{statuses:?}: {tries} tries of {REQUESTS} requests in {:?}", since.elapsed());
        assert!(tries > REQUESTS && tries <= most + extra, "{tries} tries of {most} and {extra}");
        assert_eq!(attempts(&responses), tries);
        zap.wait_until_idle();
    }
}

#[test]
fn slow_but_healthy_providers_get_each_request_once() {
    const REQUESTS: usize = 128;
    let slow = || {
        Provider::start(|seen, stream| {
            let ask = ask_of(seen);
            if !ask.is_stream {
                // Longer than the limits of streams, which are not for this request.
                thread::sleep(Duration::from_millis(2300));
                return serve(seen, stream);
            }
            thread::sleep(Duration::from_millis(300));
            let (whole, begun) = (ask.answer_bytes(), ask.begun_bytes());
            let _ = stream.write_all(&begun);
            // Content has begun: no limit but that of silence within a stream.
            thread::sleep(Duration::from_millis(2300));
            let _ = stream.write_all(&whole[begun.len()..]);
            After::Keep
        })
    };
    let providers = [slow(), slow()];
    let zap = Zap::with(
        "[timeouts]\nfirst_byte_secs = 2\nfirst_token_secs = 2\n[health]\ninterval_secs = 600\n",
        &[providers[0].backend("a", ALL_PROTOCOLS), providers[1].backend("b", ALL_PROTOCOLS)],
    );
    let responses = load(&zap, REQUESTS, REQUESTS, sent);
    assert_answers(&responses, |i| mixed(i).0);
    assert_eq!((tries(&providers), attempts(&responses)), (REQUESTS, REQUESTS));
    zap.wait_until_idle();
}

#[test]
fn a_stream_that_ends_badly_after_content_reaches_no_second_provider() {
    for end in [End::Close, End::Reset, End::Stall] {
        let bad = Provider::start(move |seen, stream| {
            let _ = stream.write_all(&ask_of(seen).begun_bytes());
            match end {
                End::Stall => drop(wait_closed(stream)),
                // Zap has read the content.
                _ => thread::sleep(Duration::from_millis(100)),
            }
            if end == End::Reset { After::Reset } else { After::Close }
        });
        let other = good();
        let settings = format!("{PATIENT}[timeouts]\nfirst_token_secs = 1\nstream_idle_secs = 1\n");
        let second = format!("priority = 1\n{ALL_PROTOCOLS}");
        let zap = Zap::with(&settings, &[bad.backend("bad", ALL_PROTOCOLS), other.backend("good", &second)]);
        let streams = [Ask::ALL[1], Ask::ALL[3], Ask::ALL[5], Ask::ALL[7]];
        let responses = load(&zap, 32, 32, |i| (streams[i % 4].path(), streams[i % 4].body("m")));
        for (i, response) in responses.iter().enumerate() {
            let text = response.text();
            assert!(text.contains("good") && text.contains("stream_interrupted"), "{end:?}: {text}");
            // An error event of `/v1/responses` or `/v1/messages` is read only if the stream ends cleanly.
            assert_eq!(response.whole, i % 4 >= 2, "{end:?}: {text}");
            assert_eq!(text.contains("event: response.failed"), i % 4 == 2, "{end:?}: {text}");
            assert_eq!(text.contains("event: error"), i % 4 == 3, "{end:?}: {text}");
        }
        assert_eq!((bad.count(), other.count(), attempts(&responses)), (32, 0, 32), "{end:?}");
        zap.wait_until_idle();
    }
}

#[test]
fn a_request_that_all_refuse_without_a_reason_delays_others_once() {
    let oversized = Ask::ALL[0].body("m").replace("hi", "oversized");
    let picky = || {
        Provider::start(|seen, stream| {
            if has(seen, "oversized") {
                reply(stream, 429, "", b"{\"error\":{\"message\":\"no\"}}");
                return After::Keep;
            }
            serve(seen, stream)
        })
    };
    let (a, b) = (picky(), picky());
    let settings = "[health]\ninterval_secs = 600\n[queue]\nmax_wait_secs = 1\n";
    let zap = Zap::with_log(settings, &[a.backend("a", ""), b.backend("b", "")]);
    let asked = thread::scope(|scope| {
        // The pairs have served, so a refusal means that they have no room.
        assert_answers(&load(&zap, 1, 4, |_| (Ask::ALL[0].path(), Ask::ALL[0].body("m"))), |_| Ask::ALL[0]);
        let large = scope.spawn(|| zap.chat(&oversized));
        let mut client = zap.client();
        let mut asked = 0;
        while !large.is_finished() {
            let response = client.chat("", Ask::ALL[0].body("m"));
            assert_eq!(response.status, 200, "{}", response.text());
            asked += 1;
        }
        assert_eq!(large.join().unwrap().status, 429);
        asked
    });
    // Each pair takes the first refusal for a lack of room, and cools down for 100 ms.
    let lines = zap.lines(4 + 1 + asked);
    let is_slow = |line: &&Value| line["status"] == 200 && line["queue_ms"].as_f64().unwrap() > 50.0;
    let slow = lines.iter().filter(is_slow).count();
    assert!(slow <= 2, "{slow} requests waited for another client's request");
}

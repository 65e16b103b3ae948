//! The sum over many requests of every kind at once.

use super::*;

/// Request `i` of the mixed load.
struct Mixed {
    i: usize,
    fate: Fate,
    ask: Ask,
    /// Whether the client itself asks for the token counts.
    asks: bool,
    counts: Counts,
    text: String,
}

impl Mixed {
    fn new(i: usize) -> Self {
        use Fate::{Cut, Gone, Left, Moved, Refused, Told, Untold};
        let fate = [
            Told, Told, Untold, Told, Moved, Told, Cut, Told, Moved, Left, Told, Refused, Untold, Told, Gone,
            Told,
        ][i % 16];
        let turn = i / 16;
        let ask = match fate {
            Cut | Left => STREAMS[turn % STREAMS.len()],
            Untold => ALL[turn % ESTIMATED],
            _ => ALL[turn % ALL.len()],
        };
        let n = i as u64;
        let (input, output) = (20 + n % 997, 1 + n % 311);
        let counts = [input, n % 20, output, n % output];
        Mixed { i, fate, ask, asks: turn.is_multiple_of(2), counts, text: "word ".repeat(1 + i % 7) }
    }

    /// The request that a provider got.
    fn of(seen: &Seen) -> Self {
        Self::new(number_of(seen))
    }

    fn model(&self) -> &'static str {
        match self.fate {
            Fate::Told => "told",
            Fate::Moved => "moved",
            Fate::Untold | Fate::Cut | Fate::Left => "guessed",
            Fate::Gone | Fate::Refused => "nothing",
        }
    }

    fn body(&self) -> String {
        let options = if self.asks && self.ask.has_options() { format!(",{ASKS}") } else { String::new() };
        self.ask.body(self.model(), &options)
    }

    /// Sends the request with `client`, and checks the answer. `arrived`: the requests that the provider has got.
    fn run(&self, client: &mut Client, arrived: &Mutex<Vec<usize>>) -> Option<Response> {
        let Mixed { i, fate, ask, .. } = self;
        client.post(ask.path(), &format!("{}x-request-id: mixed-{i}\r\n", ask.headers()), self.body());
        if *fate == Fate::Gone {
            eventually("the provider has the request", || arrived.lock().unwrap().contains(i));
            return None;
        }
        let mut answer = client.head();
        if *fate == Fate::Left {
            let content = client.chunk().unwrap();
            assert!(!content.is_empty(), "{i}");
            return None;
        }
        client.body(&mut answer);
        let text = String::from_utf8_lossy(&answer.body);
        match fate {
            Fate::Refused => assert_eq!(answer.status, 400, "{i}: {text}"),
            Fate::Cut => assert!(text.contains("word"), "{i}: {text}"),
            _ => {
                assert_eq!((answer.status, answer.whole), (200, true), "{i} {ask:?}: {text}");
                let counts = Some(self.counts).filter(|_| *fate != Fate::Untold);
                assert_eq!(text, ask.answer(&self.text, self.asks, counts), "{i}");
            }
        }
        Some(answer).filter(|answer| answer.whole && answer.header("connection") != Some("close"))
    }

    /// What a good provider does.
    fn serve(&self, seen: &Seen, stream: &mut TcpStream, arrived: &Mutex<Vec<usize>>) -> After {
        match self.fate {
            Fate::Told | Fate::Moved => serve(seen, stream, &self.text, Some(self.counts)),
            Fate::Untold => serve(seen, stream, &self.text, None),
            Fate::Refused => {
                reply(stream, 400, JSON, b"{\"error\":{\"message\":\"no\"},\"usage\":{\"prompt_tokens\":9}}");
                After::Keep
            }
            Fate::Gone => {
                arrived.lock().unwrap().push(self.i);
                wait_closed(stream);
                After::Close
            }
            Fate::Cut | Fate::Left => {
                start_events(stream);
                chunk(stream, &self.ask.events(&self.text, true, None).0);
                if self.fate == Fate::Left {
                    wait_closed(stream);
                }
                After::Close
            }
        }
    }

    /// What a provider does that fails before content, though it tells token counts.
    fn fail(&self, stream: &mut TcpStream) -> After {
        match (self.i / 32 % 4, self.ask) {
            (0, Ask { api: Api::Chat, is_stream: true }) => {
                let usage = self.ask.usage(self.counts);
                reply(
                    stream,
                    200,
                    EVENTS,
                    format!("data: {{\"choices\":[],\"usage\":{usage}}}\n\n{DONE}").as_bytes(),
                );
            }
            (0, _) => return After::Close,
            (1, _) => reply(stream, 500, JSON, b"{\"error\":{},\"usage\":{\"prompt_tokens\":9}}"),
            (2, _) => {
                reply(stream, 200, JSON, b"{\"error\":{\"message\":\"no\"},\"usage\":{\"prompt_tokens\":9}}");
            }
            _ => {
                let head = format!("HTTP/1.1 200 OK\r\n{JSON}content-length: 99\r\n\r\n{{\"id\"");
                let _ = stream.write_all(head.as_bytes());
                return After::Close;
            }
        }
        After::Keep
    }
}

#[test]
fn the_sum_of_a_mixed_load_is_what_the_providers_told_and_all_else_is_an_estimate_or_free() {
    const REQUESTS: usize = 5000;
    let arrived = Arc::new(Mutex::new(Vec::new()));
    let theirs = arrived.clone();
    let good = Provider::start(move |seen, stream| Mixed::of(seen).serve(seen, stream, &theirs));
    let bad = Provider::start(|seen, stream| Mixed::of(seen).fail(stream));
    let zap = Zap::with_log(
        "[health]\nfailure_threshold = 1000\ninterval_secs = 600\n[retry]\nbudget_percent = 100\nbase_delay_ms = 1\n",
        &[
            bad.backend("bad", &format!("{BOTH}usage = \"inject\"\nmodels = [\"moved\"]")),
            good.backend(
                "good",
                &format!("{BOTH}usage = \"inject\"\npriority = 1\nmodels = [\"told\", \"guessed\", \"moved\", \"nothing\"]"),
            ),
        ],
    );
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut client = zap.client();
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= REQUESTS {
                        break;
                    }
                    if Mixed::new(i).run(&mut client, &arrived).is_none() {
                        client = zap.client();
                    }
                }
            });
        }
    });
    let (mut told, mut moved, mut guessed, mut estimates) =
        (Counts::default(), Counts::default(), Counts::default(), 0);
    for line in zap.lines(REQUESTS) {
        let id = line["request_id"].as_str().unwrap();
        let mixed = Mixed::new(id.strip_prefix("mixed-").unwrap().parse().unwrap());
        let counts = mixed.ask.told(mixed.counts);
        match mixed.model() {
            "told" | "moved" => {
                assert_eq!(logged(&line), provider(counts), "{line}");
                add(if mixed.fate == Fate::Told { &mut told } else { &mut moved }, counts);
            }
            "guessed" => {
                let (counts, source) = logged(&line).unwrap();
                assert_eq!(source, "estimate", "{line}");
                let has_text = !matches!(mixed.ask.api, Api::Embeddings | Api::Rerank);
                assert_eq!((counts[0] > 0, counts[2] > 0), (true, has_text), "{line}");
                add(&mut guessed, counts);
                estimates += 1;
            }
            _ => assert_eq!((logged(&line), &line["cost_usd"]), (None, &Value::Null), "{line}"),
        }
    }
    let metrics = zap.metrics();
    assert_eq!(tokens(&metrics, "good", "told"), told);
    assert_eq!(tokens(&metrics, "good", "moved"), moved);
    assert_eq!(tokens(&metrics, "good", "guessed"), guessed);
    assert_eq!(metrics["zap_usage_missing_total{backend=\"good\"}"], f64::from(estimates));
    assert!(estimates > REQUESTS as i32 / 5);
    // Nothing else is counted: neither a failed try, nor an error, nor a request without an answer.
    let sum = |name: &str| -> f64 {
        metrics.iter().filter(|(series, _)| series.starts_with(name)).map(|(_, n)| *n).sum()
    };
    let all: u64 = [told, moved, guessed].into_iter().flatten().sum();
    assert_eq!(sum("zap_tokens_total{"), all as f64);
    assert_eq!(sum("zap_client_tokens_total{"), all as f64);
    assert_eq!(metrics["zap_usage_missing_total{backend=\"bad\"}"], 0.0);
    assert!(bad.count() >= REQUESTS / 8, "{} requests were rescued", bad.count());
    zap.wait_until_idle();
}

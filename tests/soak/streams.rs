//! Streams through three providers of which one is killed every ten seconds.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use memchr::memmem;
use serde_json::Value;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::sleep;

use crate::lies::{Api, Ask};
use crate::load::{Answer, Client};
use crate::provider::Process;
use crate::scenes::check;
use crate::zap::{Zap, config};

const STREAMS: usize = 2000;

/// The events of a stream; one lasts 10 s, a twentieth of it before the content.
const EVENTS: usize = 19;
const SCRIPT: &str = ",\"user\":\"talk:19:500\"";

const KILL_EVERY: Duration = Duration::from_secs(10);
const DEAD_FOR: Duration = Duration::from_secs(4);

#[derive(Default)]
struct Tally {
    whole: Cell<u64>,
    cut: Cell<u64>,
    other: RefCell<Vec<String>>,
    is_over: Cell<bool>,
}

pub(crate) async fn run(secs: u64) -> bool {
    let mut providers = [0; 3].map(|port| Some(Process::start(port, 0)));
    let ports = providers.each_ref().map(|p| p.as_ref().unwrap().port);
    let settings = "[health]\ninterval_secs = 1\n[queue]\nmax_in_flight = 4000\n";
    let zap = Zap::start(&config(settings, &[("a", ports[0], ""), ("b", ports[1], ""), ("c", ports[2], "")]));
    let tally = Rc::new(Tally::default());
    let mut kills = 0;
    LocalSet::new()
        .run_until(async {
            let mut tasks = Vec::new();
            for i in 0..STREAMS {
                let (tally, address) = (tally.clone(), zap.address);
                let api = [Api::Chat, Api::Responses, Api::Completions, Api::Messages][i % 4];
                tasks.push(spawn_local(async move {
                    // Spread the beginnings over the length of a stream.
                    sleep(Duration::from_secs_f64(10.0 * i as f64 / STREAMS as f64)).await;
                    let (ask, mut client) = (Ask { api, is_stream: true }, Client::new(address));
                    while !tally.is_over.get() {
                        judge(ask, client.ask(ask, "m", SCRIPT).await, &tally);
                        // A client that retries does so after a moment.
                        sleep(Duration::from_secs_f64(fastrand::f64())).await;
                    }
                }));
            }
            let since = Instant::now();
            while since.elapsed() + KILL_EVERY <= Duration::from_secs(secs) {
                sleep(KILL_EVERY - DEAD_FOR).await;
                providers[kills % 3] = None;
                sleep(DEAD_FOR).await;
                providers[kills % 3] = Some(Process::start(ports[kills % 3], 0));
                kills += 1;
            }
            tally.is_over.set(true);
            for task in tasks {
                task.await.unwrap();
            }
        })
        .await;
    let other = tally.other.take();
    other.iter().take(5).for_each(|what| println!("    {what}"));
    let rescued = zap.metric("zap_prelude_failovers_total", "").await;
    let (whole, cut) = (tally.whole.get(), tally.cut.get());
    let text = format!(
        "{STREAMS} streams at a time for {secs} s, {kills} times kill -9 of one of three: {whole} whole, {rescued} of them \
         rescued before content, {cut} cut in the shape of their endpoint, {} other",
        other.len()
    );
    let mut fine = check(&text, other.is_empty() && whole > 0 && cut > 0 && rescued > 0.0);
    let interrupted = zap.metric("zap_streams_interrupted_total", "side=\"upstream\"").await;
    fine &= check(&format!("{interrupted} of {cut} cut streams are counted"), interrupted == cut as f64);
    fine & check("all gauges are 0 afterwards", zap.held().await.is_empty())
}

fn judge(ask: Ask, answer: Result<Answer, String>, tally: &Tally) {
    let (before, content, behind) = ask.parts();
    // The number of content events in a prefix of the right stream. Where no other provider was left, it may have none.
    let count = |body: &[u8]| {
        let rest = body.strip_prefix(before.as_bytes())?;
        let n = rest.len() / content.len();
        (n <= EVENTS && rest == content.repeat(n).as_bytes()).then_some(n)
    };
    match answer {
        Ok(answer) if answer.body == (before.clone() + &content.repeat(EVENTS) + &behind).as_bytes() => {
            match answer.is_good() {
                true => tally.whole.set(tally.whole.get() + 1),
                false => tally.other.borrow_mut().push(answer.text()),
            }
        }
        Ok(answer) if is_cut(ask.api, &answer, count) => tally.cut.set(tally.cut.get() + 1),
        Ok(answer) => tally.other.borrow_mut().push(answer.text()),
        Err(e) => tally.other.borrow_mut().push(e),
    }
}

/// Whether the stream is a prefix of the right one and then the error event of its endpoint.
fn is_cut(api: Api, answer: &Answer, count: impl Fn(&[u8]) -> Option<usize>) -> bool {
    let begin = match api {
        Api::Chat | Api::Completions => "data: {\"error\"",
        Api::Messages => "event: error\ndata: ",
        Api::Responses => "event: response.failed\ndata: ",
    };
    let Some(at) = memmem::find(&answer.body, begin.as_bytes()) else { return false };
    let (begin, error) = answer.body.split_at(at);
    let Some(events) = count(begin) else { return false };
    let data =
        memmem::find(error, b"data: ").map(|at| &error[at + 6..]).and_then(|e| e.strip_suffix(b"\n\n"));
    let Some(Ok(json)) = data.map(serde_json::from_slice::<Value>) else { return false };
    let is_right = match api {
        Api::Responses => {
            json["type"] == "response.failed"
                && json["sequence_number"] == if events == 0 { 2 } else { 3 }
                && json["response"]["id"] == "resp_1"
                && json["response"]["status"] == "failed"
        }
        Api::Messages => json["type"] == "error",
        Api::Chat | Api::Completions => true,
    };
    // Anthropic's SDKs and Codex read the error only if the stream ends cleanly; other clients know a cut by its end.
    let is_clean = matches!(api, Api::Messages | Api::Responses);
    answer.status == 200
        && answer.whole == is_clean
        && is_right
        && json["error"]["code"] == "stream_interrupted"
}

//! Ten thousand requests over a provider that lies, stalls and breaks in every way, and over clients that send poison.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::sleep;

use crate::lies::{Ask, BUSY, Lie, STALLS};
use crate::load::Client;
use crate::provider::{Request, listen, read_request, tell};
use crate::scenes::check;
use crate::zap::{Zap, config};

const REQUESTS: usize = 10_000;
const CLIENTS: usize = 64;

/// How long a provider takes for an answer to a request of [`poison`].
const ANSWER: Duration = Duration::from_millis(50);

/// What a provider sends to a request.
enum Reply {
    /// This status, after [`ANSWER`].
    Refusal(u16),
    Lie(&'static Lie),
    /// The right answer.
    Right,
    /// The right answer, after [`ANSWER`].
    SlowRight,
}

type Script = dyn Fn(&Request) -> Reply + Send + Sync;

async fn serve(listener: TcpListener, script: Arc<Script>) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let script = script.clone();
        tokio::spawn(async move {
            let mut buf = Vec::new();
            while let Some(request) = read_request(&mut stream, &mut buf).await {
                let reply = if request.is_check { Reply::Right } else { script(&request) };
                if matches!(reply, Reply::Refusal(_) | Reply::SlowRight) {
                    sleep(ANSWER).await;
                }
                let is_kept = match reply {
                    Reply::Lie(lie) => tell(&mut stream, lie).await,
                    Reply::Right | Reply::SlowRight => {
                        stream.write_all(&request.ask.answer_bytes()).await.is_ok()
                    }
                    Reply::Refusal(status) => {
                        let length = POISON_ERROR.len();
                        let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n\r\n");
                        let text = head + POISON_ERROR;
                        stream.write_all(text.as_bytes()).await.is_ok()
                    }
                };
                if !is_kept {
                    break;
                }
            }
        });
    }
}

/// Starts a provider and returns its port.
fn start(script: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> u16 {
    let listener = listen(0);
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(serve(listener, Arc::new(script)));
    port
}

/// Plays lies in turn, for each endpoint and for the models `busy` and `stall` its own; serves the model `fine`.
#[derive(Default)]
struct Liar {
    turns: HashMap<(Ask, &'static str), usize>,
    /// By request id, since Zap sends a request again if a reused connection closes at once: that is the same try.
    told: HashMap<String, Option<&'static Lie>>,
}

impl Liar {
    fn pick(&mut self, request: &Request) -> Option<&'static Lie> {
        if let Some(told) = self.told.get(&request.id) {
            return *told;
        }
        let kind =
            ["busy", "fine", "stall"].into_iter().find(|kind| request.body.contains(kind)).unwrap_or("");
        let key = if kind.is_empty() { request.ask } else { Ask::ALL[0] };
        let next = self.turns.entry((key, kind)).or_default();
        let turn = *next;
        *next += 1;
        let lie = match kind {
            // Every other request is served, so that the provider is busy and not broken.
            "busy" if turn.is_multiple_of(2) => None,
            "busy" => Some(&BUSY[turn / 2 % BUSY.len()]),
            "fine" => None,
            "stall" => Some(&STALLS[turn % STALLS.len()]),
            _ => request.ask.lies().nth(turn % request.ask.lies().count()),
        };
        self.told.insert(request.id.clone(), lie);
        lie
    }

    /// How many requests got each kind of lie.
    fn count(&self, kind: impl Fn(&'static Lie) -> Option<&'static str>) -> HashMap<&'static str, u64> {
        let mut counts = HashMap::new();
        self.told
            .values()
            .flatten()
            .filter_map(|lie| kind(lie))
            .for_each(|k| *counts.entry(k).or_default() += 1);
        counts
    }
}

/// Runs `count` requests of [`CLIENTS`] clients; `request` gives the endpoint, the model and further members of each.
/// Returns what did not get the right answer, and the mean time.
async fn load(
    zap: &Zap,
    count: usize,
    request: impl Fn(usize) -> (Ask, String) + Clone + 'static,
) -> (Vec<String>, Duration) {
    let (next, failed) = (Rc::new(Cell::new(0)), Rc::new(RefCell::new(Vec::new())));
    let took = Rc::new(Cell::new(Duration::ZERO));
    let tasks = (0..CLIENTS).map(|_| {
        let (next, failed, took, request) = (next.clone(), failed.clone(), took.clone(), request.clone());
        let mut client = Client::new(zap.address);
        spawn_local(async move {
            loop {
                let i = next.replace(next.get() + 1);
                if i >= count {
                    break;
                }
                let ((ask, model), since) = (request(i), Instant::now());
                match client.ask(ask, &model, "").await {
                    Ok(answer) if answer.is_good() && answer.body == ask.answer().as_bytes() => {}
                    Ok(answer) => failed.borrow_mut().push(format!("{ask:?} {model}: {}", answer.text())),
                    Err(e) => failed.borrow_mut().push(format!("{ask:?} {model}: {e}")),
                }
                took.set(took.get() + since.elapsed());
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    (failed.take(), took.get() / count as u32)
}

pub(crate) async fn run() -> bool {
    LocalSet::new().run_until(async { lies().await & poison().await }).await
}

/// No request fails, and every rescue is counted.
async fn lies() -> bool {
    let liar = Arc::new(Mutex::new(Liar::default()));
    let theirs = liar.clone();
    let bad = start(move |request| theirs.lock().unwrap().pick(request).map_or(Reply::Right, Reply::Lie));
    let good = start(|_| Reply::Right);
    // The bad provider stays in use. A pair is ejected after 1000 failures in a row, and the load spreads over eight; a
    // backend after as many of its connections, and it serves one model.
    let settings = "[health]\nfailure_threshold = 1000\n[retry]\nbudget_percent = 100\n\
        [timeouts]\nfirst_byte_secs = 2\nfirst_token_secs = 2\n";
    let zap = Zap::start(&config(settings, &[("bad", bad, ""), ("good", good, "")]));
    let since = Instant::now();
    let (failed, _) = load(&zap, REQUESTS, |i| match i {
        // Only a stream goes elsewhere when it has waited for long.
        _ if i.is_multiple_of(500) => (Ask::ALL[1], "stall".to_owned()),
        _ if i.is_multiple_of(9) => (Ask::ALL[i % 8], "busy".to_owned()),
        _ if i % 9 == 4 => (Ask::ALL[i % 8], "fine".to_owned()),
        _ => (Ask::ALL[[0, 1, 0, 1, 2, 3, 4, 5, 6, 7][i % 10]], format!("m{}", i / 10 % 8)),
    })
    .await;
    failed.iter().take(5).for_each(|what| println!("    {what}"));
    let took = since.elapsed();
    let liar = std::mem::take(&mut *liar.lock().unwrap());
    let (names, told) = (liar.count(|lie| Some(lie.name)), liar.count(|lie| Some(lie.retry)));
    let mut every = Ask::ALL.iter().flat_map(|ask| ask.lies()).chain(&BUSY).chain(&STALLS);
    let is_complete = every.all(|lie| names.contains_key(lie.name));
    let text = format!(
        "{REQUESTS} requests in {took:.1?}, {} of them at a provider that lies in {} ways: {} failed",
        names.values().sum::<u64>(),
        names.len(),
        failed.len()
    );
    let mut fine = check(&text, failed.is_empty() && is_complete);
    let prelude = liar.count(|lie| lie.prelude);
    for (name, counts) in [("zap_retries_total", told), ("zap_prelude_failovers_total", prelude)] {
        let mut wrong = Vec::new();
        for (reason, n) in &counts {
            let counted = zap.metric(name, &format!("backend=\"bad\",reason=\"{reason}\"")).await;
            if counted != *n as f64 {
                wrong.push(format!("{reason}: {counted} of {n}"));
            }
        }
        let (all, sum) = (zap.metric(name, "").await, counts.values().sum::<u64>());
        fine &= check(&format!("{name}: {all} of {sum} {wrong:?}"), wrong.is_empty() && all == sum as f64);
    }
    fine & check("all gauges are 0 afterwards", zap.held().await.is_empty())
}

/// The statuses that every provider answers to a poisonous request.
const POISON: [u16; 5] = [403, 402, 500, 501, 429];

/// The error to a poisonous request. OpenAI answers 429 to a request that alone is over the limit.
const POISON_ERROR: &str =
    r#"{"error":{"message":"Request too large for gpt-4","type":"tokens","code":"rate_limit_exceeded"}}"#;

/// One percent of poisonous requests changes nothing for the others: no failure, no other time, no other backend.
async fn poison() -> bool {
    let script = |request: &Request| {
        let poison = POISON.iter().find(|status| request.body.contains(&format!("poison {status}")));
        poison.map_or(Reply::SlowRight, |status| Reply::Refusal(*status))
    };
    let ports = [(); 3].map(|()| start(script));
    // One strike would eject.
    let settings = "[health]\nfailure_threshold = 1\n";
    let zap = Rc::new(Zap::start(&config(
        settings,
        &[("a", ports[0], ""), ("b", ports[1], ""), ("c", ports[2], "")],
    )));
    let request = |i: usize| (Ask::ALL[i % 8], "m".to_owned());
    // The first requests open connections.
    load(&zap, CLIENTS * 8, request).await;
    let (failed_before, before) = load(&zap, REQUESTS, request).await;
    let tries = zap.metric("zap_retries_total", "").await;
    let (theirs, wrong) = (zap.clone(), Rc::new(Cell::new(0)));
    let unexpected = wrong.clone();
    let poisoning = spawn_local(async move {
        let mut client = Client::new(theirs.address);
        for i in 0..REQUESTS / 100 {
            let status = POISON[i % POISON.len()];
            let more = format!(",\"user\":\"poison {status}\"");
            let answer = client.ask(Ask::ALL[i / 4 % 2], "m", &more).await;
            unexpected.set(unexpected.get() + u32::from(answer.is_ok_and(|a| a.status != status)));
        }
    });
    let (failed, after) = load(&zap, REQUESTS, request).await;
    poisoning.await.unwrap();
    failed.iter().chain(&failed_before).take(5).for_each(|what| println!("    {what}"));
    let retries = zap.metric("zap_retries_total", "").await - tries;
    let moved = after.as_secs_f64() / before.as_secs_f64() * 100.0 - 100.0;
    let text = format!(
        "1 % of poison: {} of {REQUESTS} other requests failed; mean {before:.1?} before, {after:.1?} with it ({moved:+.2} %)",
        failed.len() + failed_before.len()
    );
    let mut fine = check(&text, failed.is_empty() && failed_before.is_empty() && moved < 1.0);
    let text = format!("the poison got its own status, {} times another; {retries} retries", wrong.get());
    fine &= check(&text, wrong.get() == 0);
    let mut up = 0.0;
    for name in ["a", "b", "c"] {
        up += zap.metric("zap_backend_up", &format!("backend=\"{name}\"")).await;
    }
    fine & check(&format!("{up} of 3 backends are up afterwards"), up == 3.0)
}

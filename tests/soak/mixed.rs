//! The soak test: mixed load, failing providers and reloads at the same time.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::sleep;

use crate::load::Client;
use crate::provider::Process;
use crate::zap::{Zap, config};

/// The number of clients of each kind, and their mean pause between two requests.
const PLAIN: usize = 24;
const STREAMS: usize = 100;
const DISCONNECTING: usize = 16;
const PAUSE: Duration = Duration::from_millis(60);

/// The time between two reloads.
const RELOAD: Duration = Duration::from_secs(2);

/// The results of all requests.
#[derive(Default)]
struct Tally {
    plain: Cell<u64>,
    streams: Cell<u64>,
    cut: Cell<u64>,
    given_up: Cell<u64>,
    disconnected: Cell<u64>,
    unexpected: RefCell<Vec<String>>,
    over: Cell<bool>,
}

impl Tally {
    fn add_unexpected(&self, what: String) {
        self.unexpected.borrow_mut().push(what);
    }
}

pub(crate) async fn run(secs: u64) -> bool {
    let (steady, shaky) = (Process::start(0, 0), Process::start(0, 5));
    let settings = "[health]\ninterval_secs = 1\n[retry]\nbase_delay_ms = 10\n[rate_limit]\nrequests_per_minute = 1000000\n";
    let fleet = |weights: (u32, u32)| {
        let (a, b) = (format!("weight = {}", weights.0), format!("weight = {}", weights.1));
        config(settings, &[("steady", steady.port, &a), ("shaky", shaky.port, &b)])
    };
    let zap = Rc::new(Zap::start(&fleet((2, 1))));
    // Zap's threads open their files one after another; wait until the number is stable.
    let mut files = 0;
    while files != zap.open_files() {
        files = zap.open_files();
        sleep(Duration::from_millis(300)).await;
    }
    let tally = Rc::new(Tally::default());
    let mut memory = Vec::new();
    let mut reloads = (0u64, 0u64);
    let local = LocalSet::new();
    local
        .run_until(async {
            for i in 0..PLAIN + STREAMS + DISCONNECTING {
                let (zap, tally) = (zap.clone(), tally.clone());
                spawn_local(async move {
                    let mut client = Client::new(zap.address);
                    while !tally.over.get() {
                        match i {
                            0..PLAIN => plain(&mut client, &tally).await,
                            i if i < PLAIN + STREAMS => stream(&mut client, &tally).await,
                            _ => disconnect(&mut client, &tally).await,
                        }
                        sleep(PAUSE.mul_f64(0.5 + fastrand::f64())).await;
                    }
                });
            }
            let (since, mut reload, mut second) = (Instant::now(), Instant::now(), Instant::now());
            while since.elapsed() < Duration::from_secs(secs) {
                sleep(Duration::from_millis(100)).await;
                if reload.elapsed() >= RELOAD {
                    reload = Instant::now();
                    match (reloads.0 + reloads.1) % 4 {
                        3 => {
                            zap.rewrite("[queue]\nmax_size = -1\n");
                            reloads.1 += 1;
                        }
                        n => {
                            zap.rewrite(&fleet([(2, 1), (1, 2), (3, 3)][n as usize]));
                            reloads.0 += 1;
                        }
                    }
                    zap.signal(Signal::HUP);
                }
                if second.elapsed() >= Duration::from_secs(1) {
                    second = Instant::now();
                    memory.push((since.elapsed().as_secs_f64(), zap.rss_anon() as f64));
                }
            }
            tally.over.set(true);
            // Let running streams end.
            sleep(Duration::from_secs(2)).await;
        })
        .await;
    drop(local);
    report(&zap, &tally, &memory, files, reloads, secs).await
}

async fn plain(client: &mut Client, tally: &Tally) {
    match client.chat("plain").await {
        Ok(answer) if answer.is_good() => tally.plain.set(tally.plain.get() + 1),
        Ok(answer) => tally.add_unexpected(answer.text()),
        Err(e) => tally.add_unexpected(format!("plain: {e}")),
    }
}

async fn stream(client: &mut Client, tally: &Tally) {
    match client.chat("stream:30:20").await {
        Ok(answer) if answer.is_done() => tally.streams.set(tally.streams.get() + 1),
        // The shaky provider cuts some of its streams.
        Ok(answer) if answer.is_cut_with_error() => tally.cut.set(tally.cut.get() + 1),
        // It ends others with an error event of its own.
        Ok(answer) if answer.is_given_up() => tally.given_up.set(tally.given_up.get() + 1),
        Ok(answer) => tally.add_unexpected(answer.text()),
        Err(e) => tally.add_unexpected(format!("stream: {e}")),
    }
}

async fn disconnect(client: &mut Client, tally: &Tally) {
    let user = ["plain", "stream:50:20", "wait"][fastrand::usize(..3)];
    if let Err(e) = client.start(user).await {
        tally.add_unexpected(format!("disconnecting client: {e}"));
    }
    sleep(Duration::from_millis(fastrand::u64(..200))).await;
    client.disconnect(fastrand::bool());
    tally.disconnected.set(tally.disconnected.get() + 1);
}

async fn report(
    zap: &Zap,
    tally: &Tally,
    memory: &[(f64, f64)],
    files: usize,
    reloads: (u64, u64),
    secs: u64,
) -> bool {
    let mut fine = true;
    let mut check = |name: &str, value: String, good: bool| {
        println!("{name:24} {value:40} {}", if good { "ok" } else { "FAILED" });
        fine &= good;
    };
    let (plain, streams) = (tally.plain.get(), tally.streams.get());
    check("responses", format!("{plain} plain, {streams} streams"), plain > 0 && streams > 0);
    check(
        "disconnected and cut",
        format!("{} disconnected, {} cut with an error", tally.disconnected.get(), tally.cut.get()),
        true,
    );
    let rescued = zap.metric("zap_prelude_failovers_total", "").await;
    check(
        "lies",
        format!("{rescued} rescued before content, {} given up after it", tally.given_up.get()),
        rescued > 0.0 && tally.given_up.get() > 0,
    );
    let unexpected = tally.unexpected.take();
    check("unexpected", unexpected.len().to_string(), unexpected.is_empty());
    unexpected.iter().take(5).for_each(|what| println!("    {what}"));
    let counted = (
        zap.metric("zap_config_reloads_total", "applied").await as u64,
        zap.metric("zap_config_reloads_total", "rejected").await as u64,
    );
    check("reloads", format!("{counted:?} of {reloads:?}"), counted == reloads);
    // Idle upstream connections live for 30 s.
    let end = Instant::now() + Duration::from_secs(40);
    let (held, open) = loop {
        sleep(Duration::from_millis(200)).await;
        // Count files before reading the gauges: Zap closes the connection of that read a moment later.
        let open = zap.open_files();
        let held = zap.held().await;
        if open <= files && held.is_empty() || Instant::now() > end {
            break (held, open);
        }
    };
    check("gauges", format!("{held:?}"), held.is_empty());
    check("open files", format!("{open} of {files}"), open <= files);
    // The first half of the run, at most half an hour, is warm-up: the allocator touches its pages one by one, so
    // resident memory approaches mapped memory while allocated memory stays constant.
    let from = (secs as f64 / 2.0).min(1800.0);
    let settled: Vec<_> = memory.iter().copied().filter(|(at, _)| *at >= from).collect();
    let slope = slope(&settled) * 3600.0 / 1024.0;
    let growth = slope * (secs as f64 - from) / 3600.0;
    // A minute is too short for a slope, so a short run allows 2 MiB in total, mostly for rate limit windows.
    let good = if secs >= 600 { slope < 1.0 } else { growth < 2.0 };
    let last = settled.last().map_or(0.0, |m| m.1 / 1024.0);
    check("RssAnon", format!("{last:.1} MiB, {slope:+.2} MiB/h, {growth:+.2} MiB in total"), good);
    fine
}

/// The slope of the least-squares line.
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len().max(1) as f64;
    let mean = points.iter().fold((0.0, 0.0), |m, p| (m.0 + p.0 / n, m.1 + p.1 / n));
    let (mut above, mut below) = (0.0, f64::EPSILON);
    for (x, y) in points {
        above += (x - mean.0) * (y - mean.1);
        below += (x - mean.0) * (x - mean.0);
    }
    above / below
}

//! Scenes that each measure one figure and compare it with its target.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{sleep, sleep_until, timeout};
use zap::internals::Limiter;

use crate::load::{Client, percentile};
use crate::provider::{self, Events, Process};
use crate::zap::{Zap, config};

pub(crate) fn check(what: &str, good: bool) -> bool {
    println!("{what}: {}", if good { "met" } else { "MISSED" });
    good
}

/// Starts `count` tasks at `rate` per second and waits for all of them; each runs `one` with its index.
async fn paced<F: Future<Output = ()> + 'static>(rate: u64, count: u64, one: impl Fn(u64) -> F) {
    let start = tokio::time::Instant::now();
    let mut tasks = Vec::new();
    for i in 0..count {
        sleep_until(start + Duration::from_secs_f64(i as f64 / rate as f64)).await;
        tasks.push(spawn_local(one(i)));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

/// A pool of clients, as many as are in use at the same time. They are used in turn, so that none is idle for long.
#[derive(Default)]
pub(crate) struct Clients(RefCell<VecDeque<Client>>);

impl Clients {
    pub(crate) fn take(&self) -> Option<Client> {
        self.0.borrow_mut().pop_front()
    }

    pub(crate) fn give(&self, client: Client) {
        self.0.borrow_mut().push_back(client);
    }
}

/// The time from a client's disconnect to the close of the upstream connection.
pub(crate) async fn leave() -> bool {
    const TIMES: usize = 200;
    let listener = provider::listen(0);
    let port = listener.local_addr().unwrap().port();
    let events = Arc::new(Events::default());
    let serving = tokio::spawn(provider::serve(listener, 0, events.clone()));
    let zap = Zap::start(&config("", &[("a", port, "")]));
    let mut fine = true;
    for (phase, user, resets) in [
        ("waiting, FIN", "wait", false),
        ("waiting, RST", "wait", true),
        ("streaming, FIN", "stream:100000:5", false),
        ("streaming, RST", "stream:100000:5", true),
    ] {
        let mut times = Vec::new();
        for _ in 0..TIMES {
            let mut client = Client::new(zap.address);
            client.start(user).await.unwrap();
            events.received.notified().await;
            sleep(Duration::from_millis(fastrand::u64(5..25))).await;
            let since = Instant::now();
            client.disconnect(resets);
            let closed = timeout(Duration::from_secs(5), events.disconnected.notified()).await;
            times.push(if closed.is_ok() { since.elapsed() } else { Duration::MAX });
        }
        let (p50, p99) = (percentile(&mut times, 0.5), percentile(&mut times, 0.99));
        fine &= check(
            &format!(
                "upstream closed after a client disconnected ({phase}), p50 {p50:.1?}, p99 {p99:.1?} of 250 ms"
            ),
            p99 <= Duration::from_millis(250),
        );
    }
    fine &= disconnect_before_the_request_is_sent(port).await;
    serving.abort();
    fine & check("all gauges are 0 afterwards", zap.held().await.is_empty())
}

/// The same for clients that disconnect while queued, during connect or during backoff. No upstream connection is open
/// then, so the disconnect counter of the phase is watched.
async fn disconnect_before_the_request_is_sent(port: u16) -> bool {
    const TIMES: usize = 200;
    let (hole, _held) = blackhole();
    let mut fine = true;
    for (phase, settings, more, at) in [
        ("queued", "[queue]\nmax_in_flight = 1\n", "", port),
        ("connecting", "[timeouts]\nconnect_ms = 60000\n[health]\ninterval_secs = 3600\n", "", hole),
        (
            "backoff",
            "[retry]\nbase_delay_ms = 60000\nmax_delay_ms = 60000\nbudget_percent = 100\n[health]\ninterval_secs = 3600\nfailure_threshold = 1000\n",
            "",
            1,
        ),
    ] {
        let zap = Zap::start(&config(settings, &[("a", at, more)]));
        let mut first = Client::new(zap.address);
        if phase == "queued" {
            first.start("wait").await.unwrap();
            while zap.metric("zap_in_flight", "").await < 1.0 {
                sleep(Duration::from_millis(5)).await;
            }
        }
        let count = || zap.metric("zap_client_disconnects_total", phase);
        let mut times = Vec::new();
        let mut in_other_phase = 0;
        for _ in 0..TIMES {
            let before = count().await;
            let mut client = Client::new(zap.address);
            client.start("plain").await.unwrap();
            sleep(Duration::from_millis(30)).await;
            let since = Instant::now();
            client.disconnect(false);
            while count().await == before && since.elapsed() < Duration::from_secs(1) {}
            match since.elapsed() {
                // With full jitter a backoff may end at once.
                late if late >= Duration::from_secs(1) => in_other_phase += 1,
                time => times.push(time),
            }
        }
        let p99 = percentile(&mut times, 0.99);
        fine &= check(
            &format!(
                "a client that disconnects in phase {phase} is released, p99 {p99:.1?} of 250 ms ({} of {TIMES} were in it)",
                times.len()
            ),
            p99 <= Duration::from_millis(250) && in_other_phase <= TIMES / 20,
        );
    }
    fine
}

/// A port whose handshakes stay unanswered while the second value is held.
fn blackhole() -> (u16, impl Sized) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(1).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok();
    let held: Vec<_> = (0..8).map_while(|_| connect()).collect();
    (address.port(), (socket, held))
}

/// Kills one of two providers with `kill -9` under load, and restarts it later.
pub(crate) async fn kill() -> bool {
    const RATE: u64 = 500;
    const SECS: u64 = 20;
    let (mut a, b) = (Some(Process::start(0, 0)), Process::start(0, 0));
    let port = a.as_ref().unwrap().port;
    let settings = "[health]\ninterval_secs = 1\n";
    let zap = Rc::new(Zap::start(&config(settings, &[("a", port, ""), ("b", b.port, "")])));
    let clients = Rc::new(Clients::default());
    let failed = Rc::new(RefCell::new(Vec::new()));
    let (done, cut, other) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    let mut back = None;
    LocalSet::new()
        .run_until(async {
            let load = spawn_local(paced(RATE, RATE * SECS, {
                let (zap, clients, failed) = (zap.clone(), clients.clone(), failed.clone());
                move |_| {
                    let (zap, clients, failed) = (zap.clone(), clients.clone(), failed.clone());
                    async move {
                        let mut client = clients.take().unwrap_or_else(|| zap.client());
                        match client.chat("plain").await {
                            Ok(answer) if answer.is_good() => clients.give(client),
                            Ok(answer) => failed.borrow_mut().push(answer.text()),
                            Err(e) => failed.borrow_mut().push(e),
                        }
                    }
                }
            }));
            for _ in 0..50 {
                let (zap, done, cut, other) = (zap.clone(), done.clone(), cut.clone(), other.clone());
                spawn_local(async move {
                    let mut client = Client::new(zap.address);
                    let count = |n: &Cell<u32>| n.set(n.get() + 1);
                    for _ in 0..SECS / 3 {
                        match client.chat("stream:100:20").await {
                            Ok(answer) if answer.is_done() => count(&done),
                            Ok(answer) if answer.is_cut_with_error() => count(&cut),
                            _ => count(&other),
                        }
                    }
                });
            }
            sleep(Duration::from_secs(5)).await;
            a.take();
            sleep(Duration::from_secs(7)).await;
            let served = zap.metric("zap_requests_total", "backend=\"a\"").await;
            let _a = Process::start(port, 0);
            let since = Instant::now();
            while since.elapsed() < Duration::from_secs(5) && back.is_none() {
                sleep(Duration::from_millis(20)).await;
                if zap.metric("zap_requests_total", "backend=\"a\"").await > served {
                    back = Some(since.elapsed());
                }
            }
            load.await.unwrap();
            sleep(Duration::from_secs(3)).await;
        })
        .await;
    let failed = failed.borrow();
    failed.iter().take(3).for_each(|what| println!("    {what}"));
    let text = format!(
        "kill -9 of one of two at {RATE} rps: {} of {} plain requests failed",
        failed.len(),
        RATE * SECS
    );
    let mut fine = check(&text, failed.is_empty());
    let text = format!(
        "its streams: {} complete, {} cut with an error, {} other",
        done.get(),
        cut.get(),
        other.get()
    );
    fine &= check(&text, other.get() == 0 && cut.get() > 0);
    fine & check(
        &format!("in use again after {back:.1?} of 2 intervals (2 s)"),
        back.is_some_and(|b| b <= Duration::from_secs(2)),
    )
}

/// Two hundred reloads under load, every tenth of an invalid file. The first hundred are warm-up: they fill the caches
/// that are kept for reuse. A sweep closes the idle connections of replaced backends once a second, so the open files
/// are read after a sweep.
pub(crate) async fn reload() -> bool {
    const REQUESTS_PER_RELOAD: u64 = 1_000;
    const RELOADS: u64 = 200;
    let (a, b) = (Process::start(0, 0), Process::start(0, 0));
    let fleet = |n: u64| {
        let more = format!("weight = {}", 1 + n % 3);
        let all = [("a", a.port, more.as_str()), ("b", b.port, ""), ("c", b.port, "default_model = \"x\"")];
        let text = config("", &all[..2 + n as usize % 2]);
        if n % 2 == 1 {
            text.replacen("default_model = \"m\"\nweight = 1\ndefault_model", "weight = 1\ndefault_model", 1)
        } else {
            text
        }
    };
    let zap = Rc::new(Zap::start(&fleet(0)));
    let served = Rc::new(Cell::new(0u64));
    let is_over = Rc::new(Cell::new(false));
    let failed = Rc::new(RefCell::new(Vec::new()));
    let (mut before, mut after) = ((0, 0), (0, 0));
    LocalSet::new()
        .run_until(async {
            let mut clients = Vec::new();
            for _ in 0..32 {
                let (zap, served, failed) = (zap.clone(), served.clone(), failed.clone());
                let is_over = is_over.clone();
                clients.push(spawn_local(async move {
                    let mut client = Client::new(zap.address);
                    while !is_over.get() {
                        served.set(served.get() + 1);
                        match client.chat("plain").await {
                            Ok(answer) if answer.is_good() => {}
                            Ok(answer) => failed.borrow_mut().push(answer.text()),
                            Err(e) => failed.borrow_mut().push(e),
                        }
                    }
                }));
            }
            for n in 1..=RELOADS {
                let due = served.get() + REQUESTS_PER_RELOAD;
                while served.get() < due {
                    sleep(Duration::from_millis(1)).await;
                }
                if n == RELOADS / 2 {
                    before = (open_files_after_sweep(&zap).await, zap.rss_anon());
                }
                zap.rewrite(&if n % 10 == 0 { "[[backends]\n".to_owned() } else { fleet(n) });
                zap.signal(Signal::HUP);
                let taken = || async { zap.metric("zap_config_reloads_total", "").await >= n as f64 };
                while !taken().await {
                    sleep(Duration::from_millis(1)).await;
                }
            }
            after = (open_files_after_sweep(&zap).await, zap.rss_anon());
            is_over.set(true);
            for client in clients {
                client.await.unwrap();
            }
        })
        .await;
    let failed = failed.take();
    failed.iter().take(3).for_each(|what| println!("    {what}"));
    let rejected = zap.metric("zap_config_reloads_total", "rejected").await;
    let text = format!(
        "{RELOADS} reloads ({rejected} of invalid files) under load: {} of {} requests failed",
        failed.len(),
        served.get()
    );
    let mut fine = check(&text, failed.is_empty() && rejected == 20.0);
    fine &= check(
        &format!("open files and RssAnon (KiB) after 100 and after 200 reloads: {before:?}, {after:?}"),
        after.0 <= before.0 + 32 && after.1 <= before.1 + 2048,
    );
    fine & check("all gauges are 0 afterwards", zap.held().await.is_empty())
}

/// The number of open files when it has not changed for 300 ms.
async fn open_files_at_rest(zap: &Zap) -> usize {
    let (mut files, mut since) = (zap.open_files(), Instant::now());
    while since.elapsed() < Duration::from_millis(300) {
        sleep(Duration::from_millis(10)).await;
        if files != zap.open_files() {
            (files, since) = (zap.open_files(), Instant::now());
        }
    }
    files
}

/// The fewest open files within two sweeps.
async fn open_files_after_sweep(zap: &Zap) -> usize {
    const SWEEP: Duration = Duration::from_secs(1);
    let (since, mut fewest) = (Instant::now(), usize::MAX);
    while since.elapsed() < 2 * SWEEP {
        fewest = fewest.min(zap.open_files());
        sleep(SWEEP / 50).await;
    }
    fewest
}

/// SIGTERM during 500 streams, half of which cannot end within `drain_secs`.
pub(crate) async fn drain() -> bool {
    const LIMIT: Duration = Duration::from_secs(4);
    let a = Process::start(0, 0);
    let settings = format!("drain_secs = {}\n", LIMIT.as_secs());
    let mut zap = Zap::start(&config(&settings, &[("a", a.port, "")]));
    let (short, long) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    let mut end = None;
    LocalSet::new()
        .run_until(async {
            let mut tasks = Vec::new();
            for i in 0..500 {
                let (address, short, long) = (zap.address, short.clone(), long.clone());
                tasks.push(spawn_local(async move {
                    let mut client = Client::new(address);
                    // Streams of 3 s and of 20 s.
                    let user = if i % 2 == 0 { "stream:100:30" } else { "stream:400:50" };
                    let answer = client.chat(user).await.unwrap();
                    match i % 2 {
                        0 if answer.is_done() => short.set(short.get() + 1),
                        1 if answer.is_cut_with_error() => long.set(long.get() + 1),
                        _ => println!("    {}", answer.text()),
                    }
                }));
            }
            while zap.metric("zap_in_flight", "").await < 500.0 {
                sleep(Duration::from_millis(10)).await;
            }
            zap.signal(Signal::TERM);
            let since = Instant::now();
            for task in tasks {
                task.await.unwrap();
            }
            end = zap.wait(LIMIT * 2).map(|(code, _)| (code, since.elapsed()));
        })
        .await;
    let (short, long) = (short.get(), long.get());
    let mut fine =
        check(&format!("SIGTERM with 500 streams: {short} of 250 short ones completed"), short == 250);
    fine &= check(&format!("{long} of 250 long ones were cut with an error"), long == 250);
    let in_time = end.is_some_and(|(code, took)| code == 1 && took <= LIMIT + Duration::from_secs(1));
    fine & check(&format!("exit code and time (limit {LIMIT:?} plus 1 s): {end:.1?}"), in_time)
}

/// Five thousand concurrent streams.
pub(crate) async fn hold(secs: u64) -> bool {
    const STREAMS: usize = 5000;
    let a = Process::start(0, 0);
    let settings = "[queue]\nmax_in_flight = 6000\n";
    let zap = Zap::start(&config(settings, &[("a", a.port, "")]));
    let before = zap.rss_anon();
    let (good, bad) = (Rc::new(Cell::new(0)), Rc::new(RefCell::new(Vec::new())));
    let mut memory = 0;
    LocalSet::new()
        .run_until(async {
            let mut tasks = Vec::new();
            for i in 0..STREAMS {
                if i % 50 == 0 {
                    sleep(Duration::from_millis(5)).await;
                }
                let (address, good, bad) = (zap.address, good.clone(), bad.clone());
                tasks.push(spawn_local(async move {
                    let mut client = Client::new(address);
                    match client.chat(&format!("stream:{secs}:1000")).await {
                        Ok(answer) if answer.is_done() => good.set(good.get() + 1),
                        Ok(answer) => bad.borrow_mut().push(answer.text()),
                        Err(e) => bad.borrow_mut().push(e),
                    }
                }));
            }
            sleep(Duration::from_secs(secs / 2)).await;
            memory = zap.rss_anon();
            for task in tasks {
                task.await.unwrap();
            }
        })
        .await;
    bad.borrow().iter().take(3).for_each(|what| println!("    {what}"));
    let each = memory.saturating_sub(before) as f64 / STREAMS as f64;
    let text = format!(
        "{STREAMS} streams held for {secs} s: {} complete, {} errors, {each:.1} KiB each",
        good.get(),
        bad.borrow().len()
    );
    check(&text, good.get() == STREAMS) & check("all gauges are 0 afterwards", zap.held().await.is_empty())
}

/// A thousand requests per second while all backends are down.
pub(crate) async fn dead() -> bool {
    const RATE: u64 = 1000;
    const SECS: u64 = 12;
    let zap = Rc::new(Zap::start(&config("[health]\ninterval_secs = 60\n", &[("a", 1, ""), ("b", 2, "")])));
    let clients = Rc::new(Clients::default());
    let times = Rc::new(RefCell::new(Vec::new()));
    let other = Rc::new(Cell::new(0));
    LocalSet::new()
        .run_until(paced(RATE, RATE * SECS, {
            let (zap, clients, times, other) = (zap.clone(), clients.clone(), times.clone(), other.clone());
            move |i| {
                let (zap, clients, times, other) =
                    (zap.clone(), clients.clone(), times.clone(), other.clone());
                async move {
                    let mut client = clients.take().unwrap_or_else(|| zap.client());
                    let since = Instant::now();
                    let answer = client.chat("plain").await.unwrap();
                    // Skip the first second: until the backends are ejected, requests wait for their backoff.
                    if i >= RATE {
                        times.borrow_mut().push(since.elapsed());
                    }
                    if answer.status != 502 {
                        other.set(other.get() + 1);
                    }
                    clients.give(client);
                }
            }
        }))
        .await;
    let errors = zap.metric("zap_upstream_errors_total", "").await;
    let each = errors / (RATE * SECS) as f64;
    let p99 = percentile(&mut times.borrow_mut(), 0.99);
    let text = format!("{RATE} rps with all backends down: {each:.3} upstream tries per request of 1.2");
    let mut fine = check(&text, each <= 1.2 && errors > 0.0);
    fine &= check(&format!("responses within {p99:.1?} (p99) of 50 ms"), p99 <= Duration::from_millis(50));
    fine & check(&format!("{} responses that are not 502", other.get()), other.get() == 0)
}

/// Ten thousand connections that send nothing, with `max_connections` at half of that.
pub(crate) async fn silent() -> bool {
    const CONNECTIONS: usize = 10_000;
    const MOST: usize = 5_000;
    let a = Process::start(0, 0);
    let zap = Zap::start(&config(&format!("max_connections = {MOST}\n"), &[("a", a.port, "")]));
    // Workers and checks may still open files just after the start.
    let files = open_files_at_rest(&zap).await;
    let memory = zap.rss_anon();
    let since = Instant::now();
    let mut crowd = Vec::new();
    for _ in 0..CONNECTIONS {
        // The kernel's backlog holds connections that are not accepted yet; when it is full, a connect waits.
        match timeout(Duration::from_millis(500), tokio::net::TcpStream::connect(zap.address)).await {
            Ok(Ok(stream)) => crowd.push(stream),
            _ => break,
        }
    }
    let taken = || zap.open_files().saturating_sub(files);
    while taken() < MOST && since.elapsed() < Duration::from_secs(8) {
        sleep(Duration::from_millis(20)).await;
    }
    let (most, each) = (taken(), zap.rss_anon().saturating_sub(memory) as f64 / MOST as f64);
    let mut fine = check(
        &format!("{} silent connections: {most} accepted of {MOST} allowed, {each:.1} KiB each", crowd.len()),
        (MOST..MOST + 32).contains(&most) && crowd.len() > MOST,
    );
    drop(crowd.split_off(MOST));
    // Zap closes a silent connection after 10 s at most; the test allows 14 s.
    let mut one = [0; 1];
    let mut closed = 0;
    for stream in &crowd {
        let end = tokio::time::Instant::from_std(since + Duration::from_secs(14));
        closed += usize::from(
            matches!(tokio::time::timeout_at(end, stream.readable()).await, Ok(Ok(())))
                && matches!(stream.try_read(&mut one), Ok(0) | Err(_)),
        );
    }
    fine &= check(&format!("{closed} of them closed after {:.1?}", since.elapsed()), closed == crowd.len());
    drop(crowd);
    let answer = Client::new(zap.address).chat("plain").await;
    fine & check("the next client is served", answer.is_ok_and(|a| a.is_good()))
}

/// A million names of models, paths and methods, none of which may become a series.
pub(crate) async fn series() -> bool {
    const EACH: u64 = 1_000_000 / 3;
    const CLIENTS: u64 = 64;
    let a = Process::start(0, 0);
    let zap = Rc::new(Zap::start(&config("", &[("a", a.port, "models = [\"m\"]")])));
    let names = async |zap: &Zap| {
        let text = crate::load::get(zap.address, "/metrics").await;
        let series = text.lines().filter(|l| !l.starts_with('#')).filter_map(|l| l.rsplit_once(' '));
        series.map(|(name, _)| name.to_owned()).collect::<std::collections::BTreeSet<_>>()
    };
    // Send each kind of request, so that its series exists.
    let ask = async |client: &mut Client, i: u64| {
        let body = format!("{{\"model\":\"m{i}\",\"messages\":[]}}");
        let length = body.len();
        for text in [
            format!("POST /chat HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n{body}"),
            format!("GET /p{i} HTTP/1.1\r\nhost: a\r\n\r\n"),
            format!("M{i} /chat HTTP/1.1\r\nhost: a\r\n\r\n"),
        ] {
            let status = client.raw(&text).await.map(|a| a.status);
            assert!(matches!(status, Ok(404 | 405)), "{status:?}");
        }
    };
    ask(&mut Client::new(zap.address), EACH).await;
    // A scrape is a request too; after the first one its series exists.
    names(&zap).await;
    let before = names(&zap).await;
    LocalSet::new()
        .run_until(async {
            let mut tasks = Vec::new();
            for c in 0..CLIENTS {
                let zap = zap.clone();
                tasks.push(spawn_local(async move {
                    let mut client = Client::new(zap.address);
                    for i in (c..EACH).step_by(CLIENTS as usize) {
                        ask(&mut client, i).await;
                    }
                }));
            }
            for task in tasks {
                task.await.unwrap();
            }
        })
        .await;
    let after = names(&zap).await;
    let text = format!(
        "{} names of models, paths and methods: {} series before, {} after",
        3 * EACH,
        before.len(),
        after.len()
    );
    check(&text, before == after)
}

/// Five million keys in the rate limiter.
pub(crate) fn keys() -> bool {
    const KEYS: u64 = 5_000_000;
    const LIVE: u64 = 100;
    let key = |i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let anon = || {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before = anon();
    let limiter = Limiter::new(100_000);
    let (mut most, mut wrong) = (0, 0);
    for i in 0..KEYS {
        // 5,000,000 keys in 50 s, within one window.
        let now = i * 10_000;
        limiter.check(key(1000 + i), 10, now);
        if i % 100 == 0 {
            // An active key returns before 100,000 other keys have come, so it is not evicted: ten of its checks pass.
            let (live, turn) = (i / 100 % LIVE, i / 100 / LIVE);
            wrong += u64::from(limiter.check(key(live), 10, now).admitted != (turn < 10));
        }
        if i % 100_000 == 0 {
            most = most.max(anon());
        }
    }
    let mib = most.saturating_sub(before) as f64 / 1024.0;
    let text = format!("{KEYS} keys: {mib:.1} MiB of 64, {wrong} wrong decisions for {LIVE} active keys");
    check(&text, mib < 64.0 && wrong == 0)
}

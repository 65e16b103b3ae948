//! Deploys under load that lose nothing: a rolling restart behind a balancer, upgrades on one port.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::net::TcpListener;
use tokio::task::{LocalSet, spawn_blocking, spawn_local};
use tokio::time::{interval, sleep};

use crate::balancer::Balancer;
use crate::load::Client;
use crate::provider::Process;
use crate::scenes::{Clients, check};
use crate::zap::{Zap, config, is_running};

/// Plain requests a second.
pub(crate) const RATE: u64 = 500;

/// Streams at a time, each of 40 events in 2 s.
pub(crate) const STREAMS: usize = 200;
const SCRIPT: &str = "stream:40:50";
const EVENTS: usize = 40;

/// Load on one address, and what became of it.
pub(crate) struct Load {
    connect: Box<dyn Fn() -> Client>,
    clients: Clients,
    pub is_over: Cell<bool>,
    served: Cell<u64>,
    streams: Cell<u64>,
    lost: RefCell<Vec<String>>,
}

impl Load {
    /// The load of clients that `connect` makes.
    pub(crate) fn new(connect: impl Fn() -> Client + 'static) -> Rc<Self> {
        Rc::new(Load {
            connect: Box::new(connect),
            clients: Clients::default(),
            is_over: Cell::default(),
            served: Cell::default(),
            streams: Cell::default(),
            lost: RefCell::default(),
        })
    }

    /// Sends [`RATE`] requests a second, every `fresh`th on a connection of its own, and holds [`STREAMS`] streams.
    /// Returns when the load [is over](Self::is_over) and all has ended.
    pub(crate) async fn run(self: Rc<Self>, fresh: u64) {
        let mut tasks = Vec::new();
        for i in 0..STREAMS {
            let load = self.clone();
            tasks.push(spawn_local(async move {
                // Spread the beginnings over the length of a stream.
                sleep(Duration::from_secs_f64(2.0 * i as f64 / STREAMS as f64)).await;
                let mut client = (load.connect)();
                while !load.is_over.get() {
                    load.stream(&mut client).await;
                }
            }));
        }
        let mut due = interval(Duration::from_secs(1) / RATE as u32);
        for i in 0.. {
            due.tick().await;
            if self.is_over.get() {
                break;
            }
            tasks.push(spawn_local(self.clone().request(i % fresh == 0)));
        }
        for task in tasks {
            task.await.unwrap();
        }
    }

    async fn request(self: Rc<Self>, is_fresh: bool) {
        let kept = if is_fresh { None } else { self.clients.take() };
        let mut client = kept.unwrap_or_else(|| (self.connect)());
        match client.chat("plain").await {
            Ok(answer) if answer.is_good() => self.served.set(self.served.get() + 1),
            Ok(answer) => return self.lose(answer.text()),
            Err(e) => return self.lose(e),
        }
        if !is_fresh {
            self.clients.give(client);
        }
    }

    async fn stream(&self, client: &mut Client) {
        let whole = "data: {\"content\":\"hi\"}\n\n".repeat(EVENTS) + "data: [DONE]\n\n";
        match client.chat(SCRIPT).await {
            Ok(answer) if answer.is_good() && answer.body == whole.as_bytes() => {
                self.streams.set(self.streams.get() + 1);
            }
            Ok(answer) => self.lose(format!("a stream: {}", answer.text())),
            Err(e) => self.lose(format!("a stream: {e}")),
        }
    }

    fn lose(&self, what: String) {
        self.lost.borrow_mut().push(what);
    }

    /// Waits until so many more requests and streams were served.
    pub(crate) async fn more(&self, requests: u64, streams: u64) {
        let (requests, streams) = (self.served.get() + requests, self.streams.get() + streams);
        let since = Instant::now();
        while (self.served.get() < requests || self.streams.get() < streams)
            && since.elapsed() < Duration::from_secs(60)
        {
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Judges the load during `what`.
    pub(crate) fn verdict(&self, what: &str) -> bool {
        let lost = self.lost.borrow();
        lost.iter().take(5).for_each(|what| println!("    {what}"));
        let (served, streams) = (self.served.get(), self.streams.get());
        let text = format!(
            "{what} under {RATE} rps and {STREAMS} streams: {served} requests and {streams} streams whole, {} lost",
            lost.len()
        );
        check(&text, lost.is_empty() && served > 0 && streams > 0)
    }
}

/// Restarts each of two Zaps behind a balancer `times` times.
pub(crate) async fn rolling(times: u64) -> bool {
    /// Long enough for the balancer to notice: five of its looks.
    const DELAY_SECS: u64 = 1;
    let provider = Process::start(0, 0);
    let settings =
        format!("drain_delay_secs = {DELAY_SECS}\ndrain_secs = 20\n[queue]\nmax_in_flight = 2000\n");
    let text = config(&settings, &[("a", provider.port, "")]);
    let mut fine = true;
    LocalSet::new()
        .run_until(async {
            let mut zaps = [Zap::start(&text), Zap::start(&text)];
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let balancer = Balancer::start(listener, &zaps.each_ref().map(|zap| zap.address));
            while !(balancer.is_ready(0) && balancer.is_ready(1)) {
                sleep(Duration::from_millis(10)).await;
            }
            let address = balancer.address;
            let load = Load::new(move || Client::new(address));
            let running = spawn_local(load.clone().run(20));
            load.more(RATE, STREAMS as u64).await;
            let (mut longest, mut codes) = (Duration::ZERO, Vec::new());
            for at in (0..2).cycle().take(2 * times as usize) {
                let since = Instant::now();
                zaps[at].signal(Signal::TERM);
                codes.push(zaps[at].ended(Duration::from_secs(30)).await);
                longest = longest.max(since.elapsed());
                // A thread of its own waits for the new one; this one is the balancer's.
                let text = text.clone();
                zaps[at] = spawn_blocking(move || Zap::start(&text)).await.unwrap();
                balancer.replace(at, zaps[at].address);
                while !balancer.is_ready(at) {
                    sleep(Duration::from_millis(10)).await;
                }
                load.more(RATE / 2, STREAMS as u64 / 4).await;
            }
            load.is_over.set(true);
            running.await.unwrap();
            balancer.losses.borrow().iter().take(5).for_each(|what| println!("    balancer: {what}"));
            fine = load.verdict(&format!("{} rolling restarts of two Zaps", 2 * times));
            let good = codes.iter().all(|code| *code == Some(0));
            fine &= check(&format!("each ended with code 0, after {longest:.1?} at most"), good);
            for zap in &zaps {
                fine &= check("all gauges are 0 afterwards", zap.held().await.is_empty());
            }
        })
        .await;
    fine
}

/// Upgrades one Zap `times` times, while a tenth of the requests come on connections of their own.
pub(crate) async fn upgrade(times: u64) -> bool {
    let provider = Process::start(0, 0);
    let settings = "drain_secs = 20\n[queue]\nmax_in_flight = 2000\n";
    let mut zap = Zap::start(&config(settings, &[("a", provider.port, "")]));
    let address = zap.address;
    let load = Load::new(move || Client::new(address));
    let mut fine = true;
    LocalSet::new()
        .run_until(async {
            let running = spawn_local(load.clone().run(10));
            load.more(RATE, STREAMS as u64).await;
            let mut left = Vec::new();
            for _ in 0..times {
                left.push(zap.upgrade().await);
                // Half of the streams, so that the last process still drains when the next one takes over.
                load.more(RATE / 2, STREAMS as u64 / 2).await;
            }
            load.is_over.set(true);
            running.await.unwrap();
            let code = zap.ended(Duration::from_secs(30)).await;
            let since = Instant::now();
            while left.iter().any(|old| is_running(*old)) && since.elapsed() < Duration::from_secs(30) {
                sleep(Duration::from_millis(10)).await;
            }
            fine = load.verdict(&format!("{times} upgrades on one port"));
            let clean = zap.lines("all requests finished").len();
            let is_over = code == Some(0) && !left.iter().any(|old| is_running(*old));
            fine &= check(
                &format!("{clean} of {times} old processes ended with all requests finished"),
                is_over && clean == times as usize,
            );
            fine &= check("all gauges are 0 afterwards", zap.held().await.is_empty());
        })
        .await;
    fine
}

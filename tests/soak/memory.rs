//! What readers that do not read cost, and what is left of a burst of large bodies.

use std::process::Command;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::load::Client;
use crate::provider::Process;
use crate::scenes::check;
use crate::zap::{Zap, config};

const KIB: u64 = 1024;

/// Memory of the kernel for the sockets of Zap to its clients and to a backend, in KiB: what waits in them.
fn kernel(zap: &Zap, backend: u16) -> u64 {
    let output =
        Command::new("ss").args(["-tmnHO", "state", "established"]).output().expect("iproute2 is here");
    let text = String::from_utf8(output.stdout).unwrap();
    let port = |address: Option<&str>| address?.rsplit_once(':')?.1.parse::<u16>().ok();
    let bytes = text.lines().filter_map(|line| {
        let mut addresses = line.split_whitespace().filter(|word| word.contains(':'));
        let (local, peer) = (port(addresses.next()), port(addresses.next()));
        if local != Some(zap.address.port()) && peer != Some(backend) {
            return None;
        }
        // `skmem:(r…,rb…,t…,tb…,f…,w…,…)`: received, and written and not acknowledged.
        let (_, memory) = line.split_once("skmem:(")?;
        let parts = memory.split([',', ')']);
        let of = |part: &str, name: char| part.strip_prefix(name)?.parse::<u64>().ok();
        Some(parts.filter_map(|part| of(part, 'r').or_else(|| of(part, 'w'))).sum::<u64>())
    });
    bytes.sum::<u64>() / KIB
}

/// Clients that ask for a large answer and read nothing of it.
pub(crate) async fn slow() -> bool {
    const READERS: u64 = 100;
    const MOST: u64 = 256;
    let a = Process::start(0, 0);
    let mut fine = true;
    for (what, user) in [("JSON", "large"), ("a stream", "flood")] {
        let zap = Zap::start(&config("", &[("a", a.port, "")]));
        // The first requests make what is made only once.
        for _ in 0..20 {
            fine &= Client::new(zap.address).chat("plain").await.is_ok_and(|answer| answer.is_good());
        }
        let before = zap.rss_anon();
        let mut readers = Vec::new();
        for _ in 0..READERS {
            let mut client = Client::new(zap.address);
            client.start(user).await.unwrap();
            readers.push(client);
        }
        for reader in &readers {
            reader.has_answer().await;
        }
        let cost = || zap.rss_anon().saturating_sub(before) + kernel(&zap, a.port);
        let (since, mut last) = (Instant::now(), u64::MAX);
        // All buffers are full once the sum stays.
        let cost = loop {
            sleep(Duration::from_secs(1)).await;
            let now = cost();
            if now.abs_diff(last) <= now / 100 && now > READERS || since.elapsed() > Duration::from_secs(30) {
                break now;
            }
            last = now;
        };
        let each = cost / READERS;
        let text = format!("{READERS} clients that do not read {what}: {each} KiB each of {MOST}");
        fine &= check(&text, each <= MOST && each > 64);
        drop(readers);
    }
    fine
}

/// Forty bodies of 4 MiB at once, and the memory afterwards.
pub(crate) async fn burst() -> bool {
    const CLIENTS: usize = 40;
    const LENGTH: usize = 4 << 20;
    const LIMIT: Duration = Duration::from_secs(60);
    let a = Process::start(0, 0);
    let zap = Zap::start(&config("", &[("a", a.port, "")]));
    let chats = async |text: &str, times: usize| {
        let mut clients: Vec<_> = (0..CLIENTS).map(|_| Client::new(zap.address)).collect();
        let mut good = 0;
        for _ in 0..times {
            let mut all = tokio::task::JoinSet::new();
            for mut client in clients.drain(..) {
                let text = text.to_owned();
                all.spawn(async move {
                    let answer = client.raw(&text).await;
                    (client, answer.is_ok_and(|answer| answer.is_good()))
                });
            }
            for (client, is_good) in all.join_all().await {
                clients.push(client);
                good += usize::from(is_good);
            }
        }
        good
    };
    let post = |length: usize| {
        let body = format!("{{\"messages\":[{{\"role\":\"user\",\"content\":\"{}\"}}]}}", "x".repeat(length));
        format!("POST /chat HTTP/1.1\r\nhost: zap\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    // Ordinary requests bring the code into memory.
    let mut fine = chats(&post(700), 20).await == 20 * CLIENTS;
    let before = zap.rss();
    fine &= chats(&post(LENGTH), 2).await == 2 * CLIENTS;
    let since = Instant::now();
    let ratio = || zap.rss() as f64 / before as f64;
    while ratio() > 1.5 && since.elapsed() < LIMIT {
        sleep(Duration::from_millis(500)).await;
    }
    let (after, took) = (ratio(), since.elapsed());
    let text = format!(
        "memory {took:.1?} after {CLIENTS} bodies of 4 MiB: {after:.2} of 1.5 times the {before} KiB before"
    );
    fine & check(&text, after <= 1.5)
}

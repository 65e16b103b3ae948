//! Kills Zap again and again while it serves, and reads its ledger after each kill.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::sleep;

use crate::load::Client;
use crate::provider::Process;
use crate::scenes::check;
use crate::zap::{Zap, config};

const CLIENTS: u64 = 8;

/// A row is written a second after its request at the latest; a write takes its time too.
const LATEST: Duration = Duration::from_millis(1250);

/// The rows' number of requests, and whether SQLite finds the file whole.
fn read(path: &str) -> (u64, bool) {
    let file = rusqlite::Connection::open(path).unwrap();
    let state: String = file.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    let requests: Option<i64> =
        file.query_row("SELECT sum(requests) FROM usage", [], |row| row.get(0)).unwrap();
    (requests.unwrap_or(0) as u64, state == "ok")
}

/// Each kill loses at most the last second, and never damages the file.
pub(crate) async fn run(kills: u64) -> bool {
    let provider = Process::start(0, 0);
    let path =
        std::env::temp_dir().join(format!("zap-soak-{}-{:x}.db", std::process::id(), fastrand::u64(..)));
    let path = path.to_str().unwrap().to_owned();
    let settings = format!("[ledger]\npath = \"{path}\"\n");
    let text = config(&settings, &[("a", provider.port, "")]);
    let (mut written, mut most_lost, mut wrong, mut all) = (0, 0, Vec::new(), 0);
    for n in 0..kills {
        let mut zap = Zap::start(&text);
        let done = Rc::new(RefCell::new(Vec::new()));
        let killed = LocalSet::new()
            .run_until(async {
                for _ in 0..CLIENTS {
                    let (mut client, done) = (Client::new(zap.address), done.clone());
                    spawn_local(async move {
                        while let Ok(answer) = client.chat("plain").await {
                            assert!(answer.is_good(), "{}", answer.text());
                            done.borrow_mut().push(Instant::now());
                        }
                    });
                }
                sleep(Duration::from_millis(500 + fastrand::u64(..1500))).await;
                let now = Instant::now();
                zap.signal(Signal::KILL);
                zap.wait(Duration::from_secs(5)).unwrap();
                now
            })
            .await;
        let (rows, is_whole) = read(&path);
        let done = done.borrow();
        let early = done.iter().filter(|at| **at + LATEST <= killed).count() as u64;
        // A response may be counted that its client has not read to the end.
        let fits = (written + early..=written + done.len() as u64 + CLIENTS).contains(&rows);
        if !fits || !is_whole {
            wrong.push(format!(
                "kill {n}: {rows} rows after {written}, {early} to {} requests, whole: {is_whole}",
                done.len()
            ));
        }
        most_lost = most_lost.max((written + done.len() as u64).saturating_sub(rows));
        all += done.len();
        written = rows;
    }
    for end in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{path}{end}"));
    }
    wrong.iter().take(5).for_each(|what| println!("    {what}"));
    let text = format!(
        "{kills} times kill -9 under load, {all} requests: {} ledgers damaged or with more than the last second lost; {most_lost} requests lost at most",
        wrong.len()
    );
    check(&text, wrong.is_empty())
}

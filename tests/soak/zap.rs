//! A Zap process: its configuration file, its signals, and its memory and open files as seen by the kernel.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};

use crate::load::{Client, Tls};

pub(crate) fn raise_file_limit() -> std::io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?)
}

/// Log lines that are kept.
const KEPT_LINES: usize = 1000;

/// A running Zap; killed when dropped.
pub(crate) struct Zap {
    child: Child,
    /// The process that has the listeners: the child, or one that an upgrade has started.
    newest: Pid,
    pub address: SocketAddr,
    /// How its clients speak TLS.
    tls: Option<Tls>,
    file: PathBuf,
    /// The last lines of the log, of all its processes.
    log: Arc<Mutex<VecDeque<String>>>,
}

impl Zap {
    pub(crate) fn start(config: &str) -> Self {
        let file = std::env::temp_dir().join(format!(
            "zap-soak-{}-{:x}.toml",
            std::process::id(),
            fastrand::u64(..)
        ));
        write(&file, config);
        Zap::start_with(file, None)
    }

    /// Starts Zap with this file, which is deleted when Zap is dropped.
    pub(crate) fn start_with(file: PathBuf, tls: Option<Tls>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_zap"));
        command.arg("--config").arg(&file).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("Zap ended before it listened").unwrap();
            match line.split_once("listening on ") {
                // A listener with TLS says so behind its address.
                Some((_, address)) => break address.split(['"', ' ']).next().unwrap().parse().unwrap(),
                None => eprintln!("zap: {line}"),
            }
        };
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let kept = log.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                // Show only log lines about bugs; the other lines are expected.
                if line.contains("a bug") {
                    eprintln!("zap: {line}");
                }
                let mut kept = kept.lock().unwrap();
                if kept.len() == KEPT_LINES {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
        });
        let newest = Pid::from_raw(child.id() as i32).unwrap();
        Zap { child, newest, address, tls, file, log }
    }

    /// A new client.
    pub(crate) fn client(&self) -> Client {
        match &self.tls {
            Some(tls) => Client::with_tls(self.address, tls.clone()),
            None => Client::new(self.address),
        }
    }

    /// The lines of the log with this text, as far as they are kept.
    pub(crate) fn lines(&self, part: &str) -> Vec<String> {
        self.log.lock().unwrap().iter().filter(|line| line.contains(part)).cloned().collect()
    }

    pub(crate) fn rewrite(&self, config: &str) {
        write(&self.file, config);
    }

    /// Signals the process that has the listeners.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.newest, signal).unwrap();
    }

    /// Upgrades; returns the old process once the new one has the listeners.
    pub(crate) async fn upgrade(&mut self) -> Pid {
        const TAKEN: &str = " has taken the listeners";
        let taken = self.lines(TAKEN).len();
        self.signal(Signal::USR2);
        let since = Instant::now();
        while self.lines(TAKEN).len() == taken {
            assert!(since.elapsed() < Duration::from_secs(30), "no upgrade: {:?}", self.lines("upgrade"));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let line = self.lines(TAKEN).pop().unwrap();
        let id = line.split(TAKEN).next().and_then(|text| text.rsplit(' ').next());
        let id = id.and_then(|id| Pid::from_raw(id.parse().ok()?));
        std::mem::replace(&mut self.newest, id.expect("the line names the process"))
    }

    /// Waits up to `limit` for the first process to exit, and returns its exit code; does not block the thread.
    pub(crate) async fn ended(&mut self, limit: Duration) -> Option<i32> {
        let since = Instant::now();
        while since.elapsed() < limit {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status.code().unwrap_or(-1));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        None
    }

    /// Waits up to `limit` for the process to exit; returns the exit code and the time it took.
    pub(crate) fn wait(&mut self, limit: Duration) -> Option<(i32, Duration)> {
        let since = Instant::now();
        while since.elapsed() < limit {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some((status.code().unwrap_or(-1), since.elapsed()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    /// Resident memory in KiB.
    pub(crate) fn rss(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// Anonymous memory in KiB.
    pub(crate) fn rss_anon(&self) -> u64 {
        self.memory("RssAnon:")
    }

    fn memory(&self, name: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub(crate) fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// The sum of all samples of the metric `name` whose line contains `part`.
    pub(crate) async fn metric(&self, name: &str, part: &str) -> f64 {
        let text = self.client().get("/metrics").await.unwrap();
        let of = |l: &str| l.split([' ', '{']).next() == Some(name) && l.contains(part);
        text.lines().filter(|l| of(l)).filter_map(|l| l.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }

    /// The gauges of held resources that are not 0.
    pub(crate) async fn held(&self) -> Vec<(&'static str, f64)> {
        let mut held = Vec::new();
        for (name, part) in
            [("zap_in_flight", ""), ("zap_queue_depth", ""), ("zap_upstream_connections", "active")]
        {
            held.push((name, self.metric(name, part).await));
        }
        held.retain(|(_, value)| *value != 0.0);
        held
    }
}

impl Drop for Zap {
    fn drop(&mut self) {
        // An upgraded process is no child, so its id may be free once it has ended; its file says whether it runs.
        if self.newest.as_raw_nonzero().get() != self.child.id() as i32 && is_running(self.newest) {
            let _ = kill_process(self.newest, Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Whether a process that an upgrade has left, or started, still runs. A container may have nobody who takes its end.
pub(crate) fn is_running(process: Pid) -> bool {
    let path = format!("/proc/{}/stat", process.as_raw_nonzero());
    let stat = std::fs::read_to_string(path).unwrap_or_default();
    stat.starts_with(&format!("{} (zap) ", process.as_raw_nonzero())) && !stat.contains(") Z ")
}

fn write(file: &Path, config: &str) {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(file).unwrap();
    file.write_all(config.as_bytes()).unwrap();
}

/// A configuration text with these backends, each given as name, port and further lines.
pub(crate) fn config(settings: &str, backends: &[(&str, u16, &str)]) -> String {
    let mut text = format!(
        "[server]\nhost = \"127.0.0.1\"\nport = 0\nworkers = 2\n{settings}\n[log]\nrequests = false\n"
    );
    for (name, port, more) in backends {
        let weight = if more.contains("weight") { "" } else { "weight = 1\n" };
        text += &format!(
            "[[backends]]\nname = \"{name}\"\nurl = \"http://127.0.0.1:{port}\"\nprotocols = [\"openai\", \"anthropic\"]\napi_key = \"sk-soak\"\ndefault_model = \"m\"\n{weight}{more}\n"
        );
    }
    text
}

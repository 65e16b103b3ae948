//! A Zap process: its configuration file, its signals, and its memory and open files as seen by the kernel.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};

use crate::load;

pub(crate) fn raise_file_limit() -> std::io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?)
}

/// A running Zap; killed when dropped.
pub(crate) struct Zap {
    child: Child,
    pub address: SocketAddr,
    file: PathBuf,
}

impl Zap {
    pub(crate) fn start(config: &str) -> Self {
        let file = std::env::temp_dir().join(format!(
            "zap-soak-{}-{:x}.toml",
            std::process::id(),
            fastrand::u64(..)
        ));
        write(&file, config);
        let mut command = Command::new(env!("CARGO_BIN_EXE_zap"));
        command.arg("--config").arg(&file).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("Zap ended before it listened").unwrap();
            match line.split_once("listening on ") {
                Some((_, address)) => break address.parse().unwrap(),
                None => eprintln!("zap: {line}"),
            }
        };
        std::thread::spawn(move || {
            // Show only log lines about bugs; the other lines are expected.
            lines.map_while(Result::ok).filter(|l| l.contains("a bug")).for_each(|l| eprintln!("zap: {l}"));
        });
        Zap { child, address, file }
    }

    pub(crate) fn rewrite(&self, config: &str) {
        write(&self.file, config);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), signal).unwrap();
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
        let text = load::get(self.address, "/metrics").await;
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
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.file);
    }
}

fn write(file: &PathBuf, config: &str) {
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

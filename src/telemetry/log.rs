//! Log lines, on stderr. A bounded channel leads to a writer thread, so a request never waits for stderr.

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use crate::clock;
use crate::config::LogFormat;

/// Most lines that may wait to be written.
const BACKLOG: usize = 8192;

/// How long [`Log::flush`] waits for the last lines.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(300);

/// A handle to the log. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Log {
    lines: Option<SyncSender<String>>,
    dropped: Arc<AtomicU64>,
    /// Whether events are JSON.
    json: Arc<AtomicBool>,
    writer: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Log {
    /// Starts the writer thread, which writes to stderr.
    pub fn start(format: LogFormat) -> Self {
        Self::to(format, std::io::stderr())
    }

    /// Starts the writer thread, which writes to `out`.
    pub fn to(format: LogFormat, out: impl io::Write + Send + 'static) -> Self {
        let (lines, receiver) = sync_channel(BACKLOG);
        let dropped = Arc::new(AtomicU64::new(0));
        let counter = dropped.clone();
        let writer = std::thread::Builder::new()
            .name("zap-log".into())
            .spawn(move || write(&receiver, &counter, out))
            .ok();
        let json = Arc::new(AtomicBool::new(format == LogFormat::Json));
        Log { lines: Some(lines), dropped, json, writer: Arc::new(Mutex::new(writer)) }
    }

    /// Sets the format of events.
    pub fn set_format(&self, format: LogFormat) {
        self.json.store(format == LogFormat::Json, Ordering::Relaxed);
    }

    /// Logs one line, which must not contain a line break. If the backlog is full, drops the line and counts it.
    pub fn line(&self, line: String) {
        if self.lines.as_ref().is_none_or(|l| l.try_send(line).is_err()) {
            self.count_dropped(1);
        }
    }

    /// Logs an event of the gateway as a whole, not of one request. `event` is its fixed name.
    pub fn event(&self, level: &str, event: &str, text: &str) {
        let time = clock::timestamp(SystemTime::now());
        let mut line = String::with_capacity(96 + text.len());
        match self.json.load(Ordering::Relaxed) {
            true => {
                let _ = write!(
                    line,
                    "{{\"time\":\"{time}\",\"level\":\"{level}\",\"event\":\"{event}\",\"message\":"
                );
                push_json(&mut line, text);
                line.push('}');
            }
            false => {
                let _ = write!(line, "{time} {level} {event}: ");
                for c in text.chars() {
                    if c.is_control() {
                        line.extend(c.escape_unicode());
                    } else {
                        line.push(c);
                    }
                }
            }
        }
        self.line(line);
    }

    /// Counts `lines` log lines as dropped.
    pub fn count_dropped(&self, lines: u64) {
        self.dropped.fetch_add(lines, Ordering::Relaxed);
    }

    /// Lines dropped so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Drops this handle and waits up to 300 ms until the last lines are written. All other handles must be dropped
    /// before: the writer ends only then.
    pub fn flush(mut self) {
        self.lines = None;
        let Some(writer) = self.writer.lock().take() else { return };
        let end = Instant::now() + FLUSH_TIMEOUT;
        while !writer.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn write(lines: &Receiver<String>, dropped: &AtomicU64, mut out: impl io::Write) {
    let mut batch = String::new();
    while let Ok(first) = lines.recv() {
        batch.clear();
        let mut n = 0;
        for line in std::iter::once(first).chain(lines.try_iter()) {
            batch.push_str(&line);
            batch.push('\n');
            n += 1;
            if batch.len() > 1 << 16 {
                break;
            }
        }
        if out.write_all(batch.as_bytes()).is_err() {
            dropped.fetch_add(n, Ordering::Relaxed);
        }
    }
}

/// Appends `text` to `out` as a JSON string; control characters (C0, DEL, C1) are escaped.
pub(crate) fn push_json(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_every_control_character() {
        let mut out = String::new();
        push_json(&mut out, "a\"\\\r\n\u{1b}[0m\u{7f}\u{9b}é");
        assert_eq!(out, "\"a\\\"\\\\\\u000d\\u000a\\u001b[0m\\u007f\\u009bé\"");
        let back: String = serde_json::from_str(&out).unwrap();
        assert_eq!(back, "a\"\\\r\n\u{1b}[0m\u{7f}\u{9b}é");
    }

    #[test]
    fn a_full_backlog_drops_and_counts() {
        let (lines, receiver) = sync_channel(1);
        let log = Log {
            lines: Some(lines),
            dropped: Arc::default(),
            json: Arc::new(AtomicBool::new(true)),
            writer: Arc::default(),
        };
        log.event("info", "x", "first");
        log.event("info", "x", "second");
        assert_eq!(log.dropped(), 1);
        let line = receiver.recv().unwrap();
        assert!(line.ends_with("\"level\":\"info\",\"event\":\"x\",\"message\":\"first\"}"), "{line}");
    }
}

//! The log, on stderr. A bounded channel leads to a writer thread, so a request never waits for stderr.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use crate::config::LogFormat;
use crate::telemetry::line::{Fields, Style, terminal};

/// Most lines that may wait to be written.
const BACKLOG: usize = 8192;

/// How long [`Log::flush`] waits for the last lines.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(300);

/// A handle to the log. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Log {
    lines: Option<SyncSender<String>>,
    dropped: Arc<AtomicU64>,
    /// The format that the configuration asks for.
    format: Arc<AtomicU8>,
    /// Whether the lines go to a terminal, and then whether it takes colours.
    terminal: Option<bool>,
    writer: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Log {
    /// Starts the writer thread, which writes to stderr.
    pub fn start(format: LogFormat) -> Self {
        Self::with(format, terminal(), std::io::stderr())
    }

    /// Starts the writer thread, which writes to `out`: no terminal.
    pub fn to(format: LogFormat, out: impl io::Write + Send + 'static) -> Self {
        Self::with(format, None, out)
    }

    fn with(format: LogFormat, terminal: Option<bool>, out: impl io::Write + Send + 'static) -> Self {
        let (lines, receiver) = sync_channel(BACKLOG);
        let dropped = Arc::new(AtomicU64::new(0));
        let counter = dropped.clone();
        let writer = std::thread::Builder::new()
            .name("zap-log".into())
            .spawn(move || write(&receiver, &counter, out))
            .ok();
        let format = Arc::new(AtomicU8::new(format as u8));
        Log { lines: Some(lines), dropped, format, terminal, writer: Arc::new(Mutex::new(writer)) }
    }

    /// Sets the format of the lines to come.
    pub fn set_format(&self, format: LogFormat) {
        self.format.store(format as u8, Ordering::Relaxed);
    }

    /// The style of the lines.
    pub(crate) fn style(&self) -> Style {
        const AUTO: u8 = LogFormat::Auto as u8;
        const TEXT: u8 = LogFormat::Text as u8;
        let format = match self.format.load(Ordering::Relaxed) {
            AUTO => LogFormat::Auto,
            TEXT => LogFormat::Text,
            _ => LogFormat::Json,
        };
        match self.terminal {
            Some(is_coloured) => Style::for_terminal(format, is_coloured),
            None => Style::for_file(format),
        }
    }

    /// Logs one line, which must not contain a line break. If the backlog is full, drops the line and counts it.
    pub fn line(&self, line: String) {
        if self.lines.as_ref().is_none_or(|l| l.try_send(line).is_err()) {
            self.count_dropped(1);
        }
    }

    /// Logs an event of the gateway as a whole, not of one request. `event` is its fixed name.
    pub fn event(&self, level: &str, event: &str, text: &str) {
        self.event_with(level, event, text, &Fields::default());
    }

    /// Logs an event. A JSON line has the fields `more`, too; `text` says the same in words.
    pub(crate) fn event_with(&self, level: &str, event: &str, text: &str, more: &Fields) {
        self.line(self.style().event(SystemTime::now(), (level, event), text, more));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_backlog_drops_and_counts() {
        let (lines, receiver) = sync_channel(1);
        let log = Log {
            lines: Some(lines),
            dropped: Arc::default(),
            format: Arc::new(AtomicU8::new(LogFormat::Json as u8)),
            terminal: None,
            writer: Arc::default(),
        };
        log.event("info", "x", "first");
        log.event("info", "x", "second");
        assert_eq!(log.dropped(), 1);
        let line = receiver.recv().unwrap();
        assert!(line.ends_with("\"level\":\"info\",\"event\":\"x\",\"message\":\"first\"}"), "{line}");
    }
}

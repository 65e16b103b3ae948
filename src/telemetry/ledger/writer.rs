//! The thread that writes the ledger to its file.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::clock;
use crate::telemetry::ledger::Ledger;
use crate::telemetry::ledger::file::File;
use crate::time::Day;

/// Time from one write to the next.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long the end of the thread may take. The tries of the last write get a part of it, the last of them may last for
/// the busy timeout of the file.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
const LAST_TRIES: Duration = Duration::from_millis(1500);
/// Time between two tries of the last write.
const STOP_INTERVAL: Duration = Duration::from_millis(50);

/// Takes an event: level, fixed name, text.
pub(crate) type Events = Box<dyn Fn(&str, &str, &str) + Send>;

/// Writes a ledger to its file.
pub(crate) struct Writer {
    ledger: Arc<Ledger>,
    pub(super) file: File,
    /// The path as configured, for events.
    path: PathBuf,
    events: Events,
    /// Failures since the last success.
    failures: u64,
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("path", &self.path).finish_non_exhaustive()
    }
}

/// The running thread. Dropping the handle ends the thread, too, but does not wait for it.
#[derive(Debug)]
pub(crate) struct WriterHandle {
    stop: Sender<()>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl WriterHandle {
    /// Writes what is pending and ends the thread. Takes at most 2 seconds. Rows that cannot be written in this time
    /// are lost; an event says how many.
    pub(crate) fn stop(self) {
        drop(self.stop);
        let _ = self.ended.recv_timeout(STOP_TIMEOUT);
    }
}

impl Writer {
    pub(super) fn new(ledger: Arc<Ledger>, file: File, path: &Path, events: Events) -> Writer {
        Writer { ledger, file, path: path.into(), events, failures: 0 }
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no room for a thread.
    pub(crate) fn start(self) -> io::Result<WriterHandle> {
        let (stop, orders) = channel();
        let (ending, ended) = channel();
        let run = move || {
            self.run(&orders);
            drop::<Sender<()>>(ending);
        };
        thread::Builder::new().name("zap-ledger".into()).spawn(run)?;
        Ok(WriterHandle { stop, ended })
    }

    fn run(mut self, orders: &Receiver<()>) {
        while orders.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
            self.write(clock::today());
        }
        self.finish(LAST_TRIES);
    }

    /// Reads the sums of the file.
    pub(super) fn read_sums(&mut self) -> Result<(), String> {
        self.try_write(clock::today())
    }

    /// Writes the pending rows once, and reads the sums if others have written.
    pub(super) fn write(&mut self, today: Day) {
        let rows = self.ledger.unwritten();
        match self.try_write(today) {
            Ok(()) if self.failures > 0 => {
                let failures = std::mem::take(&mut self.failures);
                let path = self.path.display();
                let text =
                    format!("{path}: the rows in memory ({rows}) are written, after {failures} failures");
                (self.events)("info", "ledger_recovered", &text);
            }
            Ok(()) => {}
            Err(cause) => {
                self.failures += 1;
                if self.failures == 1 {
                    let path = self.path.display();
                    let text = format!(
                        "{path}: {cause}; Zap keeps the rows in memory ({rows}) and tries again each second"
                    );
                    (self.events)("error", "ledger_failed", &text);
                }
            }
        }
    }

    fn try_write(&mut self, today: Day) -> Result<(), String> {
        let Writer { ledger, file, .. } = self;
        let batch = ledger.begin_batch();
        let written = file.write(&batch, today, |transaction, sums| ledger.commit_batch(transaction, sums));
        // Drop it first: a table is copied when it changes while there is another reference to it.
        drop(batch);
        written.inspect_err(|_| ledger.return_batch())
    }

    /// Writes the last rows. Tries again until `limit` has passed.
    pub(super) fn finish(mut self, limit: Duration) {
        let end = Instant::now() + limit;
        self.write(clock::today());
        while self.ledger.unwritten() > 0 && Instant::now() + STOP_INTERVAL < end {
            thread::sleep(STOP_INTERVAL);
            self.write(clock::today());
        }
        let lost = self.ledger.unwritten();
        if lost > 0 {
            let text = format!("{}: Zap stops and loses the rows in memory ({lost})", self.path.display());
            (self.events)("error", "ledger_failed", &text);
        }
        // The last connection that is closed moves the write-ahead log into the file.
        self.ledger.close_reader();
    }
}

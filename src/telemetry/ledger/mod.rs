//! The ledger: what each client has used of each backend and model, by day.
//!
//! A worker adds a request to a table in memory. A thread writes the table to an SQLite file once a second, so a
//! request never waits for the disk. If the file cannot be written, the rows stay in memory and the next second tries
//! again. Several processes may use one file: each adds to its rows.

pub(crate) mod report;

pub(crate) mod sums;

pub(crate) mod table;

mod file;

mod open;

mod shard;

pub(crate) mod writer;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_utils::CachePadded;
use parking_lot::Mutex;
use rusqlite::{Connection, Transaction};

use crate::telemetry::ledger::file::File;
use crate::telemetry::ledger::report::{Report, ReportError, UsageQuery};
use crate::telemetry::ledger::shard::Shard;
use crate::telemetry::ledger::sums::{Payer, Spent, Sums};
use crate::telemetry::ledger::table::{Amounts, Labels, Table};
use crate::telemetry::ledger::writer::{Events, Writer};
use crate::time::Day;

/// Number of shards. Workers with the same remainder share one.
const SHARDS: usize = 16;

/// Days that a ledger without a file keeps.
const KEPT_DAYS: u32 = 400;

/// How long a report waits for the connection or for a commit.
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);

/// The ledger, shared by all workers.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// What the workers have added lately, so that they do not wait for each other.
    shards: [CachePadded<Mutex<Shard>>; SHARDS],
    /// Held while the shards are emptied. Taken before any other lock here but those of [`Reading`].
    collecting: Mutex<()>,
    state: Mutex<State>,
    /// `None`: the ledger has no file.
    reading: Option<Reading>,
    errors: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Rows that are not yet in the file. Without a file: all rows.
    pending: Table,
    /// Rows that the writer thread is writing.
    writing: Table,
    /// The costs of the rows in the file, as far as known, and of all rows here.
    sums: Sums,
}

/// What reports need of the file.
#[derive(Debug)]
struct Reading {
    /// A read-only connection; `None` after the end of the writer.
    connection: Mutex<Option<Connection>>,
    /// Held from a commit until the state shows it. A report holds it while it takes its snapshots of file and state,
    /// so that no row is missing or counted twice.
    commit: Mutex<()>,
}

impl Ledger {
    /// A ledger without a file: it knows what this process has seen, of at most 400 days.
    pub(crate) fn in_memory() -> Arc<Ledger> {
        Arc::new(Self::new(None))
    }

    fn new(reading: Option<Reading>) -> Self {
        Ledger {
            shards: Default::default(),
            collecting: Mutex::default(),
            state: Mutex::default(),
            reading,
            errors: AtomicU64::new(0),
        }
    }

    /// Opens the ledger in the file at `path`. A missing file is created; its directory must exist. `events` gets the
    /// events `ledger_failed` and `ledger_recovered`. Nothing is written until [`Writer::start`].
    ///
    /// # Errors
    /// The file cannot be used. The message names the path, the cause and the way out; the file is unchanged.
    pub(crate) fn open(path: &Path, events: Events) -> Result<(Arc<Ledger>, Writer), String> {
        let file = File::open(path)?;
        let fault = |e| format!("cannot read the ledger {}: {e}", path.display());
        let connection = Mutex::new(Some(file.reader().map_err(fault)?));
        let reading = Some(Reading { connection, commit: Mutex::new(()) });
        let ledger = Arc::new(Self::new(reading));
        let mut writer = Writer::new(ledger.clone(), file, path, events);
        writer.read_sums().map_err(|e| format!("cannot read the ledger {}: {e}", path.display()))?;
        Ok((ledger, writer))
    }

    /// Adds what a request of a worker used; `day` is the day of its end, `key` a hash of the labels. Never waits for
    /// the disk.
    pub(crate) fn add(&self, worker: usize, day: Day, (key, labels): (u64, Labels<'_>), amounts: Amounts) {
        if !self.shards[worker % SHARDS].lock().add(day, (key, labels), amounts) {
            let mut row = Table::default();
            row.add(day, labels, amounts);
            self.collect(row);
            // The shard begins with the new day.
            self.collect_all();
        }
    }

    /// Takes what the workers have added since the last call.
    fn collect_all(&self) {
        // Whoever collects at the same time waits, so that no row is in neither place.
        let _collecting = self.collecting.lock();
        self.shards.iter().for_each(|shard| {
            // The worker need not wait until the rows are added.
            let rows = shard.lock().take();
            self.collect(rows);
        });
    }

    fn collect(&self, rows: Table) {
        let mut state = self.state.lock();
        for (day, labels, amounts) in rows.all() {
            if self.reading.is_none() && !state.pending.has(day) {
                let first = day.minus(KEPT_DAYS - 1);
                state.pending.drop_before(first);
                state.sums.drop_before(first);
            }
            state.pending.add(day, labels, amounts);
            state.sums.add(day, labels, amounts.cost_nano_usd);
        }
    }

    /// What `payer` has spent on the day `today` and in its month: by all processes in the file, as of the last second,
    /// and by this process up to the last [`Ledger::add`]. Never waits for the disk.
    pub(crate) fn spent(&self, payer: Payer<'_>, today: Day) -> Spent {
        self.collect_all();
        self.state.lock().sums.spent(payer, today)
    }

    /// Number of times that the file could not be read or written.
    pub(crate) fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    /// Runs a query on the file and on the rows that are not yet written, or on the rows in memory. Reads the file,
    /// which takes milliseconds a month, and may wait for a commit: call it where blocking is allowed.
    ///
    /// # Errors
    /// See [`ReportError`].
    pub(crate) fn report(&self, query: UsageQuery) -> Result<Report, ReportError> {
        let mut groups = Report::new(query);
        let Some(Reading { connection, commit }) = &self.reading else {
            self.collect_all();
            let rows = self.state.lock().pending.clone();
            return groups.add_table(&rows).map(|()| groups);
        };
        let busy = || ReportError::Unavailable("the ledger is busy".into());
        let mut connection = connection.try_lock_for(REPORT_TIMEOUT).ok_or_else(busy)?;
        let connection = connection.as_mut().ok_or_else(busy)?;
        let snapshot = commit.try_lock_for(REPORT_TIMEOUT).ok_or_else(busy)?;
        self.collect_all();
        let transaction = file::begin_read(connection).inspect_err(|_| self.count_error())?;
        let (pending, writing) = {
            let state = self.state.lock();
            (state.pending.clone(), state.writing.clone())
        };
        drop(snapshot);
        groups.add_file(&transaction).inspect_err(|e| match e {
            ReportError::Unavailable(_) => self.count_error(),
            ReportError::TooLarge(_) => {}
        })?;
        groups.add_table(&writing)?;
        groups.add_table(&pending).map(|()| groups)
    }

    /// Hands the pending rows to the writer.
    fn begin_batch(&self) -> Table {
        self.collect_all();
        let mut state = self.state.lock();
        state.writing = std::mem::take(&mut state.pending);
        state.writing.clone()
    }

    /// Commits the batch. If there are new `sums` of the file, they replace the known ones.
    fn commit_batch(&self, transaction: Transaction<'_>, sums: Option<Sums>) -> rusqlite::Result<()> {
        let _guard = self.reading.as_ref().map(|reading| reading.commit.lock());
        transaction.commit()?;
        let mut state = self.state.lock();
        state.writing = Table::default();
        if let Some(mut sums) = sums {
            sums.add_all(state.pending.all());
            state.sums = sums;
        }
        Ok(())
    }

    /// Puts the batch back, since it was not written.
    fn return_batch(&self) {
        let mut state = self.state.lock();
        let batch = std::mem::take(&mut state.writing);
        state.pending.merge(batch);
        self.count_error();
    }

    fn count_error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Number of rows that are not in the file.
    fn unwritten(&self) -> usize {
        self.collect_all();
        let state = self.state.lock();
        state.pending.len() + state.writing.len()
    }

    /// Closes the connection of the reports.
    fn close_reader(&self) {
        if let Some(reading) = &self.reading {
            *reading.connection.lock() = None;
        }
    }
}

#[cfg(test)]
mod tests;

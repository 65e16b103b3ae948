//! The SQLite file of the ledger: reads and writes rows.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior, params_from_iter};

use crate::telemetry::ledger::open::{Refusal, open};
use crate::telemetry::ledger::sums::Sums;
use crate::telemetry::ledger::table::{Amounts, Labels, Table};
use crate::time::Day;

/// How long SQLite waits for a lock of another process.
const BUSY_TIMEOUT: Duration = Duration::from_millis(250);

/// An open ledger file.
#[derive(Debug)]
pub(super) struct File {
    pub(super) connection: Connection,
    path: PathBuf,
    /// Device and inode of the file.
    identity: (u64, u64),
    /// The day of the last sums, and `PRAGMA data_version` when they were read. Another version means that another
    /// process has written since.
    last_sums: Option<(Day, i64)>,
}

impl File {
    /// Opens the ledger at `path`, or creates it if there is no file or an empty one.
    ///
    /// # Errors
    /// The message names the path, the cause and the way out. A file that is not a ledger is not changed.
    pub(super) fn open(path: &Path) -> Result<File, String> {
        let fault = |why: Refusal| format!("cannot use the ledger {}: {}", path.display(), why.explain(path));
        let (absolute, connection) = open(path).map_err(fault)?;
        let prepared = insert(&connection, &Table::default()).and(connection.busy_timeout(BUSY_TIMEOUT));
        prepared.map_err(|e| fault(Refusal::Unusable(format!("its table is not that of a ledger: {e}"))))?;
        let identity = identity(&fs::metadata(&absolute).map_err(|e| fault(e.into()))?);
        Ok(File { connection, path: absolute, identity, last_sums: None })
    }

    /// Opens a second, read-only connection.
    pub(super) fn reader(&self) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        Ok(connection)
    }

    /// Adds the rows of `batch` to the file in one transaction. `publish` commits it, or drops it. If the day has
    /// changed or another process has written, `publish` also gets new sums, which include `batch`.
    ///
    /// # Errors
    /// Nothing was written.
    pub(super) fn write(
        &mut self,
        batch: &Table,
        today: Day,
        publish: impl FnOnce(Transaction<'_>, Option<Sums>) -> rusqlite::Result<()>,
    ) -> Result<(), String> {
        self.check_identity()?;
        self.transact(batch, today, publish).map_err(|e| e.to_string())
    }

    fn transact(
        &mut self,
        batch: &Table,
        today: Day,
        publish: impl FnOnce(Transaction<'_>, Option<Sums>) -> rusqlite::Result<()>,
    ) -> rusqlite::Result<()> {
        if batch.is_empty() && self.last_sums == Some((today, data_version(&self.connection)?)) {
            return Ok(());
        }
        let behavior =
            if batch.is_empty() { TransactionBehavior::Deferred } else { TransactionBehavior::Immediate };
        let transaction = self.connection.transaction_with_behavior(behavior)?;
        insert(&transaction, batch)?;
        let now = (today, data_version(&transaction)?);
        let sums = if self.last_sums == Some(now) { None } else { Some(sums(&transaction, today)?) };
        publish(transaction, sums)?;
        self.last_sums = Some(now);
        Ok(())
    }

    /// Fails if the path no longer leads to the open file. SQLite would go on to write to a file that was deleted.
    fn check_identity(&self) -> Result<(), String> {
        match fs::metadata(&self.path) {
            Ok(metadata) if identity(&metadata) == self.identity => Ok(()),
            Ok(_) => Err("another file has taken its place; move the first one back, since a restart loses what is not yet written".into()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err("the file was moved or deleted; move it back, since a restart loses what is not yet written".into())
            }
            Err(e) => Err(e.to_string()),
        }
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn data_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "data_version", |row| row.get(0))
}

/// Adds the rows of `batch` to the rows of the file. A sum that leaves the range of an integer would become a float in
/// SQLite; `min` holds it at the largest integer.
fn insert(connection: &Connection, batch: &Table) -> rusqlite::Result<()> {
    let columns = Amounts::COLUMNS;
    let sums = columns.map(|name| format!("{name} = min({name} + excluded.{name}, {})", i64::MAX));
    let sql = format!(
        "INSERT INTO usage(day, client, backend, model, {}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11) \
         ON CONFLICT(day, client, backend, model) DO UPDATE SET {}",
        columns.join(", "),
        sums.join(", ")
    );
    let mut statement = connection.prepare(&sql)?;
    for (day, Labels { client, backend, model }, amounts) in batch.all() {
        let labels = [&day.to_string(), client, backend, model].map(|text| Value::Text(text.into()));
        let numbers = amounts.columns().map(|n| Value::Integer(n.try_into().unwrap_or(i64::MAX)));
        statement.execute(params_from_iter(labels.into_iter().chain(numbers)))?;
    }
    Ok(())
}

/// Begins a read transaction. It sees the file as it is now, until it is dropped.
pub(super) fn begin_read(connection: &mut Connection) -> rusqlite::Result<Transaction<'_>> {
    let transaction = connection.transaction()?;
    // A transaction takes its snapshot at its first read.
    data_version(&transaction)?;
    Ok(transaction)
}

/// Calls `visit` for each row from `from` to `to`, both inclusive. A cell that is no number of Zap's counts as 0.
pub(super) fn visit(
    connection: &Connection,
    from: Day,
    to: Day,
    mut visit: impl FnMut(Day, Labels<'_>, Amounts),
) -> rusqlite::Result<()> {
    let sql = format!(
        "SELECT day, client, backend, model, {} FROM usage WHERE day BETWEEN ?1 AND ?2",
        Amounts::COLUMNS.join(", ")
    );
    let mut statement = connection.prepare(&sql)?;
    let mut rows = statement.query([from.to_string(), to.to_string()])?;
    while let Some(row) = rows.next()? {
        let mut labels = [""; 4];
        for (at, label) in labels.iter_mut().enumerate() {
            *label = row.get_ref(at)?.as_str().unwrap_or("");
        }
        let mut amounts = [0; 7];
        for (at, amount) in amounts.iter_mut().enumerate() {
            let number = row.get_ref(4 + at)?.as_i64().unwrap_or(0);
            *amount = u64::try_from(number).unwrap_or(0);
        }
        let [day, client, backend, model] = labels;
        if let Some(day) = Day::parse(day) {
            visit(day, Labels { client, backend, model }, Amounts::of_columns(amounts));
        }
    }
    Ok(())
}

/// Reads the costs from the month of the day before `today` on: a request may end at midnight.
fn sums(connection: &Connection, today: Day) -> rusqlite::Result<Sums> {
    let mut sums = Sums::default();
    visit(
        connection,
        today.minus(1).first_of_month(),
        today.first_of_next_month(),
        |day, labels, amounts| {
            sums.add(day, labels, amounts.cost_nano_usd);
        },
    )?;
    Ok(sums)
}

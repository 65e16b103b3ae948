//! Opens the SQLite file of the ledger, and refuses a file that is not one.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};

/// `PRAGMA application_id` of a ledger: "ZapL".
const APPLICATION: i64 = 0x5a61_704c;

/// `PRAGMA user_version`: the version of the format.
const VERSION: i64 = 1;

/// The first bytes of an SQLite file: <https://sqlite.org/fileformat2.html>, section 1.3.
const MAGIC: &[u8] = b"SQLite format 3\0";
/// Length of the header of an SQLite file, and where the application id stands in it.
const HEADER: u64 = 100;
const APPLICATION_AT: usize = 68;

/// How long SQLite waits for a lock of another process.
const START_TIMEOUT: Duration = Duration::from_secs(1);

const CREATE: &str = "CREATE TABLE usage(day TEXT, client TEXT, backend TEXT, model TEXT, \
    requests INTEGER, estimated INTEGER, input INTEGER, cached INTEGER, output INTEGER, reasoning INTEGER, \
    cost_nano_usd INTEGER, PRIMARY KEY (day, client, backend, model))";

/// Opens the ledger at `path`, or creates it if there is no file or an empty one. Returns the absolute path, too. A
/// file that is not a ledger is not changed.
pub(super) fn open(path: &Path) -> Result<(PathBuf, Connection), Refusal> {
    examine(path)?;
    // SQLite takes a relative path that begins with "file:" for a URI.
    let absolute = std::path::absolute(path)?;
    let connection = connect(&absolute)?;
    Ok((absolute, connection))
}

/// Why a file cannot be used.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The directory of the file does not exist.
    NoDirectory(PathBuf),
    /// The file cannot be opened.
    Failed(String),
    /// The file is not a ledger, or it is damaged.
    Unusable(String),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Refusal::Failed(error.to_string())
    }
}

impl From<rusqlite::Error> for Refusal {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Refusal::Unusable(error.to_string())
            }
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                Refusal::Failed("another program has locked it".into())
            }
            _ => Refusal::Failed(error.to_string()),
        }
    }
}

impl Refusal {
    /// The cause and the way out.
    pub(super) fn explain(&self, path: &Path) -> String {
        match self {
            Refusal::NoDirectory(directory) => format!(
                "the directory {} does not exist; create it, for example: mkdir -p {}",
                directory.display(),
                shell_word(directory)
            ),
            Refusal::Failed(cause) => cause.clone(),
            Refusal::Unusable(cause) => {
                format!("{cause}; move it aside, for example: {}", move_aside(path))
            }
        }
    }
}

/// The file beside `path` whose name has one more `suffix`.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The command that moves a ledger aside, with its write-ahead log.
fn move_aside(path: &Path) -> String {
    let number = |n: u32| if n == 1 { ".bad".to_owned() } else { format!(".bad{n}") };
    let is_free = |suffix: &String| !beside(path, suffix).exists();
    let suffix = (1..=99).map(number).find(is_free).unwrap_or_else(|| ".bad".into());
    let files = ["", "-wal"].map(|part| (beside(path, part), beside(path, &format!("{suffix}{part}"))));
    let existing = files.iter().filter(|(file, _)| file.exists());
    let moves = existing.map(|(file, to)| format!("mv {} {}", shell_word(file), shell_word(to)));
    moves.collect::<Vec<_>>().join(" && ")
}

/// A path as a word of the shell.
fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+,:@%".contains(c);
    match text.chars().all(is_plain) && !text.starts_with('-') {
        true => text,
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

/// Looks at the file without SQLite, which could change a file that is not a ledger: SQLite moves a write-ahead log
/// into its file and rolls back what a crash has left.
fn examine(path: &Path) -> Result<(), Refusal> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return check_place(path),
        Err(e) => return Err(e.into()),
    };
    if !metadata.is_file() {
        return Err(Refusal::Failed("it is not a file".into()));
    }
    let mut header = Vec::new();
    fs::File::open(path)?.take(HEADER).read_to_end(&mut header)?;
    if header.is_empty() {
        return check_place(path);
    }
    let id =
        header.get(APPLICATION_AT..).and_then(|rest| rest.first_chunk()).map(|id| u32::from_be_bytes(*id));
    match id {
        Some(id) if header.starts_with(MAGIC) => check_application(id.into()),
        _ => Err(Refusal::Unusable("it is not an SQLite file".into())),
    }
}

/// Checks that a file may be created. SQLite would delete a write-ahead log whose file has gone.
fn check_place(path: &Path) -> Result<(), Refusal> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !directory.is_dir() {
        return Err(Refusal::NoDirectory(directory.into()));
    }
    match fs::metadata(beside(path, "-wal")) {
        Ok(log) if log.len() > 0 => {
            Err(Refusal::Unusable("the file is missing or empty, but its write-ahead log is there".into()))
        }
        _ => Ok(()),
    }
}

fn check_application(id: i64) -> Result<(), Refusal> {
    match id {
        APPLICATION => Ok(()),
        _ => Err(Refusal::Unusable("it is an SQLite file of another program".into())),
    }
}

/// Opens a file that may be used, creates the table if it is new, and checks that all is well.
fn connect(path: &Path) -> Result<Connection, Refusal> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(START_TIMEOUT)?;
    // The write-ahead log of a file that is refused stays beside it.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    create(&mut connection)?;
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", (), |row| row.get(0))?;
    if verdict != "ok" {
        return Err(Refusal::Unusable(format!("it is damaged: {verdict}")));
    }
    // The table is created before: the header then holds the application id, whatever happens to the write-ahead log.
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", (), |row| row.get(0))?;
    if mode != "wal" {
        return Err(Refusal::Failed("its file system cannot share memory, which SQLite's WAL needs".into()));
    }
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
    Ok(connection)
}

/// Creates the table, unless this is a ledger already. Fails if the file cannot be written.
fn create(connection: &mut Connection) -> Result<(), Refusal> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let number = |pragma| transaction.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let tables: i64 = transaction.query_row("SELECT count(*) FROM sqlite_schema", (), |row| row.get(0))?;
    match (number("application_id")?, tables) {
        (0, 0) => {
            transaction.pragma_update(None, "application_id", APPLICATION)?;
            transaction.pragma_update(None, "user_version", VERSION)?;
            transaction.execute(CREATE, ())?;
        }
        (id, _) => check_application(id)?,
    }
    match number("user_version")? {
        VERSION => Ok(transaction.commit()?),
        other => {
            Err(Refusal::Unusable(format!("it is a ledger of format {other}, this Zap knows {VERSION}")))
        }
    }
}

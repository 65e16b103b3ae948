use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Instant, SystemTime};

use super::*;
use crate::telemetry::ledger::report::Format;

/// A directory that is removed at the end of the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = format!("zap-ledger-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("zap.db")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

type Seen = Arc<Mutex<Vec<String>>>;

fn open(path: &Path) -> (Arc<Ledger>, Writer, Seen) {
    let seen = Seen::default();
    let into = seen.clone();
    let events = move |level: &str, event: &str, text: &str| {
        into.lock().push(format!("{level} {event}: {text}"));
    };
    let (ledger, writer) = Ledger::open(path, Box::new(events)).unwrap();
    (ledger, writer, seen)
}

fn day(text: &str) -> Day {
    Day::parse(text).unwrap()
}

const A: Labels<'_> = Labels { client: "a", backend: "x", model: "m" };
const B: Labels<'_> = Labels { client: "b", backend: "x", model: "n" };

fn cost(cost_nano_usd: u64) -> Amounts {
    Amounts { requests: 1, estimated: 0, input: 30, cached: 10, output: 20, reasoning: 5, cost_nano_usd }
}

/// All rows of the ledger as CSV without the header.
fn rows(ledger: &Ledger) -> Vec<String> {
    let query = "by=day,client,backend,model&format=csv&from=1970-01-01&to=9999-12-31";
    let query = UsageQuery::parse(Some(query), day("2026-11-25")).unwrap();
    assert_eq!(query.format, Format::Csv);
    let (_, text) = ledger.report(query).unwrap().encode();
    text.lines().skip(1).map(str::to_owned).collect()
}

/// The sum of all requests and of their costs, as any SQLite client reads the file.
fn totals(path: &Path) -> (u64, u64) {
    let connection = Connection::open(path).unwrap();
    let verdict: String = connection.query_row("PRAGMA integrity_check", (), |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
    let sql = "SELECT coalesce(sum(requests), 0), coalesce(sum(cost_nano_usd), 0) FROM usage";
    let (requests, cost): (i64, i64) =
        connection.query_row(sql, (), |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    (requests.cast_unsigned(), cost.cast_unsigned())
}

#[test]
fn amounts_add_up_in_memory_in_the_file_and_after_a_restart() {
    let (folder, today) = (Folder::new(), day("2026-11-25"));
    let (ledger, mut writer, seen) = open(&folder.file());
    let memory = Ledger::in_memory();
    for (n, labels) in [(1, A), (2, A), (3, B)] {
        add(&ledger, today, labels, cost(n));
        add(&memory, today, labels, cost(n));
        if n == 1 {
            writer.write(today);
        }
    }
    let want =
        ["2026-11-25,a,x,m,2,0,60,20,40,10,0.000000003", "2026-11-25,b,x,n,1,0,30,10,20,5,0.000000003"];
    assert_eq!(rows(&ledger), want);
    assert_eq!(rows(&memory), want);
    writer.write(today);
    assert_eq!(rows(&ledger), want);
    assert_eq!(ledger.unwritten(), 0);
    writer.finish(Duration::from_secs(1));
    // The end leaves one file.
    assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
    assert_eq!(totals(&folder.file()), (3, 6));
    let (ledger, mut writer, _) = open(&folder.file());
    assert_eq!(rows(&ledger), want);
    add(&ledger, today, A, cost(10));
    writer.write(today);
    assert_eq!(totals(&folder.file()), (4, 16));
    assert!(seen.lock().is_empty(), "{seen:?}");
    assert_eq!(ledger.errors(), 0);
}

#[test]
fn the_file_has_the_documented_table() {
    let folder = Folder::new();
    let (_ledger, _writer, _) = open(&folder.file());
    let connection = Connection::open(folder.file()).unwrap();
    let text = |sql: &str| connection.query_row(sql, (), |row| row.get::<_, String>(0)).unwrap();
    let number = |sql: &str| connection.query_row(sql, (), |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(
        text("SELECT group_concat(name || ' ' || type || ' ' || pk, ', ') FROM pragma_table_info('usage')"),
        "day TEXT 1, client TEXT 2, backend TEXT 3, model TEXT 4, requests INTEGER 0, estimated INTEGER 0, \
         input INTEGER 0, cached INTEGER 0, output INTEGER 0, reasoning INTEGER 0, cost_nano_usd INTEGER 0"
    );
    assert_eq!(number("SELECT count(*) FROM sqlite_schema WHERE type = 'table'"), 1);
    assert_eq!(text("PRAGMA journal_mode"), "wal");
    assert_eq!(number("PRAGMA user_version"), 1);
    assert_eq!(number("PRAGMA application_id"), i64::from(u32::from_be_bytes(*b"ZapL")));
}

#[test]
fn spent_follows_the_days_and_the_months() {
    let folder = Folder::new();
    let (with_file, mut writer, _) = open(&folder.file());
    for (ledger, has_file) in [(&with_file, true), (&Ledger::in_memory(), false)] {
        let (october, first, second) = (day("2026-10-31"), day("2026-11-01"), day("2026-11-02"));
        let spent = |payer, today| {
            let Spent { day, month } = ledger.spent(payer, today);
            (day, month)
        };
        let mut write = |today| {
            if has_file {
                writer.write(today);
            }
        };
        let (a, x) = (Payer::Client("a"), Payer::Backend("x"));
        add(ledger, october, A, cost(1));
        assert_eq!(spent(a, october), (1, 1));
        assert_eq!(spent(a, first), (0, 0), "a new month begins without an action");
        write(october);
        add(ledger, first, A, cost(20));
        // A request that ended before midnight is added after one that ended later.
        add(ledger, october, B, cost(300));
        for _ in 0..2 {
            assert_eq!(spent(x, october), (301, 301));
            assert_eq!(spent(x, first), (20, 20));
            write(first);
        }
        add(ledger, second, B, cost(4_000));
        for _ in 0..2 {
            assert_eq!(spent(x, second), (4_000, 4_020));
            assert_eq!(spent(Payer::Client("b"), second), (4_000, 4_000));
            assert_eq!(spent(a, second), (0, 20));
            assert_eq!(spent(x, first), (20, 4_020), "a clock that goes back");
            write(second);
        }
        assert_eq!(spent(Payer::Client("x"), second), (0, 0));
    }
    let (ledger, mut writer, _) = open(&folder.file());
    writer.write(day("2026-11-02"));
    assert_eq!(ledger.spent(Payer::Backend("x"), day("2026-11-02")), Spent { day: 4_000, month: 4_020 });
    assert_eq!(ledger.spent(Payer::Client("a"), day("2026-11-30")), Spent { day: 0, month: 20 });
}

#[test]
fn a_restart_knows_what_is_spent_today() {
    let (folder, today) = (Folder::new(), Day::of(SystemTime::now()));
    let (ledger, writer, _) = open(&folder.file());
    add(&ledger, today, A, cost(7));
    writer.finish(Duration::from_secs(1));
    let (ledger, _writer, _) = open(&folder.file());
    assert_eq!(ledger.spent(Payer::Client("a"), today), Spent { day: 7, month: 7 });
}

#[test]
fn a_ledger_without_a_file_keeps_400_days() {
    let (ledger, last) = (Ledger::in_memory(), day("2030-01-01"));
    for age in (0..1000).rev() {
        add(&ledger, last.minus(age), A, cost(1));
    }
    let rows = rows(&ledger);
    assert_eq!(rows.len(), 400);
    assert!(rows[0].starts_with(&last.minus(399).to_string()));
    assert_eq!(ledger.spent(Payer::Client("a"), last.minus(1)), Spent { day: 1, month: 31 });
    assert_eq!(ledger.spent(Payer::Client("a"), last.minus(400)).day, 0);
}

#[test]
fn two_processes_on_one_file_add_up_and_see_each_other() {
    let (folder, today) = (Folder::new(), day("2026-11-25"));
    let (first, mut first_writer, _) = open(&folder.file());
    let (second, mut second_writer, _) = open(&folder.file());
    for round in 1..=20 {
        add(&first, today, A, cost(1));
        add(&second, today, A, cost(100));
        // Both know their own costs at once, and those of the other after a second.
        first_writer.write(today);
        second_writer.write(today);
        assert_eq!(second.spent(Payer::Client("a"), today).day, round * 101);
        assert_eq!(first.spent(Payer::Client("a"), today).day, round * 101 - 100);
        first_writer.write(today);
        assert_eq!(first.spent(Payer::Client("a"), today).day, round * 101);
    }
    assert_eq!(rows(&first), rows(&second));
    assert_eq!(totals(&folder.file()), (40, 2020));
}

/// Threads add to one or two ledgers on a file, while rows are written and reports run. Every report has all requests
/// that were added before it, none twice.
#[test]
fn reports_under_load_are_exact() {
    let (folder, today) = (Folder::new(), day("2026-11-25"));
    let (ledger, mut writer, seen) = open(&folder.file());
    let (begun, ended, is_over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for n in 0..20_000_u64 {
                    let labels = if n % 2 == 0 { A } else { B };
                    begun.fetch_add(1, Ordering::SeqCst);
                    add(&ledger, today, labels, cost(1));
                    ended.fetch_add(1, Ordering::SeqCst);
                    if n % 100 == 0 {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            });
        }
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                writer.write(today);
            }
        });
        let (mut reports, mut faults) = (0, Vec::new());
        while ended.load(Ordering::SeqCst) < 40_000 {
            let low = ended.load(Ordering::SeqCst);
            let query = UsageQuery::parse(Some("by=backend&format=csv"), today).unwrap();
            let text = ledger.report(query).map(|report| report.encode().1);
            let spent = ledger.spent(Payer::Backend("x"), today).day;
            let high = begun.load(Ordering::SeqCst);
            let row = text.as_ref().ok().and_then(|text| text.lines().nth(1)).unwrap_or("x,0");
            let found: u64 = row.split(',').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
            if !(low..=high).contains(&found) || !(low..=high).contains(&spent) {
                faults.push(format!("{low} to {high}, reported {found}, spent {spent}: {text:?}"));
            }
            reports += 1;
        }
        is_over.store(true, Ordering::SeqCst);
        assert!(faults.is_empty() && reports > 10, "{reports} reports: {faults:?}");
    });
    assert_eq!(ledger.spent(Payer::Backend("x"), today).day, 40_000);
    writer.finish(Duration::from_secs(1));
    assert_eq!(totals(&folder.file()), (40_000, 40_000));
    assert!(seen.lock().is_empty(), "{seen:?}");
}

#[test]
fn a_locked_file_loses_nothing() {
    let (folder, today) = (Folder::new(), day("2026-11-25"));
    let (ledger, mut writer, seen) = open(&folder.file());
    let lock = Connection::open(folder.file()).unwrap();
    lock.execute_batch("BEGIN EXCLUSIVE").unwrap();
    for round in 1..=3 {
        add(&ledger, today, A, cost(1));
        let since = Instant::now();
        writer.write(today);
        assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
        assert_eq!(ledger.errors(), round);
        assert_eq!(ledger.spent(Payer::Client("a"), today).day, round);
        assert_eq!(rows(&ledger).len(), 1, "a report needs no lock");
    }
    let path = folder.file().display().to_string();
    let failed = format!(
        "error ledger_failed: {path}: database is locked; Zap keeps the rows in memory (1) and tries again each second"
    );
    assert_eq!(*seen.lock(), std::slice::from_ref(&failed));
    lock.execute_batch("ROLLBACK").unwrap();
    writer.write(today);
    writer.write(today);
    let recovered =
        format!("info ledger_recovered: {path}: the rows in memory (1) are written, after 3 failures");
    assert_eq!(*seen.lock(), [failed, recovered]);
    assert_eq!(totals(&folder.file()), (3, 3));
    assert_eq!((ledger.errors(), ledger.unwritten()), (3, 0));
}

#[test]
fn a_full_disk_loses_nothing() {
    let (folder, today) = (Folder::new(), day("2026-11-25"));
    let (ledger, mut writer, seen) = open(&folder.file());
    let limit = |writer: &Writer, pages: i64| {
        let sql = format!("PRAGMA max_page_count = {pages}");
        writer.file.connection.query_row(&sql, (), |row| row.get::<_, i64>(0)).unwrap()
    };
    limit(&writer, 4);
    for n in 0..1000_u64 {
        let labels = Labels { client: &format!("client-{}", n % 500), ..A };
        add(&ledger, today, labels, cost(n));
        if n % 250 == 249 {
            writer.write(today);
        }
    }
    assert_eq!(ledger.errors(), 4);
    assert_eq!((rows(&ledger).len(), totals(&folder.file())), (500, (0, 0)));
    assert_eq!(ledger.spent(Payer::Backend("x"), today).day, 499_500);
    limit(&writer, 100_000);
    writer.write(today);
    assert_eq!(totals(&folder.file()), (1000, 499_500));
    assert_eq!(rows(&ledger).len(), 500);
    let seen = seen.lock();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(
        seen[0].contains("ledger_failed") && seen[0].contains("full; Zap keeps the rows in memory (250) and"),
        "{seen:?}"
    );
    assert!(
        seen[1].contains("ledger_recovered") && seen[1].contains("(500) are written, after 4 fail"),
        "{seen:?}"
    );
}

#[test]
fn a_file_that_is_moved_or_deleted_is_not_written_to() {
    let (folder, today) = (Folder::new(), day("2026-11-25"));
    let (ledger, mut writer, seen) = open(&folder.file());
    let aside = folder.0.join("aside");
    fs::rename(folder.file(), &aside).unwrap();
    add(&ledger, today, A, cost(1));
    writer.write(today);
    fs::write(folder.file(), "").unwrap();
    writer.write(today);
    assert_eq!(ledger.errors(), 2);
    fs::rename(&aside, folder.file()).unwrap();
    writer.write(today);
    assert_eq!(totals(&folder.file()), (1, 1));
    let seen = seen.lock();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(
        seen[0].contains(
            "the file was moved or deleted; move it back, since a restart loses what is not yet written"
        ),
        "{seen:?}"
    );
}

#[test]
fn the_thread_writes_what_is_pending_when_it_stops() {
    let (folder, today) = (Folder::new(), Day::of(SystemTime::now()));
    let (ledger, writer, seen) = open(&folder.file());
    let handle = writer.start().unwrap();
    add(&ledger, today, A, cost(1));
    let since = Instant::now();
    handle.stop();
    assert!(since.elapsed() < Duration::from_secs(1));
    assert_eq!(totals(&folder.file()), (1, 1));
    assert!(seen.lock().is_empty());
    let query = UsageQuery::parse(None, today).unwrap();
    assert!(matches!(ledger.report(query), Err(ReportError::Unavailable(_))));
}

#[test]
fn a_lock_that_stays_cannot_hold_up_the_end() {
    let (folder, today) = (Folder::new(), day("2026-11-25"));
    let (ledger, writer, seen) = open(&folder.file());
    let lock = Connection::open(folder.file()).unwrap();
    lock.execute_batch("BEGIN IMMEDIATE").unwrap();
    add(&ledger, today, A, cost(1));
    let since = Instant::now();
    writer.finish(Duration::from_millis(80));
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    let seen = seen.lock();
    assert!(seen.last().unwrap().contains("Zap stops and loses the rows in memory (1)"), "{seen:?}");
}

#[test]
fn a_copy_of_the_files_of_a_crash_has_all_that_was_committed() {
    let (folder, today) = (Folder::new(), day("2026-11-25"));
    let (ledger, mut writer, _) = open(&folder.file());
    for n in 1..=50 {
        add(&ledger, today, Labels { client: &n.to_string(), ..A }, cost(1));
        writer.write(today);
        let copy = Folder::new();
        for suffix in ["", "-wal"] {
            let name = format!("zap.db{suffix}");
            fs::copy(folder.0.join(&name), copy.0.join(&name)).unwrap();
        }
        // The end of a commit that was cut off is ignored.
        let mut log = fs::OpenOptions::new().append(true).open(copy.0.join("zap.db-wal")).unwrap();
        log.write_all(&[0x5a; 3000]).unwrap();
        drop(log);
        let (_ledger, copy_writer, _) = open(&copy.file());
        copy_writer.finish(Duration::from_secs(1));
        assert_eq!(totals(&copy.file()), (n, n));
    }
}

/// Set in the child process of the next test: the path of the ledger.
const CHILD: &str = "ZAP_TEST_LEDGER_CHILD";

/// Not a test of its own: what the child of the next test runs until it is killed. Prints what it has written.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let (ledger, mut writer, _) = open(Path::new(&path));
    let today = day("2026-11-25");
    for n in 1.. {
        add(&ledger, today, Labels { client: &(n % 97).to_string(), ..A }, cost(1));
        writer.write(today);
        println!("\nwritten {n}");
    }
}

#[test]
fn a_kill_loses_no_committed_row_and_corrupts_nothing() {
    let folder = Folder::new();
    let mut known = 0;
    for round in 0..20 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "telemetry::ledger::tests::child_that_writes_until_it_is_killed",
                "--nocapture",
            ])
            .env(CHILD, folder.file())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut written = 0;
        let mut lines = output.lines().map_while(Result::ok);
        let number = |line: &str| line.strip_prefix("written ").and_then(|n| n.parse::<u64>().ok());
        while written < 1 + round * 17 {
            written = number(&lines.next().unwrap()).unwrap_or(written);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        written = lines.filter_map(|line| number(&line)).last().unwrap_or(written);
        let (requests, cost) = {
            let (ledger, _writer, _) = open(&folder.file());
            assert!(!rows(&ledger).is_empty());
            totals(&folder.file())
        };
        // The child may have been killed between a commit and its line.
        let least = known + written;
        assert!((least..=least + 1).contains(&requests), "round {round}: {requests}, at least {least}");
        assert_eq!(cost, requests);
        known = requests;
    }
}

#[test]
fn a_file_that_is_no_ledger_is_refused_and_stays_as_it_is() {
    let folder = Folder::new();
    let path = folder.file();
    let foreign = |sql: &str| {
        let _ = fs::remove_file(&path);
        Connection::open(&path).unwrap().execute_batch(sql).unwrap();
        fs::read(&path).unwrap()
    };
    let mut damaged = {
        let (ledger, writer, _) = open(&path);
        for n in 0..2000 {
            let labels = Labels { client: &format!("client-{n}"), ..A };
            add(&ledger, day("2026-11-25"), labels, cost(1));
        }
        writer.finish(Duration::from_secs(1));
        fs::read(&path).unwrap()
    };
    let newer = {
        let mut bytes = damaged.clone();
        bytes[60..64].copy_from_slice(&2_u32.to_be_bytes());
        bytes
    };
    damaged[3 * 4096..6 * 4096].fill(0xaa);
    let mut truncated = damaged.clone();
    truncated.truncate(5000);
    let shown = path.display();
    let cases = [
        (b"# My notes\n".repeat(40), "it is not an SQLite file"),
        (b"x".to_vec(), "it is not an SQLite file"),
        (vec![0; 4096], "it is not an SQLite file"),
        (foreign("CREATE TABLE users(name TEXT)"), "it is an SQLite file of another program"),
        (
            foreign("PRAGMA application_id = -7; CREATE TABLE usage(day TEXT)"),
            "it is an SQLite file of another program",
        ),
        (
            foreign("PRAGMA application_id = 1516335180; PRAGMA user_version = 1; CREATE TABLE t(a)"),
            "its table is not that of a ledger: ",
        ),
        (newer, "it is a ledger of format 2, this Zap knows 1"),
        (damaged, "it is damaged: "),
        (truncated, "database disk image is malformed"),
    ];
    for (bytes, cause) in cases {
        fs::write(&path, &bytes).unwrap();
        let error = Ledger::open(&path, Box::new(|_, _, _| {})).unwrap_err();
        assert!(error.starts_with(&format!("cannot use the ledger {shown}: ")), "{error}");
        assert!(error.contains(cause), "{error}");
        let advice = format!("; move it aside, for example: mv {shown} {shown}.bad");
        assert!(error.contains(&advice), "{error}");
        if !cause.starts_with("its table") {
            assert_eq!(fs::read(&path).unwrap(), bytes, "{cause}");
        }
    }
}

/// The write-ahead log of a ledger that is refused is not moved into its file.
#[test]
fn a_damaged_file_with_a_log_stays_as_it_is() {
    let (folder, copy) = (Folder::new(), Folder::new());
    let (ledger, mut writer, _) = open(&folder.file());
    add(&ledger, day("2026-11-25"), A, cost(1));
    writer.write(day("2026-11-25"));
    let log = fs::read(folder.0.join("zap.db-wal")).unwrap();
    let mut file = fs::read(folder.file()).unwrap();
    file[60..64].copy_from_slice(&2_u32.to_be_bytes());
    // A page that no page refers to.
    file[28..32].copy_from_slice(&9_u32.to_be_bytes());
    file.resize(9 * 4096, 0xaa);
    fs::write(copy.file(), &file).unwrap();
    fs::write(copy.0.join("zap.db-wal"), &log).unwrap();
    let error = Ledger::open(&copy.file(), Box::new(|_, _, _| {})).unwrap_err();
    let shown = copy.file().display().to_string();
    assert!(error.ends_with(&format!("mv {shown} {shown}.bad && mv {shown}-wal {shown}.bad-wal")), "{error}");
    assert!(fs::read(copy.file()).unwrap() == file, "{error}");
    assert!(fs::read(copy.0.join("zap.db-wal")).unwrap() == log, "{error}");
}

#[test]
fn a_place_that_cannot_hold_a_ledger_is_refused_with_a_way_out() {
    let folder = Folder::new();
    let root = folder.0.display();
    let refused = |path: &Path| Ledger::open(path, Box::new(|_, _, _| {})).unwrap_err();
    assert_eq!(
        refused(&folder.0.join("no where/zap.db")),
        format!(
            "cannot use the ledger {root}/no where/zap.db: the directory {root}/no where does not exist; create it, \
             for example: mkdir -p '{root}/no where'"
        )
    );
    assert_eq!(refused(&folder.0), format!("cannot use the ledger {root}: it is not a file"));
    let (path, shown) = (folder.file(), folder.file().display().to_string());
    // The log of a ledger whose file was moved after a crash.
    fs::write(folder.0.join("zap.db-wal"), "rows").unwrap();
    fs::write(folder.0.join("zap.db.bad"), "an older one").unwrap();
    assert_eq!(
        refused(&path),
        format!(
            "cannot use the ledger {shown}: the file is missing or empty, but its write-ahead log is there; move it \
             aside, for example: mv {shown}-wal {shown}.bad2-wal"
        )
    );
    fs::remove_file(folder.0.join("zap.db-wal")).unwrap();
    fs::write(&path, "").unwrap();
    drop(open(&path));
    let lock = Connection::open(&path).unwrap();
    lock.execute_batch("BEGIN EXCLUSIVE").unwrap();
    assert_eq!(refused(&path), format!("cannot use the ledger {shown}: another program has locked it"));
}

#[test]
fn a_sum_out_of_range_stays_at_the_largest_integer() {
    let (folder, today) = (Folder::new(), day("2026-11-25"));
    let (ledger, mut writer, seen) = open(&folder.file());
    for _ in 0..3 {
        add(&ledger, today, A, cost(u64::MAX));
        writer.write(today);
    }
    assert_eq!(rows(&ledger), ["2026-11-25,a,x,m,3,0,90,30,60,15,9223372036.854775807"]);
    assert_eq!(ledger.unwritten(), 0);
    assert!(seen.lock().is_empty(), "{seen:?}");
}

#[test]
fn a_usage_becomes_amounts() {
    let usage =
        crate::protocol::usage::Usage { input: 9, cached: 4, cache_write: 2, output: 7, reasoning: 3 };
    let want =
        Amounts { requests: 1, estimated: 1, input: 9, cached: 4, output: 7, reasoning: 3, cost_nano_usd: 5 };
    assert_eq!(Amounts::of_request(usage, true, 5), want);
}

/// Adds as a worker does.
fn add(ledger: &Ledger, day: Day, labels: Labels<'_>, amounts: Amounts) {
    let key = std::hash::BuildHasher::hash_one(
        &std::hash::BuildHasherDefault::<std::hash::DefaultHasher>::default(),
        labels,
    );
    ledger.add(key as usize, day, (key, labels), amounts);
}

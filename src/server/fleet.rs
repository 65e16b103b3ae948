//! The fleet thread: runs health checks, polls lists of models, rebuilds the schedule, reloads the configuration and
//! watches its files.
//!
//! One loop replaces the snapshot, so two tasks never do so at the same time. It has its own thread, since a schedule
//! for thousands of backends takes long to build, and clients must not wait for it.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinHandle, LocalSet, spawn_blocking, spawn_local};

use crate::clock;
use crate::config::{Config, Files, LoadError, Server};
use crate::gateway::state::{Generation, Shared};
use crate::server::first_checks::FirstChecks;
use crate::server::setup::Options;
use crate::server::watch::Watch;
use crate::server::{exporter, listing, probe};
use crate::time::{MILLI, Nanos};
use crate::upstream::Upstream;
use crate::upstream::fleet::Snapshot;
use crate::upstream::fleet::prepare;
use crate::upstream::proxy;

/// Most threads for blocking work: name look-ups of the probes, and files.
const MAX_BLOCKING: usize = 16;

/// After a rebuild of the schedule that took longer than this, the loop pauses before the next one.
const QUICK_REBUILD: Nanos = MILLI;

/// How often budgets are read from the ledger, which other processes may write to, and backends are sampled for the
/// history.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);

/// The fleet thread; dropping this value ends the thread.
#[derive(Debug)]
pub(crate) struct FleetThread {
    /// Sends nothing; dropping it ends the thread.
    stop: oneshot::Sender<Infallible>,
    /// Receives nothing; closed when the thread ends.
    ended: oneshot::Receiver<Infallible>,
    thread: std::thread::JoinHandle<()>,
}

impl FleetThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// Returns the error of the system if the runtime or the thread cannot be created.
    pub(crate) fn start(shared: Arc<Shared>, options: Arc<Options>) -> io::Result<Self> {
        FleetThread::run(async move || watch(&shared, &options).await)
    }

    fn run(work: impl AsyncFnOnce() + Send + 'static) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(MAX_BLOCKING)
            .build()?;
        let (stop, stopped) = oneshot::channel();
        let (alive, ended) = oneshot::channel();
        let run = move || {
            let _alive = alive;
            runtime.block_on(async {
                tokio::select! {
                    () = work() => {}
                    _ = stopped => {}
                }
            });
            // A name look-up or a file that hangs must not delay the exit of the process.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("zap-fleet".into()).spawn(run)?;
        Ok(FleetThread { stop, ended, thread })
    }

    /// Waits until the thread ends by itself, which only a panic causes.
    pub(crate) async fn ended(&mut self) {
        let _ = (&mut self.ended).await;
    }

    /// Ends the thread and waits for it. Returns `false` if the thread panicked.
    pub(crate) fn join(self) -> bool {
        drop(self.stop);
        self.thread.join().is_ok()
    }
}

/// The loop of the fleet thread; runs until the future is dropped.
async fn watch(shared: &Arc<Shared>, options: &Options) {
    let local = LocalSet::new();
    let files = Watch::new(shared.current.load().config.files.clone(), options.watch);
    let each_second = async {
        loop {
            shared.history.look(&shared.current.load().backends, clock::now(), SystemTime::now());
            tokio::time::sleep(SYNC_INTERVAL).await;
            shared.sync_budgets();
        }
    };
    let watching = async {
        let (mut probes, mut listings) = (Tasks::default(), Tasks::default());
        let first_checks = Rc::new(FirstChecks::default());
        let mut reading = None;
        loop {
            let watched =
                |shared: Arc<Shared>, id| probe::watch(first_checks.begin(shared.clone()), shared, id);
            probes.update(shared, |_, b| probe::is_checked(b), watched);
            listings.update(shared, listing::is_asked, listing::watch);
            shared.served_models.keep(|id| listings.0.contains_key(&id));
            let began = clock::now();
            let next = shared.rebuild();
            let took = clock::now() - began;
            if took > QUICK_REBUILD {
                // If many backends change one after the other, the probes still get half of the time.
                tokio::time::sleep(Duration::from_nanos(took)).await;
            }
            let wait =
                next.map_or(Duration::MAX, |at| Duration::from_nanos(at.saturating_sub(clock::now()) + 1));
            tokio::select! {
                () = shared.fleet_changed.notified() => {}
                () = tokio::time::sleep(wait) => {}
                () = shared.reload_wanted.notified(), if reading.is_none() => {
                    options.supervisor.reloading();
                    let before = shared.current.load_full();
                    // The file may be on a disk that hangs; the loop continues meanwhile.
                    reading = Some(spawn_blocking(move || read(&before)));
                }
                read = result_of(&mut reading) => {
                    reading = None;
                    let (read, listed) = read.unwrap_or_else(|_| {
                        (Err("reading the file panicked".into()), shared.current.load().config.files.look())
                    });
                    reload(shared, read);
                    files.loaded(listed);
                    options.supervisor.reloaded();
                }
            }
        }
    };
    local
        .run_until(async {
            tokio::select! {
                () = watching => {}
                () = each_second => {}
                () = exporter::export(shared) => {}
                () = files.run(shared) => {}
            }
        })
        .await;
}

/// The running tasks of one kind, by backend id.
#[derive(Default)]
struct Tasks(HashMap<u64, JoinHandle<()>>);

impl Tasks {
    /// Stops the tasks of backends that are gone or need none any more, and starts those of other backends.
    fn update<T>(
        &mut self,
        shared: &Arc<Shared>,
        is_needed: impl Fn(&Generation, &Upstream) -> bool,
        start: impl Fn(Arc<Shared>, u64) -> T,
    ) where
        T: Future<Output = ()> + 'static,
    {
        let current = shared.current.load();
        let needed: HashSet<u64> =
            current.backends.iter().filter(|b| is_needed(&current, b)).map(|b| b.state.id).collect();
        self.0.retain(|id, task| {
            let keep = needed.contains(id) && !task.is_finished();
            if !keep {
                task.abort();
            }
            keep
        });
        for id in needed {
            self.0.entry(id).or_insert_with(|| spawn_local(start(shared.clone(), id)));
        }
    }
}

/// Waits for the result of `reading`; pending forever if there is none.
async fn result_of<T>(reading: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    match reading {
        Some(reading) => reading.await,
        None => std::future::pending().await,
    }
}

/// Replaces the configuration by a new one. A configuration with faults changes nothing.
fn reload(shared: &Arc<Shared>, read: Result<Snapshot, String>) {
    match read {
        Ok(next) => {
            for warning in &next.config.warnings {
                shared.telemetry.log.event("warn", "config", warning);
            }
            let n = next.backends.len();
            let proxies = proxy::summary(&next.config.backends)
                .filter(|text| Some(text) != proxy::summary(&shared.current.load().config.backends).as_ref());
            shared.replace(next);
            if let Some(text) = proxies {
                shared.telemetry.log.event("info", "proxy", &text);
            }
            // The limiter may now track more keys than allowed; dropping them can take long.
            let shared_for_shrink = shared.clone();
            drop(spawn_blocking(move || shared_for_shrink.shrink()));
            shared.telemetry.reloads.applied();
            shared.telemetry.log.event(
                "info",
                "reload",
                &format!("the new configuration is in effect: {n} backends"),
            );
        }
        Err(why) => {
            shared.telemetry.reloads.rejected(&why);
            let text = format!("the old configuration stays in effect: {why}");
            shared.telemetry.log.event("error", "reload", &text);
        }
    }
}

/// Reads the configuration file of `before` again. Returns, too, the files that were read.
fn read(before: &Snapshot) -> (Result<Snapshot, String>, Files) {
    let mut files = Files::default();
    let read = read_and_list(before, &mut files);
    (read, files)
}

fn read_and_list(before: &Snapshot, files: &mut Files) -> Result<Snapshot, String> {
    let Some(file) = &before.config.file else { return Err("it was not read from a file".into()) };
    let mut config = Config::load_and_list(file, files).map_err(|error| match error {
        LoadError::Missing(path) => format!("there is no file at {}", path.display()),
        LoadError::Invalid(faults) => faults.to_string().replace('\n', "; "),
    })?;
    let mut changed = config.server.changed_keys(&before.config.server);
    if config.ledger != before.config.ledger {
        changed.push("ledger.path");
    }
    if !changed.is_empty() {
        config.warnings.push(format!(
            "{} changed; this needs a restart, until then the old values stay in effect",
            changed.join(", ")
        ));
    }
    if config.server.admin != before.config.server.admin {
        // The listener stays where it is until the restart, and so must its token.
        config.admin = before.config.admin.clone();
    }
    config.server = Server::clone(&before.config.server);
    if config.tls == before.config.tls {
        // The keys of session tickets stay the same.
        config.tls.clone_from(&before.config.tls);
    }
    if config.admin.tls == before.config.admin.tls {
        config.admin.tls.clone_from(&before.config.admin.tls);
    }
    config.ledger.clone_from(&before.config.ledger);
    if config.otlp == before.config.otlp {
        // The connection to the collector stays open.
        config.otlp.clone_from(&before.config.otlp);
    }
    prepare(config, Some(before))
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[test]
    fn the_thread_ends_on_join_and_a_panic_is_reported() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let held = Arc::new(());
        let in_thread = held.clone();
        let mut fleet = FleetThread::run(async move || {
            let _held = in_thread;
            pending().await
        })
        .unwrap();
        let early = runtime.block_on(clock::within(Duration::from_millis(20), fleet.ended()));
        assert_eq!(early, Err(clock::LimitExpired));
        assert!(fleet.join());
        assert_eq!(Arc::strong_count(&held), 1, "the thread dropped everything");
        let mut broken = FleetThread::run(async || panic!("a bug")).unwrap();
        let ended = runtime.block_on(clock::within(Duration::from_secs(10), broken.ended()));
        assert_eq!(ended, Ok(()));
        assert!(!broken.join());
    }
}

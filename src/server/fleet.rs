//! The watch over the fleet: probes, the schedule in step with the backends' states, reloads.
//!
//! One loop does all of it, so that no two of them replace the snapshot at once. It has a thread of its own: making a
//! schedule for very many backends takes its time, and clients must not wait for that.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinHandle, LocalSet, spawn_blocking, spawn_local};

use crate::clock;
use crate::config::{Config, LoadError, Server};
use crate::gateway::state::Shared;
use crate::server::probe;
use crate::time::{MILLI, Nanos};
use crate::upstream::fleet::Snapshot;
use crate::upstream::fleet::prepare;

/// Threads for what blocks: name look-ups of the probes, and files.
const MAX_BLOCKING: usize = 16;

/// A schedule that takes longer than this to make is not made again at once.
const QUICK: Nanos = MILLI;

/// The thread that watches the fleet; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct FleetWatch {
    /// Sends nothing: that it is gone ends the thread.
    stop: oneshot::Sender<Infallible>,
    /// The other end is gone when the thread has ended.
    ended: oneshot::Receiver<Infallible>,
    thread: std::thread::JoinHandle<()>,
}

impl FleetWatch {
    /// Starts it.
    ///
    /// # Errors
    /// The system has no thread, or no files for one.
    pub(crate) fn start(shared: Arc<Shared>) -> io::Result<Self> {
        FleetWatch::run(async move || watch(&shared).await)
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
            // A name look-up or a file that hangs must not hold the process.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("zap-fleet".into()).spawn(run)?;
        Ok(FleetWatch { stop, ended, thread })
    }

    /// Waits until the thread has ended by itself, which only a bug makes it do.
    pub(crate) async fn ended(&mut self) {
        let _ = (&mut self.ended).await;
    }

    /// Ends it and waits for that. `false` where it failed.
    pub(crate) fn join(self) -> bool {
        drop(self.stop);
        self.thread.join().is_ok()
    }
}

/// Watches until it is dropped.
async fn watch(shared: &Arc<Shared>) {
    let local = LocalSet::new();
    let watching = async {
        let mut probes = Probes::default();
        let mut reading = None;
        loop {
            probes.keep_up(shared);
            let began = clock::now();
            let next = shared.rebuild();
            let took = clock::now() - began;
            if took > QUICK {
                // Where many backends change one after the other, the probes get half of the time.
                tokio::time::sleep(Duration::from_nanos(took)).await;
            }
            let wait =
                next.map_or(Duration::MAX, |at| Duration::from_nanos(at.saturating_sub(clock::now()) + 1));
            tokio::select! {
                () = shared.fleet_changed.notified() => {}
                () = tokio::time::sleep(wait) => {}
                () = shared.reload_wanted.notified(), if reading.is_none() => {
                    let before = shared.snapshot.load_full();
                    // A file may stand on a disk that hangs: all else goes on meanwhile.
                    reading = Some(spawn_blocking(move || read(&before)));
                }
                read = ready(&mut reading) => {
                    reading = None;
                    reload(shared, read.unwrap_or_else(|_| Err("it could not be read".into())));
                }
            }
        }
    };
    local.run_until(watching).await;
}

/// The probes under way, by the backend's id.
#[derive(Default)]
struct Probes(HashMap<u64, JoinHandle<()>>);

impl Probes {
    /// Ends those of backends that are gone or drained, and begins those of new ones.
    fn keep_up(&mut self, shared: &Arc<Shared>) {
        let snapshot = shared.snapshot.load();
        let takes_requests: HashSet<u64> =
            snapshot.backends.iter().filter(|b| b.conf.weight > 0).map(|b| b.state.id).collect();
        self.0.retain(|id, probe| {
            let stays = takes_requests.contains(id) && !probe.is_finished();
            if !stays {
                probe.abort();
            }
            stays
        });
        for b in snapshot.backends.iter().filter(|b| b.conf.weight > 0) {
            let begin = || spawn_local(probe::watch(shared.clone(), b.state.id));
            self.0.entry(b.state.id).or_insert_with(begin);
        }
    }
}

/// What a file was read to; never, where none is being read.
async fn ready<T>(reading: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    match reading {
        Some(reading) => reading.await,
        None => std::future::pending().await,
    }
}

/// Puts a new configuration in place of the present one; a bad one changes nothing.
fn reload(shared: &Arc<Shared>, read: Result<(Snapshot, Vec<String>), String>) {
    match read {
        Ok((next, warnings)) => {
            for warning in &warnings {
                shared.telemetry.log.event("warn", "config", warning);
            }
            let n = next.backends.len();
            shared.replace(next);
            // Very many keys may be too much now.
            let limiter = shared.clone();
            drop(spawn_blocking(move || limiter.limiter.shrink()));
            shared.telemetry.reloads.applied.fetch_add(1, Ordering::Relaxed);
            shared.telemetry.log.event(
                "info",
                "reload",
                &format!("the new configuration is in place: {n} backends"),
            );
        }
        Err(why) => {
            shared.telemetry.reloads.rejected.fetch_add(1, Ordering::Relaxed);
            let text = format!("the configuration stays as it was: {why}");
            shared.telemetry.log.event("error", "reload", &text);
        }
    }
}

/// The fleet as its file describes it now, and what to warn of.
fn read(before: &Snapshot) -> Result<(Snapshot, Vec<String>), String> {
    let Some(file) = &before.config.file else { return Err("it came from no file".into()) };
    let mut config = Config::load(file).map_err(|error| match error {
        LoadError::Missing(path) => format!("no file at {}", path.display()),
        LoadError::Invalid(faults) => faults.to_string().replace('\n', "; "),
    })?;
    let mut warnings = std::mem::take(&mut config.warnings);
    let changed = config.server.changed_keys(&before.config.server);
    if !changed.is_empty() {
        warnings
            .push(format!("{} changed: this needs a restart, until then the old stays", changed.join(", ")));
    }
    config.server = Server::clone(&before.config.server);
    Ok((prepare(config, Some(before))?, warnings))
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[test]
    fn its_thread_ends_when_told_and_says_when_a_bug_ended_it() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let held = Arc::new(());
        let theirs = held.clone();
        let mut fleet = FleetWatch::run(async move || {
            let _held = theirs;
            pending().await
        })
        .unwrap();
        let early = runtime.block_on(clock::within(Duration::from_millis(20), fleet.ended()));
        assert_eq!(early, Err(clock::Late));
        assert!(fleet.join());
        assert_eq!(Arc::strong_count(&held), 1, "nothing of it is left");
        let mut broken = FleetWatch::run(async || panic!("a bug")).unwrap();
        let ended = runtime.block_on(clock::within(Duration::from_secs(10), broken.ended()));
        assert_eq!(ended, Ok(()));
        assert!(!broken.join());
    }
}

//! The watch over the fleet, on the control thread: probes, the schedule in step with the backends' states, reloads.
//!
//! One loop does all of it, so that no two of them replace the snapshot at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::{JoinError, JoinHandle, LocalSet, spawn_blocking, spawn_local};

use crate::clock;
use crate::config::{Config, LoadError, Server};
use crate::state::snapshot::Snapshot;
use crate::state::{Shared, prepare};
use crate::upstream::probe;

/// Watches until it is dropped.
pub async fn watch(shared: &Arc<Shared>) {
    let local = LocalSet::new();
    let watching = async {
        let mut probes = Probes::default();
        let mut reading = None;
        loop {
            probes.keep_up(shared);
            let next = shared.rebuild();
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
        let takes_requests = |id: u64| snapshot.backends.iter().any(|b| b.live.id == id && b.conf.weight > 0);
        self.0.retain(|id, probe| {
            let stays = takes_requests(*id) && !probe.is_finished();
            if !stays {
                probe.abort();
            }
            stays
        });
        for b in snapshot.backends.iter().filter(|b| b.conf.weight > 0) {
            let begin = || spawn_local(probe::watch(shared.clone(), b.live.id));
            self.0.entry(b.live.id).or_insert_with(begin);
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
                shared.log.event("warn", "config", warning);
            }
            let n = next.backends.len();
            shared.replace(next);
            // Very many keys may be too much now.
            let limiter = shared.clone();
            drop(spawn_blocking(move || limiter.limiter.shrink()));
            shared.reloads.applied.fetch_add(1, Ordering::Relaxed);
            shared.log.event("info", "reload", &format!("the new configuration is in place: {n} backends"));
        }
        Err(why) => {
            shared.reloads.rejected.fetch_add(1, Ordering::Relaxed);
            let text = format!("the configuration stays as it was: {why}");
            shared.log.event("error", "reload", &text);
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
    let changed = config.server.differs(&before.config.server);
    if !changed.is_empty() {
        warnings
            .push(format!("{} changed: this needs a restart, until then the old stays", changed.join(", ")));
    }
    config.server = Server::clone(&before.config.server);
    Ok((prepare(config, Some(before))?, warnings))
}

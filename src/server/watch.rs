//! Watches the files of the configuration by their content, and asks for a reload when one has changed.
//!
//! Kubernetes changes a mounted ConfigMap by a rename of the link `..data`, which changes no file that a watch of the
//! system would report. So Zap reads the files, which costs little: they are few and small.

use std::cell::RefCell;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::config::Files;
use crate::gateway::state::Shared;

/// Time from one look at the files to the next.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The files must be unchanged for this long before the reload: a file may be half written.
const QUIET: Duration = Duration::from_millis(500);

/// The files that the last try to load the configuration has read, and their content at that time.
#[derive(Debug)]
pub(crate) struct Watch {
    loaded: RefCell<Files>,
    /// Notified after each try.
    tried: Notify,
    /// Whether the files are watched whatever `reload.watch` says.
    always: bool,
}

impl Watch {
    pub(crate) fn new(loaded: Files, always: bool) -> Self {
        Watch { loaded: RefCell::new(loaded), tried: Notify::new(), always }
    }

    /// Records which files a try has read, with or without success.
    pub(crate) fn loaded(&self, files: Files) {
        self.loaded.replace(files);
        self.tried.notify_waiters();
    }

    /// Watches until the future is dropped. Must run on the thread that calls [`loaded`](Self::loaded).
    pub(crate) async fn run(&self, shared: &Shared) {
        loop {
            sleep(LOOK_INTERVAL).await;
            if !(self.always || shared.current.load().config.watch) {
                continue;
            }
            let loaded = self.loaded.borrow().clone();
            let Some(text) = settled_change(&loaded).await else { continue };
            if *self.loaded.borrow() != loaded {
                // A reload by SIGHUP was faster.
                continue;
            }
            shared.telemetry.log.event("info", "watch", &text);
            let tried = self.tried.notified();
            shared.reload_wanted.notify_one();
            tried.await;
        }
    }
}

/// Waits until the files stop changing, then names those that differ from `loaded`. Returns `None` if none does.
async fn settled_change(loaded: &Files) -> Option<String> {
    let mut seen = look(loaded).await?;
    loaded.changed(&seen).next()?;
    loop {
        sleep(QUIET).await;
        let now = look(loaded).await?;
        if now == seen {
            break;
        }
        seen = now;
    }
    let mut changed = loaded.changed(&seen);
    let first = changed.next()?.display();
    Some(match changed.count() {
        0 => format!("{first} changed"),
        more => format!("{first} and {more} more files changed"),
    })
}

/// Reads the files. A disk that hangs stops nothing but the watch.
async fn look(files: &Files) -> Option<Files> {
    let files = files.clone();
    spawn_blocking(move || files.look()).await.ok()
}

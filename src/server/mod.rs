//! The control thread: it accepts, hands connections to workers and ends the process. It does nothing that takes long.

pub(crate) mod worker;

pub(crate) mod fleet;

pub(crate) mod probe;

pub(crate) mod drain;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::Receiver;

use crate::config::Config;
use crate::gateway::state::Shared;
use crate::server::drain::Order;
use crate::server::fleet::FleetWatch;
use crate::server::worker::Worker;
use crate::upstream::connect::is_lack_of_files;

/// Open files that Zap needs beside connections: its runtimes, streams and the listener.
const OWN_FILES: u64 = 32;
const FILES_PER_WORKER: u64 = 4;

/// How long nothing is said anew of the same trouble with accepting.
const ACCEPT_SILENCE: Duration = Duration::from_secs(10);

/// How long accepting pauses when the system has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until told to stop. `true`: nothing was cut.
///
/// # Errors
/// The listener cannot be used, or no thread can be started.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    listener: std::net::TcpListener,
    mut orders: Receiver<Order>,
) -> std::io::Result<bool> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let config = shared.snapshot.load().config.clone();
    let room = FileRoom::of(&shared, &config);
    let upstreams = (room.upstreams / config.server.workers).max(1);
    let workers: Result<Vec<_>, _> =
        (0..config.server.workers).map(|id| Worker::start(id, shared.clone(), upstreams)).collect();
    let workers = workers?;
    let mut fleet = FleetWatch::start(shared.clone())?;
    let whole = {
        let clients = accept(&shared, &listener, &workers, room.clients);
        // Accepting and probing go on while the running requests end.
        let ending = async {
            let order = loop {
                match orders.recv().await {
                    Some(Order::Reload) => shared.reload_wanted.notify_one(),
                    order => break order,
                }
            };
            shared.start_draining();
            shared.telemetry.log.event(
                "info",
                "drain",
                "shutting down: new requests are refused, running ones may end",
            );
            let limit = if order == Some(Order::Drain) { config.server.drain } else { Duration::ZERO };
            drain::drain(&workers, || running(&shared, &workers), limit, &mut orders).await
        };
        tokio::select! {
            whole = ending => whole,
            () = fleet.ended() => false,
            () = clients => false,
        }
    };
    shared.telemetry.log.event(
        "info",
        "stop",
        if whole { "all requests ended" } else { "some requests were cut" },
    );
    Ok(whole & fleet.join() & workers.into_iter().all(is_joined))
}

/// Joins a worker whose connections are gone; one that still has some is left to the end of the process.
fn is_joined(worker: Worker) -> bool {
    worker.connections() > 0 || worker.join()
}

/// Requests whose body is still to come, that wait for a slot or hold one, and answers under way.
fn running(shared: &Shared, workers: &[Worker]) -> usize {
    let uploads: usize = workers.iter().map(Worker::uploads).sum();
    uploads + shared.admission.in_flight() + shared.admission.depth()
}

/// Connections that the process has files for.
#[derive(Clone, Copy, Debug)]
struct FileRoom {
    /// As many clients as configured, or fewer: at most half of the files.
    clients: usize,
    /// Connections to backends, in use and idle: what clients leave.
    upstreams: usize,
}

impl FileRoom {
    fn of(shared: &Shared, config: &Config) -> Self {
        let limit = getrlimit(Resource::Nofile);
        if let Some(most) = limit.maximum {
            // Where the soft limit may not be raised, it stays.
            let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..limit });
        }
        let wanted = config.server.max_connections;
        let Some(files) = getrlimit(Resource::Nofile).current else {
            return FileRoom { clients: wanted, upstreams: usize::MAX };
        };
        let own = OWN_FILES + FILES_PER_WORKER * config.server.workers as u64 + config.backends.len() as u64;
        let all = usize::try_from(files.saturating_sub(own)).unwrap_or(usize::MAX).max(2);
        let fit = all / 2;
        // A few less are no news.
        if fit + fit / 10 < wanted {
            let text = format!(
                "the limit of {files} open files has room for {fit} connections, not for {wanted}: further ones wait"
            );
            shared.telemetry.log.event("warn", "start", &text);
        }
        let clients = fit.min(wanted);
        FileRoom { clients, upstreams: all - clients }
    }
}

async fn accept(shared: &Shared, listener: &TcpListener, workers: &[Worker], max: usize) {
    let permits = Arc::new(Semaphore::new(max));
    let mut said: Option<Instant> = None;
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, peer)) => {
                let _ = client.set_nodelay(true);
                let alive = workers.iter().filter(|w| !w.is_gone());
                // Without workers the process is of no use: it ends, and whoever minds it starts it anew.
                let Some(worker) = alive.min_by_key(|w| w.connections()) else { return };
                if let Ok(client) = client.into_std() {
                    worker.take(client, peer.ip(), permit);
                }
            }
            Err(e) if is_of_one_client(&e) => {}
            Err(e) => {
                if said.is_none_or(|at| at.elapsed() > ACCEPT_SILENCE) {
                    said = Some(Instant::now());
                    shared.telemetry.log.event(
                        "error",
                        "accept",
                        &format!("no connection can be accepted: {e}"),
                    );
                }
                if e.raw_os_error().map(Errno::from_raw_os_error).is_some_and(is_lack_of_files) {
                    workers.iter().for_each(Worker::free_files);
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_of_one_client(e: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(e.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

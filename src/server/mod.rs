//! The control thread: accepts connections, hands them to workers and shuts the process down. Nothing on this thread
//! takes long.

pub(crate) mod worker;

pub(crate) mod fleet;

mod exporter;

pub(crate) mod probe;

mod listing;

pub(crate) mod live;

pub(crate) mod drain;

pub(crate) mod setup;

pub(crate) mod start;

mod first_checks;

mod watch;

mod control;

mod upgrade;

mod listeners;

pub(crate) mod inherited;

pub(crate) mod supervisor;

mod unix_socket;

use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::mpsc::Receiver;

use crate::client::connection_limit::{ConnectionLimit, RESERVE};
use crate::clock;
use crate::config::Config;
use crate::gateway::state::Shared;
use crate::policy::throttle::Throttle;
use crate::server::control::{Control, End};
use crate::server::drain::{Order, Running};
use crate::server::fleet::FleetThread;
use crate::server::listeners::{Client, Listeners};
use crate::server::setup::Setup;
use crate::server::worker::Worker;
use crate::time::{Nanos, SECOND};
use crate::upstream::connect::is_lack_of_files;

/// Open files that Zap needs in addition to connections: runtimes, standard streams, the listeners, and the reserve of
/// connections.
const RESERVED_FILES: u64 = 32 + RESERVE as u64;
const FILES_PER_WORKER: usize = 4;

/// Most connections to the admin listener; further ones wait. They do not count against `server.max_connections`, so
/// that Zap answers operators when clients have taken all of these.
const MAX_ADMIN_CONNECTIONS: usize = 256;

/// Least time between two log lines about failures to accept.
const ACCEPT_LOG_INTERVAL: Nanos = 10 * SECOND;

/// Pause after a failure to accept, for example because no file descriptor is free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until an order to stop. Returns `true` if all requests finished, `false` if some were cut or a thread failed.
///
/// # Errors
/// Returns the error of the system if the listener cannot be used or a thread cannot be started.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    setup: Setup,
    orders: Receiver<Order>,
) -> std::io::Result<bool> {
    let listeners = Listeners::new(setup.tcp, setup.unix, setup.admin)?;
    let (options, mut unix_file) = (setup.options, setup.unix_file);
    let config = shared.current.load().config.clone();
    let budget = FileBudget::new(&shared, &config);
    let upstreams = (budget.upstreams / config.server.workers).max(1);
    let workers: Result<Vec<_>, _> =
        (0..config.server.workers).map(|id| Worker::start(id, shared.clone(), upstreams)).collect();
    let workers = workers?;
    let mut fleet = FleetThread::start(shared.clone(), options.clone())?;
    let owns_unix = unix_file.is_some();
    let running = Running { shared: &shared, workers: &workers };
    let control = Control { running, supervisor: &options.supervisor, owns_unix };
    if let Some(file) = &mut unix_file {
        file.is_owned = true;
    }
    options.supervisor.ready();
    let ended = {
        let clients = take_clients(
            &shared,
            || listeners.client(),
            &workers,
            ConnectionLimit::new(budget.clients, RESERVE),
        );
        let operators = take_clients(
            &shared,
            || listeners.operator(),
            &workers,
            ConnectionLimit::new(MAX_ADMIN_CONNECTIONS, 0),
        );
        // The gateway accepts and probes while the running requests finish.
        tokio::select! {
            end = control.run(&listeners, orders) => Some(end),
            () = fleet.ended() => None,
            () = clients => None,
            () = operators => None,
        }
    };
    let completed = match ended {
        Some(End::Drained { mut stop, is_idle, end }) => {
            // The limit of connections does not apply to those that wait in the kernel's queue.
            listeners.close(|(client, peer)| {
                if let Some(worker) = least_loaded(&workers) {
                    worker.take(client, peer, None);
                }
            });
            drop(unix_file.take());
            stop.close(end, !is_idle).await
        }
        Some(End::HandedOver { mut stop }) => {
            // What waits in the kernel's queue is the new process's.
            drop(listeners);
            if let Some(file) = &mut unix_file {
                file.is_owned = false;
            }
            let (is_idle, end) = stop.wait_for_connections(config.server.drain).await;
            stop.close(end, !is_idle).await
        }
        None => false,
    };
    shared.telemetry.log.event(
        "info",
        "stop",
        if completed { "all requests finished" } else { "some requests were cut" },
    );
    let are_joined = workers.into_iter().fold(true, |all, worker| all & join(worker));
    let left = shared.telemetry.traces.close(exporter::MAX_FLUSH).await;
    if left > 0 {
        let text = format!("{left} spans were not sent: the collector did not take them in time");
        shared.telemetry.log.event("warn", "otlp", &text);
    }
    Ok(completed & fleet.join() & are_joined)
}

/// The worker with the fewest connections; `None` if no worker is alive.
fn least_loaded(workers: &[Worker]) -> Option<&Worker> {
    workers.iter().filter(|worker| !worker.is_gone()).min_by_key(|worker| worker.connections())
}

/// Joins a worker that has no connections. A worker that still has some is not joined; it ends with the process.
fn join(worker: Worker) -> bool {
    worker.connections() > 0 || worker.join()
}

/// How many connections the limit of open files allows.
#[derive(Clone, Copy, Debug)]
struct FileBudget {
    /// Client connections: as many as configured, but at most half of the files.
    clients: usize,
    /// Connections to backends, active and idle: the rest of the files.
    upstreams: usize,
}

impl FileBudget {
    /// Raises the soft limit of open files to the hard limit and divides the files.
    fn new(shared: &Shared, config: &Config) -> Self {
        let limit = getrlimit(Resource::Nofile);
        if let Some(most) = limit.maximum {
            // If the soft limit cannot be raised, the old one stays in effect.
            let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..limit });
        }
        let wanted = config.server.max_connections;
        let Some(files) = getrlimit(Resource::Nofile).current else {
            return FileBudget { clients: wanted, upstreams: usize::MAX };
        };
        let admin = config.server.admin.map_or(0, |_| MAX_ADMIN_CONNECTIONS);
        let own = admin + FILES_PER_WORKER * config.server.workers + config.backends.len();
        let reserved = RESERVED_FILES + own as u64;
        let available = usize::try_from(files.saturating_sub(reserved)).unwrap_or(usize::MAX).max(2);
        let fit = available / 2;
        // Up to about a tenth less than configured is not worth a warning.
        if fit + fit / 10 < wanted {
            let text = format!(
                "the limit of {files} open files allows {fit} client connections; \
                 server.max_connections is {wanted}: further connections wait"
            );
            shared.telemetry.log.event("warn", "start", &text);
        }
        let clients = fit.min(wanted);
        FileBudget { clients, upstreams: available - clients }
    }
}

/// Takes as many clients of `accept` at once as `limit` allows, and hands each to the worker with the fewest
/// connections. Returns if no worker is alive.
async fn take_clients(
    shared: &Shared,
    accept: impl AsyncFn() -> std::io::Result<Client>,
    workers: &[Worker],
    limit: ConnectionLimit,
) {
    let mut failures = Throttle::new(ACCEPT_LOG_INTERVAL);
    loop {
        let Some(permit) = limit.permit().await else { return };
        match accept().await {
            Ok((client, peer)) => {
                // Without workers the process is of no use and ends, so that its supervisor can restart it.
                let Some(worker) = least_loaded(workers) else { return };
                worker.take(client, peer, Some(limit.upgrade(permit)));
            }
            Err(e) if is_client_error(&e) => {}
            Err(e) => {
                if failures.pass(clock::now()).is_some() {
                    shared.telemetry.log.event("error", "accept", &format!("cannot accept connections: {e}"));
                }
                if e.raw_os_error().map(Errno::from_raw_os_error).is_some_and(is_lack_of_files) {
                    workers.iter().for_each(Worker::free_files);
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whether accepting failed because of one client, so that the next client can be accepted at once.
fn is_client_error(e: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(e.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

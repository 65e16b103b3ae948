//! The control thread: accepts connections, hands them to workers and shuts the process down. Nothing on this thread
//! takes long.

pub(crate) mod worker;

pub(crate) mod fleet;

pub(crate) mod probe;

mod listing;

pub(crate) mod live;

pub(crate) mod drain;

pub(crate) mod setup;

mod watch;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::Receiver;

use crate::config;
use crate::config::Config;
use crate::gateway::state::Shared;
use crate::server::drain::{Order, Stop};
use crate::server::fleet::FleetThread;
use crate::server::setup::Setup;
use crate::server::worker::Worker;
use crate::upstream::connect::is_lack_of_files;
use crate::upstream::proxy;

/// Open files that Zap needs in addition to connections: runtimes, standard streams and the listener.
const RESERVED_FILES: u64 = 32;
const FILES_PER_WORKER: u64 = 4;

/// Least time between two log lines about failures to accept.
const ACCEPT_LOG_INTERVAL: Duration = Duration::from_secs(10);

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
    setup.tcp.set_nonblocking(true)?;
    let listener = TcpListener::from_std(setup.tcp)?;
    let config = shared.current.load().config.clone();
    if let Some(text) = proxy::summary(&config.backends) {
        shared.telemetry.log.event("info", "proxy", &text);
    }
    let budget = FileBudget::new(&shared, &config);
    let upstreams = (budget.upstreams / config.server.workers).max(1);
    let workers: Result<Vec<_>, _> =
        (0..config.server.workers).map(|id| Worker::start(id, shared.clone(), upstreams)).collect();
    let workers = workers?;
    let mut fleet = FleetThread::start(shared.clone(), setup.watch)?;
    let ended = {
        let clients = accept(&shared, &listener, &workers, budget.clients);
        // The gateway accepts and probes while the running requests finish.
        tokio::select! {
            stopped = stop(&shared, &config.server, &workers, orders) => Some(stopped),
            () = fleet.ended() => None,
            () = clients => None,
        }
    };
    let completed = match ended {
        Some((mut stop, is_idle, end)) => {
            accept_backlog(listener, &workers);
            stop.close(end, !is_idle).await
        }
        None => false,
    };
    shared.telemetry.log.event(
        "info",
        "stop",
        if completed { "all requests finished" } else { "some requests were cut" },
    );
    Ok(completed & fleet.join() & workers.into_iter().all(join))
}

/// Waits for an order to stop, then until no request runs. Returns the stop, whether no request runs, and the time at
/// which connections must be cut.
async fn stop<'w>(
    shared: &'w Shared,
    server: &config::Server,
    workers: &'w [Worker],
    mut orders: Receiver<Order>,
) -> (Stop<'w>, bool, Instant) {
    let order = loop {
        match orders.recv().await {
            Some(Order::Reload) => shared.reload_wanted.notify_one(),
            order => break order,
        }
    };
    let log = &shared.telemetry.log;
    shared.start_stopping();
    let mut stop = Stop::new(order, log, workers, orders);
    if order == Some(Order::DelayedDrain) && !server.drain_delay.is_zero() {
        let secs = server.drain_delay.as_secs();
        let text = format!(
            "shutting down: requests are served for {secs} s more; a second signal cuts all requests"
        );
        log.event("info", "drain", &text);
        stop.delay(server.drain_delay).await;
    }
    shared.start_draining();
    let (running, secs) = (|| running(shared, workers), server.drain.as_secs());
    let text = format!(
        "shutting down: new requests are refused; requests running: {}, cut after {secs} s or by a second signal",
        running()
    );
    log.event("info", "drain", &text);
    let end = Instant::now() + server.drain;
    let is_idle = stop.wait_for_requests(end, running).await;
    (stop, is_idle, end)
}

/// Hands the connections that wait in the kernel's queue to the workers, then closes the listener. The limit of
/// connections does not apply: closing the listener would reset these connections.
fn accept_backlog(listener: TcpListener, workers: &[Worker]) {
    let Ok(listener) = listener.into_std() else { return };
    // Any error means that no further connection can be taken; most often the queue is empty.
    while let Ok((client, peer)) = listener.accept() {
        let Some(worker) = least_loaded(workers) else { return };
        if client.set_nonblocking(true).is_ok() {
            let _ = client.set_nodelay(true);
            worker.take(client, peer.ip(), None);
        }
    }
}

/// The worker with the fewest connections; `None` if no worker is alive.
fn least_loaded(workers: &[Worker]) -> Option<&Worker> {
    workers.iter().filter(|worker| !worker.is_gone()).min_by_key(|worker| worker.connections())
}

/// Joins a worker that has no connections. A worker that still has some is not joined; it ends with the process.
fn join(worker: Worker) -> bool {
    worker.connections() > 0 || worker.join()
}

/// Number of running requests: those that upload a body, wait for a permit or hold one. A permit is held until the end
/// of the response.
fn running(shared: &Shared, workers: &[Worker]) -> usize {
    let uploads: usize = workers.iter().map(Worker::uploads).sum();
    uploads + shared.admission.in_flight() + shared.admission.depth()
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
        let reserved =
            RESERVED_FILES + FILES_PER_WORKER * config.server.workers as u64 + config.backends.len() as u64;
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

/// Accepts up to `max` clients at once and hands each to the worker with the fewest connections. Returns if no worker
/// is alive.
async fn accept(shared: &Shared, listener: &TcpListener, workers: &[Worker], max: usize) {
    let permits = Arc::new(Semaphore::new(max));
    let mut last_logged: Option<Instant> = None;
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, peer)) => {
                let _ = client.set_nodelay(true);
                // Without workers the process is of no use and ends, so that its supervisor can restart it.
                let Some(worker) = least_loaded(workers) else { return };
                if let Ok(client) = client.into_std() {
                    worker.take(client, peer.ip(), Some(permit));
                }
            }
            Err(e) if is_client_error(&e) => {}
            Err(e) => {
                if last_logged.is_none_or(|at| at.elapsed() > ACCEPT_LOG_INTERVAL) {
                    last_logged = Some(Instant::now());
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

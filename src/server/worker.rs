//! A worker: a thread with its own runtime, which owns its client connections and its upstream connections.

use std::cell::RefCell;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use tokio::net::TcpStream;
use tokio::runtime::{self, LocalOptions};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::client::conn::Settings;
use crate::client::connection_limit::ConnectionPermit;
use crate::client::deadline::{Deadlines, SWEEP_INTERVAL};
use crate::client::future_pool::FuturePool;
use crate::client::handshake::HandshakeError;
use crate::client::load::WorkerState;
use crate::client::peer::Peer;
use crate::client::serve;
use crate::clock;
use crate::gateway::Gateway;
use crate::gateway::state::Shared;
use crate::policy::throttle::Throttle;
use crate::server::listeners::tls_of;
use crate::telemetry::log::Log;
use crate::time::{Nanos, SECOND};

/// Most threads for name look-ups, which block. A backend may use only a few, so that a name that hangs leaves threads
/// for the other backends.
const MAX_BLOCKING: usize = 64;

/// Every so many sweeps of the deadlines the pool of upstream connections is swept.
const SWEEPS_PER_POOL_SWEEP: u32 = 10;

/// Least time between two log lines of a worker about failed handshakes.
const HANDSHAKE_LOG_INTERVAL: Nanos = 10 * SECOND;

/// The control thread's handle to a worker.
#[derive(Debug)]
pub(crate) struct Worker {
    clients: UnboundedSender<NewClient>,
    load: Arc<WorkerState>,
    thread: JoinHandle<io::Result<()>>,
}

type NewClient = (std::net::TcpStream, Peer, Option<ConnectionPermit>);

impl Worker {
    /// Starts worker number `id`. Once the worker has `upstreams` upstream connections, it closes idle ones before it
    /// opens another.
    ///
    /// # Errors
    /// Returns the error of the system if the thread cannot be started.
    pub(crate) fn start(id: usize, shared: Arc<Shared>, upstreams: usize) -> io::Result<Self> {
        let (clients, inbox) = unbounded_channel();
        let load = Arc::new(WorkerState { upstreams, ..WorkerState::default() });
        let load_of_thread = load.clone();
        let thread = std::thread::Builder::new()
            .name(format!("zap-{id}"))
            .spawn(move || run(id, shared, load_of_thread, inbox))?;
        Ok(Worker { clients, load, thread })
    }

    /// Number of client connections that the worker serves.
    pub(crate) fn connections(&self) -> usize {
        self.load.connections.load(Ordering::Relaxed)
    }

    /// Number of request bodies that the worker still receives.
    pub(crate) fn uploads(&self) -> usize {
        self.load.uploads.load(Ordering::Relaxed)
    }

    /// Whether a panic has ended the worker's thread.
    pub(crate) fn is_gone(&self) -> bool {
        self.clients.is_closed()
    }

    /// Hands a client to the worker. `permit`, if there is one, is released when the connection ends.
    pub(crate) fn take(&self, client: std::net::TcpStream, peer: Peer, permit: Option<ConnectionPermit>) {
        self.load.connections.fetch_add(1, Ordering::Relaxed);
        if self.clients.send((client, peer, permit)).is_err() {
            self.load.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Makes the worker close half of its idle upstream connections, since no file is left for a client.
    pub(crate) fn free_files(&self) {
        self.load.lacks_files.store(true, Ordering::Relaxed);
        self.load.changed.notify_one();
    }

    /// Makes the worker close its idle client connections now, and busy ones after their response.
    pub(crate) fn close(&self) {
        self.load.close.store(true, Ordering::Relaxed);
        self.load.changed.notify_one();
    }

    /// Makes the worker cut the connections that are still open.
    pub(crate) fn cut(&self) {
        self.load.cut.store(true, Ordering::Relaxed);
        self.close();
    }

    /// Waits until the thread ends, which happens when all its connections are closed. Returns `false` if the thread
    /// failed.
    pub(crate) fn join(self) -> bool {
        drop(self.clients);
        matches!(self.thread.join(), Ok(Ok(())))
    }
}

/// Logs handshakes that failed, at most one each [`HANDSHAKE_LOG_INTERVAL`].
struct HandshakeLog {
    log: Log,
    throttle: RefCell<Throttle>,
}

impl HandshakeLog {
    fn new(log: Log) -> Self {
        HandshakeLog { log, throttle: RefCell::new(Throttle::new(HANDSHAKE_LOG_INTERVAL)) }
    }

    fn note(&self, peer: IpAddr, error: &HandshakeError) {
        // `zap healthcheck` has no certificate.
        let is_healthcheck = peer.is_loopback() && error.is_without_certificate();
        if is_healthcheck || matches!(error, HandshakeError::Unfinished) {
            return;
        }
        let Some(left_out) = self.throttle.borrow_mut().pass(clock::now()) else { return };
        let more = match left_out {
            0 => String::new(),
            n => format!("; {n} more failed since the last such line"),
        };
        self.log.event("warn", "tls", &format!("the TLS handshake with {peer} failed: {error}{more}"));
    }
}

/// Counts a connection as open until this value is dropped.
struct Counted(Arc<WorkerState>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

fn run(
    id: usize,
    shared: Arc<Shared>,
    load: Arc<WorkerState>,
    inbox: UnboundedReceiver<NewClient>,
) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING)
        .build_local(LocalOptions::default())?;
    runtime.block_on(serve(id, shared, load, inbox));
    // A name look-up that hangs must not delay the exit of the process.
    runtime.shutdown_background();
    Ok(())
}

async fn serve(
    id: usize,
    shared: Arc<Shared>,
    load: Arc<WorkerState>,
    mut inbox: UnboundedReceiver<NewClient>,
) {
    let deadlines = Rc::new(Deadlines::default());
    deadlines.sweep();
    let gateway = Gateway::new(id, shared, load.clone());
    let keep_alive = clock::nanos(gateway.server().keep_alive);
    let settings = Rc::new(Settings { deadlines: deadlines.clone(), keep_alive });
    let runner = gateway.clone();
    let futures = FuturePool::new(move |mailbox| serve::run_requests(runner.clone(), mailbox));
    let failures = Rc::new(HandshakeLog::new(gateway.shared().telemetry.log.clone()));
    let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut sweeps = 0u32;
    let mut ejections = 0;
    let mut open = true;
    while open || load.connections.load(Ordering::Relaxed) > 0 {
        tokio::select! {
            client = inbox.recv(), if open => match client {
                Some((client, peer, permit)) => {
                    let counted = Counted(load.clone());
                    if let Ok(client) = TcpStream::from_std(client) {
                        let current = gateway.current();
                        let tls = tls_of(peer.listener, &current.config).map(|tls| tls.rustls.clone());
                        drop(current);
                        let (gateway, futures, settings) = (gateway.clone(), futures.clone(), settings.clone());
                        let failures = failures.clone();
                        tokio::task::spawn_local(async move {
                            let _counted = counted;
                            let serving = serve::serve((client, peer, permit), tls, &settings, gateway, futures);
                            if let Err(error) = serving.await {
                                failures.note(peer.address, &error);
                            }
                        });
                    }
                }
                None => open = false,
            },
            () = load.changed.notified() => {
                if load.lacks_files.swap(false, Ordering::Relaxed) {
                    gateway.pool().close_half();
                }
                if load.is_closing() {
                    deadlines.all(load.is_cut());
                }
            }
            _ = sweep.tick() => {
                deadlines.sweep();
                let so_far = gateway.shared().ejections.load(Ordering::Relaxed);
                if std::mem::replace(&mut ejections, so_far) != so_far {
                    // Requests that wait for an ejected target go to another one.
                    deadlines.all(false);
                }
                sweeps = sweeps.wrapping_add(1);
                if sweeps.is_multiple_of(SWEEPS_PER_POOL_SWEEP) {
                    gateway.pool().sweep(clock::now(), &gateway.current().backends);
                }
            }
        }
    }
}

//! Signals and graceful shutdown: serve on for `server.drain_delay_secs`, refuse new requests, let running requests
//! finish, cut those that take longer than `server.drain_secs`.

use std::io;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::gateway::state::Shared;
use crate::server::worker::Worker;

/// An order of the operator to a running gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Serve on for `server.drain_delay_secs`, then [`Drain`](Self::Drain).
    DelayedDrain,
    /// Let running requests finish within `server.drain_secs`, then stop.
    Drain,
    /// Stop at once.
    Now,
    /// Reload the configuration.
    Reload,
    /// Start the program anew and hand the listeners over to it.
    Upgrade,
}

/// Creates the channel for orders; [`crate::run`] takes the receiver.
pub fn orders() -> (Sender<Order>, Receiver<Order>) {
    channel(4)
}

/// The handlers of SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2. Once they are installed, these signals no longer kill
/// the process.
#[derive(Debug)]
pub(crate) struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
    usr1: Signal,
    usr2: Signal,
}

impl Signals {
    /// Installs the handlers. Must be called within a runtime.
    ///
    /// # Errors
    /// Returns the error of the system if a handler cannot be installed.
    pub(crate) fn catch() -> io::Result<Self> {
        Ok(Signals {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            hup: signal(SignalKind::hangup())?,
            usr1: signal(SignalKind::user_defined1())?,
            usr2: signal(SignalKind::user_defined2())?,
        })
    }

    /// Sends [`Order::Reload`] for SIGHUP, [`Order::Upgrade`] for SIGUSR2, [`Order::DelayedDrain`] for SIGTERM and
    /// [`Order::Drain`] for SIGINT. Each SIGTERM or SIGINT after the first sends [`Order::Now`]. SIGUSR1 does nothing.
    pub(crate) async fn send(mut self, orders: Sender<Order>) {
        let mut is_stopping = false;
        let mut stop = |first| if std::mem::replace(&mut is_stopping, true) { Order::Now } else { first };
        loop {
            let order = tokio::select! {
                _ = self.hup.recv() => Order::Reload,
                _ = self.usr1.recv() => continue,
                _ = self.usr2.recv() => Order::Upgrade,
                _ = self.term.recv() => stop(Order::DelayedDrain),
                _ = self.int.recv() => stop(Order::Drain),
            };
            // While the channel is full, each signal waits in its own handler, which holds it once.
            if orders.send(order).await.is_err() {
                return;
            }
        }
    }
}

/// How often the drain polls what still runs.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// How long the drain waits for connections to close.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// How often the log says how many requests still run.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// After another process has taken the listeners, idle connections stay open until no request has run for this long:
/// each may send one more request. Its response says `connection: close`, so that a busy client never meets a closed
/// connection.
const IDLE_GRACE: Duration = Duration::from_secs(5);

/// What runs in this process.
#[derive(Clone, Copy)]
pub(crate) struct Running<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) workers: &'a [Worker],
}

impl Running<'_> {
    /// Number of running requests: those that upload a body, wait for a permit or hold one. A permit is held until the
    /// end of the response.
    pub(crate) fn requests(&self) -> usize {
        let uploads: usize = self.workers.iter().map(Worker::uploads).sum();
        uploads + self.shared.admission.in_flight() + self.shared.admission.depth()
    }

    /// Number of client connections.
    fn connections(&self) -> usize {
        self.workers.iter().map(Worker::connections).sum()
    }

    /// Logs an event.
    pub(crate) fn log(&self, level: &str, event: &str, text: &str) {
        self.shared.telemetry.log.event(level, event, text);
    }
}

/// A stop in progress.
pub(crate) struct Stop<'a> {
    running: Running<'a>,
    orders: Receiver<Order>,
    /// Whether [`Order::Now`] was received. It ends every wait.
    is_forced: bool,
}

impl<'a> Stop<'a> {
    /// Begins a stop after the `first` order.
    pub(crate) fn new(first: Option<Order>, running: Running<'a>, orders: Receiver<Order>) -> Self {
        Stop { running, orders, is_forced: matches!(first, Some(Order::Now) | None) }
    }

    /// Waits for `delay`.
    pub(crate) async fn delay(&mut self, delay: Duration) {
        self.wait(Instant::now() + delay, || false).await;
    }

    /// Waits until `end`, or until no request runs. Returns `false` if requests still run.
    pub(crate) async fn wait_for_requests(&mut self, end: Instant) -> bool {
        let mut requests = reporting(self.running);
        self.wait(end, || requests() == 0).await
    }

    /// Lets the connections go within `drain` after another process has taken the listeners: idle ones once nothing has
    /// run for a while, at the latest after half of the time; busy ones after their response. Returns whether no
    /// request runs, and when connections must be cut.
    pub(crate) async fn wait_for_connections(&mut self, drain: Duration) -> (bool, Instant) {
        let (began, running) = (Instant::now(), self.running);
        let end = began + drain;
        let mut requests = reporting(running);
        let mut last_busy = began;
        let are_gone = || {
            if requests() > 0 {
                last_busy = Instant::now();
            }
            running.connections() == 0 || last_busy.elapsed() >= IDLE_GRACE
        };
        self.wait(began + drain / 2, are_gone).await;
        running.workers.iter().for_each(Worker::close);
        (self.wait(end, || requests() == 0).await, end)
    }

    /// Closes all connections: idle ones now, busy ones after their response. Cuts them if `cut` is set, or if they are
    /// still open at `end`. Returns `false` if connections were cut.
    pub(crate) async fn close(&mut self, end: Instant, cut: bool) -> bool {
        let running = self.running;
        let is_closed = || running.connections() == 0;
        running.workers.iter().for_each(Worker::close);
        let completed = !cut && self.wait(end.max(Instant::now() + CLOSE_TIMEOUT), is_closed).await;
        if !completed {
            running.workers.iter().for_each(Worker::cut);
            // A forced stop, too, gives the cut connections this time to end with an error event.
            self.is_forced = false;
            self.wait(Instant::now() + CLOSE_TIMEOUT, is_closed).await;
        }
        completed
    }

    /// Waits until `is_done`. Returns `false` at `end`, or on [`Order::Now`].
    async fn wait(&mut self, end: Instant, mut is_done: impl FnMut() -> bool) -> bool {
        loop {
            if is_done() {
                return true;
            }
            if self.is_forced || Instant::now() >= end {
                return false;
            }
            let orders = &mut self.orders;
            tokio::select! {
                order = orders.recv(), if !orders.is_closed() => self.is_forced = order == Some(Order::Now),
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
        }
    }
}

/// Counts the running requests; now and then the log says how many there still are.
fn reporting(running: Running<'_>) -> impl FnMut() -> usize {
    let mut reported = Instant::now();
    move || {
        let left = running.requests();
        if left > 0 && reported.elapsed() >= REPORT_INTERVAL {
            reported = Instant::now();
            running.log("info", "drain", &format!("requests still running: {left}"));
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{Signal as Number, getpid, kill_process};

    use super::*;

    #[test]
    fn no_order_is_lost_while_others_wait_and_a_repeated_signal_is_one_order() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (sender, mut orders) = orders();
            let channel = sender.clone();
            let signals = Signals::catch().unwrap();
            let raise = |number| kill_process(getpid(), number).unwrap();
            let read = async {
                while channel.capacity() > 0 {
                    let before = channel.capacity();
                    raise(Number::HUP);
                    while channel.capacity() == before {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
                let more = [Number::HUP, Number::HUP, Number::USR2, Number::USR2, Number::TERM];
                more.into_iter().for_each(raise);
                let mut received = Vec::new();
                while ![Order::Upgrade, Order::DelayedDrain].iter().all(|order| received.contains(order)) {
                    received.push(orders.recv().await.unwrap());
                }
                received
            };
            tokio::select! {
                () = signals.send(sender) => panic!("the receiver lives"),
                received = read => {
                    assert!(received.starts_with(&[Order::Reload; 4]) && received.len() <= 9, "{received:?}");
                }
            }
        });
    }
}

//! Signals and graceful shutdown: serve on for `server.drain_delay_secs`, refuse new requests, let running requests finish,
//! cut those that take longer than `server.drain_secs`.

use std::io;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::server::worker::Worker;
use crate::telemetry::log::Log;

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
}

/// Creates the channel for orders; [`crate::run`] takes the receiver.
pub fn orders() -> (Sender<Order>, Receiver<Order>) {
    channel(4)
}

/// The handlers of SIGTERM, SIGINT and SIGHUP. Once they are installed, these signals no longer kill the process.
#[derive(Debug)]
pub(crate) struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
}

impl Signals {
    /// Installs the handlers. Must be called within a runtime.
    ///
    /// # Errors
    /// Returns the error of the system if a handler cannot be installed.
    pub(crate) fn catch() -> io::Result<Self> {
        let [term, int, hup] =
            [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
        Ok(Signals { term: term?, int: int?, hup: hup? })
    }

    /// Sends [`Order::Reload`] for SIGHUP, [`Order::DelayedDrain`] for SIGTERM and [`Order::Drain`] for SIGINT. Each SIGTERM
    /// or SIGINT after the first sends [`Order::Now`].
    pub(crate) async fn send(mut self, orders: Sender<Order>) {
        let mut is_stopping = false;
        let mut stop = |first| if std::mem::replace(&mut is_stopping, true) { Order::Now } else { first };
        loop {
            let order = tokio::select! {
                _ = self.hup.recv() => Order::Reload,
                _ = self.term.recv() => stop(Order::DelayedDrain),
                _ = self.int.recv() => stop(Order::Drain),
            };
            match order {
                // If the channel is full, a reload that waits there is enough.
                Order::Reload => drop(orders.try_send(order)),
                order if orders.send(order).await.is_err() => return,
                _ => {}
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

/// A stop in progress.
pub(crate) struct Stop<'a> {
    log: &'a Log,
    workers: &'a [Worker],
    orders: Receiver<Order>,
    /// Whether [`Order::Now`] was received. It ends every wait.
    is_forced: bool,
}

impl<'a> Stop<'a> {
    /// Begins a stop after the `first` order.
    pub(crate) fn new(
        first: Option<Order>,
        log: &'a Log,
        workers: &'a [Worker],
        orders: Receiver<Order>,
    ) -> Self {
        Stop { log, workers, orders, is_forced: matches!(first, Some(Order::Now) | None) }
    }

    /// Waits for `delay`.
    pub(crate) async fn delay(&mut self, delay: Duration) {
        self.wait(Instant::now() + delay, || false).await;
    }

    /// Waits until `end`, or until `running` returns 0. Returns `false` if requests still run.
    pub(crate) async fn wait_for_requests(&mut self, end: Instant, running: impl Fn() -> usize) -> bool {
        let mut reported = Instant::now();
        let log = self.log;
        let is_done = || {
            let left = running();
            if left > 0 && reported.elapsed() >= REPORT_INTERVAL {
                reported = Instant::now();
                log.event("info", "drain", &format!("requests still running: {left}"));
            }
            left == 0
        };
        self.wait(end, is_done).await
    }

    /// Closes all connections: idle ones now, busy ones after their response. Cuts them if `cut` is set, or if they are
    /// still open at `end`. Returns `false` if connections were cut.
    pub(crate) async fn close(&mut self, end: Instant, cut: bool) -> bool {
        let workers = self.workers;
        let is_closed = || workers.iter().map(Worker::connections).sum::<usize>() == 0;
        workers.iter().for_each(Worker::close);
        let completed = !cut && self.wait(end.max(Instant::now() + CLOSE_TIMEOUT), is_closed).await;
        if !completed {
            workers.iter().for_each(Worker::cut);
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

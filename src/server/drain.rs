//! Signals and graceful shutdown: refuse new requests, let running requests finish, cut those that take longer than
//! `server.drain_secs`.

use std::io;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::server::worker::Worker;

/// An order of the operator to a running gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
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

    /// Sends [`Order::Reload`] for SIGHUP, [`Order::Drain`] for the first SIGTERM or SIGINT, and [`Order::Now`] for
    /// every further one.
    pub(crate) async fn send(mut self, orders: Sender<Order>) {
        let mut stop = Order::Drain;
        loop {
            let order = tokio::select! {
                _ = self.hup.recv() => Order::Reload,
                _ = self.term.recv() => std::mem::replace(&mut stop, Order::Now),
                _ = self.int.recv() => std::mem::replace(&mut stop, Order::Now),
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

/// Waits up to `limit` until `running` returns 0, then until every connection is closed. Returns `false` if connections
/// had to be cut.
pub(crate) async fn drain(
    workers: &[Worker],
    running: impl Fn() -> usize,
    limit: Duration,
    orders: &mut Receiver<Order>,
) -> bool {
    let end = Instant::now() + limit;
    let connections = || workers.iter().map(Worker::connections).sum::<usize>();
    let mut completed = wait_for_zero(&running, end, orders).await;
    workers.iter().for_each(Worker::close);
    // Idle connections close now, busy ones after their response.
    completed =
        completed && wait_for_zero(&connections, end.max(Instant::now() + CLOSE_TIMEOUT), orders).await;
    if !completed {
        workers.iter().for_each(Worker::cut);
        wait_for_zero(&connections, Instant::now() + CLOSE_TIMEOUT, orders).await;
    }
    completed
}

/// Waits until `count` returns 0. Returns `false` at `end`, or on [`Order::Now`].
async fn wait_for_zero(count: &impl Fn() -> usize, end: Instant, orders: &mut Receiver<Order>) -> bool {
    while count() > 0 {
        tokio::select! {
            order = orders.recv(), if !orders.is_closed() => if order == Some(Order::Now) { return false },
            () = tokio::time::sleep(POLL_INTERVAL) => if Instant::now() >= end { return false },
        }
    }
    true
}

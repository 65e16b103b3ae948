//! Signals, and the way out: refuse what is new, let run what runs, cut what overstays.

use std::io;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::server::worker::Worker;

/// What an operator asks of a running gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Let what runs end, within `server.drain_secs`.
    Drain,
    /// End at once.
    Now,
    /// Read the configuration anew.
    Reload,
}

/// A way to send orders, and the end that [`crate::run`] takes.
pub fn orders() -> (Sender<Order>, Receiver<Order>) {
    channel(4)
}

/// The signals that are orders. From when it exists they end the process no more.
#[derive(Debug)]
pub(crate) struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
}

impl Signals {
    /// Catches them; within a runtime.
    ///
    /// # Errors
    /// The signals cannot be caught.
    pub(crate) fn catch() -> io::Result<Self> {
        let [term, int, hup] =
            [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
        Ok(Signals { term: term?, int: int?, hup: hup? })
    }

    /// Turns SIGHUP into [`Order::Reload`], the first SIGTERM or SIGINT into [`Order::Drain`], and every further one into
    /// [`Order::Now`].
    pub(crate) async fn send(mut self, orders: Sender<Order>) {
        let mut end = Order::Drain;
        loop {
            let order = tokio::select! {
                _ = self.hup.recv() => Order::Reload,
                _ = self.term.recv() => std::mem::replace(&mut end, Order::Now),
                _ = self.int.recv() => std::mem::replace(&mut end, Order::Now),
            };
            match order {
                // Where so many wait already, one of them will do.
                Order::Reload => drop(orders.try_send(order)),
                order if orders.send(order).await.is_err() => return,
                _ => {}
            }
        }
    }
}

/// How often the way out looks at what still runs.
const LOOK: Duration = Duration::from_millis(10);

/// How long a cut connection may take to say so.
const CUT: Duration = Duration::from_millis(500);

/// Waits until `running` says 0, then until every connection is closed; `false` where something had to be cut.
pub(crate) async fn drain(
    workers: &[Worker],
    running: impl Fn() -> usize,
    limit: Duration,
    orders: &mut Receiver<Order>,
) -> bool {
    let end = Instant::now() + limit;
    let connections = || workers.iter().map(Worker::connections).sum::<usize>();
    let mut whole = wait(&running, end, orders).await;
    workers.iter().for_each(Worker::close);
    // Idle connections close now, those with a request behind its answer.
    whole = whole && wait(&connections, end.max(Instant::now() + CUT), orders).await;
    if !whole {
        workers.iter().for_each(Worker::cut);
        wait(&connections, Instant::now() + CUT, orders).await;
    }
    whole
}

/// Waits until `count` says 0: `false` at `end` or on an order to end at once.
async fn wait(count: &impl Fn() -> usize, end: Instant, orders: &mut Receiver<Order>) -> bool {
    while count() > 0 {
        tokio::select! {
            order = orders.recv(), if !orders.is_closed() => if order == Some(Order::Now) { return false },
            () = tokio::time::sleep(LOOK) => if Instant::now() >= end { return false },
        }
    }
    true
}

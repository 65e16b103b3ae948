//! Signals, and the way out: refuse what is new, let run what runs, cut what overstays.

use std::io;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::worker::Worker;

/// An order to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Let what runs end, within `server.drain_secs`.
    Drain,
    /// End at once.
    Now,
}

/// A way to send [`Stop`] orders, and the end that [`crate::run`] takes.
pub fn orders() -> (Sender<Stop>, Receiver<Stop>) {
    channel(4)
}

/// Turns SIGTERM and SIGINT into orders: the first drains, the second ends at once.
///
/// # Errors
/// The signals cannot be caught.
pub async fn on_signals(orders: Sender<Stop>) -> io::Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    for order in [Stop::Drain, Stop::Now] {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        if orders.send(order).await.is_err() {
            break;
        }
    }
    std::future::pending().await
}

/// How often the way out looks at what still runs.
const LOOK: Duration = Duration::from_millis(10);

/// How long a cut connection may take to say so.
const CUT: Duration = Duration::from_millis(500);

/// Waits until `running` says 0, then until every connection is closed; `false` where something had to be cut.
pub async fn drain(
    workers: &[Worker],
    running: impl Fn() -> usize,
    limit: Duration,
    orders: &mut Receiver<Stop>,
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
async fn wait(count: &impl Fn() -> usize, end: Instant, orders: &mut Receiver<Stop>) -> bool {
    while count() > 0 {
        tokio::select! {
            order = orders.recv(), if !orders.is_closed() => if order == Some(Stop::Now) { return false },
            () = tokio::time::sleep(LOOK) => if Instant::now() >= end { return false },
        }
    }
    true
}

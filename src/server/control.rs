//! The orders of the operator: reload, upgrade, stop.

use std::time::Instant;

use tokio::sync::mpsc::Receiver;

use crate::gateway::state::Shared;
use crate::server::drain::{Order, Stop};
use crate::server::listeners::Listeners;
use crate::server::supervisor::Supervisor;
use crate::server::upgrade::Next;
use crate::server::worker::Worker;

/// What the orders act on.
pub(crate) struct Control<'w> {
    pub(crate) shared: &'w Shared,
    pub(crate) workers: &'w [Worker],
    pub(crate) supervisor: &'w Supervisor,
    /// Whether this process owns the file of the unix socket.
    pub(crate) owns_unix: bool,
}

/// Why Zap accepts no more clients.
pub(crate) enum End<'w> {
    /// It was told to stop.
    Drained {
        stop: Stop<'w>,
        /// Whether no request runs.
        is_idle: bool,
        /// When connections must be cut.
        end: Instant,
    },
    /// Another process accepts them.
    HandedOver { stop: Stop<'w> },
}

impl<'w> Control<'w> {
    /// Carries out orders until one to stop, then waits until no request runs; or until another process has taken over.
    pub(crate) async fn run(&self, listeners: &Listeners, mut orders: Receiver<Order>) -> End<'w> {
        let mut next = None;
        let order = loop {
            let order = tokio::select! {
                order = orders.recv() => order,
                ready = is_ready(&mut next) => match ready {
                    Ok(id) => {
                        self.hand_over(id);
                        let log = &self.shared.telemetry.log;
                        let stop = Stop::new(Some(Order::Upgrade), log, self.workers, orders);
                        return End::HandedOver { stop };
                    }
                    Err(why) => {
                        next = None;
                        self.upgrade_failed(&why);
                        continue;
                    }
                },
            };
            match order {
                Some(Order::Reload) => self.shared.reload_wanted.notify_one(),
                Some(Order::Upgrade) if next.is_some() => self.log("info", "upgrade", "it has begun already"),
                Some(Order::Upgrade) => match Next::start(&listeners.sockets(), self.owns_unix) {
                    Ok(started) => {
                        let text =
                            format!("process {} was started, and may take the listeners", started.id());
                        self.log("info", "upgrade", &text);
                        next = Some(started);
                    }
                    Err(why) => self.upgrade_failed(&why),
                },
                order => break order,
            }
        };
        drop(next);
        self.drain(order, orders).await
    }

    fn upgrade_failed(&self, why: &str) {
        self.log("error", "upgrade", &format!("the upgrade failed, this process serves on: {why}"));
    }

    /// Tells everybody that the process `id` accepts clients now.
    fn hand_over(&self, id: u32) {
        self.supervisor.handed_over(id);
        self.shared.start_leaving();
        let secs = self.shared.current.load().config.server.drain.as_secs();
        let text = format!(
            "process {id} has taken the listeners; requests running here: {}, cut after {secs} s",
            running(self.shared, self.workers)
        );
        self.log("info", "upgrade", &text);
    }

    /// Serves on for a while if `order` says so, then refuses new requests and waits for the running ones.
    async fn drain(&self, order: Option<Order>, orders: Receiver<Order>) -> End<'w> {
        self.supervisor.stopping();
        self.shared.start_stopping();
        let config = self.shared.current.load().config.clone();
        let server = &config.server;
        let mut stop = Stop::new(order, &self.shared.telemetry.log, self.workers, orders);
        if order == Some(Order::DelayedDrain) && !server.drain_delay.is_zero() {
            let secs = server.drain_delay.as_secs();
            let text = format!(
                "shutting down: requests are served for {secs} s more; a second signal cuts all requests"
            );
            self.log("info", "drain", &text);
            stop.delay(server.drain_delay).await;
        }
        self.shared.start_draining();
        let (running, secs) = (|| running(self.shared, self.workers), server.drain.as_secs());
        let text = format!(
            "shutting down: new requests are refused; requests running: {}, cut after {secs} s or by a second signal",
            running()
        );
        self.log("info", "drain", &text);
        let end = Instant::now() + server.drain;
        let is_idle = stop.wait_for_requests(end, running).await;
        End::Drained { stop, is_idle, end }
    }

    fn log(&self, level: &str, event: &str, text: &str) {
        self.shared.telemetry.log.event(level, event, text);
    }
}

/// Waits until the new process accepts clients, or fails; pending forever if there is none.
async fn is_ready(next: &mut Option<Next>) -> Result<u32, String> {
    match next {
        Some(next) => next.ready().await.map(|()| next.id()),
        None => std::future::pending().await,
    }
}

/// Number of running requests: those that upload a body, wait for a permit or hold one. A permit is held until the end
/// of the response.
pub(crate) fn running(shared: &Shared, workers: &[Worker]) -> usize {
    let uploads: usize = workers.iter().map(Worker::uploads).sum();
    uploads + shared.admission.in_flight() + shared.admission.depth()
}

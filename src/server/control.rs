//! Carries out the operator's orders: reload, upgrade, stop.

use std::time::Instant;

use tokio::sync::mpsc::Receiver;

use crate::server::drain::{Order, Running, Stop};
use crate::server::listeners::Listeners;
use crate::server::supervisor::Supervisor;
use crate::server::upgrade::Next;

/// What the orders act on.
pub(crate) struct Control<'w> {
    pub(crate) running: Running<'w>,
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
                        let stop = Stop::new(Some(Order::Upgrade), self.running, orders);
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
                Some(Order::Reload) => self.running.shared.reload_wanted.notify_one(),
                Some(Order::Upgrade) if next.is_some() => {
                    self.running.log("info", "upgrade", "an upgrade is already running")
                }
                Some(Order::Upgrade) => match Next::start(&listeners.sockets(), self.owns_unix) {
                    Ok(started) => {
                        let id = started.id();
                        let text = format!("started process {id}; waiting until it accepts clients");
                        self.running.log("info", "upgrade", &text);
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
        let text = format!("the upgrade failed; this process keeps serving: {why}");
        self.running.log("error", "upgrade", &text);
    }

    /// Announces that process `id` accepts clients now.
    fn hand_over(&self, id: u32) {
        self.supervisor.handed_over(id);
        self.running.shared.start_leaving();
        let secs = self.running.shared.current.load().config.server.drain.as_secs();
        let text = format!(
            "process {id} has taken the listeners; requests running here: {}, cut after {secs} s",
            self.running.requests()
        );
        self.running.log("info", "upgrade", &text);
    }

    /// Serves on for a while if `order` says so, then refuses new requests and waits for the running ones.
    async fn drain(&self, order: Option<Order>, orders: Receiver<Order>) -> End<'w> {
        self.supervisor.stopping();
        let running = self.running;
        running.shared.start_stopping();
        let config = running.shared.current.load().config.clone();
        let server = &config.server;
        let mut stop = Stop::new(order, running, orders);
        if order == Some(Order::DelayedDrain) && !server.drain_delay.is_zero() {
            let secs = server.drain_delay.as_secs();
            let text = format!(
                "shutting down: requests are served for {secs} s more; a second signal cuts all requests"
            );
            running.log("info", "drain", &text);
            stop.delay(server.drain_delay).await;
        }
        running.shared.start_draining();
        let secs = server.drain.as_secs();
        let text = format!(
            "shutting down: new requests are refused; requests running: {}, cut after {secs} s or by a second signal",
            running.requests()
        );
        running.log("info", "drain", &text);
        let end = Instant::now() + server.drain;
        let is_idle = stop.wait_for_requests(end).await;
        End::Drained { stop, is_idle, end }
    }
}

/// Waits until the new process accepts clients, or fails; pending forever if there is none.
async fn is_ready(next: &mut Option<Next>) -> Result<u32, String> {
    match next {
        Some(next) => next.ready().await.map(|()| next.id()),
        None => std::future::pending().await,
    }
}

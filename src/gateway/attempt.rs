//! The attempt loop: pick, send, judge, again. It ends with an answer to relay or with an error. What one try is, is
//! [`super::once`]'s business.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::HeaderMap;
use http::header::{HeaderValue, RETRY_AFTER};
use http::response::Parts;

use super::Gateway;
use super::admit::{Line, admit, refusal};
use super::intake::ChatRequest;
use crate::clock;
use crate::error::{Code, GatewayError};
use crate::policy::queue::Slot;
use crate::policy::retry::{backoff, retry_after_secs};
use crate::policy::route::TargetId;
use crate::policy::{Nanos, SECOND};
use crate::server::io::Conn;
use crate::state::snapshot::{Ask, Chosen, Pick, Snapshot};
use crate::telemetry::{Completion, Phase};
use crate::upstream::link::Link;
use crate::upstream::pool::Lease;
use crate::upstream::{Closed, InFlight};

/// Frames that are read of an answer nobody wants, to keep its connection.
const MAX_LEFTOVER: usize = 16;

/// An answer that goes to the client.
pub struct Delivery {
    /// Status and headers as they came.
    pub head: Parts,
    /// The connection, positioned behind the head, or behind `first`.
    pub lease: Lease,
    /// The place at the backend.
    pub entered: InFlight,
    /// The slot.
    pub slot: Slot,
    /// The body's first frame, where it was waited for.
    pub first: Option<Bytes>,
    /// How long the answer may make no progress.
    pub patience: Nanos,
}

/// What the last try left, should there be no further one.
pub enum Last {
    /// An answer that was not worth delivering yet.
    Answer {
        /// Its head.
        head: Box<Parts>,
        /// Its connection.
        lease: Lease,
        /// The place at the backend.
        entered: InFlight,
    },
    /// No answer.
    Error(GatewayError),
}

/// A try's result that is no delivery: why, and what could be delivered all the same.
pub struct Failed {
    /// Why.
    pub code: Code,
    /// What it left.
    pub last: Last,
    /// Counts against the backend.
    pub blame: bool,
    /// No other backend is asked.
    pub fatal: bool,
    /// It let its share of the time pass: it is not asked again.
    pub silent: bool,
}

/// One request's way through the backends.
pub struct Attempts<'a> {
    /// The worker's gateway.
    pub gateway: &'a Gateway,
    /// The client's connection, for time limits.
    pub conn: &'a Conn,
    /// The client's headers.
    pub headers: &'a HeaderMap,
    /// The client's body.
    pub chat: &'a ChatRequest,
    /// What it asks for.
    pub ask: Ask<'a>,
    /// The fleet, of the configuration that the request came under.
    pub snapshot: Arc<Snapshot>,
    /// The record.
    pub completion: &'a mut Completion,
    /// When the first byte must be on its way.
    pub deadline: Nanos,
}

impl Attempts<'_> {
    /// Tries until there is an answer to deliver.
    ///
    /// # Errors
    /// What to tell the client where there is none.
    pub async fn run(mut self, slot: Slot) -> Result<Delivery, GatewayError> {
        let mut slot = Some(slot);
        let mut last = None;
        let mut line = Line::default();
        // In the first round targets are picked; later rounds go through them in the same order.
        let (mut order, mut tried) = (Vec::<TargetId>::new(), Vec::<TargetId>::new());
        // Who let its share of the time pass is not asked again.
        let mut silent = Vec::<TargetId>::new();
        let mut rounds = 0;
        loop {
            let now = clock::now();
            if self.completion.tries > 0 && !self.may_retry(now) {
                return self.give_up(last, slot);
            }
            self.refresh();
            let picked = self.pick(now, rounds, &order, &tried, &mut line);
            self.pass_over(now, &tried, &picked);
            let (chosen, panic) = match picked {
                Pick::Backend(chosen) => (chosen, false),
                Pick::Out => match self.pick_in_panic(now, &mut line) {
                    Pick::Backend(chosen) => (chosen, true),
                    // Whoever is out is not waited for.
                    Pick::Busy(busy) => return Err(refusal(&busy, now)),
                    _ => return Err(GatewayError::NoBackend),
                },
                Pick::Nobody => return Err(GatewayError::NoBackend),
                Pick::Busy(busy) => {
                    drop(slot.take());
                    line.wait(self.gateway, self.conn, self.completion, &self.snapshot, &busy, self.deadline)
                        .await?;
                    slot = Some(admit(self.gateway, self.conn, self.completion, self.deadline).await?);
                    continue;
                }
                Pick::Tried => {
                    if !self.may_come_again(&order, &silent) || !self.back_off(rounds).await {
                        return self.give_up(last, slot);
                    }
                    tried.clone_from(&silent);
                    rounds += 1;
                    continue;
                }
            };
            let Chosen { target, entered } = chosen;
            line.served(self.snapshot.route(&self.ask).targets[target].backend);
            if self.completion.tries > 0 {
                self.count_retry(now, &last);
            }
            if panic {
                self.gateway.recorder().lane().panic_picks.add(1);
            }
            let limit = self.share(now, &tried);
            self.let_go(last.take());
            let failed = match (self.try_one(target, entered, limit).await, slot.take()) {
                (Ok((head, lease, entered, first)), Some(slot)) => {
                    return Ok(Delivery { head, lease, entered, slot, first, patience: self.patience() });
                }
                (Ok(_), None) => return Err(GatewayError::Internal),
                (Err(failed), held) => {
                    slot = held;
                    *failed
                }
            };
            last = Some((failed.code, failed.last));
            if failed.fatal || panic {
                return self.give_up(last, slot);
            }
            tried.push(target);
            if failed.silent {
                silent.push(target);
            }
            if !order.contains(&target) {
                order.push(target);
            }
        }
    }

    /// Looks at the fleet as it is now, unless a reload has made it another's.
    fn refresh(&mut self) {
        let fresh = self.gateway.snapshot();
        if !Arc::ptr_eq(&fresh, &self.snapshot) && fresh.is_of(&self.snapshot) {
            self.snapshot = fresh.clone();
        }
    }

    fn pick(&self, now: Nanos, rounds: u32, order: &[TargetId], tried: &[TargetId], line: &mut Line) -> Pick {
        if rounds == 0 {
            let mut waited = line.granted.take();
            let picked = match self.snapshot.pick_waited(now, &self.ask, tried, &mut waited, line.turn()) {
                Some(chosen) => Pick::Backend(chosen),
                None => self.snapshot.pick(now, &self.ask, tried, line.turn()),
            };
            // Where all are out, it is good still.
            line.granted = waited.filter(|_| matches!(picked, Pick::Out));
            return picked;
        }
        // Whoever has reopened since comes before those that failed already.
        if let fresh @ Pick::Backend(_) = self.snapshot.pick(now, &self.ask, order, None) {
            return fresh;
        }
        let rest: Vec<_> = order.iter().copied().filter(|id| !tried.contains(id)).collect();
        self.snapshot.pick_in_order(now, &self.ask, &rest).map_or(Pick::Tried, Pick::Backend)
    }

    fn pick_in_panic(&self, now: Nanos, line: &mut Line) -> Pick {
        let waited = line.granted.take();
        self.snapshot.pick_in_panic(now, &self.ask, waited, line.turn())
    }

    /// Notes for the log who was passed over.
    fn pass_over(&mut self, now: Nanos, tried: &[TargetId], picked: &Pick) {
        if !self.gateway.shared().log_requests() {
            return;
        }
        let chosen = match picked {
            Pick::Backend(chosen) => Some(chosen.target),
            _ => None,
        };
        for (upstream, why) in self.snapshot.passed(now, &self.ask, tried, chosen) {
            self.completion.pass_over(upstream, why);
        }
    }

    /// Drops an answer that will not be delivered; its connection serves on if the rest of it is here already.
    fn let_go(&self, last: Option<(Code, Last)>) {
        let Some((_, Last::Answer { mut lease, .. })) = last else { return };
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..MAX_LEFTOVER {
            match lease.link.poll_frame(&mut cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(None) => return self.gateway.pool().park(lease, clock::now()),
                Poll::Ready(Some(Err(_))) | Poll::Pending => return,
            }
        }
    }

    /// Whether one of those tried may be asked once more.
    fn may_come_again(&self, order: &[TargetId], silent: &[TargetId]) -> bool {
        let now = clock::now();
        order.iter().any(|id| !silent.contains(id) && self.snapshot.check(now, &self.ask, *id, None).is_ok())
    }

    /// Whether the rules allow one more try.
    fn may_retry(&self, now: Nanos) -> bool {
        self.completion.tries <= self.snapshot.config.retry.max_retries
            && now < self.deadline
            && self.gateway.shared().budget.has_room(now)
    }

    /// Counts a further try, by the backend whose failure led to it.
    fn count_retry(&self, now: Nanos, last: &Option<(Code, Last)>) {
        self.gateway.shared().budget.withdraw(now);
        if let (Some((reason, _)), Some((upstream, _))) = (last, self.completion.failed.last()) {
            upstream.lanes[self.gateway.recorder().worker].retried(*reason);
        }
    }

    /// Waits before the next round. `false`: there is no time, or no try, left for one.
    async fn back_off(&mut self, rounds: u32) -> bool {
        let retry = &self.snapshot.config.retry;
        let wait = backoff(retry.base_delay, retry.max_delay, rounds, self.gateway.random());
        let since = clock::now();
        if since + clock::nanos(wait) >= self.deadline {
            return false;
        }
        self.completion.phase = Phase::Backoff;
        self.conn.alarm.set(self.deadline);
        tokio::time::sleep(wait).await;
        self.completion.others += clock::now() - since;
        true
    }

    /// Until when a try may wait for its head: its share of what is left, by the targets still untried that are up.
    fn share(&self, now: Nanos, tried: &[TargetId]) -> Nanos {
        let untried = self.snapshot.untried(now, &self.ask, tried).max(1) as u64;
        now + self.deadline.saturating_sub(now) / untried
    }

    /// Nothing further is tried: the last answer as it came, or the last error.
    fn give_up(&mut self, last: Option<(Code, Last)>, slot: Option<Slot>) -> Result<Delivery, GatewayError> {
        match (last, slot) {
            (Some((_, Last::Answer { mut head, lease, entered })), Some(slot)) => {
                if head.status == http::StatusCode::TOO_MANY_REQUESTS {
                    let secs = retry_after_secs(self.soonest());
                    head.headers.insert(RETRY_AFTER, HeaderValue::from(secs));
                    head.headers.remove("retry-after-ms");
                }
                // The answer that is delivered did not fail for the log's purposes: its status says it all.
                self.completion.failed.pop();
                Ok(Delivery { head: *head, lease, entered, slot, first: None, patience: self.patience() })
            }
            (Some((_, Last::Error(error))), _) => Err(error),
            _ => Err(GatewayError::UpstreamTimeout),
        }
    }

    fn patience(&self) -> Nanos {
        clock::nanos(self.snapshot.config.timeouts.stream_idle)
    }

    /// Time until the first of all targets that cannot be asked now reopens.
    fn soonest(&self) -> Nanos {
        let now = clock::now();
        let opens = |id| match self.snapshot.check(now, &self.ask, id, None) {
            Err(Closed::Cooling(at) | Closed::Quota(at)) => Some(at.saturating_sub(now)),
            _ => None,
        };
        (0..self.snapshot.route(&self.ask).targets.len()).filter_map(opens).min().unwrap_or(SECOND)
    }
}

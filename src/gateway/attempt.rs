//! The attempt loop: pick, send, judge, again. It ends with an answer to relay or with an error. What one try is, is
//! [`super::once`]'s business.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::HeaderMap;
use http::header::{HeaderValue, RETRY_AFTER};
use http::response::Parts;

use super::Gateway;
use super::admit::{Line, Wait, admit, refusal};
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

/// What a failed try left.
pub enum Left {
    /// An answer that goes to the client if nobody has a better one.
    Answer(Box<Answer>),
    /// No answer.
    Error(GatewayError),
}

/// An answer that is not worth delivering yet.
pub struct Answer {
    /// Status and headers as they came.
    pub head: Parts,
    /// The connection, positioned behind the head.
    pub lease: Lease,
    /// The request at the backend, its place given up.
    pub entered: InFlight,
}

/// A try's result that is no delivery: why, and what could be delivered for want of a better answer.
pub struct Failed {
    /// Why.
    pub code: Code,
    /// What it left.
    pub left: Left,
    /// It counts against the backend.
    pub blame: bool,
    /// No other backend is asked.
    pub fatal: bool,
    /// The target is not asked again: it let its share of the time pass, or refused what was asked.
    pub once: bool,
}

/// What the tries so far have left.
#[derive(Default)]
struct Leftovers {
    /// The last answer that came, and the number of its try.
    answer: Option<(Box<Answer>, u32)>,
    /// Why the last try failed.
    code: Option<Code>,
    /// What to say where no answer came.
    error: Option<GatewayError>,
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
        let mut left = Leftovers::default();
        let mut line = Line::default();
        // In the first round targets are picked; later rounds go through them in the same order.
        let (mut order, mut tried) = (Vec::<TargetId>::new(), Vec::<TargetId>::new());
        // Targets that are not asked again.
        let mut once = Vec::<TargetId>::new();
        let mut rounds = 0;
        loop {
            let now = clock::now();
            if self.completion.tries > 0 && !self.may_retry(now) {
                return self.give_up(left, slot);
            }
            self.refresh();
            let mut picked = self.look(now, rounds, &order, &tried, &mut line);
            // A backend that reopens from here on ends the wait; one that has reopened before is seen by a second look.
            let gateway = self.gateway;
            let is_busy = matches!(picked, (Pick::Busy(_), _));
            let reopened = is_busy.then(|| gateway.shared().reopened.notified());
            if is_busy {
                picked = self.look(now, rounds, &order, &tried, &mut line);
            }
            let (picked, panic) = picked;
            self.pass_over(now, &tried, &picked);
            let chosen = match picked {
                Pick::Backend(chosen) => chosen,
                Pick::Nobody | Pick::Out => return Err(GatewayError::NoBackend),
                Pick::KeysRefused => return Err(GatewayError::UpstreamAuth),
                // A target that is out is waited for only where the request stood in its line before.
                Pick::Busy(busy) if panic && !line.stands() => return Err(refusal(&busy, now)),
                Pick::Busy(busy) => {
                    drop(slot.take());
                    let wait = Wait { snapshot: &self.snapshot, busy: &busy, deadline: self.deadline };
                    line.wait(self.gateway, self.conn, self.completion, wait, reopened).await?;
                    slot = Some(admit(self.gateway, self.conn, self.completion, self.deadline).await?);
                    continue;
                }
                Pick::Tried => {
                    if !self.may_come_again(&order, &once) || !self.back_off(rounds).await {
                        return self.give_up(left, slot);
                    }
                    tried.clone_from(&once);
                    rounds += 1;
                    continue;
                }
            };
            let Chosen { target, entered } = chosen;
            line.served(self.snapshot.route(&self.ask).targets[target].backend);
            if self.completion.tries > 0 && !self.count_retry(now, &left) {
                return self.give_up(left, slot);
            }
            if panic {
                self.gateway.recorder().lane().panic_picks.add(1);
            }
            let limit = self.share(now, &tried);
            let failed = match (self.try_one(target, entered, limit).await, slot.take()) {
                (Ok((head, lease, entered, first)), Some(slot)) => {
                    self.let_go(left.answer);
                    return Ok(Delivery { head, lease, entered, slot, first, patience: self.patience() });
                }
                (Ok(_), None) => return Err(GatewayError::Internal),
                (Err(failed), held) => {
                    slot = held;
                    *failed
                }
            };
            tried.push(target);
            if failed.once {
                once.push(target);
            }
            if !order.contains(&target) {
                order.push(target);
            }
            let fatal = failed.fatal;
            self.keep(failed, &mut left);
            if fatal {
                return self.give_up(left, slot);
            }
        }
    }

    /// Keeps what a failed try left: the last answer, or where none came the last error. An error that ends the request
    /// comes before any answer.
    fn keep(&self, failed: Failed, left: &mut Leftovers) {
        left.code = Some(failed.code);
        match failed.left {
            Left::Answer(answer) => {
                let older = left.answer.replace((answer, self.completion.tries));
                self.let_go(older);
            }
            Left::Error(error) => {
                left.error = Some(error);
                if failed.fatal {
                    self.let_go(left.answer.take());
                }
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

    /// Picks a target, in panic where all are out; whether it was in panic.
    fn look(
        &self,
        now: Nanos,
        rounds: u32,
        order: &[TargetId],
        tried: &[TargetId],
        line: &mut Line,
    ) -> (Pick, bool) {
        match self.pick(now, rounds, order, tried, line) {
            Pick::Out => (self.pick_in_panic(now, tried, line), true),
            picked => (picked, false),
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
        // One that has reopened since comes before those that failed already.
        if let fresh @ (Pick::Backend(_) | Pick::Out) = self.snapshot.pick(now, &self.ask, order, None) {
            return fresh;
        }
        let rest: Vec<_> = order.iter().copied().filter(|id| !tried.contains(id)).collect();
        self.snapshot.pick_in_order(now, &self.ask, &rest).map_or(Pick::Tried, Pick::Backend)
    }

    fn pick_in_panic(&self, now: Nanos, tried: &[TargetId], line: &mut Line) -> Pick {
        let waited = line.granted.take();
        self.snapshot.pick_in_panic(now, &self.ask, tried, waited, line.turn())
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
            self.completion.pass_over(upstream, why, now);
        }
    }

    /// Drops an answer that will not be delivered; its connection serves on if the rest of it is here already.
    fn let_go(&self, answer: Option<(Box<Answer>, u32)>) {
        let Some((answer, _)) = answer else { return };
        let mut lease = answer.lease;
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
    fn may_come_again(&self, order: &[TargetId], once: &[TargetId]) -> bool {
        let now = clock::now();
        order.iter().any(|id| !once.contains(id) && self.snapshot.check(now, &self.ask, *id, None).is_ok())
    }

    /// Whether the rules allow one more try.
    fn may_retry(&self, now: Nanos) -> bool {
        self.completion.tries <= self.snapshot.config.retry.max_retries
            && now < self.deadline
            && self.gateway.shared().budget.has_room(now)
    }

    /// Counts a further try against the budget and by the backend whose failure led to it. `false`: the budget was spent
    /// since it was last asked.
    fn count_retry(&self, now: Nanos, left: &Leftovers) -> bool {
        if !self.gateway.shared().budget.try_withdraw(now) {
            return false;
        }
        if let (Some(reason), Some((upstream, _))) = (left.code, self.completion.failed.last()) {
            upstream.lanes[self.gateway.recorder().worker].retried(reason);
        }
        true
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

    /// Nothing further is tried: the last answer as it came, or where none came the last error.
    fn give_up(&mut self, left: Leftovers, slot: Option<Slot>) -> Result<Delivery, GatewayError> {
        let (Some((answer, number)), Some(slot)) = (left.answer, slot) else {
            return Err(left.error.unwrap_or(GatewayError::UpstreamTimeout));
        };
        let Answer { mut head, lease, entered } = *answer;
        if head.status == http::StatusCode::TOO_MANY_REQUESTS {
            let secs = retry_after_secs(self.soonest());
            head.headers.insert(RETRY_AFTER, HeaderValue::from(secs));
            head.headers.remove("retry-after-ms");
        }
        if number == self.completion.tries {
            // In the log the status of the answer says more than the code of the failure.
            self.completion.failed.pop();
        }
        Ok(Delivery { head, lease, entered, slot, first: None, patience: self.patience() })
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

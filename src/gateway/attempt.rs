//! The driver of a request's tries: it does what [`Dispatch`] says, until there is an answer to relay or an error. What
//! one try is, is [`crate::gateway::one_try`]'s business.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::HeaderMap;
use http::header::{HeaderValue, RETRY_AFTER};
use http::response::Parts;
use tokio::time::sleep;

use crate::client::exchange::Exchange;
use crate::clock;
use crate::code::Code;
use crate::gateway::Gateway;
use crate::gateway::admit::{Lines, Wait, refusal};
use crate::gateway::intake::ChatRequest;
use crate::gateway::refusal::GatewayError;
use crate::http1::headers;
use crate::http1::headers::About;
use crate::policy::choose::Closed;
use crate::policy::dispatch::{Dispatch, Do, Refusal, Rules};
use crate::policy::queue::Permit;
use crate::policy::retry::retry_after_secs;
use crate::policy::route::TargetId;
use crate::telemetry::{Phase, RequestRecord};
use crate::time::{Nanos, SECOND};
use crate::upstream::fleet::{Ask, Snapshot, View};
use crate::upstream::in_flight::InFlight;
use crate::upstream::link::Link;
use crate::upstream::pool::Lease;

/// Frames that are read of an answer nobody wants, to keep its connection.
const MAX_LEFTOVER: usize = 16;

/// An answer that goes to the client.
pub(crate) struct Delivery {
    /// Status and headers, without those that end at Zap.
    pub head: Parts,
    /// What the headers say.
    pub about: About,
    /// The connection, positioned behind the head, or behind `first`.
    pub lease: Lease,
    /// The place at the backend.
    pub entered: InFlight,
    /// The slot.
    pub slot: Permit,
    /// The body's first frame, where it was waited for.
    pub first: Option<Bytes>,
    /// How long the answer may make no progress.
    pub patience: Nanos,
}

/// An answer that is kept, to be delivered if nobody has a better one.
pub(crate) struct Kept {
    /// Status and headers as they came.
    pub head: Parts,
    /// The connection, positioned behind the head.
    pub lease: Lease,
    /// The request at the backend, its place given up.
    pub entered: InFlight,
    /// Number of its try.
    pub number: u32,
}

/// One request's way through the backends.
pub(crate) struct Attempts<'a> {
    /// The worker's gateway.
    pub gateway: &'a Gateway,
    /// The client's connection, for time limits.
    pub exchange: &'a Exchange,
    /// The client's headers.
    pub headers: &'a HeaderMap,
    /// The client's body.
    pub chat: &'a ChatRequest,
    /// What it asks for.
    pub ask: Ask<'a>,
    /// The fleet, of the configuration that the request came under.
    pub snapshot: Arc<Snapshot>,
    /// The record.
    pub record: &'a mut RequestRecord,
    /// When the first byte must be on its way.
    pub deadline: Nanos,
    /// When the present try began to wait for its backend, if it has.
    pub begun: Option<Nanos>,
}

impl Attempts<'_> {
    /// Tries until there is an answer to deliver.
    ///
    /// # Errors
    /// What to tell the client where there is none.
    pub(crate) async fn run(mut self, slot: Permit) -> Result<Delivery, GatewayError> {
        let (mut slot, mut kept, mut line) = (Some(slot), None, Lines::default());
        let mut dispatch = Dispatch::new(self.rules());
        let mut now = clock::now();
        self.gateway.shared().budget.offer(now);
        loop {
            if self.record.others > 0 {
                self.refresh();
            }
            let mut step = self.decide(now, &mut dispatch, &line);
            // A backend that reopens from here on ends the wait; one that has reopened before is seen by a second look.
            let gateway = self.gateway;
            let reopened = matches!(step, Do::Wait(_)).then(|| gateway.shared().reopened.notified());
            if reopened.is_some() {
                line.granted = None;
                step = self.decide(now, &mut dispatch, &line);
            }
            self.note_passed(now, dispatch.tried(), &step);
            match step {
                Do::Try { target, until, panic } => {
                    let Some(entered) = self.enter(now, target, &mut line) else {
                        dispatch.missed();
                        continue;
                    };
                    self.count_try(panic);
                    match (self.try_one(target, entered, until, &mut dispatch).await, slot.take()) {
                        (Ok((head, about, lease, entered, first)), Some(slot)) => {
                            self.let_go(kept);
                            let patience = self.patience();
                            return Ok(Delivery { head, about, lease, entered, slot, first, patience });
                        }
                        (Ok(_), None) => return Err(GatewayError::Internal),
                        (Err(newer), held) => {
                            slot = held;
                            if newer.is_some() {
                                self.let_go(std::mem::replace(&mut kept, newer));
                            }
                        }
                    }
                }
                Do::Wait(busy) => {
                    drop(slot.take());
                    let wait =
                        Wait { snapshot: &self.snapshot, busy: &busy, deadline: self.deadline, reopened };
                    line.wait(self.gateway, self.exchange, self.record, wait).await?;
                    slot = Some(line.readmit(self.gateway, self.exchange, self.record, self.deadline).await?);
                }
                Do::Backoff { until } => self.back_off(now, until).await,
                Do::Deliver => match (kept.take(), slot.take()) {
                    (Some(kept), Some(slot)) => return Ok(self.deliver_kept(*kept, slot)),
                    _ => return Err(GatewayError::Internal),
                },
                Do::Refuse(why) => return Err(refused(why, now)),
            }
            now = clock::now();
        }
    }

    fn rules(&self) -> Rules {
        let retry = &self.snapshot.config.retry;
        Rules {
            max_retries: retry.max_retries,
            base_delay: retry.base_delay,
            max_delay: retry.max_delay,
            deadline: self.deadline,
        }
    }

    /// Looks at the fleet as it is now, unless a reload has made it another's. Only a request that has waited since it took
    /// its snapshot need do so.
    fn refresh(&mut self) {
        let fresh = self.gateway.snapshot();
        if !Arc::ptr_eq(&fresh, &self.snapshot) && fresh.is_of(&self.snapshot) {
            self.snapshot = fresh.clone();
        }
    }

    fn decide(&self, now: Nanos, dispatch: &mut Dispatch, line: &Lines) -> Do {
        let view = View {
            snapshot: &self.snapshot,
            ask: &self.ask,
            now,
            turn: line.turn(),
            granted: line.granted.as_ref().map(|(backend, _)| *backend),
            stands_in_line: line.stands(),
        };
        dispatch.next(now, &view, &self.gateway.shared().budget, || self.gateway.random())
    }

    /// Takes a place at a target and leaves all lines; `None` where another request came first.
    fn enter(&self, now: Nanos, target: TargetId, line: &mut Lines) -> Option<InFlight> {
        let backend = self.snapshot.route(&self.ask).targets[target].backend;
        let upstream = &self.snapshot.backends[backend];
        let entered = match line.granted.take_if(|(granted, _)| *granted == backend) {
            Some((_, place)) => upstream.enter_at(Some(place), now, line.turn()),
            None => upstream.enter(now, line.turn()),
        };
        line.served(backend, entered.is_some());
        entered
    }

    /// Counts a try: a further one by the backend whose failure led to it.
    fn count_try(&self, panic: bool) {
        let recorder = self.gateway.recorder();
        if let Some((upstream, fault)) = self.record.failed.last() {
            upstream.lanes[recorder.worker].retried(fault.kind);
        }
        if panic {
            recorder.lane().panic_picks.add(1);
        }
    }

    /// Notes for the log which targets were passed over.
    fn note_passed(&mut self, now: Nanos, tried: &[TargetId], step: &Do) {
        if !self.record.is_logged {
            return;
        }
        let chosen = match step {
            Do::Try { target, .. } => Some(*target),
            _ => None,
        };
        for (upstream, why) in self.snapshot.passed(now, &self.ask, tried, chosen) {
            self.record.pass_over(upstream, why, now);
        }
    }

    /// Drops an answer that will not be delivered; its connection serves on if the rest of it is here already.
    fn let_go(&self, kept: Option<Box<Kept>>) {
        let Some(kept) = kept else { return };
        let mut lease = kept.lease;
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..MAX_LEFTOVER {
            match lease.link.poll_frame(&mut cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(None) => return self.gateway.pool().park(lease, clock::now()),
                Poll::Ready(Some(Err(_))) | Poll::Pending => return,
            }
        }
    }

    async fn back_off(&mut self, now: Nanos, until: Nanos) {
        self.record.phase = Phase::Backoff;
        self.exchange.set_deadline(self.deadline);
        sleep(std::time::Duration::from_nanos(until.saturating_sub(now))).await;
        self.record.others += clock::now() - now;
    }

    fn deliver_kept(&mut self, kept: Kept, slot: Permit) -> Delivery {
        let Kept { mut head, lease, entered, number } = kept;
        let about = headers::to_client(&mut head.headers);
        if head.status == http::StatusCode::TOO_MANY_REQUESTS {
            let secs = retry_after_secs(self.soonest());
            head.headers.insert(RETRY_AFTER, HeaderValue::from(secs));
            head.headers.remove("retry-after-ms");
        }
        if number == self.record.tries {
            // In the log the status of the answer says more than the code of the failure.
            self.record.failed.pop();
        }
        Delivery { head, about, lease, entered, slot, first: None, patience: self.patience() }
    }

    fn patience(&self) -> Nanos {
        clock::nanos(self.snapshot.config.timeouts.stream_idle)
    }

    /// Time until the first of all targets that cannot be asked now reopens.
    fn soonest(&self) -> Nanos {
        let now = clock::now();
        let opens = |id| match self.snapshot.check(now, &self.ask, id) {
            Err(Closed::Cooling(at) | Closed::Quota(at)) => Some(at.saturating_sub(now)),
            _ => None,
        };
        (0..self.snapshot.route(&self.ask).targets.len()).filter_map(opens).min().unwrap_or(SECOND)
    }
}

fn refused(why: Refusal, now: Nanos) -> GatewayError {
    match why {
        Refusal::Busy(busy) => refusal(&busy, now),
        Refusal::KeysRefused => GatewayError::UpstreamAuth,
        Refusal::NoBackend => GatewayError::NoBackend,
        Refusal::Failed(code) => match code {
            Code::Draining => GatewayError::Draining,
            Code::UpstreamAuthError => GatewayError::UpstreamAuth,
            Code::UpstreamInvalidResponse => GatewayError::UpstreamInvalid,
            Code::UpstreamRedirect => GatewayError::UpstreamRedirect,
            Code::UpstreamTimeout => GatewayError::UpstreamTimeout,
            Code::UpstreamTlsError => GatewayError::UpstreamTls,
            _ => GatewayError::UpstreamUnreachable,
        },
    }
}

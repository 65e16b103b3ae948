//! Drives the tries of a request: carries out the decisions of [`Dispatch`] until there is a response to relay or an
//! error. [`crate::gateway::one_try`] runs a single try.

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
use crate::gateway::backend_queue::{BackendQueues, Wait, refusal};
use crate::gateway::intake::ChatRequest;
use crate::gateway::refusal::GatewayError;
use crate::gateway::state::Generation;
use crate::http1::headers;
use crate::http1::headers::ResponseFacts;
use crate::policy::choose::Closed;
use crate::policy::dispatch::{Dispatch, Do, Refusal, Rules};
use crate::policy::queue::Permit;
use crate::policy::retry::retry_after_secs;
use crate::policy::route::TargetId;
use crate::telemetry::phase::Phase;
use crate::telemetry::record::RequestRecord;
use crate::time::{Nanos, SECOND};
use crate::upstream::fleet::{Ask, View};
use crate::upstream::in_flight::InFlight;
use crate::upstream::link::Link;
use crate::upstream::pool::Lease;

/// Frames read from a discarded response, so that its connection can be reused.
const MAX_DISCARDED_FRAMES: usize = 16;

/// A response of a backend that goes to the client.
pub(crate) struct Delivery {
    /// The status and the headers, without hop-by-hop headers and others that Zap does not forward.
    pub head: Parts,
    /// The facts that Zap needs from the headers.
    pub about: ResponseFacts,
    /// The connection, positioned after the head, or after `first`.
    pub lease: Lease,
    /// The request at the backend, with its permit.
    pub in_flight: InFlight,
    /// The slot of the request.
    pub slot: Permit,
    /// The first frame of the body, if it has been read already.
    pub first: Option<Bytes>,
    /// How long the response may make no progress.
    pub idle_timeout: Nanos,
}

/// A response of a failed try, which is delivered if no later try has a better one.
pub(crate) struct KeptResponse {
    /// The status and the headers as received.
    pub head: Parts,
    /// The connection, positioned after the head.
    pub lease: Lease,
    /// The request at the backend, without a permit.
    pub in_flight: InFlight,
    /// The number of its try, from 1.
    pub number: u32,
}

/// The tries of one request.
pub(crate) struct Attempts<'a> {
    /// The worker's gateway.
    pub gateway: &'a Gateway,
    /// The exchange on the client connection, for time limits.
    pub exchange: &'a Exchange,
    /// The headers of the client's request.
    pub headers: &'a HeaderMap,
    /// The body of the client's request.
    pub chat: &'a ChatRequest,
    /// The route, the model and the affinity of the request.
    pub ask: Ask<'a>,
    /// The fleet, under the configuration that was current when the request arrived.
    pub snapshot: Arc<Generation>,
    /// The record of the request.
    pub record: &'a mut RequestRecord,
    /// The deadline for the first byte of the response.
    pub deadline: Nanos,
    /// When the current try began to wait for its backend; `None` before that.
    pub wait_began: Option<Nanos>,
}

impl Attempts<'_> {
    /// Runs tries until there is a response to deliver.
    ///
    /// # Errors
    /// The error to send to the client if there is none.
    pub(crate) async fn run(mut self, slot: Permit) -> Result<Delivery, GatewayError> {
        let (mut slot, mut kept, mut queues) = (Some(slot), None, BackendQueues::default());
        let mut dispatch = Dispatch::new(self.rules());
        let mut now = clock::now();
        self.gateway.shared().budget.offer(now);
        loop {
            if self.record.waited > 0 {
                self.refresh();
            }
            let mut step = self.decide(now, &mut dispatch, &queues);
            // Register for reopened backends, then decide again: a backend may have reopened before the registration.
            let gateway = self.gateway;
            let reopened = matches!(step, Do::Wait(_)).then(|| gateway.shared().reopened.notified());
            if reopened.is_some() {
                queues.granted = None;
                step = self.decide(now, &mut dispatch, &queues);
            }
            self.record_passed(now, dispatch.tried(), &step);
            match step {
                Do::Try { target, until, panic } => {
                    let Some(in_flight) = self.enter(now, target, &mut queues) else {
                        dispatch.missed();
                        continue;
                    };
                    self.count_try(panic);
                    match (self.try_one(target, in_flight, until, &mut dispatch).await, slot.take()) {
                        (Ok((head, about, lease, in_flight, first)), Some(slot)) => {
                            self.discard(kept);
                            let idle_timeout = self.idle_timeout();
                            return Ok(Delivery { head, about, lease, in_flight, slot, first, idle_timeout });
                        }
                        (Ok(_), None) => return Err(GatewayError::Internal),
                        (Err(newer), still_held) => {
                            slot = still_held;
                            if newer.is_some() {
                                self.discard(std::mem::replace(&mut kept, newer));
                            }
                        }
                    }
                }
                Do::Wait(busy) => {
                    drop(slot.take());
                    let wait =
                        Wait { snapshot: &self.snapshot, busy: &busy, deadline: self.deadline, reopened };
                    queues.wait(self.gateway, self.exchange, self.record, wait).await?;
                    slot =
                        Some(queues.readmit(self.gateway, self.exchange, self.record, self.deadline).await?);
                }
                Do::Backoff { until } => self.back_off(now, until).await,
                Do::Deliver => match (kept.take(), slot.take()) {
                    (Some(kept), Some(slot)) => return Ok(self.deliver_kept(*kept, slot)),
                    _ => return Err(GatewayError::Internal),
                },
                Do::Refuse(why) => return Err(to_error(why, now)),
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

    /// Takes the current snapshot of the fleet, unless a reload has changed the configuration. Only a request that has
    /// waited since its last snapshot needs a new one.
    fn refresh(&mut self) {
        let fresh = self.gateway.current();
        if !Arc::ptr_eq(&fresh, &self.snapshot) && fresh.has_same_ids(&self.snapshot) {
            self.snapshot = fresh.clone();
        }
    }

    fn decide(&self, now: Nanos, dispatch: &mut Dispatch, queues: &BackendQueues) -> Do {
        let view = View {
            snapshot: &self.snapshot,
            ask: &self.ask,
            now,
            ticket: queues.ticket(),
            granted: queues.granted.as_ref().map(|(backend, _)| *backend),
            is_waiting: queues.is_waiting(),
        };
        dispatch.next(now, &view, &self.gateway.shared().budget, || self.gateway.random())
    }

    /// Takes a permit and a unit of the quota at the target's backend, and leaves all queues. Returns `None` if another
    /// request took the last one.
    fn enter(&self, now: Nanos, target: TargetId, queues: &mut BackendQueues) -> Option<InFlight> {
        let backend = self.snapshot.route(&self.ask).targets[target].backend;
        let upstream = &self.snapshot.backends[backend];
        let in_flight = match queues.granted.take_if(|(granted, _)| *granted == backend) {
            Some((_, permit)) => upstream.enter_with(Some(permit), now, queues.ticket()),
            None => upstream.enter(now, queues.ticket()),
        }?;
        queues.leave(backend);
        Some(in_flight)
    }

    /// Counts a try. A retry counts at the backend whose failure caused it.
    fn count_try(&self, panic: bool) {
        let recorder = self.gateway.recorder();
        if let Some((upstream, fault)) = self.record.failed.last() {
            upstream.lanes[recorder.worker].retried(fault.kind);
        }
        if panic {
            recorder.lane().panic_picks.add(1);
        }
    }

    /// Records for the log which targets were passed over.
    fn record_passed(&mut self, now: Nanos, tried: &[TargetId], step: &Do) {
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

    /// Discards a kept response. Its connection is reused if the rest of the body has been received already.
    fn discard(&self, kept: Option<Box<KeptResponse>>) {
        let Some(kept) = kept else { return };
        let mut lease = kept.lease;
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..MAX_DISCARDED_FRAMES {
            match lease.link.poll_frame(&mut cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(None) => return self.gateway.pool().park(lease, clock::now()),
                Poll::Ready(Some(Err(_))) | Poll::Pending => return,
            }
        }
    }

    /// Sleeps until `until`.
    async fn back_off(&mut self, now: Nanos, until: Nanos) {
        self.record.phase = Phase::Backoff;
        self.exchange.set_deadline(self.deadline);
        sleep(std::time::Duration::from_nanos(until.saturating_sub(now))).await;
        self.record.waited += clock::now() - now;
    }

    /// Delivers the response of a failed try. A 429 gets the time after which a target reopens as `Retry-After`.
    fn deliver_kept(&mut self, kept: KeptResponse, slot: Permit) -> Delivery {
        let KeptResponse { mut head, lease, in_flight, number } = kept;
        let about = headers::to_client(&mut head.headers);
        if head.status == http::StatusCode::TOO_MANY_REQUESTS {
            let secs = retry_after_secs(self.time_to_reopen());
            head.headers.insert(RETRY_AFTER, HeaderValue::from(secs));
            head.headers.remove("retry-after-ms");
        }
        if number == self.record.tries {
            // The log line shows the status of this response instead of the code of the failure.
            self.record.failed.pop();
        }
        Delivery { head, about, lease, in_flight, slot, first: None, idle_timeout: self.idle_timeout() }
    }

    fn idle_timeout(&self) -> Nanos {
        clock::nanos(self.snapshot.config.timeouts.stream_idle)
    }

    /// Returns the time until the first target that cools down or has spent its quota reopens; a second if there is
    /// none.
    fn time_to_reopen(&self) -> Nanos {
        let now = clock::now();
        let opens = |id| match self.snapshot.check(now, &self.ask, id) {
            Err(Closed::Cooling(at) | Closed::Quota(at)) => Some(at.saturating_sub(now)),
            _ => None,
        };
        (0..self.snapshot.route(&self.ask).targets.len()).filter_map(opens).min().unwrap_or(SECOND)
    }
}

/// The error to send to the client for a refusal.
fn to_error(why: Refusal, now: Nanos) -> GatewayError {
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

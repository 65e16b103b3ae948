//! Time limits of client connections: one periodic sweep for each worker, not a timer for each phase.
//!
//! A connection is in one phase at a time, so it needs one deadline: each phase sets it, and the sweep expires those
//! that have passed. If no phase takes the expiry, the connection ends.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::clock;
use crate::time::{Nanos, SECOND};

/// Time between two sweeps. A deadline expires at most so late.
pub(crate) const SWEEP_INTERVAL: Duration = Duration::from_millis(100);

/// A sweep that is this late shows that the process was stopped, together with all work that the deadlines limit.
const STOPPED: Nanos = SECOND;

/// Time for a head, from its first byte or from the accept, and for a handshake.
const BEGIN: Nanos = 10 * SECOND;

/// The same on a connection of the reserve, which the next health check needs.
const RESERVE_BEGIN: Nanos = 2 * SECOND;

/// How long a client may take for a handshake or for a head. `is_reserve`: all regular connections are taken.
pub(super) fn time_to_begin(is_reserve: bool) -> Nanos {
    if is_reserve { RESERVE_BEGIN } else { BEGIN }
}

/// A deadline has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Elapsed;

/// One connection's deadline.
#[derive(Debug, Default)]
pub(crate) struct Deadline {
    at: Cell<Nanos>,
    expired: Cell<bool>,
    /// Whether every sweep wakes the task.
    wake_on_sweep: Cell<bool>,
    /// When the task is woken once, without an expiry; 0: never.
    nudge_at: Cell<Nanos>,
    nudged: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Deadline {
    /// Sets the deadline to `at`, in place of the previous one.
    pub(crate) fn set(&self, at: Nanos) {
        self.at.set(at);
        self.expired.set(false);
    }

    /// Whether it has expired and no phase has taken that.
    pub(crate) fn has_expired(&self) -> bool {
        self.expired.get()
    }

    /// Takes the expiry. Returns whether there was one.
    pub(crate) fn take_expired(&self) -> bool {
        self.expired.take()
    }

    /// Expires it now.
    pub(crate) fn expire(&self) {
        self.at.set(Nanos::MAX);
        self.expired.set(true);
        self.wake();
    }

    /// Sets whether every sweep wakes the task.
    pub(crate) fn set_wake_on_sweep(&self, wake_on_sweep: bool) {
        self.wake_on_sweep.set(wake_on_sweep);
    }

    /// Has the task woken once at `at`, whatever the deadline is; 0: not at all.
    pub(crate) fn nudge_at(&self, at: Nanos) {
        self.nudge_at.set(at);
        self.nudged.set(false);
    }

    /// Takes the nudge. Returns whether there was one.
    pub(crate) fn take_nudge(&self) -> bool {
        self.nudged.take()
    }

    /// Wakes the connection's task.
    pub(crate) fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Registers the task of the connection.
    pub(crate) fn register(&self, cx: &Context<'_>) {
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
    }

    /// Runs `work` until the deadline `at`.
    ///
    /// # Errors
    /// Returns [`Elapsed`] if the deadline has passed; `work` is dropped then.
    pub(crate) async fn limit<F: Future>(&self, at: Nanos, work: F) -> Result<F::Output, Elapsed> {
        self.set(at);
        let mut work = pin!(work);
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(out) => Poll::Ready(Ok(out)),
            Poll::Pending if self.take_expired() => Poll::Ready(Err(Elapsed)),
            Poll::Pending => Poll::Pending,
        })
        .await
    }
}

/// The deadlines of a worker's connections.
#[derive(Debug, Default)]
pub(crate) struct Deadlines {
    all: RefCell<Vec<Weak<Deadline>>>,
    now: Cell<Nanos>,
}

impl Deadlines {
    /// Adds a deadline that expires at `at`.
    pub(crate) fn add(&self, at: Nanos) -> Rc<Deadline> {
        let deadline = Rc::new(Deadline::default());
        deadline.set(at);
        self.all.borrow_mut().push(Rc::downgrade(&deadline));
        deadline
    }

    /// The time of the last sweep. It is exact to [`SWEEP_INTERVAL`], which is enough for limits of seconds, and costs
    /// nothing.
    pub(crate) fn coarse_now(&self) -> Nanos {
        self.now.get()
    }

    /// Expires what is due, and removes the connections that have ended.
    pub(crate) fn sweep(&self) {
        self.sweep_at(clock::now());
    }

    fn sweep_at(&self, now: Nanos) {
        let last = self.now.replace(now);
        let late = now.saturating_sub(last).saturating_sub(clock::nanos(SWEEP_INTERVAL));
        // What came meanwhile was not read yet: the deadlines do not count that time.
        let grace = if last > 0 && late >= STOPPED { late } else { 0 };
        self.all.borrow_mut().retain(|weak| {
            let Some(deadline) = weak.upgrade() else { return false };
            deadline.at.set(deadline.at.get().saturating_add(grace));
            if deadline.nudge_at.get() > 0 {
                deadline.nudge_at.set(deadline.nudge_at.get().saturating_add(grace));
            }
            let is_nudged = (1..=now).contains(&deadline.nudge_at.get());
            if is_nudged {
                deadline.nudge_at.set(0);
                deadline.nudged.set(true);
            }
            if deadline.at.get() <= now {
                deadline.expire();
            } else if is_nudged || deadline.wake_on_sweep.get() {
                deadline.wake();
            }
            true
        });
    }

    /// Wakes every connection, or expires every deadline.
    pub(crate) fn all(&self, expire: bool) {
        for deadline in self.all.borrow().iter().filter_map(Weak::upgrade) {
            if expire { deadline.expire() } else { deadline.wake() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expired_deadline_is_taken_once_and_ended_connections_are_removed() {
        let deadlines = Deadlines::default();
        let (due, later) = (deadlines.add(0), deadlines.add(Nanos::MAX));
        drop(deadlines.add(0));
        deadlines.sweep();
        assert!(due.has_expired() && !later.has_expired());
        assert!(due.take_expired() && !due.take_expired());
        deadlines.sweep();
        assert!(!due.has_expired(), "a deadline expires once");
        assert_eq!(deadlines.all.borrow().len(), 2);
    }

    #[test]
    fn deadlines_do_not_count_the_time_while_the_process_was_stopped() {
        let deadlines = Deadlines::default();
        deadlines.sweep_at(SECOND);
        let deadline = deadlines.add(3 * SECOND);
        deadlines.sweep_at(61 * SECOND);
        assert!(!deadline.has_expired(), "a minute was lost");
        (0..15).for_each(|i| deadlines.sweep_at(61 * SECOND + i * SECOND / 10));
        assert!(!deadline.has_expired());
        (15..25).for_each(|i| deadlines.sweep_at(61 * SECOND + i * SECOND / 10));
        assert!(deadline.has_expired(), "two seconds were left of three");
    }

    #[test]
    fn work_past_its_deadline_is_dropped() {
        let deadlines = Deadlines::default();
        let deadline = deadlines.add(Nanos::MAX);
        let mut cx = Context::from_waker(Waker::noop());
        let mut work = pin!(deadline.limit(0, std::future::pending::<()>()));
        assert!(work.as_mut().poll(&mut cx).is_pending());
        deadlines.sweep();
        assert_eq!(work.as_mut().poll(&mut cx), Poll::Ready(Err(Elapsed)));
        let mut done = pin!(deadline.limit(0, std::future::ready(3)));
        assert_eq!(done.as_mut().poll(&mut cx), Poll::Ready(Ok(3)));
    }
}

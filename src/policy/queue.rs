//! Admission: a fixed number of slots, and a bounded queue with fair lines for requests that find no free slot.
//!
//! All counts live in one atomic word, so whether a request passes, waits or is refused is one decision: never
//! more than `slots` in flight, never more than `max_waiting` waiting, and no refusal while there is room. Waiters
//! come through a crossbeam `ArrayQueue`. A released slot is *reserved* for the queue. The thread that settles sorts
//! the waiters into one line a client and hands reserved slots to those whose [turn](crate::policy::lines) it is; no
//! thread waits for another one to settle.
//!
//! The module uses wakers but no runtime: time limits are the caller's task.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crossbeam_utils::CachePadded;

pub use crate::policy::lines::Turn;

use crate::policy::lines::Lines;
use crate::policy::sync::{ArrayQueue, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Mutex, Ordering};

/// Largest number of slots, and of waiters: 21 bits of the word each.
pub(crate) const MAX: usize = (1 << 21) - 1;

/// Counts of held slots for each slot, so that two clients seldom share one.
const COUNTS_PER_SLOT: usize = 16;

/// Most counts of held slots.
const MAX_COUNTS: usize = 1_024;

/// Waiters that the array has room for if there may be many admissions, few of which have waiters.
const FEW: usize = 16;

/// No slot is free and the queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueFull;

/// The slots and the queue in front of them.
#[derive(Debug)]
pub struct Admission {
    word: CachePadded<AtomicU64>,
    slots: AtomicU64,
    max_waiting: AtomicU64,
    queue: ArrayQueue<Arc<Waiter>>,
    /// Waiters taken out of `queue` but not yet served.
    lines: Mutex<Lines<Arc<Waiter>>>,
    /// The slots that clients hold, by the last bits of the hash of the client. The length is a power of two. Two
    /// clients may share a count, which can only change whose turn is next.
    held: Box<[AtomicU32]>,
    /// Calls to `settle` that are not yet done. The thread that raises it from 0 settles for all of them.
    unsettled: AtomicUsize,
    /// Waiters that gave up and may still be in `queue`.
    cancelled: AtomicUsize,
    /// Requests that wait for a backend outside the queue. They count as waiting, but do not wait for a slot.
    outside: AtomicU64,
}

/// The counts as one word. Invariants: `reserved <= waiting`; except while the limits change, `in_flight <= slots`, and
/// `waiting > reserved` only while `in_flight == slots`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Slots taken, reserved ones included.
    in_flight: u64,
    /// Waiters that have neither given up nor been served.
    waiting: u64,
    /// Slots that are reserved for the queue but not yet handed to a waiter.
    reserved: u64,
}

impl Counts {
    fn unpack(word: u64) -> Self {
        let mask = MAX as u64;
        Counts { in_flight: word & mask, waiting: word >> 21 & mask, reserved: word >> 42 & mask }
    }

    fn pack(self) -> u64 {
        self.in_flight | self.waiting << 21 | self.reserved << 42
    }

    /// Frees a reserved slot if no waiter is left to take it.
    fn free_surplus(mut self) -> Self {
        if self.reserved > self.waiting {
            self.reserved -= 1;
            self.in_flight -= 1;
        }
        self
    }
}

const WAITING: u8 = 0;
const GRANTED: u8 = 1;
const CANCELLED: u8 = 2;

#[derive(Debug)]
struct Waiter {
    turn: Turn,
    /// [`WAITING`], [`GRANTED`] or [`CANCELLED`].
    state: AtomicU8,
    waker: Mutex<Option<Waker>>,
}

/// A slot that is held. Dropping the permit hands the slot to the next waiter, or frees it.
#[derive(Debug)]
#[must_use = "dropping a permit releases its slot"]
pub struct Permit {
    admission: Arc<Admission>,
    client: u64,
}

/// A place in the queue: a future that yields the [`Permit`]. Dropping the ticket leaves the queue.
#[derive(Debug)]
#[must_use = "dropping a ticket leaves the queue"]
pub struct Ticket {
    admission: Arc<Admission>,
    waiter: Arc<Waiter>,
    done: bool,
}

/// A request that waits for a backend to come back, and needs no slot for it. Dropping the value ends the wait.
#[derive(Debug)]
#[must_use = "dropping it ends the wait"]
pub struct BackendWait(Arc<Admission>);

/// The decision of [`Admission::enter`].
#[derive(Debug)]
pub enum Admitted {
    /// A slot was free.
    Passed(Permit),
    /// The request must wait for this ticket.
    Queued(Ticket),
}

impl Admission {
    /// Creates an admission with `slots` (1 to [`MAX`]) requests in flight and `max_waiting` (0 to [`MAX`]) in the
    /// queue.
    pub fn new(slots: usize, max_waiting: usize) -> Arc<Self> {
        Self::with_counts(slots, max_waiting, counts(slots))
    }

    /// [`new`](Self::new) with little memory, for one of many backends: its waiters go to their lines under a lock if
    /// they are many.
    pub(crate) fn of_one_backend(slots: usize, max_waiting: usize) -> Arc<Self> {
        Self::small(slots, max_waiting, counts(slots))
    }

    /// [`new`](Self::new) with little memory, for the requests of one of many clients.
    pub(crate) fn of_one_client(slots: usize, max_waiting: usize) -> Arc<Self> {
        Self::small(slots, max_waiting, 1)
    }

    fn small(slots: usize, max_waiting: usize, counts: usize) -> Arc<Self> {
        let admission = Self::with_counts(slots, max_waiting.min(FEW), counts);
        admission.resize(slots, max_waiting);
        admission
    }

    fn with_counts(slots: usize, max_waiting: usize, counts: usize) -> Arc<Self> {
        let (slots, max_waiting) = (slots.clamp(1, MAX), max_waiting.min(MAX));
        Arc::new(Admission {
            word: CachePadded::new(AtomicU64::new(0)),
            slots: AtomicU64::new(slots as u64),
            max_waiting: AtomicU64::new(max_waiting as u64),
            // Room for all waiters and as many cancelled ones, which are removed when they reach `max_waiting`.
            queue: ArrayQueue::new(2 * max_waiting + 2),
            lines: Mutex::new(Lines::default()),
            held: (0..counts).map(|_| AtomicU32::new(0)).collect(),
            unsettled: AtomicUsize::new(0),
            cancelled: AtomicUsize::new(0),
            outside: AtomicU64::new(0),
        })
    }

    /// Changes the limits. Waiters get the slots that are free now; requests that hold a slot above a lower limit
    /// keep it.
    pub fn resize(&self, slots: usize, max_waiting: usize) {
        self.slots.store(slots.clamp(1, MAX) as u64, Ordering::SeqCst);
        self.max_waiting.store(max_waiting.min(MAX) as u64, Ordering::SeqCst);
        self.settle();
    }

    /// Takes a slot, or a place in the queue.
    ///
    /// # Errors
    /// Returns [`QueueFull`] if no slot is free and the queue is full.
    pub fn enter(self: &Arc<Self>, turn: Turn) -> Result<Admitted, QueueFull> {
        let outside = self.outside.load(Ordering::Relaxed);
        let mut passed = false;
        self.update(|mut c| {
            passed = c.in_flight < self.slots.load(Ordering::SeqCst);
            if passed {
                c.in_flight += 1;
            } else if c.waiting - c.reserved + outside < self.max_waiting.load(Ordering::Relaxed) {
                c.waiting += 1;
            } else {
                return None;
            }
            Some(c)
        })
        .ok_or(QueueFull)?;
        if passed {
            return Ok(Admitted::Passed(self.permit(turn.client)));
        }
        let waiter = Arc::new(Waiter { turn, state: AtomicU8::new(WAITING), waker: Mutex::new(None) });
        if let Err(waiter) = self.queue.push(waiter.clone()) {
            // The array was made for a lower limit, or is full of cancelled waiters: move them all to their lines.
            let mut lines = self.lines.lock();
            self.sort_into(&mut lines);
            lines.push(turn, waiter);
        }
        self.settle();
        Ok(Admitted::Queued(Ticket { admission: self.clone(), waiter, done: false }))
    }

    /// Takes a slot if one is free. Never takes a slot that is reserved for a waiter.
    pub fn try_pass(self: &Arc<Self>, turn: Turn) -> Option<Permit> {
        let free = |mut c: Counts| {
            c.in_flight += 1;
            (c.in_flight <= self.slots.load(Ordering::Relaxed)).then_some(c)
        };
        self.update(free).map(|_| self.permit(turn.client))
    }

    /// Whether [`try_pass`](Self::try_pass) would fail now.
    pub fn is_full(&self) -> bool {
        Counts::unpack(self.word.load(Ordering::Relaxed)).in_flight >= self.slots.load(Ordering::Relaxed)
    }

    /// Counts a request as waiting without a place in the queue: the request waits for a backend, not for a slot.
    ///
    /// # Errors
    /// Returns [`QueueFull`] if the largest number of requests wait already.
    pub fn wait_for_backend(self: &Arc<Self>) -> Result<BackendWait, QueueFull> {
        let c = Counts::unpack(self.word.load(Ordering::SeqCst));
        let room = self.max_waiting.load(Ordering::Relaxed).saturating_sub(c.waiting - c.reserved);
        let more = |n| (n < room).then_some(n + 1);
        match self.outside.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more) {
            Ok(_) => Ok(BackendWait(self.clone())),
            Err(_) => Err(QueueFull),
        }
    }

    /// Returns the number of requests that hold a slot.
    pub fn in_flight(&self) -> usize {
        let c = Counts::unpack(self.word.load(Ordering::Relaxed));
        // A served waiter may have released its slot before `reserved` was lowered for it.
        c.in_flight.saturating_sub(c.reserved) as usize
    }

    /// Returns the number of requests that wait, in the queue and outside it.
    pub fn depth(&self) -> usize {
        let c = Counts::unpack(self.word.load(Ordering::Relaxed));
        (c.waiting + self.outside.load(Ordering::Relaxed)) as usize
    }

    /// Changes the counts in one atomic step, unless `change` returns `None`. Returns the counts before the change.
    fn update(&self, mut change: impl FnMut(Counts) -> Option<Counts>) -> Option<Counts> {
        let packed = |word| change(Counts::unpack(word)).map(Counts::pack);
        self.word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, packed).ok().map(Counts::unpack)
    }

    /// The permit for a slot that has been taken for a client.
    fn permit(self: &Arc<Self>, client: u64) -> Permit {
        self.held(client).fetch_add(1, Ordering::Relaxed);
        Permit { admission: self.clone(), client }
    }

    /// The number of slots that a client holds.
    fn held(&self, client: u64) -> &AtomicU32 {
        &self.held[client as usize & (self.held.len() - 1)]
    }

    /// Moves the waiters of the queue to the lines of their clients.
    fn sort_into(&self, lines: &mut Lines<Arc<Waiter>>) {
        while let Some(waiter) = self.queue.pop() {
            lines.push(waiter.turn, waiter);
        }
    }

    /// A client gives back a slot.
    fn release(&self, client: u64) {
        self.held(client).fetch_sub(1, Ordering::Relaxed);
        let before = self.update(|mut c| {
            if c.waiting > c.reserved && c.in_flight <= self.slots.load(Ordering::SeqCst) {
                c.reserved += 1;
            } else {
                c.in_flight -= 1;
            }
            Some(c)
        });
        // If the limit has just been raised, `settle` reserves the free slots.
        if before.is_some_and(|c| c.waiting > c.reserved) {
            let mut lines = self.lines.lock();
            self.sort_into(&mut lines);
            lines.end_turn(client);
            drop(lines);
            self.settle();
        }
    }

    /// A waiter gave up before it was served.
    fn cancel(&self) {
        self.update(|mut c| {
            c.waiting -= 1;
            Some(c.free_surplus())
        });
        if self.cancelled.fetch_add(1, Ordering::SeqCst) + 1 >= self.max_cancelled() {
            self.settle();
        }
    }

    /// Hands reserved slots to waiters. If another thread is settling already, that thread does this call's work too.
    fn settle(&self) {
        if self.unsettled.fetch_add(1, Ordering::SeqCst) != 0 {
            return;
        }
        let mut seen = 1;
        loop {
            self.serve_front();
            match self.unsettled.compare_exchange(seen, 0, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return,
                Err(more) => seen = more,
            }
        }
    }

    /// Number of cancelled waiters at which they are removed from the queue.
    fn max_cancelled(&self) -> usize {
        self.max_waiting.load(Ordering::Relaxed).max(1) as usize
    }

    /// Reserves free slots for the waiters. Both exist at once only after the limits were changed.
    fn reserve_free_slots(&self) {
        let reserve = |mut c: Counts| {
            let has_both = c.waiting > c.reserved && c.in_flight < self.slots.load(Ordering::SeqCst);
            c.reserved += 1;
            c.in_flight += 1;
            has_both.then_some(c)
        };
        while self.update(reserve).is_some() {}
    }

    fn serve_front(&self) {
        self.reserve_free_slots();
        let mut lines = self.lines.lock();
        let is_waiting = |waiter: &Arc<Waiter>| waiter.state.load(Ordering::SeqCst) == WAITING;
        if self.cancelled.load(Ordering::SeqCst) >= self.max_cancelled() {
            self.cancelled.store(0, Ordering::SeqCst);
            self.sort_into(&mut lines);
            lines.retain(is_waiting);
        }
        while Counts::unpack(self.word.load(Ordering::SeqCst)).reserved > 0 {
            self.sort_into(&mut lines);
            // No waiter found: one is counted but not yet pushed. Its thread settles after the push.
            let next = lines.pop(|client| self.held(client).load(Ordering::Relaxed), is_waiting);
            let Some(waiter) = next else { return };
            let granted =
                waiter.state.compare_exchange(WAITING, GRANTED, Ordering::SeqCst, Ordering::SeqCst).is_ok();
            if granted {
                self.held(waiter.turn.client).fetch_add(1, Ordering::Relaxed);
                self.update(|mut c| {
                    c.waiting -= 1;
                    c.reserved -= 1;
                    Some(c)
                });
                if let Some(waker) = waiter.waker.lock().take() {
                    waker.wake();
                }
            }
        }
    }
}

/// The number of counts of held slots: a power of two.
fn counts(slots: usize) -> usize {
    slots.saturating_mul(COUNTS_PER_SLOT).clamp(1, MAX_COUNTS).next_power_of_two()
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.release(self.client);
    }
}

impl Drop for BackendWait {
    fn drop(&mut self) {
        self.0.outside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Future for Ticket {
    type Output = Permit;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Permit> {
        let mut waker = self.waiter.waker.lock();
        if self.waiter.state.load(Ordering::SeqCst) == GRANTED {
            drop(waker);
            self.done = true;
            return Poll::Ready(Permit {
                admission: self.admission.clone(),
                client: self.waiter.turn.client,
            });
        }
        if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        match self.waiter.state.compare_exchange(WAITING, CANCELLED, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => self.admission.cancel(),
            Err(_) => self.admission.release(self.waiter.turn.client),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn poll(ticket: &mut Ticket) -> Option<Permit> {
        match Pin::new(ticket).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(permit) => Some(permit),
            Poll::Pending => None,
        }
    }

    fn permit(a: &Arc<Admission>) -> Permit {
        match a.enter(Turn::default()) {
            Ok(Admitted::Passed(permit)) => permit,
            other => panic!("no permit: {other:?}"),
        }
    }

    fn ticket(a: &Arc<Admission>) -> Ticket {
        match a.enter(Turn::default()) {
            Ok(Admitted::Queued(ticket)) => ticket,
            other => panic!("no ticket: {other:?}"),
        }
    }

    fn is_idle(a: &Arc<Admission>) -> bool {
        a.word.load(Ordering::SeqCst) == 0 && a.depth() == 0
    }

    #[test]
    fn holds_exactly_slots_plus_max_waiting_requests() {
        let a = Admission::new(2, 3);
        let permits = [permit(&a), permit(&a)];
        let tickets = [ticket(&a), ticket(&a), ticket(&a)];
        assert_eq!(a.enter(Turn::default()).unwrap_err(), QueueFull);
        assert_eq!((a.in_flight(), a.depth()), (2, 3));
        drop(permits);
        drop(tickets);
        assert!(is_idle(&a));
    }

    #[test]
    fn a_queue_of_length_zero_refuses_at_once() {
        let a = Admission::new(1, 0);
        let s = permit(&a);
        assert_eq!(a.enter(Turn::default()).unwrap_err(), QueueFull);
        drop(s);
        drop(permit(&a));
        assert!(is_idle(&a));
    }

    #[test]
    fn try_pass_does_not_overtake_the_queue() {
        let a = Admission::new(1, 2);
        let s = a.try_pass(Turn::default()).expect("a slot is free");
        assert!(a.is_full() && a.try_pass(Turn::default()).is_none());
        let mut waiting = ticket(&a);
        drop(s);
        assert!(a.is_full() && a.try_pass(Turn::default()).is_none(), "the slot is reserved for the queue");
        drop(poll(&mut waiting).expect("the slot is granted"));
        assert!(!a.is_full() && a.try_pass(Turn::default()).is_some());
        assert!(is_idle(&a));
    }

    #[test]
    fn a_slot_goes_to_the_first_waiter_that_has_not_given_up() {
        let a = Admission::new(1, 4);
        let s = permit(&a);
        let (first, mut second, mut third) = (ticket(&a), ticket(&a), ticket(&a));
        drop(first);
        drop(s);
        assert!(poll(&mut third).is_none());
        let s = poll(&mut second).expect("the first has given up");
        assert_eq!((a.in_flight(), a.depth()), (1, 1));
        drop(s);
        drop(poll(&mut third).expect("the third is next"));
        assert!(is_idle(&a));
    }

    #[test]
    fn a_granted_ticket_that_is_dropped_passes_its_slot_on() {
        let a = Admission::new(1, 2);
        let s = permit(&a);
        let (first, mut second) = (ticket(&a), ticket(&a));
        drop(s);
        drop(first);
        assert!(poll(&mut second).is_some());
        drop(second);
        assert!(is_idle(&a));
    }

    #[test]
    fn places_of_cancelled_waiters_are_reused_and_the_order_is_kept() {
        let a = Admission::new(1, 3);
        let s = permit(&a);
        let mut stays = ticket(&a);
        for _ in 0..1000 {
            drop(ticket(&a));
        }
        let mut last = ticket(&a);
        assert_eq!(a.depth(), 2);
        drop(s);
        assert!(poll(&mut last).is_none());
        drop(poll(&mut stays).expect("first in, first out"));
        drop(poll(&mut last).expect("the last is next"));
        assert!(is_idle(&a));
    }

    #[test]
    fn requests_that_wait_outside_the_queue_count_as_waiting() {
        let a = Admission::new(1, 2);
        let s = permit(&a);
        let outside = [a.wait_for_backend().unwrap(), a.wait_for_backend().unwrap()];
        assert_eq!(a.wait_for_backend().unwrap_err(), QueueFull);
        assert_eq!(a.enter(Turn::default()).unwrap_err(), QueueFull);
        assert_eq!(a.depth(), 2);
        drop((outside, s));
        assert!(is_idle(&a));
    }

    #[test]
    fn limits_can_be_changed_while_requests_wait() {
        let a = Admission::new(2, 2);
        let permits = [permit(&a), permit(&a)];
        let mut queue = vec![ticket(&a), ticket(&a)];
        assert_eq!(a.enter(Turn::default()).unwrap_err(), QueueFull);
        a.resize(3, 40);
        let third = poll(&mut queue.remove(0)).expect("the first waiter gets the new slot");
        // More than the array was made for.
        queue.extend((0..30).map(|_| ticket(&a)));
        assert_eq!((a.in_flight(), a.depth()), (3, 31));
        a.resize(1, 3);
        assert_eq!(a.enter(Turn::default()).unwrap_err(), QueueFull);
        drop((permits, third));
        for mut next in queue {
            drop(poll(&mut next).expect("first in, first out"));
        }
        assert!(is_idle(&a));
        assert!(
            a.try_pass(Turn::default()).is_some_and(|_s| a.try_pass(Turn::default()).is_none()),
            "one slot is left"
        );
    }

    #[test]
    fn threads_never_exceed_the_slots_and_no_wakeup_is_lost() {
        let a = Admission::new(3, 5);
        let inside = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for t in 0..4u64 {
                let (a, inside) = (&a, &inside);
                s.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(t);
                    for _ in 0..5_000 {
                        let permit = match a.enter(Turn::default()) {
                            Err(QueueFull) => continue,
                            Ok(Admitted::Passed(permit)) => permit,
                            Ok(Admitted::Queued(ticket)) if rng.u8(..4) == 0 => {
                                drop(ticket);
                                continue;
                            }
                            Ok(Admitted::Queued(ticket)) => block_on(ticket),
                        };
                        assert!(inside.fetch_add(1, Ordering::SeqCst) < 3);
                        if rng.bool() {
                            std::thread::yield_now();
                        }
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(permit);
                    }
                });
            }
        });
        assert!(is_idle(&a), "{:?}", Counts::unpack(a.word.load(Ordering::SeqCst)));
    }

    fn block_on(mut ticket: Ticket) -> Permit {
        struct Unpark(std::thread::Thread);
        impl std::task::Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        loop {
            if let Poll::Ready(permit) = Pin::new(&mut ticket).poll(&mut Context::from_waker(&waker)) {
                return permit;
            }
            std::thread::park();
        }
    }

    proptest! {
        /// Runs sequences of operations against a plain model: a list of permits and a queue of tickets.
        #[test]
        fn agrees_with_a_plain_model(slots in 1usize..4, max_waiting in 0usize..4, ops in prop::collection::vec((0u8..4, any::<prop::sample::Index>()), 1..120)) {
            let a = Admission::new(slots, max_waiting);
            let (mut held, mut queue): (Vec<Permit>, VecDeque<Ticket>) = Default::default();
            let (mut slots, mut max_waiting) = (slots, max_waiting);
            for (op, index) in ops {
                match op {
                    0 => match a.enter(Turn::default()) {
                        Ok(Admitted::Passed(s)) => { prop_assert!(held.len() < slots); held.push(s); }
                        Ok(Admitted::Queued(p)) => { prop_assert!(held.len() >= slots && queue.len() < max_waiting); queue.push_back(p); }
                        Err(QueueFull) => prop_assert!(held.len() >= slots && queue.len() >= max_waiting),
                    },
                    1 if !held.is_empty() => drop(held.swap_remove(index.index(held.len()))),
                    2 if !queue.is_empty() => { queue.remove(index.index(queue.len())); }
                    3 => {
                        (slots, max_waiting) = (1 + index.index(5), index.index(7));
                        a.resize(slots, max_waiting);
                    }
                    _ => {}
                }
                while held.len() < slots && !queue.is_empty() {
                    let permit = queue.pop_front().and_then(|mut first| poll(&mut first));
                    prop_assert!(permit.is_some(), "the first waiter was passed over");
                    held.extend(permit);
                }
                prop_assert!(queue.iter_mut().all(|p| poll(p).is_none()));
                prop_assert_eq!((a.in_flight(), a.depth()), (held.len(), queue.len()));
            }
            drop((held, queue));
            prop_assert!(is_idle(&a));
        }
    }
}

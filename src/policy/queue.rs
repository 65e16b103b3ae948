//! Admission: a fixed number of slots, and a bounded first-in first-out queue for those that find none.
//!
//! All counts live in one atomic word, so whether a request passes, waits or is refused is one decision: never
//! more than `slots` in flight, never more than `places` waiting, and no refusal while there is room. Waiters
//! stand in a crossbeam `ArrayQueue`. A released slot becomes a *grant* owed to the queue, and whoever holds
//! the settling right brings grants and waiters together in order; nobody blocks on anybody.
//!
//! The module knows wakers but no runtime: time limits are the caller's.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crossbeam_utils::CachePadded;

use crate::policy::sync::{ArrayQueue, AtomicU8, AtomicU64, AtomicUsize, Mutex, Ordering};

/// Largest number of slots or places: 21 bits of the word each.
pub(crate) const MAX: usize = (1 << 21) - 1;

/// No slot is free and no place in the queue either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueFull;

/// The slots and the queue before them.
#[derive(Debug)]
pub struct Admission {
    word: CachePadded<AtomicU64>,
    slots: AtomicU64,
    places: AtomicU64,
    queue: ArrayQueue<Arc<Waiter>>,
    /// Waiters taken out of `queue` but not yet served: they come first.
    front: Mutex<VecDeque<Arc<Waiter>>>,
    /// Calls to `settle` not yet answered; whoever raises it from 0 settles for all.
    unsettled: AtomicUsize,
    /// Waiters that gave up and may still stand in `queue`.
    dead: AtomicUsize,
    /// Requests that wait outside the queue for a backend (they count as waiting, but for no slot).
    outside: AtomicU64,
}

/// The counts as one word. Invariants: `owed <= waiting`, and but for the moment in which the limits change
/// `in_flight <= slots`, and `waiting > owed` only while `in_flight == slots`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Slots taken, those owed included.
    in_flight: u64,
    /// Waiters alive and not yet served.
    waiting: u64,
    /// Slots that belong to the queue but have not reached a waiter.
    owed: u64,
}

impl Counts {
    fn unpack(word: u64) -> Self {
        let mask = MAX as u64;
        Counts { in_flight: word & mask, waiting: word >> 21 & mask, owed: word >> 42 & mask }
    }

    fn pack(self) -> u64 {
        self.in_flight | self.waiting << 21 | self.owed << 42
    }

    /// A grant that no living waiter can take goes back to the free slots.
    fn settle_surplus(mut self) -> Self {
        if self.owed > self.waiting {
            self.owed -= 1;
            self.in_flight -= 1;
        }
        self
    }
}

const WAITING: u8 = 0;
const GRANTED: u8 = 1;
const GONE: u8 = 2;

#[derive(Debug)]
struct Waiter {
    state: AtomicU8,
    waker: Mutex<Option<Waker>>,
}

/// A slot; dropping it hands it to the first waiter or frees it.
#[derive(Debug)]
#[must_use = "dropping a slot gives it back"]
pub struct Permit(Arc<Admission>);

/// A place in the queue: a future that yields the [`Permit`]. Dropping it gives the place up.
#[derive(Debug)]
#[must_use = "dropping a place gives it up"]
pub struct Ticket {
    admission: Arc<Admission>,
    waiter: Arc<Waiter>,
    done: bool,
}

/// A request that waits for a backend to reopen, outside the slots. Dropping it ends the wait.
#[derive(Debug)]
#[must_use = "dropping it ends the wait"]
pub struct Outside(Arc<Admission>);

/// What [`Admission::enter`] decides.
#[derive(Debug)]
pub enum Admitted {
    /// Straight through.
    Passed(Permit),
    /// Wait for this.
    Queued(Ticket),
}

impl Admission {
    /// `slots` (1 to [`MAX`]) requests at once, `places` (0 to [`MAX`]) waiting.
    pub fn new(slots: usize, places: usize) -> Arc<Self> {
        let (slots, places) = (slots.clamp(1, MAX), places.min(MAX));
        Arc::new(Admission {
            word: CachePadded::new(AtomicU64::new(0)),
            slots: AtomicU64::new(slots as u64),
            places: AtomicU64::new(places as u64),
            // Room for every living waiter and as many dead ones; at `places` dead they are swept out.
            queue: ArrayQueue::new(2 * places + 2),
            front: Mutex::new(VecDeque::new()),
            unsettled: AtomicUsize::new(0),
            dead: AtomicUsize::new(0),
            outside: AtomicU64::new(0),
        })
    }

    /// Changes the limits: those who wait get what is free now, those who hold more than there is keep it.
    pub fn resize(&self, slots: usize, places: usize) {
        self.slots.store(slots.clamp(1, MAX) as u64, Ordering::SeqCst);
        self.places.store(places.min(MAX) as u64, Ordering::SeqCst);
        self.settle();
    }

    /// Takes a slot, or a place in the queue.
    ///
    /// # Errors
    /// [`QueueFull`] where there is neither.
    pub fn enter(self: &Arc<Self>) -> Result<Admitted, QueueFull> {
        let outside = self.outside.load(Ordering::Relaxed);
        let mut passed = false;
        self.update(|mut c| {
            passed = c.in_flight < self.slots.load(Ordering::SeqCst);
            if passed {
                c.in_flight += 1;
            } else if c.waiting - c.owed + outside < self.places.load(Ordering::Relaxed) {
                c.waiting += 1;
            } else {
                return None;
            }
            Some(c)
        })
        .ok_or(QueueFull)?;
        if passed {
            return Ok(Admitted::Passed(Permit(self.clone())));
        }
        let waiter = Arc::new(Waiter { state: AtomicU8::new(WAITING), waker: Mutex::new(None) });
        if let Err(waiter) = self.queue.push(waiter.clone()) {
            // Made for fewer, or full of dead ones: the line goes on in front.
            let mut front = self.front.lock();
            front.extend(std::iter::from_fn(|| self.queue.pop()));
            front.push_back(waiter);
        }
        self.settle();
        Ok(Admitted::Queued(Ticket { admission: self.clone(), waiter, done: false }))
    }

    /// Takes a slot if one is free and nobody waits for it.
    pub fn try_pass(self: &Arc<Self>) -> Option<Permit> {
        let free = |mut c: Counts| {
            c.in_flight += 1;
            (c.in_flight <= self.slots.load(Ordering::Relaxed)).then_some(c)
        };
        self.update(free).map(|_| Permit(self.clone()))
    }

    /// Whether [`try_pass`](Self::try_pass) would fail now.
    pub fn is_full(&self) -> bool {
        Counts::unpack(self.word.load(Ordering::Relaxed)).in_flight >= self.slots.load(Ordering::Relaxed)
    }

    /// Counts a request as waiting without a place in line: it waits for a backend, not for a slot.
    ///
    /// # Errors
    /// [`QueueFull`] where as many wait already as may.
    pub fn wait_outside(self: &Arc<Self>) -> Result<Outside, QueueFull> {
        let c = Counts::unpack(self.word.load(Ordering::SeqCst));
        let room = self.places.load(Ordering::Relaxed).saturating_sub(c.waiting - c.owed);
        let more = |n| (n < room).then_some(n + 1);
        match self.outside.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more) {
            Ok(_) => Ok(Outside(self.clone())),
            Err(_) => Err(QueueFull),
        }
    }

    /// Requests that hold a slot.
    pub fn in_flight(&self) -> usize {
        let c = Counts::unpack(self.word.load(Ordering::Relaxed));
        // Who waited may have gone before what it was granted is booked.
        c.in_flight.saturating_sub(c.owed) as usize
    }

    /// Requests that wait.
    pub fn depth(&self) -> usize {
        let c = Counts::unpack(self.word.load(Ordering::Relaxed));
        (c.waiting + self.outside.load(Ordering::Relaxed)) as usize
    }

    /// Changes the counts in one step; `None` leaves them.
    fn update(&self, mut change: impl FnMut(Counts) -> Option<Counts>) -> Option<Counts> {
        let packed = |word| change(Counts::unpack(word)).map(Counts::pack);
        self.word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, packed).ok().map(Counts::unpack)
    }

    fn release(&self) {
        let before = self.update(|mut c| {
            if c.waiting > c.owed && c.in_flight <= self.slots.load(Ordering::SeqCst) {
                c.owed += 1;
            } else {
                c.in_flight -= 1;
            }
            Some(c)
        });
        // Where the limit has just changed, who settles finds what is owed.
        if before.is_some_and(|c| c.waiting > c.owed) {
            self.settle();
        }
    }

    /// A waiter gave up before it was served.
    fn cancel(&self) {
        self.update(|mut c| {
            c.waiting -= 1;
            Some(c.settle_surplus())
        });
        if self.dead.fetch_add(1, Ordering::SeqCst) + 1 >= self.most_dead() {
            self.settle();
        }
    }

    /// Brings grants and waiters together, unless another thread does so already: then it goes on for this one.
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

    /// Waiters that may have given up before they are swept out.
    fn most_dead(&self) -> usize {
        self.places.load(Ordering::Relaxed).max(1) as usize
    }

    /// Owes the line what is free: there is such only where the limits were changed.
    fn owe_what_is_free(&self) {
        let owe = |mut c: Counts| {
            let owes = c.waiting > c.owed && c.in_flight < self.slots.load(Ordering::SeqCst);
            c.owed += 1;
            c.in_flight += 1;
            owes.then_some(c)
        };
        while self.update(owe).is_some() {}
    }

    fn serve_front(&self) {
        self.owe_what_is_free();
        let mut front = self.front.lock();
        if self.dead.load(Ordering::SeqCst) >= self.most_dead() {
            self.dead.store(0, Ordering::SeqCst);
            front.extend(std::iter::from_fn(|| self.queue.pop()));
            front.retain(|w| w.state.load(Ordering::SeqCst) == WAITING);
        }
        while Counts::unpack(self.word.load(Ordering::SeqCst)).owed > 0 {
            // None: the waiter is counted but not yet pushed; it settles after its push.
            let Some(waiter) = front.pop_front().or_else(|| self.queue.pop()) else { return };
            let granted =
                waiter.state.compare_exchange(WAITING, GRANTED, Ordering::SeqCst, Ordering::SeqCst).is_ok();
            if granted {
                self.update(|mut c| {
                    c.waiting -= 1;
                    c.owed -= 1;
                    Some(c)
                });
                if let Some(waker) = waiter.waker.lock().take() {
                    waker.wake();
                }
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl Drop for Outside {
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
            return Poll::Ready(Permit(self.admission.clone()));
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
        match self.waiter.state.compare_exchange(WAITING, GONE, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => self.admission.cancel(),
            Err(_) => self.admission.release(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn poll(place: &mut Ticket) -> Option<Permit> {
        match Pin::new(place).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(slot) => Some(slot),
            Poll::Pending => None,
        }
    }

    fn slot(a: &Arc<Admission>) -> Permit {
        match a.enter() {
            Ok(Admitted::Passed(slot)) => slot,
            other => panic!("no slot: {other:?}"),
        }
    }

    fn place(a: &Arc<Admission>) -> Ticket {
        match a.enter() {
            Ok(Admitted::Queued(place)) => place,
            other => panic!("no place: {other:?}"),
        }
    }

    fn is_idle(a: &Arc<Admission>) -> bool {
        a.word.load(Ordering::SeqCst) == 0 && a.depth() == 0
    }

    #[test]
    fn serves_exactly_slots_plus_places() {
        let a = Admission::new(2, 3);
        let slots = [slot(&a), slot(&a)];
        let places = [place(&a), place(&a), place(&a)];
        assert_eq!(a.enter().unwrap_err(), QueueFull);
        assert_eq!((a.in_flight(), a.depth()), (2, 3));
        drop(slots);
        drop(places);
        assert!(is_idle(&a));
    }

    #[test]
    fn none_may_wait_where_there_are_no_places() {
        let a = Admission::new(1, 0);
        let s = slot(&a);
        assert_eq!(a.enter().unwrap_err(), QueueFull);
        drop(s);
        drop(slot(&a));
        assert!(is_idle(&a));
    }

    #[test]
    fn who_does_not_wait_overtakes_nobody() {
        let a = Admission::new(1, 2);
        let s = a.try_pass().expect("it is free");
        assert!(a.is_full() && a.try_pass().is_none());
        let mut waiting = place(&a);
        drop(s);
        assert!(a.is_full() && a.try_pass().is_none(), "the slot is owed to the line");
        drop(poll(&mut waiting).expect("its turn"));
        assert!(!a.is_full() && a.try_pass().is_some());
        assert!(is_idle(&a));
    }

    #[test]
    fn hands_a_slot_to_the_first_that_still_lives() {
        let a = Admission::new(1, 4);
        let s = slot(&a);
        let (first, mut second, mut third) = (place(&a), place(&a), place(&a));
        drop(first);
        drop(s);
        assert!(poll(&mut third).is_none());
        let s = poll(&mut second).expect("the second is the first alive");
        assert_eq!((a.in_flight(), a.depth()), (1, 1));
        drop(s);
        drop(poll(&mut third).expect("then the third"));
        assert!(is_idle(&a));
    }

    #[test]
    fn a_granted_place_that_is_dropped_passes_its_slot_on() {
        let a = Admission::new(1, 2);
        let s = slot(&a);
        let (first, mut second) = (place(&a), place(&a));
        drop(s);
        drop(first);
        assert!(poll(&mut second).is_some());
        drop(second);
        assert!(is_idle(&a));
    }

    #[test]
    fn places_of_those_who_left_can_be_taken_again_and_order_stays() {
        let a = Admission::new(1, 3);
        let s = slot(&a);
        let mut stays = place(&a);
        for _ in 0..1000 {
            drop(place(&a));
        }
        let mut last = place(&a);
        assert_eq!(a.depth(), 2);
        drop(s);
        assert!(poll(&mut last).is_none());
        drop(poll(&mut stays).expect("first in, first out"));
        drop(poll(&mut last).expect("then the last"));
        assert!(is_idle(&a));
    }

    #[test]
    fn those_outside_count_as_waiting() {
        let a = Admission::new(1, 2);
        let s = slot(&a);
        let out = [a.wait_outside().unwrap(), a.wait_outside().unwrap()];
        assert_eq!(a.wait_outside().unwrap_err(), QueueFull);
        assert_eq!(a.enter().unwrap_err(), QueueFull);
        assert_eq!(a.depth(), 2);
        drop((out, s));
        assert!(is_idle(&a));
    }

    #[test]
    fn limits_can_be_changed_while_some_wait() {
        let a = Admission::new(2, 2);
        let slots = [slot(&a), slot(&a)];
        let mut line = vec![place(&a), place(&a)];
        assert_eq!(a.enter().unwrap_err(), QueueFull);
        a.resize(3, 40);
        let third = poll(&mut line.remove(0)).expect("the new slot is the first one's");
        // More than the queue was made for.
        line.extend((0..30).map(|_| place(&a)));
        assert_eq!((a.in_flight(), a.depth()), (3, 31));
        a.resize(1, 3);
        assert_eq!(a.enter().unwrap_err(), QueueFull);
        drop((slots, third));
        for mut next in line {
            drop(poll(&mut next).expect("in the order they came"));
        }
        assert!(is_idle(&a));
        assert!(a.try_pass().is_some_and(|_s| a.try_pass().is_none()), "one slot is left");
    }

    #[test]
    fn threads_never_exceed_the_slots_and_lose_no_wakeup() {
        let a = Admission::new(3, 5);
        let inside = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for t in 0..4u64 {
                let (a, inside) = (&a, &inside);
                s.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(t);
                    for _ in 0..5_000 {
                        let slot = match a.enter() {
                            Err(QueueFull) => continue,
                            Ok(Admitted::Passed(slot)) => slot,
                            Ok(Admitted::Queued(place)) if rng.u8(..4) == 0 => {
                                drop(place);
                                continue;
                            }
                            Ok(Admitted::Queued(place)) => block_on(place),
                        };
                        assert!(inside.fetch_add(1, Ordering::SeqCst) < 3);
                        if rng.bool() {
                            std::thread::yield_now();
                        }
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(slot);
                    }
                });
            }
        });
        assert!(is_idle(&a), "{:?}", Counts::unpack(a.word.load(Ordering::SeqCst)));
    }

    fn block_on(mut place: Ticket) -> Permit {
        struct Unpark(std::thread::Thread);
        impl std::task::Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        loop {
            if let Poll::Ready(slot) = Pin::new(&mut place).poll(&mut Context::from_waker(&waker)) {
                return slot;
            }
            std::thread::park();
        }
    }

    proptest! {
        /// Operation sequences against a plain model of slots and a line.
        #[test]
        fn behaves_as_a_line_at_a_counter(slots in 1usize..4, places in 0usize..4, ops in prop::collection::vec((0u8..4, any::<prop::sample::Index>()), 1..120)) {
            let a = Admission::new(slots, places);
            let (mut held, mut line): (Vec<Permit>, VecDeque<Ticket>) = Default::default();
            let (mut slots, mut places) = (slots, places);
            for (op, index) in ops {
                match op {
                    0 => match a.enter() {
                        Ok(Admitted::Passed(s)) => { prop_assert!(held.len() < slots); held.push(s); }
                        Ok(Admitted::Queued(p)) => { prop_assert!(held.len() >= slots && line.len() < places); line.push_back(p); }
                        Err(QueueFull) => prop_assert!(held.len() >= slots && line.len() >= places),
                    },
                    1 if !held.is_empty() => drop(held.swap_remove(index.index(held.len()))),
                    2 if !line.is_empty() => { line.remove(index.index(line.len())); }
                    3 => {
                        (slots, places) = (1 + index.index(5), index.index(7));
                        a.resize(slots, places);
                    }
                    _ => {}
                }
                while held.len() < slots && !line.is_empty() {
                    let slot = line.pop_front().and_then(|mut first| poll(&mut first));
                    prop_assert!(slot.is_some(), "the first in line was passed over");
                    held.extend(slot);
                }
                prop_assert!(line.iter_mut().all(|p| poll(p).is_none()));
                prop_assert_eq!((a.in_flight(), a.depth()), (held.len(), line.len()));
            }
            drop((held, line));
            prop_assert!(is_idle(&a));
        }
    }
}

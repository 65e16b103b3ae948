//! Counters and histograms with fixed bounds, written by one thread and read by any.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::time::{MILLI, Nanos, SECOND};

/// Histogram bounds for whole requests and for waits: 5 ms to 300 s.
pub const REQUEST: &[Nanos] = &[
    5 * MILLI,
    10 * MILLI,
    25 * MILLI,
    50 * MILLI,
    100 * MILLI,
    250 * MILLI,
    500 * MILLI,
    SECOND,
    2_500 * MILLI,
    5 * SECOND,
    10 * SECOND,
    30 * SECOND,
    60 * SECOND,
    120 * SECOND,
    300 * SECOND,
];

/// Histogram bounds for the time that Zap itself adds: 10 us to 100 ms.
pub(crate) const OVERHEAD: &[Nanos] = &[
    MILLI / 100,
    MILLI / 40,
    MILLI / 20,
    MILLI / 10,
    MILLI / 4,
    MILLI / 2,
    MILLI,
    5 * MILLI / 2,
    5 * MILLI,
    10 * MILLI,
    25 * MILLI,
    50 * MILLI,
    100 * MILLI,
];

/// Histogram bounds for the time of one output token: 1 ms to 1 s.
pub(crate) const PER_TOKEN: &[Nanos] = &[
    MILLI,
    5 * MILLI / 2,
    5 * MILLI,
    10 * MILLI,
    15 * MILLI,
    20 * MILLI,
    30 * MILLI,
    50 * MILLI,
    100 * MILLI,
    250 * MILLI,
    500 * MILLI,
    SECOND,
];

/// A number that one thread changes and any thread may read.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning thread may call this, because the load and the store are separate.
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Subtracts `n`. Only the owning thread may call this.
    pub(crate) fn sub(&self, n: u64) {
        self.add(n.wrapping_neg());
    }

    /// Returns the current value.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The length of one step of [`Recent`].
const STEP: Nanos = 5 * SECOND;

/// Steps that [`Recent::last_minute`] adds up: the present one and those before it.
const STEPS: u64 = 12;

/// A count over the last minute. The thread that owns it writes, any thread reads.
#[derive(Debug, Default)]
pub(crate) struct Recent([Step; STEPS as usize]);

#[derive(Debug, Default)]
struct Step {
    /// The number of the step since the start of the process.
    number: AtomicU64,
    count: Counter,
}

impl Recent {
    /// Adds `n` at `now`. Only the owning thread may call this.
    pub(crate) fn add(&self, now: Nanos, n: u64) {
        let number = now / STEP;
        let step = &self.0[(number % STEPS) as usize];
        if step.number.load(Ordering::Relaxed) != number {
            step.count.sub(step.count.get());
            step.number.store(number, Ordering::Relaxed);
        }
        step.count.add(n);
    }

    /// The count of the last 55 to 60 s before `now`.
    pub(crate) fn last_minute(&self, now: Nanos) -> u64 {
        let present = now / STEP;
        let is_recent = |step: &&Step| step.number.load(Ordering::Relaxed) + STEPS > present;
        self.0.iter().filter(is_recent).map(|step| step.count.get()).sum()
    }
}

/// A value of a histogram, with the trace that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exemplar {
    /// The id of the trace (W3C Trace Context).
    pub trace_id: [u8; 16],
    /// The value.
    pub value: Nanos,
    /// When it was recorded, in milliseconds since the Unix epoch.
    pub unix_millis: u64,
}

/// The last exemplar of each bucket.
type Exemplars = Box<[Option<Exemplar>]>;

/// Counts of values by bucket; the last bucket has no upper bound.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [Nanos],
    buckets: Box<[Counter]>,
    sum: Counter,
    /// Allocated at the first exemplar. Only a scrape reads it.
    exemplars: OnceLock<Mutex<Exemplars>>,
}

impl Histogram {
    /// Creates an empty histogram with these upper bounds, in ascending order.
    pub fn new(bounds: &'static [Nanos]) -> Self {
        Histogram {
            bounds,
            buckets: (0..=bounds.len()).map(|_| Counter::default()).collect(),
            sum: Counter::default(),
            exemplars: OnceLock::new(),
        }
    }

    /// Counts one value, and keeps its trace if it has one: its id, and the time in milliseconds since the Unix epoch.
    /// Only the owning thread may call this. While a scrape reads the exemplars, none is kept.
    pub(crate) fn record_traced(&self, value: Nanos, trace: Option<([u8; 16], u64)>) {
        self.record(value);
        let Some((trace_id, unix_millis)) = trace else { return };
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        let exemplars = self.exemplars.get_or_init(|| Mutex::new(vec![None; self.buckets.len()].into()));
        if let Some(mut exemplars) = exemplars.try_lock() {
            exemplars[bucket] = Some(Exemplar { trace_id, value, unix_millis });
        }
    }

    /// Counts one value. Only the owning thread may call this.
    pub fn record(&self, value: Nanos) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.buckets[bucket].add(1);
        self.sum.add(value);
    }
}

/// The sum of several histograms with the same bounds.
#[derive(Debug, PartialEq, Eq)]
pub struct Total {
    /// Each upper bound, with the number of values up to and including it.
    pub cumulative: Vec<(Nanos, u64)>,
    /// Number of values.
    pub count: u64,
    /// Sum of all values.
    pub sum: Nanos,
    /// The last exemplar of each bucket; empty: there are none. The last bucket has no upper bound.
    pub exemplars: Vec<Option<Exemplar>>,
}

impl Total {
    /// Adds up `histograms`, all of which have these `bounds`.
    pub fn of<'a>(bounds: &'static [Nanos], histograms: impl Iterator<Item = &'a Histogram>) -> Self {
        let mut plain = vec![0; bounds.len() + 1];
        let mut sum = 0u64;
        let mut exemplars: Vec<Option<Exemplar>> = Vec::new();
        for h in histograms {
            if let Some(kept) = h.exemplars.get() {
                exemplars.resize(bounds.len() + 1, None);
                let kept = kept.lock();
                let newer = |a: &Exemplar, b: &Exemplar| a.unix_millis >= b.unix_millis;
                for (last, own) in exemplars.iter_mut().zip(&**kept) {
                    if let Some(own) = own.filter(|own| last.as_ref().is_none_or(|last| newer(own, last))) {
                        *last = Some(own);
                    }
                }
            }
            sum = sum.wrapping_add(h.sum.get());
            plain.iter_mut().zip(&h.buckets).for_each(|(n, b)| *n += b.get());
        }
        let mut count = 0;
        let mut cumulative = Vec::with_capacity(bounds.len());
        for (bound, n) in bounds.iter().zip(&plain) {
            count += n;
            cumulative.push((*bound, count));
        }
        count += plain[bounds.len()];
        Total { cumulative, count, sum, exemplars }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recent_count_forgets_what_is_older_than_a_minute() {
        let recent = Recent::default();
        (0..120).for_each(|second| recent.add(second * SECOND, 1));
        for (now, want) in [(119, 60), (120, 55), (124, 55), (150, 25), (175, 0), (10_000, 0)] {
            assert_eq!(recent.last_minute(now * SECOND), want, "{now}");
        }
        recent.add(10_000 * SECOND, 7);
        assert_eq!(recent.last_minute(10_001 * SECOND), 7);
    }

    #[test]
    fn bounds_are_inclusive_and_counts_are_cumulative() {
        const BOUNDS: &[Nanos] = &[10, 20];
        let (a, b) = (Histogram::new(BOUNDS), Histogram::new(BOUNDS));
        [5, 10, 11, 21].iter().for_each(|v| a.record(*v));
        b.record(20);
        let total = Total::of(BOUNDS, [&a, &b].into_iter());
        let want = Total { cumulative: vec![(10, 2), (20, 4)], count: 5, sum: 67, exemplars: vec![] };
        assert_eq!(total, want);
    }

    #[test]
    fn the_last_exemplar_of_each_bucket_is_kept() {
        const BOUNDS: &[Nanos] = &[10, 20];
        let (a, b) = (Histogram::new(BOUNDS), Histogram::new(BOUNDS));
        for (histogram, value, id, at) in [(&a, 5, 1, 100), (&a, 7, 2, 101), (&b, 8, 3, 99), (&b, 21, 4, 50)]
        {
            histogram.record_traced(value, Some(([id; 16], at)));
        }
        a.record_traced(12, None);
        let total = Total::of(BOUNDS, [&a, &b].into_iter());
        let exemplar = |id, value, unix_millis| Some(Exemplar { trace_id: [id; 16], value, unix_millis });
        assert_eq!(total.exemplars, [exemplar(2, 7, 101), None, exemplar(4, 21, 50)]);
        assert_eq!((total.count, total.sum), (5, 53));
    }

    #[test]
    fn bounds_are_ascending() {
        for bounds in [REQUEST, OVERHEAD] {
            assert!(bounds.is_sorted());
        }
    }

    #[test]
    fn a_counter_can_be_decreased() {
        let c = Counter::default();
        c.add(3);
        c.sub(3);
        assert_eq!(c.get(), 0);
    }
}

//! Running averages of the time to first content of each pair, a backend and a model, for the strategy `least_latency`.
//!
//! Prompts of about the same size are one class, and streams have classes of their own: the first content of any other
//! answer is the whole answer. A failure is learnt as an answer that took as long as the target then cools down. The
//! design follows linkerd2-proxy's load biaser; a time above the average weighs more, as in Finagle's peak EWMA. The
//! table is bounded.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::policy::key_hasher::KeyHasher;
use crate::policy::sync::Mutex;
use crate::time::{Nanos, SECOND};

/// Most pairs of one backend. Beyond it, no further pairs are learnt.
const MAX_PAIRS: usize = 1024;

/// Classes of prompt sizes: up to 1 KiB, 2 KiB and so on, and more than 1 MiB.
const SIZES: usize = 12;

/// The time in which the weight of the past falls to 1/e.
const DECAY: Nanos = 10 * SECOND;

/// The least weight of a new time: many requests in a moment do not hide the past.
const LEAST_WEIGHT: f64 = 1.0 / 16.0;

/// The least weight of a time above the average.
const PEAK_WEIGHT: f64 = 1.0 / 4.0;

/// A class of requests whose times can be compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SizeClass(usize);

impl SizeClass {
    /// The class of a request whose body has so many `bytes`.
    pub(crate) fn of(bytes: u64, is_stream: bool) -> Self {
        let kibs = bytes.saturating_sub(1) >> 10;
        let size = ((u64::BITS - kibs.leading_zeros()) as usize).min(SIZES - 1);
        SizeClass(if is_stream { size } else { SIZES + size })
    }

    /// Classes of the same kind, the nearest size first.
    fn nearest(self) -> impl Iterator<Item = usize> {
        let kind = self.0 / SIZES * SIZES;
        let own = self.0 - kind;
        let at = move |distance: usize| {
            let larger = Some(own + distance).filter(|size| *size < SIZES);
            let smaller = own.checked_sub(distance).filter(|_| distance > 0);
            larger.into_iter().chain(smaller)
        };
        (0..SIZES).flat_map(at).map(move |size| kind + size)
    }
}

/// The average time of one class.
#[derive(Clone, Copy, Debug, Default)]
struct Average {
    nanos: f64,
    /// When the last time was learnt; 0: none.
    at: Nanos,
}

/// What is known of a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Expected {
    /// The time to first content, in nanoseconds.
    pub nanos: f64,
    /// When it was learnt.
    pub at: Nanos,
}

/// The averages of the pairs of one backend.
#[derive(Debug, Default)]
pub(crate) struct Latencies(Mutex<HashMap<u64, Box<[Average; 2 * SIZES]>, BuildHasherDefault<KeyHasher>>>);

impl Latencies {
    /// Learns at `now` that a request of this class took so long to its first content, or has failed.
    pub(crate) fn learn(&self, key: u64, class: SizeClass, took: Nanos, now: Nanos) {
        let mut all = self.0.lock();
        if all.len() >= MAX_PAIRS && !all.contains_key(&key) {
            return;
        }
        let average = &mut all.entry(key).or_default()[class.0];
        let took = took as f64;
        let since = now.saturating_sub(average.at) as f64;
        let least = if took > average.nanos { PEAK_WEIGHT } else { LEAST_WEIGHT };
        let weight = match average.at {
            0 => 1.0,
            _ => (1.0 - (-since / DECAY as f64).exp()).max(least),
        };
        average.nanos += (took - average.nanos) * weight;
        average.at = average.at.max(now).max(1);
    }

    /// What a request of this class is expected to take. A class that nothing is known of takes the nearest one's time.
    /// `None`: nothing is known of the pair.
    pub(crate) fn expect(&self, key: u64, class: SizeClass) -> Option<Expected> {
        let all = self.0.lock();
        let averages = all.get(&key)?;
        let known = class.nearest().map(|at| averages[at]).find(|average| average.at > 0)?;
        Some(Expected { nanos: known.nanos, at: known.at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::MILLI;

    fn class(bytes: u64) -> SizeClass {
        SizeClass::of(bytes, true)
    }

    #[test]
    fn sizes_are_powers_of_two_and_streams_are_apart() {
        let sizes = [0, 1, 1024, 1025, 2048, 2049, 1 << 20, (1 << 20) + 1, u64::MAX];
        assert_eq!(sizes.map(|bytes| class(bytes).0), [0, 0, 0, 1, 1, 2, 10, 11, 11]);
        assert_eq!(sizes.map(|bytes| SizeClass::of(bytes, false).0 - class(bytes).0), [SIZES; 9]);
        assert_eq!(class(2048).nearest().take(4).collect::<Vec<_>>(), [1, 2, 0, 3]);
        assert_eq!(SizeClass::of(u64::MAX, false).nearest().last(), Some(SIZES));
        assert_eq!(class(5000).nearest().count(), SIZES);
    }

    #[test]
    fn an_average_follows_what_is_learnt_and_a_peak_at_once() {
        let l = Latencies::default();
        let ms = || l.expect(1, class(9)).map(|expected| (expected.nanos / MILLI as f64).round());
        assert_eq!(ms(), None);
        l.learn(1, class(9), 100 * MILLI, SECOND);
        assert_eq!(ms(), Some(100.0));
        l.learn(1, class(9), 500 * MILLI, SECOND);
        assert_eq!(ms(), Some(200.0), "a quarter of the way up");
        l.learn(1, class(9), 40 * MILLI, SECOND);
        assert_eq!(ms(), Some(190.0), "a sixteenth of the way down");
        l.learn(1, class(9), 40 * MILLI, 61 * SECOND);
        assert_eq!(ms(), Some(40.0), "after a minute the past hardly counts");
        assert_eq!(l.expect(2, class(9)), None);
    }

    #[test]
    fn a_class_without_times_takes_those_of_the_nearest() {
        let l = Latencies::default();
        l.learn(1, class(1 << 11), 10, 7);
        l.learn(1, class(1 << 16), 90, 8);
        l.learn(1, SizeClass::of(1, false), 1_000, 9);
        let nanos = |bytes| l.expect(1, class(bytes)).unwrap().nanos;
        assert_eq!([1, 1 << 12, 1 << 15, 1 << 30].map(nanos), [10.0, 10.0, 90.0, 90.0]);
        assert_eq!(l.expect(1, SizeClass::of(1 << 20, false)), Some(Expected { nanos: 1_000.0, at: 9 }));
    }

    #[test]
    fn the_table_is_bounded() {
        let l = Latencies::default();
        (0..2 * MAX_PAIRS as u64).for_each(|key| l.learn(key, class(1), 1, 1));
        assert_eq!(l.0.lock().len(), MAX_PAIRS);
    }
}

//! Retries: what the status of a response means, how long to back off, and the retry budget.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::time::{Nanos, SECOND};

/// The meaning of a response's status code for the try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// 401 for Zap's own key.
    BadKey,
    /// The response goes to the client unchanged.
    Deliver,
    /// 413: the request is too large for this target. Another one may take it.
    Elsewhere,
    /// The target failed: try another one.
    Failure,
    /// 429: the client or the account has to wait.
    Limited,
    /// 503 or 529: the target has no room, or it is broken.
    Overloaded,
    /// 3xx except 304: a redirect, which Zap never follows.
    Redirect,
    /// 402 or 403: the account has no credit, or the provider refuses this request. Another target may serve it. The
    /// backend stays open, so that no client can close it for others.
    Refused,
}

/// Judges a response by its status. `own_key`: the request carried Zap's key, not the client's.
pub(crate) fn judge(status: u16, own_key: bool) -> Outcome {
    match status {
        304 => Outcome::Deliver,
        300..=399 => Outcome::Redirect,
        401 if own_key => Outcome::BadKey,
        402 | 403 => Outcome::Refused,
        413 => Outcome::Elsewhere,
        429 => Outcome::Limited,
        // What the client asks for is not there: its own matter, as any other 4xx.
        501 => Outcome::Deliver,
        503 | 529 => Outcome::Overloaded,
        // RFC 9110, section 15: a status outside of 100..599 counts as 5xx.
        408 | 498 | 500.. => Outcome::Failure,
        _ => Outcome::Deliver,
    }
}

/// The cooldown after a 429 that states no wait.
pub(crate) const DEFAULT_COOLING: Duration = Duration::from_secs(5);

/// Longest wait for a backend that a `Retry-After` of Zap's own names. OpenAI's SDKs ignore one of more than a minute.
pub(crate) const MAX_RETRY_AFTER: Nanos = 59 * SECOND;

/// Returns the `Retry-After` value for a wait: whole seconds, rounded up, at least 1.
pub(crate) fn retry_after_secs(wait: Nanos) -> u64 {
    wait.div_ceil(SECOND).max(1)
}

/// Returns a backoff with full jitter: uniform in [0, min(max, base x 2^n)]. `n` is the number of backoffs before
/// this one, `random` a uniform random number.
pub(crate) fn backoff(base: Duration, max: Duration, n: u32, random: u64) -> Duration {
    let ceiling = base.saturating_mul(1u32.checked_shl(n).unwrap_or(u32::MAX)).min(max);
    let nanos = u64::try_from(ceiling.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(random % nanos.saturating_add(1))
}

/// Number of retries per second that are always allowed.
pub(crate) const MIN_RETRIES_PER_SECOND: u64 = 10;

/// Seconds that the budget looks back.
const BUCKETS: usize = 10;

/// Bits of a count in a bucket. Events above [`MAX_COUNT`] are not counted.
const COUNT_BITS: u32 = 17;
const MAX_COUNT: u64 = (1 << COUNT_BITS) - 1;

/// The retry budget: retries may be at most a given share of the requests offered in the last ten seconds, but
/// [`MIN_RETRIES_PER_SECOND`] retries per second are always allowed.
#[derive(Debug)]
pub(crate) struct Budget {
    /// The share, in percent of the requests.
    percent: AtomicU64,
    /// A ring of seconds, each a packed [`Bucket`].
    buckets: [AtomicU64; BUCKETS],
}

/// The events of one second. Packed: 30 bits of the second (34 years, so it never wraps) and two counts of 17 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bucket {
    second: u64,
    requests: u64,
    retries: u64,
}

impl Bucket {
    fn unpack(word: u64) -> Self {
        Bucket {
            second: word >> (2 * COUNT_BITS),
            requests: word >> COUNT_BITS & MAX_COUNT,
            retries: word & MAX_COUNT,
        }
    }

    fn pack(self) -> u64 {
        let [requests, retries] = [self.requests, self.retries].map(|n| n.min(MAX_COUNT));
        self.second << (2 * COUNT_BITS) | requests << COUNT_BITS | retries
    }

    /// Returns the bucket for `second`: empty if it still holds an older second, `None` if it holds a newer one. An
    /// event that is older than the ring is not counted.
    fn at_second(self, second: u64) -> Option<Self> {
        match self.second.cmp(&second) {
            std::cmp::Ordering::Equal => Some(self),
            std::cmp::Ordering::Less => Some(Bucket { second, ..Bucket::default() }),
            std::cmp::Ordering::Greater => None,
        }
    }
}

impl Budget {
    /// Creates a budget with a share of `percent` (0 to 100).
    pub(crate) fn new(percent: u32) -> Self {
        Budget { percent: AtomicU64::new(u64::from(percent)), buckets: Default::default() }
    }

    /// Changes the share to `percent` (0 to 100).
    pub(crate) fn set_percent(&self, percent: u32) {
        self.percent.store(u64::from(percent), Ordering::Relaxed);
    }

    /// Counts one request that is offered to the backends at `now`.
    pub(crate) fn offer(&self, now: Nanos) {
        let second = now / SECOND;
        let _ = self.update(second, |bucket| Some(Bucket { requests: bucket.requests + 1, ..bucket }));
    }

    /// Counts one retry at `now` if the budget allows it, as one atomic step. Returns whether it was allowed.
    pub(crate) fn try_withdraw(&self, now: Nanos) -> bool {
        let second = now / SECOND;
        let granted = |bucket: Bucket| {
            let allowed = self.allows(second, bucket);
            allowed.then_some(Bucket { retries: bucket.retries + 1, ..bucket })
        };
        self.update(second, granted)
    }

    /// Whether the budget would allow a retry at `now`.
    pub(crate) fn has_room(&self, now: Nanos) -> bool {
        let second = now / SECOND;
        let bucket = Bucket::unpack(self.bucket(second).load(Ordering::Relaxed));
        bucket.at_second(second).is_some_and(|bucket| self.allows(second, bucket))
    }

    /// Whether the budget allows a retry in `second`; `bucket` holds the counts of that second.
    fn allows(&self, second: u64, bucket: Bucket) -> bool {
        if bucket.retries < MIN_RETRIES_PER_SECOND {
            return true;
        }
        let (mut requests, mut retries) = (bucket.requests, bucket.retries);
        for word in &self.buckets {
            let other = Bucket::unpack(word.load(Ordering::Relaxed));
            if other.second < second && second - other.second < BUCKETS as u64 {
                requests += other.requests;
                retries += other.retries;
            }
        }
        bucket.retries < MAX_COUNT && (retries + 1) * 100 <= requests * self.percent.load(Ordering::Relaxed)
    }

    /// Changes the bucket of `second`. Returns `false` if `change` returns `None` or the ring has moved past that
    /// second.
    fn update(&self, second: u64, change: impl Fn(Bucket) -> Option<Bucket>) -> bool {
        let step = |word| Bucket::unpack(word).at_second(second).and_then(&change).map(Bucket::pack);
        self.bucket(second).fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).is_ok()
    }

    fn bucket(&self, second: u64) -> &AtomicU64 {
        &self.buckets[(second % BUCKETS as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn judges_every_class_of_status() {
        for (status, own_key, want) in [
            (200, true, Outcome::Deliver),
            (204, true, Outcome::Deliver),
            (301, true, Outcome::Redirect),
            (304, true, Outcome::Deliver),
            (308, true, Outcome::Redirect),
            (400, true, Outcome::Deliver),
            (401, true, Outcome::BadKey),
            (402, true, Outcome::Refused),
            (403, true, Outcome::Refused),
            (403, false, Outcome::Refused),
            (401, false, Outcome::Deliver),
            (404, true, Outcome::Deliver),
            (408, true, Outcome::Failure),
            (413, true, Outcome::Elsewhere),
            (422, true, Outcome::Deliver),
            (429, true, Outcome::Limited),
            (498, true, Outcome::Failure),
            (499, true, Outcome::Deliver),
            (500, true, Outcome::Failure),
            (501, true, Outcome::Deliver),
            (502, true, Outcome::Failure),
            (503, true, Outcome::Overloaded),
            (529, true, Outcome::Overloaded),
            (700, true, Outcome::Failure),
        ] {
            assert_eq!(judge(status, own_key), want, "{status} {own_key}");
        }
    }

    #[test]
    fn retry_after_is_rounded_up() {
        for (wait, want) in [(0, 1), (1, 1), (SECOND, 1), (SECOND + 1, 2), (59 * SECOND, 59)] {
            assert_eq!(retry_after_secs(wait), want);
        }
    }

    #[test]
    fn ten_retries_a_second_are_always_allowed() {
        let b = Budget::new(0);
        for second in 1..5 {
            let granted = (0..50).filter(|_| b.try_withdraw(second * SECOND)).count();
            assert_eq!(granted, 10);
        }
    }

    #[test]
    fn retries_stay_within_their_share() {
        let b = Budget::new(20);
        let mut granted = 0;
        for i in 0..30_000u64 {
            let now = i * SECOND / 1_000;
            b.offer(now);
            granted += u64::from(b.try_withdraw(now)) + u64::from(b.try_withdraw(now));
        }
        assert!((5_900..=6_050).contains(&granted), "{granted}");
        b.set_percent(0);
        assert!(!b.has_room(30 * SECOND - 1), "earlier retries count against the new share");
    }

    #[test]
    fn an_event_older_than_the_ring_leaves_the_newer_counts_alone() {
        let b = Budget::new(0);
        let granted = |now| (0..50).filter(|_| b.try_withdraw(now)).count();
        assert_eq!(granted(20 * SECOND), 10);
        // A request of ten seconds ago maps to the bucket of the current second.
        b.offer(10 * SECOND);
        assert_eq!(granted(20 * SECOND), 0, "the ten retries of this second still count");
        assert!(!b.try_withdraw(10 * SECOND) && !b.has_room(10 * SECOND), "that second has left the ring");
    }

    #[test]
    fn old_counts_do_not_come_back() {
        let b = Budget::new(100);
        (0..1_000).for_each(|_| b.offer(3 * SECOND));
        for later in [1 << 16, 1 << 24, 1 << 29] {
            let now = (3 + later) * SECOND;
            assert_eq!((0..50).filter(|_| b.try_withdraw(now)).count(), 10, "{later} s later");
        }
    }

    #[test]
    fn a_full_count_does_not_overflow_and_allows_no_more_retries() {
        let b = Budget::new(100);
        (0..MAX_COUNT + 9).for_each(|_| b.offer(SECOND));
        let granted = (0..MAX_COUNT + 9).filter(|_| b.try_withdraw(SECOND)).count() as u64;
        assert_eq!(granted, MAX_COUNT);
        assert!(!b.has_room(SECOND));
    }

    #[test]
    fn two_threads_share_the_retries_that_are_always_allowed() {
        for second in 1..50 {
            let b = Budget::new(0);
            let ask = || (0..50).filter(|_| b.try_withdraw(second * SECOND)).count();
            let granted: usize = std::thread::scope(|s| {
                let threads = [s.spawn(ask), s.spawn(ask)];
                threads.into_iter().map(|t| t.join().unwrap()).sum()
            });
            assert_eq!(granted, 10);
        }
    }

    proptest! {
        #[test]
        fn backoff_stays_in_its_bounds(base in 1u64..10_000, max in 1u64..600_000, n in 0u32..80, random in any::<u64>()) {
            let (base, max) = (Duration::from_millis(base), Duration::from_millis(max));
            let wait = backoff(base, max, n, random);
            prop_assert!(wait <= max);
            prop_assert!(n > 20 || wait <= base * (1 << n));
        }
    }
}

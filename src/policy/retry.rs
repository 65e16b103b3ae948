//! What an upstream's answer means, when to try again, and how often in all.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use http::HeaderMap;

use super::{Nanos, SECOND};

/// What a status code says about the try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// 401, 402, 403 for a key that Zap put in.
    BadKey,
    /// 429: not a failure; the backend wants to be left alone.
    Busy,
    /// Goes to the client as it came.
    Deliver,
    /// The backend failed: count it and try another.
    Failure,
    /// 3xx but 304, which goes nowhere else: never followed.
    Redirect,
}

/// Judges a response by its status. `own_key`: the request carried a key that Zap put in.
pub fn judge(status: u16, own_key: bool) -> Outcome {
    match status {
        304 => Outcome::Deliver,
        300..=399 => Outcome::Redirect,
        401..=403 if own_key => Outcome::BadKey,
        // Beyond 599 there is no such status: it is one of 5xx (RFC 9110, section 15).
        408 | 498 | 500.. => Outcome::Failure,
        429 => Outcome::Busy,
        _ => Outcome::Deliver,
    }
}

/// Longest time that a provider may ask to be left alone.
pub const MAX_COOLING: Duration = Duration::from_secs(600);

/// How long a backend cools that says 429 but not for how long.
pub const DEFAULT_COOLING: Duration = Duration::from_secs(5);

/// How long a 429 asks to be left alone: `retry-after-ms`, else `Retry-After` as seconds or as a date (RFC 9110,
/// section 10.2.3); [`DEFAULT_COOLING`] where neither can be read, [`MAX_COOLING`] at most.
pub fn cooling(headers: &HeaderMap, wall: SystemTime) -> Duration {
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok()).map(str::trim);
    let asked = text("retry-after-ms")
        .and_then(|t| seconds(t, 0.001))
        .or_else(|| text("retry-after").and_then(|t| seconds(t, 1.0).or_else(|| until(t, wall))));
    asked.unwrap_or(DEFAULT_COOLING).min(MAX_COOLING)
}

fn seconds(text: &str, unit: f64) -> Option<Duration> {
    let plain = text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let number: f64 = text.parse().ok().filter(|_| plain)?;
    Duration::try_from_secs_f64((number * unit).min(MAX_COOLING.as_secs_f64())).ok()
}

fn until(text: &str, wall: SystemTime) -> Option<Duration> {
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(wall).unwrap_or_default())
}

/// `Retry-After` for a wait: whole seconds, rounded up, at least 1.
pub fn retry_after_secs(wait: Nanos) -> u64 {
    wait.div_ceil(SECOND).max(1)
}

/// Full jitter: uniform in [0, min(max, base x 2^n)], where `n` counts the backoffs before and `random` is any.
pub fn backoff(base: Duration, max: Duration, n: u32, random: u64) -> Duration {
    let ceiling = base.saturating_mul(1u32.checked_shl(n).unwrap_or(u32::MAX)).min(max);
    let nanos = u64::try_from(ceiling.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(random % nanos.saturating_add(1))
}

/// Retries a second that are always allowed.
pub const ALWAYS: u64 = 10;

const BUCKETS: usize = 10;

/// The retry budget: further tries may add at most a share to the offered requests of the last ten seconds,
/// though never fewer than [`ALWAYS`] a second.
#[derive(Debug)]
pub struct Budget {
    percent: AtomicU64,
    /// One second each: the second's number modulo 2^16, the requests and the retries in it, 24 bits each.
    buckets: [AtomicU64; BUCKETS],
}

impl Budget {
    /// A budget of `percent` (0 to 100).
    pub fn new(percent: u32) -> Self {
        Budget { percent: AtomicU64::new(u64::from(percent)), buckets: Default::default() }
    }

    /// Changes the share to `percent` (0 to 100).
    pub fn set_percent(&self, percent: u32) {
        self.percent.store(u64::from(percent), Ordering::Relaxed);
    }

    /// Counts a request that was offered.
    pub fn offer(&self, now: Nanos) {
        self.add(now, 1 << 24);
    }

    /// Asks for one retry; counts it where it is granted.
    pub fn withdraw(&self, now: Nanos) -> bool {
        let granted = self.has_room(now);
        if granted {
            self.add(now, 1);
        }
        granted
    }

    /// Whether a retry would be granted now.
    pub fn has_room(&self, now: Nanos) -> bool {
        let second = now / SECOND;
        let (mut requests, mut retries, mut this_second) = (0, 0, 0);
        for (i, bucket) in self.buckets.iter().enumerate() {
            let word = bucket.load(Ordering::Relaxed);
            let age = (second & 0xFFFF).wrapping_sub(word >> 48) & 0xFFFF;
            if age >= BUCKETS as u64 || word == 0 {
                continue;
            }
            requests += word >> 24 & 0xFF_FFFF;
            retries += word & 0xFF_FFFF;
            if i == (second % BUCKETS as u64) as usize && age == 0 {
                this_second = word & 0xFF_FFFF;
            }
        }
        this_second < ALWAYS || (retries + 1) * 100 <= requests * self.percent.load(Ordering::Relaxed)
    }

    fn add(&self, now: Nanos, what: u64) {
        let second = now / SECOND;
        let bucket = &self.buckets[(second % BUCKETS as u64) as usize];
        let change = |word: u64| {
            let fresh = (second & 0xFFFF) << 48;
            let counted = if word >> 48 == second & 0xFFFF { word } else { fresh };
            let full = counted >> 24 & 0xFF_FFFF == 0xFF_FFFF || counted & 0xFF_FFFF == 0xFF_FFFF;
            Some(if full { counted } else { counted + what })
        };
        let _ = bucket.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
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
            (402, true, Outcome::BadKey),
            (403, true, Outcome::BadKey),
            (401, false, Outcome::Deliver),
            (404, true, Outcome::Deliver),
            (408, true, Outcome::Failure),
            (413, true, Outcome::Deliver),
            (422, true, Outcome::Deliver),
            (429, true, Outcome::Busy),
            (498, true, Outcome::Failure),
            (499, true, Outcome::Deliver),
            (500, true, Outcome::Failure),
            (501, true, Outcome::Failure),
            (503, true, Outcome::Failure),
            (529, true, Outcome::Failure),
        ] {
            assert_eq!(judge(status, own_key), want, "{status} {own_key}");
        }
    }

    #[test]
    fn reads_every_form_of_retry_after() {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let date = httpdate::fmt_http_date(wall + Duration::from_secs(90));
        for (name, value, want) in [
            ("retry-after", "7", Duration::from_secs(7)),
            ("retry-after", " 0 ", Duration::ZERO),
            ("retry-after", "1.5", Duration::from_millis(1500)),
            ("retry-after", "99999999999999999999999", MAX_COOLING),
            ("retry-after", date.as_str(), Duration::from_secs(90)),
            ("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT", Duration::ZERO),
            ("retry-after-ms", "250", Duration::from_millis(250)),
            ("retry-after", "soon", DEFAULT_COOLING),
            ("retry-after", "-3", DEFAULT_COOLING),
            ("retry-after", "inf", DEFAULT_COOLING),
            ("retry-after", "", DEFAULT_COOLING),
            ("x-other", "1", DEFAULT_COOLING),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            assert_eq!(cooling(&headers, wall), want, "{name}: {value}");
        }
        let mut both = HeaderMap::new();
        both.insert("retry-after", "9".parse().unwrap());
        both.insert("retry-after-ms", "300".parse().unwrap());
        assert_eq!(cooling(&both, wall), Duration::from_millis(300));
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
            let granted = (0..50).filter(|_| b.withdraw(second * SECOND)).count();
            assert_eq!(granted, 10);
        }
    }

    #[test]
    fn retries_add_at_most_their_share() {
        let b = Budget::new(20);
        let mut granted = 0;
        for i in 0..30_000u64 {
            let now = i * SECOND / 1_000;
            b.offer(now);
            granted += u64::from(b.withdraw(now)) + u64::from(b.withdraw(now));
        }
        assert!((5_900..=6_050).contains(&granted), "{granted}");
        b.set_percent(0);
        assert!(!b.has_room(30 * SECOND - 1), "what was spent counts against the new share");
    }

    proptest! {
        #[test]
        fn backoff_stays_in_its_bounds(base in 1u64..10_000, max in 1u64..600_000, n in 0u32..80, random in any::<u64>()) {
            let (base, max) = (Duration::from_millis(base), Duration::from_millis(max));
            let wait = backoff(base, max, n, random);
            prop_assert!(wait <= max);
            prop_assert!(n > 20 || wait <= base * (1 << n));
        }

        #[test]
        fn cooling_never_panics_and_is_capped(value in "\\PC{0,24}") {
            let mut headers = HeaderMap::new();
            if let Ok(value) = value.parse() {
                headers.insert("retry-after", value);
            }
            prop_assert!(cooling(&headers, SystemTime::UNIX_EPOCH) <= MAX_COOLING);
        }
    }
}

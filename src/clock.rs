//! The only module that reads clocks for the decisions in [`crate::policy`].

use std::pin::pin;
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use rustix::time::{ClockId, Timespec, clock_gettime};

use crate::time::{Day, MILLI, Nanos, SECOND};

static START: LazyLock<Nanos> = LazyLock::new(since_boot);

/// Returns the monotonic time since the first call in this process.
pub(crate) fn now() -> Nanos {
    let start = *START;
    since_boot().saturating_sub(start)
}

/// Returns the time of the clock that `Instant` reads, as a number. This takes half the time, and a request reads the
/// clock many times.
fn since_boot() -> Nanos {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Monotonic);
    tv_sec.cast_unsigned() * SECOND + tv_nsec.cast_unsigned()
}

/// The wall-clock time at which [`now`] was 0. Updated when the wall clock is set.
static EPOCH: Mutex<Option<SystemTime>> = Mutex::new(None);

/// A difference between the two clocks below this does not mean that the wall clock was set: the clocks are read one
/// after the other, not at once.
const TOLERANCE: Duration = Duration::from_millis(100);

/// Returns the wall-clock time at the time `at` of [`now`]. The same `at` gives the same result in every call, unless
/// the wall clock was set in between.
pub(crate) fn wall(at: Nanos) -> SystemTime {
    let mut known = EPOCH.lock();
    let epoch = wall_epoch(*known, SystemTime::now(), now());
    *known = Some(epoch);
    epoch + Duration::from_nanos(at)
}

fn wall_epoch(known: Option<SystemTime>, wall: SystemTime, now: Nanos) -> SystemTime {
    let fresh = wall.checked_sub(Duration::from_nanos(now)).unwrap_or(wall);
    let difference = |known: SystemTime| known.duration_since(fresh).unwrap_or_else(|e| e.duration());
    match known {
        Some(known) if difference(known) < TOLERANCE => known,
        _ => fresh,
    }
}

/// A clock of the wall time. That of Linux is exact to a few milliseconds, and takes a fraction of the time.
#[cfg(target_os = "linux")]
const COARSE: ClockId = ClockId::RealtimeCoarse;
#[cfg(not(target_os = "linux"))]
const COARSE: ClockId = ClockId::Realtime;

/// Returns the present day in UTC.
pub(crate) fn today() -> Day {
    Day::of_unix(u64::try_from(clock_gettime(COARSE).tv_sec).unwrap_or_default())
}

/// Returns the wall-clock time in milliseconds since the Unix epoch, exact to a few of them.
pub(crate) fn unix_millis() -> u64 {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(COARSE);
    let (secs, nanos) =
        (u64::try_from(tv_sec).unwrap_or_default(), u64::try_from(tv_nsec).unwrap_or_default());
    secs.saturating_mul(1000) + nanos / MILLI
}

/// Converts a duration to [`Nanos`], saturating at 584 years.
pub(crate) fn nanos(span: Duration) -> Nanos {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

/// A time limit has expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LimitExpired;

/// A timer that fires this late shows that the process was stopped, together with the work that the timer limits.
const MAX_DELAY: Duration = Duration::from_secs(1);

/// Runs `work` for at most `limit`. If the timer shows that the process was stopped meanwhile, the limit starts again.
///
/// # Errors
/// Returns [`LimitExpired`] if the limit has expired; `work` is dropped then.
pub(crate) async fn within<F: Future>(limit: Duration, work: F) -> Result<F::Output, LimitExpired> {
    let mut work = pin!(work);
    loop {
        let since = Instant::now();
        match tokio::time::timeout(limit, work.as_mut()).await {
            Ok(output) => return Ok(output),
            Err(_) if since.elapsed() >= limit + MAX_DELAY => {}
            Err(_) => return Err(LimitExpired),
        }
    }
}

/// Formats a wall-clock time as RFC 3339 in UTC with milliseconds: `2026-11-24T03:20:22.123Z`.
pub(crate) fn timestamp(wall: SystemTime) -> String {
    let since = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let rest = since.as_secs() % 86_400;
    let (h, m, s, ms) = (rest / 3600, rest / 60 % 60, rest % 60, since.subsec_millis());
    format!("{}T{h:02}:{m:02}:{s:02}.{ms:03}Z", Day::of(wall))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_dates_as_rfc_3339() {
        for (secs, want) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_795_490_422, "2026-11-24T03:20:22.000Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000Z"),
        ] {
            assert_eq!(timestamp(SystemTime::UNIX_EPOCH + Duration::from_secs(secs)), want);
        }
    }

    #[test]
    fn wall_time_is_stable_until_the_wall_clock_is_set() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let (ms, mut known) = (Duration::from_millis, start);
        assert_eq!(wall_epoch(None, start, 0), start);
        for (read, now, epoch) in
            [(5_001, 5_000, 0), (9_960, 10_000, 0), (20_200, 20_000, 200), (30_150, 30_000, 200)]
        {
            known = wall_epoch(Some(known), start + ms(read), nanos(ms(now)));
            assert_eq!(known, start + ms(epoch), "{read} at {now}");
        }
    }

    #[test]
    fn now_never_goes_back() {
        let first = now();
        assert!(now() >= first);
        assert_eq!(nanos(Duration::MAX), u64::MAX);
    }
}

//! Reads the rate-limit headers of providers, so that Zap stops before it exceeds a limit.
//!
//! The names of the buckets differ, but all providers send `x-ratelimit-remaining-BUCKET` and
//! `x-ratelimit-reset-BUCKET`. An empty bucket closes the backend until the bucket's reset.

use std::time::{Duration, SystemTime};

use http::HeaderMap;

/// Longest time that a bucket's reset closes a backend. Some buckets are reset once a day.
pub(crate) const MAX_RESET: Duration = Duration::from_secs(86_400);

const REMAINING: &str = "x-ratelimit-remaining";
const RESET: &str = "x-ratelimit-reset";

/// The longest time until the reset of an empty bucket; `None` if no bucket is empty or none has a valid reset. `wall`
/// returns the time of day; it is called only if a bucket is empty.
pub(crate) fn exhausted(headers: &HeaderMap, wall: impl Fn() -> SystemTime) -> Option<Duration> {
    let empty = headers.iter().filter_map(|(name, value)| {
        let bucket = name.as_str().strip_prefix(REMAINING)?;
        (value.to_str().ok()?.trim().parse::<f64>().ok()? <= 0.0).then_some(bucket)
    });
    let reset = |bucket: &str| {
        // Empty buckets are rare, so that the allocation does not matter.
        let value = headers.get(format!("{RESET}{bucket}"))?;
        reset_in(value.to_str().ok()?, wall())
    };
    empty.filter_map(reset).max()
}

/// Parses a reset: a duration (`2m30s`, `1s`, `6ms`), a number of seconds, or a Unix time (above 1e9 in seconds, above
/// 1e12 in milliseconds). The result is at most [`MAX_RESET`]; `None` if the text is invalid.
pub(crate) fn reset_in(text: &str, wall: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase() || b == b'.') {
        return None;
    }
    if !text.bytes().any(|b| b.is_ascii_lowercase())
        && let Ok(number) = text.parse::<f64>()
    {
        let epoch = match number {
            n if n > 1e12 => n / 1e3,
            n if n > 1e9 => n,
            n => return seconds(n),
        };
        let now = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        return seconds((epoch - now.as_secs_f64()).max(0.0));
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| c.is_ascii_lowercase())?;
        let number: f64 = rest[..digits].parse().ok()?;
        let after = &rest[digits..];
        let unit = after.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(after.len());
        total += number
            * match &after[..unit] {
                "d" => 86_400.0,
                "h" => 3_600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = &after[unit..];
    }
    seconds(total)
}

fn seconds(n: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(n.min(MAX_RESET.as_secs_f64())).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wall() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_000_000)
    }

    #[test]
    fn reads_every_form_of_a_reset() {
        let ms = Duration::from_millis;
        for (text, want) in [
            ("2m30s", Some(ms(150_000))),
            ("1s", Some(ms(1_000))),
            (" 6ms ", Some(ms(6))),
            ("1h0m0.5s", Some(ms(3_600_500))),
            ("33011.38", Some(ms(33_011_380))),
            ("0", Some(ms(0))),
            ("1795000007", Some(ms(7_000))),
            ("1795000007500", Some(ms(7_500))),
            ("1700000000", Some(ms(0))),
            ("999999999", Some(MAX_RESET)),
            ("9d", Some(MAX_RESET)),
            ("", None),
            ("soon", None),
            ("5x", None),
            ("s", None),
            ("1.2.3s", None),
            ("-5", None),
            ("inf", None),
            ("nan", None),
            ("2026-11-24T00:00:00Z", None),
        ] {
            assert_eq!(reset_in(text, wall()), want, "{text}");
        }
    }

    #[test]
    fn an_empty_bucket_closes_the_backend_until_its_own_reset() {
        let read = |pairs: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.append(*name, value.parse().unwrap());
            }
            exhausted(&headers, wall)
        };
        let requests = ("x-ratelimit-remaining-requests", "0");
        let reset = ("x-ratelimit-reset-requests", "3s");
        assert_eq!(read(&[requests, reset]), Some(Duration::from_secs(3)));
        assert_eq!(read(&[requests]), None, "there is no reset");
        assert_eq!(read(&[("x-ratelimit-remaining-requests", "1"), reset]), None);
        assert_eq!(read(&[requests, ("x-ratelimit-reset-tokens", "9s")]), None, "another bucket's reset");
        let cerebras = [
            ("x-ratelimit-remaining-tokens-minute", "0"),
            ("x-ratelimit-reset-tokens-minute", "12.5"),
            ("x-ratelimit-remaining-requests-day", "100"),
            ("x-ratelimit-reset-requests-day", "33011.38"),
        ];
        assert_eq!(read(&cerebras), Some(Duration::from_millis(12_500)));
        let both =
            [requests, reset, ("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "7s")];
        assert_eq!(read(&both), Some(Duration::from_secs(7)));
    }

    proptest! {
        #[test]
        fn no_text_panics_or_closes_for_longer_than_a_day(text in "\\PC{0,24}") {
            prop_assert!(reset_in(&text, wall()).is_none_or(|d| d <= MAX_RESET));
        }
    }
}

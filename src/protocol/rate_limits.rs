//! Reads how long a provider wants Zap to wait: `Retry-After` and the rate-limit headers.
//!
//! A rate limit is a bucket with a limit, a remaining number of units and a reset. Providers spell the three headers in
//! several ways: `x-ratelimit-remaining-BUCKET` (OpenAI, Groq, Cerebras), `x-rate-limit-remaining-BUCKET` (Azure),
//! `anthropic-ratelimit-BUCKET-remaining`, and `ratelimit-remaining` or `ratelimit: "BUCKET";r=0;t=30` (IETF draft
//! "RateLimit header fields for HTTP"). The reset says when the bucket is full again, so one unit is free after a
//! `limit`-th of it.

use std::time::{Duration, SystemTime};

use http::HeaderMap;
use serde_json::Value;

/// Longest wait that a `Retry-After` can ask for.
pub(crate) const MAX_RETRY_AFTER: Duration = Duration::from_secs(600);

/// Longest time until a reset. Some buckets are reset once a day.
pub(crate) const MAX_RESET: Duration = Duration::from_secs(86_400);

/// Longest time from one request to the next that a limit tells.
pub(crate) const MAX_PACE: Duration = Duration::from_secs(60);

/// Longest wait after a successful response whose bucket is empty.
pub(crate) const MAX_AFTER_SUCCESS: Duration = Duration::from_secs(60);

/// How long a provider wants Zap to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Wait {
    /// The time until the next request.
    pub span: Duration,
    /// After that, the time from one request to the next, if the provider has told it.
    pub pace: Option<Duration>,
}

impl Wait {
    /// A wait after which there is no limit.
    pub(crate) fn of(span: Duration) -> Self {
        Wait { span, pace: None }
    }
}

/// The wait that a 429 states: its `retry-after-ms` or `Retry-After` alone, if one of them is valid; else the longest
/// wait for an empty bucket. `None` if the response states no wait. `wall` returns the time of day.
pub(crate) fn stated_wait(headers: &HeaderMap, wall: impl Fn() -> SystemTime) -> Option<Wait> {
    retry_after(headers, &wall).map(Wait::of).or_else(|| empty_bucket(headers, wall))
}

/// The wait after a successful response: for its empty buckets, at most [`MAX_AFTER_SUCCESS`].
pub(crate) fn wait_after_success(headers: &HeaderMap, wall: impl Fn() -> SystemTime) -> Option<Duration> {
    empty_bucket(headers, wall).map(|wait| wait.span.min(MAX_AFTER_SUCCESS))
}

/// The wait that the JSON body of a 429 states: `retryDelay` of `google.rpc.RetryInfo` in the details of the error,
/// such as `"34.07s"`. Gemini sends it, also with the error as the element of a list.
pub(crate) fn retry_delay(body: &[u8]) -> Option<Duration> {
    memchr::memmem::find(body, b"\"retryDelay\"")?;
    let json: Value = serde_json::from_slice(body).ok()?;
    let error = json.get("error").or_else(|| json.get(0)?.get("error"))?;
    let delay = error["details"].as_array()?.iter().find_map(|detail| detail["retryDelay"].as_str())?;
    let secs = number(delay.strip_suffix('s')?)?;
    Some(seconds(secs)?.min(MAX_RETRY_AFTER))
}

/// The wait by `retry-after-ms`, else by `Retry-After` in seconds or as a date (RFC 9110, section 10.2.3), at most
/// [`MAX_RETRY_AFTER`]. A date is read against the `Date` of the response, since the clocks may differ.
pub(crate) fn retry_after(headers: &HeaderMap, wall: impl Fn() -> SystemTime) -> Option<Duration> {
    let date = |text: &str| httpdate::parse_http_date(text).ok();
    let until = |text: &str| {
        let now = text_of(headers, "date").and_then(date).unwrap_or_else(wall);
        Some(date(text)?.duration_since(now).unwrap_or_default())
    };
    let wait = text_of(headers, "retry-after-ms").and_then(|t| number(t).and_then(|n| seconds(n / 1e3)));
    let wait = wait.or_else(|| {
        let text = text_of(headers, "retry-after")?;
        number(text).and_then(seconds).or_else(|| until(text))
    });
    wait.map(|wait| wait.min(MAX_RETRY_AFTER))
}

fn text_of<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim)
}

/// A number without sign and exponent.
fn number(text: &str) -> Option<f64> {
    text.bytes().all(|b| b.is_ascii_digit() || b == b'.').then(|| text.parse().ok())?
}

/// The longest wait for a bucket that is empty; `None` if no bucket is empty or none has a valid reset. `wall` is
/// called only if a bucket is empty.
fn empty_bucket(headers: &HeaderMap, wall: impl Fn() -> SystemTime) -> Option<Wait> {
    let wait = |name: &str, value: &str| {
        if name == "ratelimit" {
            return value.split(',').filter_map(|item| structured(headers, item)).max();
        }
        let (limit, reset) = siblings(name)?;
        // A negative number of units means that the provider does not tell.
        if number(value)? != 0.0 {
            return None;
        }
        let wait = reset_in(text_of(headers, &reset)?, wall())?;
        // The IETF draft allows a list of policies after the limit: `100, 100;w=60`.
        let limit =
            text_of(headers, &limit).map(|text| text.split([',', ';']).next().unwrap_or_default().trim());
        one_unit(wait, limit)
    };
    // Most responses have no such header, so the first bytes of a name decide whether to look closer.
    let may_be_limit = |name: &str| {
        matches!(name.as_bytes(), [b'x', b'-', b'r', ..] | [b'r', b'a', b't', ..] | [b'a', b'n', ..])
    };
    let limits = headers.iter().filter(|(name, _)| may_be_limit(name.as_str()));
    limits.filter_map(|(name, value)| wait(name.as_str(), value.to_str().ok()?.trim())).max()
}

/// The names of the limit and the reset that belong to a header with the remaining units of a bucket; `None` if `name`
/// is not such a header. Responses with them are common, but `empty_bucket` needs the names only for an empty bucket.
fn siblings(name: &str) -> Option<(String, String)> {
    let (before, after) = name.split_once("remaining")?;
    let is_known = matches!(before, "x-ratelimit-" | "x-rate-limit-" | "ratelimit-")
        || before.starts_with("anthropic-ratelimit-") && after.is_empty();
    is_known.then(|| (format!("{before}limit{after}"), format!("{before}reset{after}")))
}

/// The wait for one item of `ratelimit`, if it is empty: `"BUCKET";r=0;t=30`. The limit is `q` of the same bucket in
/// `ratelimit-policy`.
fn structured(headers: &HeaderMap, item: &str) -> Option<Wait> {
    fn parameter<'i>(item: &'i str, key: &str) -> Option<&'i str> {
        item.split(';').skip(1).find_map(|p| p.trim().strip_prefix(key)?.strip_prefix('='))
    }
    if number(parameter(item, "r")?)? != 0.0 {
        return None;
    }
    let bucket = |item: &str| item.split(';').next().unwrap_or_default().trim().to_owned();
    let policies = text_of(headers, "ratelimit-policy").unwrap_or_default();
    let policy = policies.split(',').find(|policy| bucket(policy) == bucket(item));
    one_unit(seconds(number(parameter(item, "t")?)?)?, policy.and_then(|policy| parameter(policy, "q")))
}

/// The wait until one unit of a bucket is free that is full after `reset`. A limit of 0 or less says nothing.
fn one_unit(reset: Duration, limit: Option<&str>) -> Option<Wait> {
    match limit.and_then(|text| text.parse::<f64>().ok()) {
        None => Some(Wait::of(reset)),
        Some(limit) if limit >= 1.0 => {
            let unit = reset.div_f64(limit);
            Some(Wait { span: unit, pace: Some(unit.min(MAX_PACE)) })
        }
        Some(_) => None,
    }
}

/// Parses a reset: a duration (`2m30s`, `1s`, `6ms`), a number of seconds, a Unix time (above 1e9 in seconds, above
/// 1e12 in milliseconds), or a date as in RFC 3339. The result is at most [`MAX_RESET`]; `None` if the text is invalid.
pub(crate) fn reset_in(text: &str, wall: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if let Some(at) = unix_time(text) {
        let now = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        return seconds((at - now.as_secs_f64()).max(0.0));
    }
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

/// Parses a date and time of RFC 3339, such as `2026-11-24T08:00:00.5Z`, to seconds since 1970.
fn unix_time(text: &str) -> Option<f64> {
    let (date, rest) = text.split_once(['T', 't'])?;
    let part = |text: Option<&str>, len: usize, range: std::ops::RangeInclusive<u32>| {
        let text = text.filter(|t| t.len() == len && t.bytes().all(|b| b.is_ascii_digit()))?;
        text.parse::<u32>().ok().filter(|n| range.contains(n)).map(i64::from)
    };
    let mut parts = date.split('-');
    let (year, month, day) =
        (part(parts.next(), 4, 0..=9999)?, part(parts.next(), 2, 1..=12)?, part(parts.next(), 2, 1..=31)?);
    let (time, offset) = rest.split_at(rest.find(['Z', 'z', '+', '-'])?);
    let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let mut of_day = time.split(':');
    let mut sum = 0;
    for range in [0..=23, 0..=59, 0..=60] {
        sum = sum * 60 + part(of_day.next(), 2, range)?;
    }
    let shift = match offset {
        "Z" | "z" => 0,
        _ => {
            let (hours, minutes) = offset.get(1..)?.split_once(':')?;
            let minutes = part(Some(hours), 2, 0..=23)? * 60 + part(Some(minutes), 2, 0..=59)?;
            if offset.starts_with('-') { -minutes * 60 } else { minutes * 60 }
        }
    };
    let is_whole = parts.next().is_none() && of_day.next().is_none();
    let fraction = number(&format!("0.{fraction}")).filter(|_| is_whole && !fraction.contains('.'))?;
    // Days since 1970 in the Gregorian calendar; the year begins in March, so that a leap day is the last day.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days =
        365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 + day - 719_469;
    Some((days * 86_400 + sum - shift) as f64 + fraction)
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
            ("2026-11-18T11:06:47Z", Some(ms(7_000))),
            ("2026-11-18T11:06:47.25Z", Some(ms(7_250))),
            ("2026-11-18t12:06:47+01:00", Some(ms(7_000))),
            ("2026-11-18T11:06:39Z", Some(ms(0))),
            ("2027-11-18T11:06:40Z", Some(MAX_RESET)),
            ("2026-11-18T08:26:47", None),
            ("2026-13-18T08:26:47Z", None),
            ("2026-11-18T08:26Z", None),
            ("2026-11-18T08:26:47.5.5Z", None),
            ("T", None),
        ] {
            assert_eq!(reset_in(text, wall()), want, "{text}");
        }
    }

    #[test]
    fn reads_dates_of_every_year() {
        for (text, want) in [
            ("1970-01-01T00:00:00Z", 0.0),
            ("1969-12-31T23:59:59Z", -1.0),
            ("2000-02-29T00:00:00Z", 951_782_400.0),
            ("2000-03-01T00:00:00-12:30", 951_868_800.0 + 45_000.0),
            ("2100-03-01T00:00:00Z", 4_107_542_400.0),
            ("2016-12-31T23:59:60Z", 1_483_228_800.0),
        ] {
            assert_eq!(unix_time(text), Some(want), "{text}");
        }
    }

    type Pairs = &'static [(&'static str, &'static str)];

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (http::HeaderName::from_static(name), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn an_empty_bucket_states_the_wait_for_one_unit() {
        /// 30 s after the wall clock.
        const DATE: &str = "2026-11-18T11:07:10Z";
        #[rustfmt::skip]
        let table: &[(Pairs, Option<u64>)] = &[
            (&[("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "3s")], Some(3_000)),
            (&[("x-ratelimit-remaining-requests", "0")], None),
            (&[("x-ratelimit-remaining-requests", "1"), ("x-ratelimit-reset-requests", "3s")], None),
            (&[("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-tokens", "9s")], None),
            // The reset says when all units are free again.
            (&[("x-ratelimit-limit-requests", "60"), ("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "1m")], Some(1_000)),
            // Values that say nothing.
            (&[("x-ratelimit-limit-requests", "0"), ("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "1m")], None),
            (&[("x-ratelimit-limit-requests", "-1"), ("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "1m")], None),
            (&[("x-ratelimit-remaining-requests", "-1"), ("x-ratelimit-reset-requests", "1m")], None),
            // The longest wait of several buckets (Cerebras).
            (&[("x-ratelimit-remaining-tokens-minute", "0"), ("x-ratelimit-reset-tokens-minute", "12.5"), ("x-ratelimit-remaining-requests-day", "100"), ("x-ratelimit-reset-requests-day", "33011.38")], Some(12_500)),
            (&[("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "3s"), ("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "7s")], Some(7_000)),
            // Other spellings.
            (&[("x-rate-limit-remaining-requests", "0"), ("x-rate-limit-reset-requests", "6ms")], Some(6)),
            (&[("anthropic-ratelimit-requests-limit", "10"), ("anthropic-ratelimit-requests-remaining", "0"), ("anthropic-ratelimit-requests-reset", DATE)], Some(3_000)),
            (&[("ratelimit-limit", "10, 10;w=60"), ("ratelimit-remaining", "0"), ("ratelimit-reset", "30")], Some(3_000)),
            (&[("ratelimit", "\"minute\";r=0;t=30, \"day\";r=5;t=9000"), ("ratelimit-policy", "\"day\";q=1000;w=86400, \"minute\";q=10;w=60")], Some(3_000)),
            (&[("ratelimit", "\"minute\";r=0;t=30")], Some(30_000)),
            (&[("ratelimit", "\"minute\";r=0")], None),
            (&[("x-other-remaining", "0"), ("x-other-reset", "3s")], None),
        ];
        for (pairs, want) in table {
            let found = stated_wait(&headers(pairs), wall).map(|wait| wait.span.as_millis() as u64);
            assert_eq!(found, *want, "{pairs:?}");
        }
    }

    #[test]
    fn retry_after_alone_decides_on_a_429() {
        let empty =
            [("x-ratelimit-remaining-requests-day", "0"), ("x-ratelimit-reset-requests-day", "86340")];
        let with = |name, value| {
            stated_wait(&headers(&[&[(name, value)], &empty[..]].concat()), wall).map(|wait| wait.span)
        };
        assert_eq!(with("retry-after", "1"), Some(Duration::from_secs(1)));
        assert_eq!(with("retry-after-ms", "250"), Some(Duration::from_millis(250)));
        assert_eq!(
            with("retry-after", "soon"),
            Some(Duration::from_secs(86_340)),
            "an invalid value says nothing"
        );
        assert_eq!(wait_after_success(&headers(&empty), wall), Some(MAX_AFTER_SUCCESS));
        let not_read = headers(&[("retry-after", "1")]);
        assert_eq!(wait_after_success(&not_read, wall), None, "a success has no Retry-After");
    }

    #[test]
    fn reads_the_delay_in_the_body_of_gemini() {
        let body = r#"{"error":{"code":429,"details":[{"@type":"x"},{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"34.5s"}]}}"#;
        let wait = Some(Duration::from_millis(34_500));
        assert_eq!(retry_delay(body.as_bytes()), wait);
        assert_eq!(retry_delay(format!("[{body}\n]").as_bytes()), wait);
        for (from, to) in
            [("34.5s", "34.5"), ("34.5s", "s"), ("\"34.5s\"", "34"), ("details", "more"), ("error", "x")]
        {
            assert_eq!(retry_delay(body.replace(from, to).as_bytes()), None, "{to}");
        }
        assert_eq!(retry_delay(body.replace("34.5", "9999").as_bytes()), Some(MAX_RETRY_AFTER));
    }

    #[test]
    fn reads_every_form_of_retry_after() {
        let date = httpdate::fmt_http_date(wall() + Duration::from_secs(90));
        for (name, value, want) in [
            ("retry-after", "7", Some(7_000)),
            ("retry-after", " 0 ", Some(0)),
            ("retry-after", "1.5", Some(1_500)),
            ("retry-after", "99999999999999999999999", Some(600_000)),
            ("retry-after", &date, Some(90_000)),
            ("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT", Some(0)),
            ("retry-after-ms", "250", Some(250)),
            ("retry-after", "soon", None),
            ("retry-after", "-3", None),
            ("retry-after", "inf", None),
            ("retry-after", "", None),
            ("x-other", "1", None),
        ] {
            let found =
                stated_wait(&headers(&[(name, value)]), wall).map(|wait| wait.span.as_millis() as u64);
            assert_eq!(found, want, "{name}: {value}");
        }
        let both = headers(&[("retry-after", "9"), ("retry-after-ms", "300")]);
        assert_eq!(stated_wait(&both, wall), Some(Wait::of(Duration::from_millis(300))));
        // The provider's clock is an hour behind.
        let own = httpdate::fmt_http_date(wall() - Duration::from_secs(3_600));
        let until = httpdate::fmt_http_date(wall() - Duration::from_secs(3_580));
        let skewed = headers(&[("date", &own), ("retry-after", &until)]);
        assert_eq!(stated_wait(&skewed, wall), Some(Wait::of(Duration::from_secs(20))));
    }

    proptest! {
        #[test]
        fn no_text_panics_or_closes_for_longer_than_a_day(text in "\\PC{0,24}") {
            prop_assert!(reset_in(&text, wall()).is_none_or(|d| d <= MAX_RESET));
        }
    }
}

//! The bodies of the fuzz targets, which `cargo test` runs too: one function per target, which takes bytes and panics
//! if a property does not hold.
//!
//! `cargo +nightly fuzz run <target>` searches for new inputs; the tests below replay the seeds in `fuzz/corpus`. Each
//! target compares the code with something simpler: serde_json, a shorter input, a naive log. Randomness depends only
//! on the input, so an input that fails once fails always.

mod events;
mod multipart;
mod patch;
mod response;
mod usage;

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::config::Config;
pub use crate::fuzzing::events::events;
pub use crate::fuzzing::multipart::multipart;
pub use crate::fuzzing::patch::patch;
pub use crate::fuzzing::response::upstream_response;
pub use crate::fuzzing::usage::usage;
use crate::http1::header_rules::{HeaderRules, NamePattern};
use crate::http1::headers::Passing;
use crate::http1::{head, headers as header_policy};
use crate::policy::balance::{Cursor, Schedule, Turns};
use crate::policy::limit::{Decision, Limiter, WINDOW, Window};
use crate::protocol::rate_limits;
use crate::time::{MILLI, Nanos};

/// Fuzzes `http1::head`: a verdict on a prefix of the input is the verdict on the whole input.
pub fn head(data: &[u8]) {
    let whole = head::inspect(data);
    let step = 1 + data.len() / 128;
    for cut in (0..data.len()).step_by(step) {
        match head::inspect(&data[..cut]) {
            Ok(None) => {}
            verdict => assert_eq!(verdict, whole, "at {cut}"),
        }
    }
    if let Ok(Some(head)) = whole {
        assert!(data[..head.len].ends_with(b"\r\n\r\n"));
        assert_eq!(head::inspect(&data[..head.len]), whole);
        assert_eq!(head::inspect(&data[..head.len - 1]), Ok(None));
    }
}

/// Fuzzes `http1::headers`. To a backend pass only the headers of an allow list, to a client all but those of a deny
/// list, and in neither direction a header that `Connection` nominates. The input is one header per line.
pub fn headers(data: &[u8]) {
    let mut map = HeaderMap::new();
    for line in data.split(|b| *b == b'\n').take(100) {
        let Some(colon) = line.iter().position(|b| *b == b':') else { continue };
        let (name, value) =
            (HeaderName::from_bytes(&line[..colon]), HeaderValue::from_bytes(&line[colon + 1..]));
        if let (Ok(name), Ok(value)) = (name, value) {
            map.append(name, value);
        }
    }
    let nominated = |name: &str| {
        let lines =
            map.get_all("connection").iter().map(|v| String::from_utf8_lossy(v.as_bytes()).to_lowercase());
        lines.into_iter().any(|line| line.split(',').any(|token| token.trim_matches([' ', '\t']) == name))
    };
    let was_sent = |name: &HeaderName, value: &HeaderValue| map.get_all(name).iter().any(|v| v == value);
    let patterns = |names: &[&str]| names.iter().filter_map(|name| NamePattern::parse(name)).collect();
    let listed_rules = HeaderRules {
        forward: patterns(&["x-t", "X-A*", "a*", "c*", "p*", "t*"]),
        drop: patterns(&["x-stainless-o*", "tracestate"]),
    };
    let rule_sets = [HeaderRules::default(), listed_rules];
    for (forward, rules) in [false, true].into_iter().flat_map(|f| rule_sets.iter().map(move |r| (f, r))) {
        let mut to = HeaderMap::new();
        let passing = Passing { authorization: forward, more: &["openai-beta"], ..Passing::default() };
        let _ = header_policy::to_backend(&map, passing, rules, |name, value| {
            to.append(name, value.clone());
        });
        assert_eq!(
            (&to["content-type"], &to["accept-encoding"]),
            (&HeaderValue::from_static("application/json"), &HeaderValue::from_static("identity"))
        );
        for (name, value) in &to {
            let name_text = name.as_str();
            let default = match name_text {
                "accept" => value == "*/*",
                "user-agent" => value == "zap",
                "accept-encoding" | "content-type" => true,
                _ => false,
            };
            let listed =
                ["accept", "idempotency-key", "openai-beta", "traceparent", "tracestate", "user-agent"];
            let account = ["authorization", "openai-organization", "openai-project"];
            let passes = listed.contains(&name_text)
                || forward && account.contains(&name_text)
                || name_text.starts_with("x-stainless-");
            let is_ruled = !rules.forward.is_empty();
            let is_withheld = [
                "api-key",
                "authorization",
                "connection",
                "content-length",
                "content-encoding",
                "cookie",
                "proxy-authorization",
                "proxy-connection",
                "te",
                "trailer",
                "transfer-encoding",
                "x-api-key",
            ]
            .contains(&name_text);
            let begins = |prefix: &&str| name_text.starts_with(*prefix);
            let is_forwarded =
                name_text == "x-t" || ["x-a", "a", "c", "p", "t"].iter().any(begins) && !is_withheld;
            let passes = passes || is_ruled && is_forwarded;
            let is_dropped =
                is_ruled && (name_text.starts_with("x-stainless-o") || name_text == "tracestate");
            assert!(!is_dropped, "{name} reached the backend");
            assert!(
                default || passes && was_sent(name, value) && !nominated(name_text),
                "{name} reached the backend"
            );
        }
    }
    let mut out = map.clone();
    header_policy::to_client(&mut out);
    for name in out.keys().map(HeaderName::as_str) {
        let dropped = [
            "connection",
            "keep-alive",
            "proxy-connection",
            "proxy-authenticate",
            "te",
            "trailer",
            "transfer-encoding",
            "upgrade",
            "set-cookie",
            "alt-svc",
        ];
        assert!(!dropped.contains(&name), "{name} reached the client");
        let required = name == "content-length" || name == "content-type";
        assert!(required || !nominated(name), "{name} is nominated and reached the client");
    }
    if let Some(key) = header_policy::credential(&map) {
        assert!(!key.is_empty() && key == key.trim_ascii());
    }
    let id = header_policy::request_id(&map).map(HeaderValue::as_bytes);
    assert!(id.is_none_or(|id| (1..=128).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic)));
    let peer = IpAddr::from([9, 9, 9, 9]);
    assert_eq!(header_policy::client_address(&map, peer, |_| false), peer, "no proxy is trusted");
    header_policy::client_address(&map, peer, |_| true);
}

const CANARY: &str = "sk-CANARY";
const ENV_CANARY: &str = "sk-of-the-ENVIRONMENT";

/// Fuzzes `config`: every text is read or refused, and no message contains a key.
///
/// The text is parsed twice: unchanged, and as the continuation of an `api_key` string.
pub fn config(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let env = |name: &str| match name {
        "KEY" => Some(ENV_CANARY.to_owned()),
        "EMPTY" => Some(String::new()),
        _ => None,
    };
    let parse = |text: &str| Config::parse(text, "f.toml", Path::new("no-such-directory"), &env);
    let check = |text: &str| match parse(text) {
        Ok(config) => {
            let mut names = HashSet::new();
            assert!(config.backends.iter().all(|b| names.insert(&b.name)), "two backends have the same name");
            assert!(!names.is_empty(), "no backend");
        }
        Err(faults) => {
            let lines = text.matches('\n').count() + 1;
            assert!(!faults.lines().is_empty(), "refused without a fault");
            for fault in faults.lines() {
                let at = fault.strip_prefix("f.toml:").and_then(|f| f.split_once(": ")?.0.parse().ok());
                assert!(at.is_some_and(|at| (1..=lines).contains(&at)), "no line: {fault:?}");
                assert!(!fault.contains('\n'), "more than one line: {fault:?}");
                assert!(!fault.contains(CANARY) && !fault.contains(ENV_CANARY), "{fault:?}");
            }
        }
    };
    check(&text);
    let text = text.replace(CANARY, "sk-other");
    let text = format!("[[backends]]\nurl = \"http://a\"\nweight = 1\napi_key = \"{CANARY}{text}");
    check(&text);
    // `Debug` includes the warnings.
    let shown = parse(&text).map_or_else(|faults| format!("{faults:?}"), |config| format!("{config:?}"));
    assert!(!shown.contains(CANARY), "{shown}");
}

/// Fuzzes `protocol::rate_limits`: for all header values the wait is within the cap, and plain numbers of seconds mean
/// exactly that.
///
/// The first four bytes are the wall clock in seconds; one value per line follows.
pub fn retry_after(data: &[u8]) {
    let Some((seconds, lines)) = data.split_first_chunk() else { return };
    let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::from(u32::from_le_bytes(*seconds)));
    let mut headers = HeaderMap::new();
    let names = ["retry-after", "retry-after-ms", "retry-after"];
    for (name, line) in names.iter().zip(lines.split(|b| *b == b'\n')) {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append(*name, value);
        }
    }
    for line in lines.split(|b| *b == b'\n') {
        reset(line, wall);
    }
    let wait = || rate_limits::stated_wait(&headers, || wall).map(|wait| wait.span);
    assert!(wait().is_none_or(|wait| wait <= rate_limits::MAX_RETRY_AFTER), "{:?}", wait());
    headers.remove("retry-after-ms");
    let plain: Option<u32> =
        headers.get("retry-after").and_then(|v| v.to_str().ok()).and_then(|v| v.trim().parse().ok());
    if let Some(seconds) = plain {
        let asked = Duration::from_secs(u64::from(seconds)).min(rate_limits::MAX_RETRY_AFTER);
        let signed = headers["retry-after"].as_bytes().contains(&b'+');
        assert_eq!(
            rate_limits::stated_wait(&headers, || wall).map(|wait| wait.span),
            (!signed).then_some(asked)
        );
    }
}

/// Checks one reset value: the span is at most a day; integers, alone or with `s` or `ms`, mean what they say; a bucket
/// with nothing left is closed for exactly its reset.
fn reset(line: &[u8], wall: SystemTime) {
    let Ok(value) = HeaderValue::from_bytes(line) else { return };
    let read = value.to_str().ok().and_then(|text| rate_limits::reset_in(text, wall));
    assert!(read.is_none_or(|span| span <= rate_limits::MAX_RESET), "{read:?}");
    let text = value.to_str().map(str::trim).unwrap_or_default();
    let whole = |text: &str| text.parse::<u32>().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()));
    let plain = |span: Duration| Some(span.min(rate_limits::MAX_RESET));
    let ago = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    if let Some(seconds) = whole(text) {
        let span = Duration::from_secs(u64::from(seconds));
        let want = if seconds > 1_000_000_000 { plain(span.saturating_sub(ago)) } else { plain(span) };
        let close = |a: Option<Duration>, b: Option<Duration>| {
            a.zip(b).is_some_and(|(a, b)| a.abs_diff(b) < Duration::from_millis(1))
        };
        assert!(close(read, want), "{text}: {read:?}, not {want:?}");
    } else if let Some(millis) = text.strip_suffix("ms").and_then(whole) {
        let want = plain(Duration::from_millis(u64::from(millis)));
        assert_eq!(read.map(|r| r.as_millis()), want.map(|w| w.as_millis()), "{text}");
    } else if let Some(seconds) = text.strip_suffix('s').and_then(whole) {
        assert_eq!(read, plain(Duration::from_secs(u64::from(seconds))), "{text}");
    }
    let mut headers = HeaderMap::new();
    headers.insert("x-ratelimit-remaining-tokens-minute", HeaderValue::from_static("0"));
    headers.insert("x-ratelimit-reset-tokens-minute", value);
    assert_eq!(rate_limits::stated_wait(&headers, || wall).map(|wait| wait.span), read);
}

/// Fuzzes `policy::limit`: compares a window and a limiter with naive logs.
pub fn limit_ops(data: &[u8]) {
    match data.split_first() {
        // The slowest case, so only few inputs lead to it.
        Some((0xFF, rounds)) if rounds.len() == 16 => huge_window(rounds),
        Some((0x80.., ops)) => limiter(ops),
        Some((_, ops)) => window(ops),
        None => {}
    }
}

/// Fuzzes `policy::balance`: compares a schedule with a naive smooth weighted round robin.
///
/// The first byte gives the number of backends, modulo 9. Their weights follow, then sets of eligible backends, one bit
/// per backend.
pub fn balance_ops(data: &[u8]) {
    let Some((n, rest)) = data.split_first() else { return };
    let (weights, sets) = rest.split_at(usize::from(n % 9).min(rest.len()));
    let weights: Vec<u32> = weights
        .iter()
        .map(|b| u32::from(*b))
        .map(|b| if b < 200 { b % 11 } else { (b - 200) * 18 })
        .collect();
    let schedule = Schedule::new(weights.iter().copied().enumerate());
    let cursor = Cursor::default();
    let turns = Turns { cursor: &cursor, advance: true };
    let total: u32 = weights.iter().sum();
    for want in smooth(&weights, 2 * total as usize) {
        assert_eq!(schedule.round_robin(turns, |_| true), Some(want), "not the smooth order of {weights:?}");
    }
    for set in sets.iter().take(16) {
        let eligible = |id: usize| set >> id & 1 == 1;
        let most: u32 = (0..weights.len()).filter(|id| eligible(*id)).map(|id| weights[id]).sum();
        let mut got = vec![0; weights.len()];
        for _ in 0..most.max(1) {
            let pick = schedule.round_robin(turns, eligible);
            assert_eq!(pick.is_none(), most == 0, "{weights:?} with {set:b}");
            if let Some(id) = pick {
                assert!(eligible(id), "{id} of {weights:?} with {set:b}");
                got[id] += 1;
            }
        }
        // In a longer turn Zap checks only 64 positions and then picks by weight, so proportions are not exact.
        if total <= 64 {
            let want: Vec<u32> =
                (0..weights.len()).map(|id| if eligible(id) { weights[id] } else { 0 }).collect();
            assert_eq!(got, want, "proportions with {set:b}");
        }
        let load =
            |id: usize, weight| eligible(id).then(|| f64::from(u32::from(*set) % (id as u32 + 2) + weight));
        let least = (0..weights.len()).filter(|id| weights[*id] > 0).filter_map(|id| load(id, weights[id]));
        let pick = schedule.least_loaded(turns, load);
        assert_eq!(pick.and_then(|id| load(id, weights[id])), least.min_by(f64::total_cmp));
    }
    let mut turn = vec![0; weights.len()];
    for _ in 0..total {
        schedule.round_robin(turns, |_| true).into_iter().for_each(|id| turn[id] += 1);
    }
    assert_eq!(turn, weights, "in a full turn each backend has its weight");
}

/// All times of admissions, in ascending order.
#[derive(Default)]
struct NaiveLog(Vec<Nanos>);

impl NaiveLog {
    /// The times still within the window at `now`.
    fn live(&self, now: Nanos) -> &[Nanos] {
        &self.0[self.0.partition_point(|t| *t + WINDOW <= now)..]
    }

    fn check(&mut self, limit: u32, now: Nanos, latest: Nanos) -> Decision {
        let admitted = self.live(latest).len() < limit as usize;
        if admitted {
            self.0.push(now.max(self.0.last().copied().unwrap_or(0)));
        }
        let remaining = limit.saturating_sub(self.live(latest).len() as u32);
        Decision { admitted, limit, remaining, reset: self.opens_in(limit, now, latest) }
    }

    fn opens_in(&self, limit: u32, now: Nanos, latest: Nanos) -> Nanos {
        let live = self.live(latest);
        live.len().checked_sub(limit as usize).map_or(0, |over| (live[over] + WINDOW).saturating_sub(now))
    }
}

/// Runs operations on a window: move the clock, also backwards, change the limit, check. Three bytes per operation.
fn window(ops: &[u8]) {
    let (mut window, mut naive) = (Window::default(), NaiveLog::default());
    let (mut limit, mut now, mut latest): (u32, Nanos, Nanos) = (3, 0, 0);
    for [op, a, b] in ops.as_chunks().0 {
        let step = u64::from(u16::from_le_bytes([*a, *b]));
        match op % 8 {
            0 => limit = 1 + u32::from(a % 16),
            1 => now = latest.saturating_sub(step * MILLI / 1000),
            2 => now += step * MILLI / 1000,
            3 => now += step * MILLI,
            4 => {
                now =
                    naive.live(latest).first().map_or(now, |t| (t + WINDOW).saturating_sub(step % 2).max(now))
            }
            _ => {}
        }
        latest = now.max(latest);
        if op & 0x80 != 0 {
            assert_eq!(window.opens_in(limit, now), naive.opens_in(limit, now, latest));
        }
        assert_eq!(window.check(limit, now), naive.check(limit, now, latest), "limit {limit} at {now}");
    }
}

/// Runs bursts against a limit so large that admissions share entries: the window never admits one too many, and opens
/// at most 60 s / 65536 late. Four bytes per burst: the time since the last burst in ms, and the number of requests.
fn huge_window(rounds: &[u8]) {
    const LATE: Nanos = WINDOW / 65_536;
    let (mut window, mut naive) = (Window::default(), NaiveLog::default());
    let (limit, mut now): (u32, Nanos) = (65_537, 0);
    for [a, b, c, d] in rounds.as_chunks().0 {
        now += u64::from(u16::from_le_bytes([*a, *b])) * MILLI;
        for _ in 0..u16::from_le_bytes([*c, *d]) {
            now += u64::from(*a) * 97;
            if window.check(limit, now).admitted {
                assert!(naive.live(now).len() < limit as usize, "one too many at {now}");
                naive.0.push(now);
            } else {
                assert!(naive.live(now.saturating_sub(LATE)).len() >= limit as usize, "late at {now}");
            }
        }
    }
}

/// Runs requests against a limiter. The first byte bounds the number of keys; then two bytes per request: the time
/// since the last request, and the client.
fn limiter(ops: &[u8]) {
    let Some((max_keys, ops)) = ops.split_first() else { return };
    let max_keys = usize::from(1 + max_keys % 8);
    let limiter = Limiter::new(max_keys);
    // Least recently used first.
    let mut naive: Vec<(u64, NaiveLog)> = Vec::new();
    let mut now = 0;
    for [step, client] in ops.as_chunks().0 {
        now += u64::from(*step) * u64::from(*step) * MILLI;
        let limit = 1 + u32::from(client >> 4 & 3);
        // Some keys share a shard, others do not.
        let key = u64::from(client & 15) << if client & 1 == 0 { 32 } else { 0 };
        let known = naive.iter().position(|(k, _)| *k == key);
        let mut log = known.map_or_else(NaiveLog::default, |i| naive.remove(i).1);
        assert_eq!(limiter.check(key, limit, now), log.check(limit, now, now), "key {key} at {now}");
        naive.push((key, log));
        if naive.len() > max_keys {
            naive.remove(0);
        }
        assert!(limiter.keys() <= naive.len(), "{} keys, {} expected", limiter.keys(), naive.len());
    }
}

/// The first `n` picks of nginx's smooth weighted round robin.
fn smooth(weights: &[u32], n: usize) -> impl Iterator<Item = usize> {
    let weights: Vec<i64> = weights.iter().map(|w| i64::from(*w)).collect();
    let mut credit = vec![0; weights.len()];
    (0..n).map(move |_| {
        let mut best = None;
        for (id, weight) in weights.iter().enumerate() {
            credit[id] += weight;
            if *weight > 0 && best.is_none_or(|b| credit[id] > credit[b]) {
                best = Some(id);
            }
        }
        let best = best.unwrap_or(0);
        credit[best] -= weights.iter().sum::<i64>();
        best
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `body` on every seed of `target`, and on the first half of each.
    fn replay(target: &str, body: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        let mut seeds = 0;
        for file in std::fs::read_dir(&folder).unwrap() {
            let path = file.unwrap().path();
            let data = std::fs::read(&path).unwrap();
            // The test output, shown only on failure, names the seed.
            println!("{}", path.display());
            body(&data);
            body(&data[..data.len() / 2]);
            seeds += 1;
        }
        assert!(seeds > 0, "no seeds in {}", folder.display());
    }

    #[test]
    fn patch_passes_on_its_seeds() {
        replay("patch", patch);
    }

    #[test]
    fn multipart_passes_on_its_seeds() {
        replay("multipart", multipart);
    }

    #[test]
    fn head_passes_on_its_seeds() {
        replay("head", head);
    }

    #[test]
    fn headers_passes_on_its_seeds() {
        replay("headers", headers);
    }

    #[test]
    fn config_passes_on_its_seeds() {
        replay("config", config);
    }

    #[test]
    fn retry_after_passes_on_its_seeds() {
        replay("retry_after", retry_after);
    }

    #[test]
    fn limit_ops_passes_on_its_seeds() {
        replay("limit_ops", limit_ops);
    }

    #[test]
    fn balance_ops_passes_on_its_seeds() {
        replay("balance_ops", balance_ops);
    }

    #[test]
    fn events_passes_on_its_seeds() {
        replay("events", events);
    }

    #[test]
    fn upstream_response_passes_on_its_seeds() {
        replay("upstream_response", upstream_response);
    }

    #[test]
    fn usage_passes_on_its_seeds() {
        replay("usage", usage);
    }
}

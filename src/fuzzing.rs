//! The laws that the fuzz targets and `cargo test` both check: one function per target, bytes in, a panic where a
//! law is broken.
//!
//! `cargo +nightly fuzz run <target>` looks for new inputs; the tests below replay the seeds in `fuzz/corpus`. Each
//! law compares with something plainer: serde_json, a shorter input, a naive log. What is random in a body comes
//! from its data alone, so an input that fails once fails always.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::config::Config;
use crate::policy::balance::Schedule;
use crate::policy::limit::{Decision, Limiter, WINDOW, Window};
use crate::policy::patch::{ModelText, model_splice, slices};
use crate::policy::scan::{Fields, Kind, MAX_DEPTH, MAX_NAME, Member, Model, ScanError, Scanner};
use crate::policy::{MILLI, Nanos, head, retry};

/// `policy::scan` and `policy::patch` on a request body, against serde_json.
///
/// A body is accepted where serde_json takes it as one object, it nests no deeper than [`MAX_DEPTH`] and no member
/// that Zap reads stands twice; what the scan found is what a naive look finds; chunking changes nothing; and the
/// patched body is the body with its model set, all other bytes as they were. What does not begin as an object is
/// tried as a member's value too, so that it is read beyond its first byte.
pub fn patch(data: &[u8]) {
    patch_body(data);
    if data.first() != Some(&b'{') {
        patch_body(&[b"{\"a\":", data, b"}"].concat());
    }
}

fn patch_body(data: &[u8]) {
    let body = Bytes::copy_from_slice(data);
    let mut rng = fastrand::Rng::with_seed(hash(data));
    let chunks = chunked(&body, &mut rng);
    let verdict = scan(std::slice::from_ref(&body));
    assert_eq!(verdict, scan(&chunks), "chunking changes the verdict");
    let Some(text) = one_object(data) else {
        let refused = match verdict {
            Err(ScanError::Invalid { offset }) => offset <= data.len() as u64,
            // The scan ends at the repeated key and does not see what follows.
            Err(ScanError::Duplicate(_)) => true,
            Ok(_) => false,
        };
        assert!(refused, "serde_json refuses, the scan says {verdict:?}");
        return;
    };
    let looked = look(text);
    if looked.depth > MAX_DEPTH {
        assert!(verdict.is_err(), "{} levels accepted", looked.depth);
        return;
    }
    match (verdict, looked.fields(text)) {
        (Ok(fields), Ok(want)) => {
            same_fields(&fields, &want);
            let names = ["gpt", "", "a \"b\"\\\u{1}\n", "модель 😀"];
            patched(text, &chunks, &fields, names[rng.usize(..names.len())]);
        }
        (ours, naive) => assert_eq!(ours, naive.map_err(ScanError::Duplicate)),
    }
}

/// `policy::head`: what is said of a prefix stays true of the whole.
pub fn head(data: &[u8]) {
    let whole = head::inspect(data);
    let step = 1 + data.len() / 128;
    for cut in (0..data.len()).step_by(step) {
        match head::inspect(&data[..cut]) {
            Ok(None) => {}
            early => assert_eq!(early, whole, "at {cut}"),
        }
    }
    if let Ok(Some(head)) = whole {
        assert!(data[..head.len].ends_with(b"\r\n\r\n"));
        assert_eq!(head::inspect(&data[..head.len]), whole);
        assert_eq!(head::inspect(&data[..head.len - 1]), Ok(None));
    }
}

const CANARY: &str = "sk-CANARY";
const ENV_CANARY: &str = "sk-of-the-ENVIRONMENT";

/// `config`: any text is read or refused, and no message holds a key.
///
/// The text is read twice: as it is, and as what stands behind the beginning of a key.
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
            assert!(config.backends.iter().all(|b| names.insert(&b.name)), "a name stands twice");
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
    // Warnings included.
    let shown = parse(&text).map_or_else(|faults| format!("{faults:?}"), |config| format!("{config:?}"));
    assert!(!shown.contains(CANARY), "{shown}");
}

/// `policy::retry::cooling`: any header values give a wait within the cap; whole seconds are taken at their word.
///
/// The first four bytes are the wall clock in seconds, then one value a line.
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
    let wait = retry::cooling(&headers, wall);
    assert!(wait <= retry::MAX_COOLING, "{wait:?}");
    headers.remove("retry-after-ms");
    let plain: Option<u32> =
        headers.get("retry-after").and_then(|v| v.to_str().ok()).and_then(|v| v.trim().parse().ok());
    if let Some(seconds) = plain {
        let asked = Duration::from_secs(u64::from(seconds)).min(retry::MAX_COOLING);
        let signed = headers["retry-after"].as_bytes().contains(&b'+');
        assert_eq!(retry::cooling(&headers, wall), if signed { retry::DEFAULT_COOLING } else { asked });
    }
}

/// `policy::limit`: a window and a limiter, against naive logs.
pub fn limit_ops(data: &[u8]) {
    match data.split_first() {
        // Slow, so a rare shape.
        Some((0xFF, rounds)) if rounds.len() == 16 => huge_window(rounds),
        Some((0x80.., ops)) => limiter(ops),
        Some((_, ops)) => window(ops),
        None => {}
    }
}

/// `policy::balance`: turns of a schedule against a naive smooth weighted round robin.
///
/// The first byte is the number of backends (0 to 8), then their weights, then sets of eligible ones, a bit each.
pub fn balance_ops(data: &[u8]) {
    let Some((n, rest)) = data.split_first() else { return };
    let (weights, sets) = rest.split_at(usize::from(n % 9).min(rest.len()));
    let weights: Vec<u32> = weights
        .iter()
        .map(|b| u32::from(*b))
        .map(|b| if b < 200 { b % 11 } else { (b - 200) * 18 })
        .collect();
    let schedule = Schedule::new(weights.iter().copied().enumerate());
    let total: u32 = weights.iter().sum();
    for want in smooth(&weights, 2 * total as usize) {
        assert_eq!(schedule.round_robin(|_| true), Some(want), "out of the smooth order of {weights:?}");
    }
    for set in sets.iter().take(16) {
        let eligible = |id: usize| set >> id & 1 == 1;
        let most: u32 = (0..weights.len()).filter(|id| eligible(*id)).map(|id| weights[id]).sum();
        let mut got = vec![0; weights.len()];
        for _ in 0..most.max(1) {
            let pick = schedule.round_robin(eligible);
            assert_eq!(pick.is_none(), most == 0, "{weights:?} with {set:b}");
            if let Some(id) = pick {
                assert!(eligible(id), "{id} of {weights:?} with {set:b}");
                got[id] += 1;
            }
        }
        // In a longer turn Zap looks no further than 64 places, then picks by weight.
        if total <= 64 {
            let want: Vec<u32> =
                (0..weights.len()).map(|id| if eligible(id) { weights[id] } else { 0 }).collect();
            assert_eq!(got, want, "proportions with {set:b}");
        }
        let load =
            |id: usize, weight| eligible(id).then(|| f64::from(u32::from(*set) % (id as u32 + 2) + weight));
        let least = (0..weights.len()).filter(|id| weights[*id] > 0).filter_map(|id| load(id, weights[id]));
        let pick = schedule.least_loaded(load);
        assert_eq!(pick.and_then(|id| load(id, weights[id])), least.min_by(f64::total_cmp));
    }
    let mut turn = vec![0; weights.len()];
    for _ in 0..total {
        schedule.round_robin(|_| true).into_iter().for_each(|id| turn[id] += 1);
    }
    assert_eq!(turn, weights, "a full turn gives each its weight");
}

fn scan(chunks: &[Bytes]) -> Result<Fields, ScanError> {
    let mut scanner = Scanner::new();
    chunks.iter().try_for_each(|c| scanner.feed(c))?;
    scanner.finish()
}

/// FNV-1a.
fn hash(data: &[u8]) -> u64 {
    data.iter().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01B3))
}

/// `body` in pieces of up to 1, 8, 64 or 4096 bytes, none empty.
fn chunked(body: &Bytes, rng: &mut fastrand::Rng) -> Vec<Bytes> {
    let most = [1, 8, 64, 4096][rng.usize(..4)];
    let mut rest = body.clone();
    let mut chunks = Vec::new();
    while !rest.is_empty() {
        chunks.push(rest.split_to(rng.usize(1..=most).min(rest.len())));
    }
    chunks
}

/// The text, where serde_json says that it is one object. Skipping a value it does not recurse, so it takes any
/// depth.
fn one_object(data: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(data).ok()?;
    let raw: &RawValue = serde_json::from_str(text).ok()?;
    raw.get().starts_with('{').then_some(text)
}

/// What a naive look finds in a valid object.
struct Look<'t> {
    depth: u32,
    inside: usize,
    /// Keys as written and where their values stand.
    members: Vec<(&'t str, std::ops::Range<usize>)>,
}

fn look(text: &str) -> Look<'_> {
    let mut look = Look { depth: 0, inside: text.find('{').map_or(0, |at| at + 1), members: Vec::new() };
    let (mut depth, mut in_string, mut escaped) = (0u32, false, false);
    let mut start = look.inside;
    let mut key = None;
    for (at, b) in text.bytes().enumerate() {
        if in_string {
            in_string = escaped || b != b'"';
            escaped = !escaped && b == b'\\';
            continue;
        }
        match b {
            b'"' => in_string = true,
            b'{' | b'[' => depth += 1,
            b':' if depth == 1 => {
                key = Some(text[start..at].trim());
                start = at + 1;
            }
            b',' | b'}' if depth == 1 => {
                let value = text[start..at].trim();
                let from = start + text[start..at].find(value).unwrap_or(0);
                look.members.extend(key.take().map(|key| (key, from..from + value.len())));
                start = at + 1;
                depth -= u32::from(b == b'}');
            }
            b'}' | b']' => depth -= 1,
            _ => {}
        }
        look.depth = look.depth.max(depth);
    }
    look
}

impl Look<'_> {
    /// What the scan should find, or the member that stands twice first. A name that only the scan can read, as
    /// it holds a lone surrogate, is empty.
    fn fields(&self, text: &str) -> Result<Fields, Member> {
        let mut fields = Fields {
            inside: self.inside as u64,
            empty: self.members.is_empty(),
            length: text.len() as u64,
            ..Fields::default()
        };
        for (key, span) in &self.members {
            let value = &text[span.clone()];
            let kind = match &value[..1] {
                "[" => Kind::Array,
                "f" => Kind::False,
                "n" => Kind::Null,
                "t" => Kind::True,
                _ => Kind::Other,
            };
            let twice = |seen: bool, member| if seen { Err(member) } else { Ok(()) };
            match serde_json::from_str::<String>(key).as_deref() {
                Ok("messages") => {
                    twice(fields.messages != Kind::Absent, Member::Messages)?;
                    fields.messages = kind;
                }
                Ok("stream") => {
                    twice(fields.stream != Kind::Absent, Member::Stream)?;
                    fields.stream = kind;
                }
                Ok("model") => {
                    twice(fields.model != Model::Absent, Member::Model)?;
                    let span = span.start as u64..span.end as u64;
                    fields.model = match &value[..1] {
                        "n" => Model::Nothing(span),
                        "\"" if value == "\"\"" => Model::Nothing(span),
                        "\"" => {
                            let name: String = serde_json::from_str(value).unwrap_or_default();
                            let kept = &name.as_bytes()[..name.len().min(MAX_NAME)];
                            Model::Named { span, name: String::from_utf8_lossy(kept).into_owned() }
                        }
                        _ => Model::Other,
                    };
                }
                _ => {}
            }
        }
        Ok(fields)
    }
}

fn same_fields(ours: &Fields, naive: &Fields) {
    let mut ours = ours.clone();
    if let (Model::Named { name, .. }, Model::Named { name: read, .. }) = (&mut ours.model, &naive.model)
        && read.is_empty()
    {
        name.clear();
    }
    assert_eq!(ours, *naive);
}

/// The laws of the splice, on an accepted body.
fn patched(text: &str, chunks: &[Bytes], fields: &Fields, name: &str) {
    assert_eq!(slices(chunks, model_splice(fields, None).as_ref()), chunks, "no default, no change");
    let splice = model_splice(fields, Some(&ModelText::new(name)));
    let sent = slices(chunks, splice.as_ref());
    assert!(sent.iter().all(|s| !s.is_empty()), "an empty slice");
    let out = sent.concat();
    let want = match &splice {
        Some(splice) => {
            let (at, resume) = (splice.at as usize, (splice.at + splice.skip) as usize);
            [&text.as_bytes()[..at], &splice.insert, &text.as_bytes()[resume..]].concat()
        }
        None => text.as_bytes().to_vec(),
    };
    assert_eq!(out, want, "a byte outside the splice changed");
    let out = String::from_utf8_lossy(&out);
    assert!(one_object(out.as_bytes()).is_some(), "no longer JSON: {out}");
    // `Value` cannot hold numbers beyond f64, lone surrogates, or 128 levels.
    let Ok(Value::Object(mut members)) = serde_json::from_str(text) else { return };
    if matches!(members.get("model").unwrap_or(&Value::Null), Value::Null)
        || members["model"].as_str() == Some("")
    {
        members.insert("model".to_owned(), Value::from(name));
    }
    assert_eq!(
        serde_json::from_str::<Value>(&out).ok(),
        Some(Value::Object(members)),
        "another value: {out}"
    );
}

/// Times of admissions, as the window keeps them: rising.
#[derive(Default)]
struct NaiveLog(Vec<Nanos>);

impl NaiveLog {
    /// Those still within the window at `now`.
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

/// Three bytes an operation: move the clock (also a little back), change the limit, ask.
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

/// A limit so large that admissions share entries: never one too many, and a slot reopens at most 60 s / 65536
/// late. Four bytes a burst: how long after the last one, and how many.
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

/// The first byte bounds the keys; then two bytes a request: how long after the last one, and whose.
fn limiter(ops: &[u8]) {
    let Some((max_keys, ops)) = ops.split_first() else { return };
    let max_keys = usize::from(1 + max_keys % 8);
    let limiter = Limiter::new(max_keys);
    // Least recently used first.
    let mut naive: Vec<(u64, NaiveLog)> = Vec::new();
    let mut now = 0;
    for [step, who] in ops.as_chunks().0 {
        now += u64::from(*step) * u64::from(*step) * MILLI;
        let limit = 1 + u32::from(who >> 4 & 3);
        // Some keys share a shard, others do not.
        let key = u64::from(who & 15) << if who & 1 == 0 { 32 } else { 0 };
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

    /// Runs `body` on every seed of `target`, and on each cut in half.
    fn replay(target: &str, body: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        let mut seeds = 0;
        for file in std::fs::read_dir(&folder).unwrap() {
            let path = file.unwrap().path();
            let data = std::fs::read(&path).unwrap();
            // Names the seed where a law breaks; shown only then.
            println!("{}", path.display());
            body(&data);
            body(&data[..data.len() / 2]);
            seeds += 1;
        }
        assert!(seeds > 0, "no seeds in {}", folder.display());
    }

    #[test]
    fn the_seeds_of_patch_keep_the_law() {
        replay("patch", patch);
    }

    #[test]
    fn the_seeds_of_head_keep_the_law() {
        replay("head", head);
    }

    #[test]
    fn the_seeds_of_config_keep_the_law() {
        replay("config", config);
    }

    #[test]
    fn the_seeds_of_retry_after_keep_the_law() {
        replay("retry_after", retry_after);
    }

    #[test]
    fn the_seeds_of_limit_ops_keep_the_law() {
        replay("limit_ops", limit_ops);
    }

    #[test]
    fn the_seeds_of_balance_ops_keep_the_law() {
        replay("balance_ops", balance_ops);
    }
}

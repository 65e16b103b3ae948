//! Properties of the scanner and the patcher, compared with serde_json and a naive scan.

use std::collections::HashSet;
use std::ops::Range;

use bytes::Bytes;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::json::members::{Fields, MAX_NAME, Member, MemberSpan, Model, ScanError, ValueKind, Watch};
use crate::json::patch::{ModelText, slices, splices};
use crate::json::scan::{MAX_DEPTH, Scanner};

/// Fuzzes `json::scan` and `json::patch` on a request body.
///
/// - The scan accepts a body if serde_json reads it as one object, it nests no deeper than [`MAX_DEPTH`], and no member
///   that Zap reads is repeated, in whatever case.
/// - The scan finds what a naive scan finds, and chunking changes nothing.
/// - The patched body has its model set and the dropped members removed; all other bytes are unchanged.
///
/// An input that does not begin with `{` is also tried as the value of a member, so that the scan reads beyond its
/// first byte.
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
    // Watch nothing, or everything; `user` is both droppable and a mark of affinity.
    let watch = match rng.bool() {
        true => Watch { affinity: true, droppable: DROPPABLE.map(Into::into).to_vec() },
        false => Watch::default(),
    };
    let verdict = scan(&watch, std::slice::from_ref(&body));
    assert_eq!(verdict, scan(&watch, &chunks), "chunking changes the verdict");
    let Some(text) = one_object(data) else {
        let refused = match verdict {
            Err(ScanError::Invalid { offset }) => offset <= data.len() as u64,
            // The scan ends at the repeated key and does not see the fault after it.
            Err(ScanError::Duplicate(_) | ScanError::CaseVariant { .. }) => true,
            Ok(_) => false,
        };
        assert!(refused, "serde_json refuses the body, the scan returns {verdict:?}");
        return;
    };
    let naive = naive_scan(text);
    if naive.depth > MAX_DEPTH {
        assert!(verdict.is_err(), "{} levels accepted", naive.depth);
        return;
    }
    match (verdict, naive.fields(text, &watch)) {
        (Ok(fields), Ok(want)) => {
            same_fields(&fields, &want);
            let names = ["gpt", "", "a \"b\"\\\u{1}\n", "модель 😀"];
            let model = rng.bool().then(|| names[rng.usize(..names.len())]);
            patched(text, &chunks, &fields, &watch, (model, rng.u8(..)));
        }
        (ours, naive) => assert_eq!(ours, naive),
    }
}

/// Members that the patcher may have to drop.
const DROPPABLE: [&str; 4] = ["store", "user", "n", "é"];

fn scan(watch: &Watch, chunks: &[Bytes]) -> Result<Fields, ScanError> {
    let mut scanner = Scanner::new(watch);
    chunks.iter().try_for_each(|c| scanner.feed(c))?;
    scanner.finish()
}

/// The FNV-1a hash of `data`.
fn hash(data: &[u8]) -> u64 {
    data.iter().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01B3))
}

/// Splits `body` into pieces of at most 1, 8, 64 or 4096 bytes, none empty.
fn chunked(body: &Bytes, rng: &mut fastrand::Rng) -> Vec<Bytes> {
    let most = [1, 8, 64, 4096][rng.usize(..4)];
    let mut rest = body.clone();
    let mut chunks = Vec::new();
    while !rest.is_empty() {
        chunks.push(rest.split_to(rng.usize(1..=most).min(rest.len())));
    }
    chunks
}

/// Returns the text if serde_json reads it as one object. serde_json does not recurse when it skips a value, so it
/// accepts any depth.
fn one_object(data: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(data).ok()?;
    let raw: &RawValue = serde_json::from_str(text).ok()?;
    raw.get().starts_with('{').then_some(text)
}

/// The findings of the naive scan in a valid object.
struct NaiveScan {
    depth: u32,
    /// Offset of the byte after the opening `{`.
    inside: usize,
    /// Of each member: the ranges of key and value, quotes included, and the offset of the comma after it.
    members: Vec<(Range<usize>, Range<usize>, Option<usize>)>,
}

fn naive_scan(text: &str) -> NaiveScan {
    let mut scan = NaiveScan { depth: 0, inside: text.find('{').map_or(0, |at| at + 1), members: Vec::new() };
    let (mut depth, mut in_string, mut escaped) = (0u32, false, false);
    let mut start = scan.inside;
    let mut key = None;
    let trimmed = |range: Range<usize>| {
        let from = range.start + (text[range.clone()].len() - text[range.clone()].trim_start().len());
        from..from + text[range].trim().len()
    };
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
                key = Some(trimmed(start..at));
                start = at + 1;
            }
            b',' | b'}' if depth == 1 => {
                let comma = (b == b',').then_some(at);
                scan.members.extend(key.take().map(|key| (key, trimmed(start..at), comma)));
                start = at + 1;
                depth -= u32::from(b == b'}');
            }
            b'}' | b']' => depth -= 1,
            _ => {}
        }
        scan.depth = scan.depth.max(depth);
    }
    scan
}

impl NaiveScan {
    /// The fields that the scanner must find, or the error for the first key that it must refuse. A model name with a
    /// lone surrogate is empty here, since only the scanner can read it.
    fn fields(&self, text: &str, watch: &Watch) -> Result<Fields, ScanError> {
        let mut fields = Fields {
            inside: self.inside as u64,
            members: self.members.len() as u64,
            length: text.len() as u64,
            ..Fields::default()
        };
        let mut seen = HashSet::new();
        let mut comma = 0;
        for (nth, (key, span, next_comma)) in self.members.iter().enumerate() {
            let value = &text[span.clone()];
            let kind = match &value[..1] {
                "[" => ValueKind::Array,
                "f" => ValueKind::False,
                "n" => ValueKind::Null,
                "t" => ValueKind::True,
                _ => ValueKind::Other,
            };
            let key_text = serde_json::from_str::<String>(&text[key.clone()]).unwrap_or_default();
            let offsets = span.start as u64..span.end as u64;
            let mark = || Some(offsets.clone()).filter(|_| value.starts_with('"') && value != "\"\"");
            let member = match key_text.as_str() {
                "messages" => Some(Member::Messages),
                "stream" => Some(Member::Stream),
                "model" => Some(Member::Model),
                "input" if watch.affinity => Some(Member::Input),
                "metadata" if watch.affinity => Some(Member::Metadata),
                "prompt" if watch.affinity => Some(Member::Prompt),
                "prompt_cache_key" if watch.affinity => Some(Member::PromptCacheKey),
                "user" if watch.affinity => Some(Member::User),
                _ => None,
            };
            let droppable = watch.droppable.iter().position(|name| **name == *key_text);
            if member.is_none()
                && let Some(variant) = case_variant(&key_text, watch)
                && (droppable.is_none() || !matches!(variant, Member::Droppable(_)))
            {
                return Err(ScanError::CaseVariant { key: key_text.into(), member: variant });
            }
            if !seen.insert(key_text) {
                // A member that Zap does not read may be repeated.
                if let Some(member) = member.or(droppable.map(Member::Droppable)) {
                    return Err(ScanError::Duplicate(member));
                }
            }
            match member {
                Some(Member::Messages) => {
                    fields.messages = kind;
                    if watch.affinity && kind == ValueKind::Array {
                        let found = offsets.start..span.start as u64 + opening(value);
                        fields.affinity.opening.get_or_insert(found);
                    }
                }
                Some(Member::Input | Member::Prompt) => {
                    let end = match &value[..1] {
                        "[" => Some(span.start as u64 + opening(value)),
                        "\"" => Some(offsets.end),
                        _ => None,
                    };
                    if let Some(end) = end {
                        fields.affinity.opening.get_or_insert(offsets.start..end);
                    }
                }
                Some(Member::Metadata) => {
                    fields.affinity.metadata = Some(offsets.clone()).filter(|_| value.starts_with('{'));
                }
                Some(Member::Stream) => (fields.stream, fields.stream_end) = (kind, span.end as u64),
                Some(Member::PromptCacheKey) => fields.affinity.cache_key = mark(),
                Some(Member::User) => fields.affinity.user = mark(),
                Some(Member::Model) => {
                    fields.model = match &value[..1] {
                        "n" => Model::Nothing(offsets.clone()),
                        "\"" if value == "\"\"" => Model::Nothing(offsets.clone()),
                        "\"" => {
                            let name: String = serde_json::from_str(value).unwrap_or_default();
                            let kept = &name.as_bytes()[..name.len().min(MAX_NAME)];
                            let whole = name.len() <= MAX_NAME;
                            let name = String::from_utf8_lossy(kept).into();
                            Model::Named { span: offsets.clone(), name, whole }
                        }
                        _ => Model::Other,
                    };
                }
                Some(Member::Droppable(_)) | None => {}
            }
            if let Some(name) = droppable {
                let next = next_comma.map(|at| at as u64 + 1);
                let span = key.start as u64..span.end as u64;
                fields.droppable.push(MemberSpan { name, nth: nth as u64, comma, span, next });
            }
            comma = next_comma.map_or(0, |at| at as u64);
        }
        Ok(fields)
    }
}

/// The member that a parser that ignores case would take `key` for. `key` itself is not the key of a member.
fn case_variant(key: &str, watch: &Watch) -> Option<Member> {
    let fold = |text: &str| {
        text.replace('\u{17f}', "s")
            .replace('\u{212a}', "k")
            .chars()
            .map(|c| c.to_ascii_uppercase())
            .collect()
    };
    let (key, folds_to): (String, _) = (fold(key), |name: &str, key: &str| fold(name) == key);
    let mut read = vec![Member::Messages, Member::Model, Member::Stream];
    if watch.affinity {
        read.extend([Member::Input, Member::Metadata, Member::Prompt, Member::PromptCacheKey, Member::User]);
    }
    read.extend((0..watch.droppable.len()).map(Member::Droppable));
    read.into_iter().find(|member| folds_to(member.name(watch), &key))
}

/// Length of `messages` up to the end of the first message with the role `user`, or the whole length. serde_json takes
/// the last of repeated `role` keys, the scanner any; so this checks each member by itself.
fn opening(messages: &str) -> u64 {
    let Ok(all) = serde_json::from_str::<Vec<&RawValue>>(messages) else { return messages.len() as u64 };
    let base = messages.as_ptr() as usize;
    let is_user = |message: &str| {
        let naive = naive_scan(message);
        message.starts_with('{')
            && naive.members.iter().any(|(key, value, _)| {
                let is = |range: &Range<usize>, want: &str| {
                    serde_json::from_str::<String>(&message[range.clone()]).is_ok_and(|text| text == want)
                };
                is(key, "role") && is(value, "user")
            })
    };
    let first = all.iter().map(|message| message.get()).find(|message| is_user(message));
    first.map_or(messages.len(), |message| message.as_ptr() as usize - base + message.len()) as u64
}

fn same_fields(ours: &Fields, naive: &Fields) {
    let mut ours = ours.clone();
    if let (Model::Named { name, whole, .. }, Model::Named { name: read, .. }) =
        (&mut ours.model, &naive.model)
        && read.is_empty()
    {
        *name = "".into();
        *whole = true;
    }
    assert_eq!(ours, *naive);
}

/// Checks the splices on an accepted body. `set` has a bit for each droppable member to drop.
fn patched(text: &str, chunks: &[Bytes], fields: &Fields, watch: &Watch, (model, set): (Option<&str>, u8)) {
    let model_text = model.map(ModelText::new);
    let drops = |i: usize| set >> i & 1 == 1;
    assert_eq!(
        slices(chunks, splices(fields, None, |_| false))[..],
        *chunks,
        "without a patch the body changed"
    );
    let splices: Vec<_> = splices(fields, model_text.as_ref(), drops).collect();
    let sent = slices(chunks, splices.iter().cloned());
    assert!(sent.iter().all(|s| !s.is_empty()), "an empty slice");
    let out = String::from_utf8_lossy(&sent.concat()).into_owned();
    let (mut want, mut at) = (String::new(), 0);
    for splice in &splices {
        want.push_str(&text[at..splice.at as usize]);
        want.push_str(&String::from_utf8_lossy(&splice.insert));
        at = (splice.at + splice.skip) as usize;
    }
    want.push_str(&text[at..]);
    assert_eq!(out, want, "a byte outside the splices changed");
    assert!(one_object(out.as_bytes()).is_some(), "no longer JSON: {out}");
    // Compare member by member: dropped members are gone, the model is set, all others are unchanged.
    let members = |text: &str| -> Vec<(String, String)> {
        let raw = |range: Range<usize>| text[range].to_owned();
        naive_scan(text).members.into_iter().map(|(key, value, _)| (raw(key), raw(value))).collect()
    };
    let is = |key: &str, name: &str| serde_json::from_str::<String>(key).is_ok_and(|key| key == name);
    let is_dropped =
        |key: &str| watch.droppable.iter().enumerate().any(|(i, name)| drops(i) && is(key, name));
    let mut expected = members(text);
    expected.retain(|(key, _)| !is_dropped(key));
    if let Some(model) = model.filter(|_| fields.model != Model::Other) {
        let value = Value::from(model).to_string();
        match expected.iter_mut().find(|(key, _)| is(key, "model")) {
            Some((_, old)) => *old = value,
            None => expected.insert(0, ("\"model\"".to_owned(), value)),
        }
    }
    assert_eq!(members(&out), expected, "wrong members: {out}");
}

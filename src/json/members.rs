//! The input, the results and the errors of a scan: [`crate::json::scan`] fills them in, [`crate::json::patch`] uses
//! them. All offsets are in bytes from the start of the body.

use std::ops::Range;
use std::sync::Arc;

/// Longest model name that is kept for logs and routing, in bytes. A longer name is forwarded, but matches no route by
/// name.
pub(crate) const MAX_NAME: usize = 256;

/// Why the scanner refuses a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScanError {
    /// A top-level key differs from the key of a member that Zap reads only in case ([`same_but_for_case`]). Some
    /// backends read it as that member, others do not.
    CaseVariant {
        /// The key as sent, without escapes.
        key: Box<str>,
        /// The member that some backends read it as.
        member: Member,
    },
    /// A member that Zap reads appears twice at the top level.
    Duplicate(Member),
    /// The body is not exactly one RFC 8259 object. `offset` counts bytes from 0.
    Invalid {
        /// The first byte that is not allowed at its position, or the body's length if the body ends too early.
        offset: u64,
    },
}

/// The members that a scan looks for besides `model`, `stream` and `messages`.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// Look for the values that identify a conversation: [`Affinity`].
    pub affinity: bool,
    /// Names of top-level members whose [`MemberSpan`] is noted; none that Zap reads itself.
    pub droppable: Vec<Box<str>>,
}

impl Watch {
    /// Whether `key` may differ from a droppable member's only in case. This check of the first byte is cheap.
    #[inline]
    pub(super) fn may_be_droppable(&self, key: &[u8]) -> bool {
        let may_be = |name: &str| match (key.first(), name.as_bytes().first()) {
            (Some(x), Some(y)) => may_be_equal(*x, *y),
            _ => false,
        };
        self.droppable.iter().any(|name| may_be(name))
    }
}

/// Whether two bytes are equal, differ only in ASCII case, or belong to longer characters, which the caller compares.
fn may_be_equal(a: u8, b: u8) -> bool {
    a.eq_ignore_ascii_case(&b) || a >= 0x80 || b >= 0x80
}

/// Looks for no further members.
pub(super) static WATCH_NONE: Watch = Watch { affinity: false, droppable: Vec::new() };

/// A top-level member that Zap reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Member {
    /// A member of [`Watch::droppable`], by its index.
    Droppable(usize),
    /// `input`
    Input,
    /// `messages`
    Messages,
    /// `metadata`
    Metadata,
    /// `model`
    Model,
    /// `prompt`
    Prompt,
    /// `prompt_cache_key`
    PromptCacheKey,
    /// `stream`
    Stream,
    /// `user`
    User,
}

impl Member {
    /// Returns the member's key as written in JSON.
    pub fn name(self, watch: &Watch) -> &str {
        match self {
            Member::Droppable(index) => watch.droppable.get(index).map_or("", |name| name),
            Member::Input => "input",
            Member::Messages => "messages",
            Member::Metadata => "metadata",
            Member::Model => "model",
            Member::Prompt => "prompt",
            Member::PromptCacheKey => "prompt_cache_key",
            Member::Stream => "stream",
            Member::User => "user",
        }
    }

    pub(super) fn of(key: &[u8], affinity: bool) -> Option<Self> {
        match key {
            b"messages" => Some(Member::Messages),
            b"model" => Some(Member::Model),
            b"stream" => Some(Member::Stream),
            b"input" if affinity => Some(Member::Input),
            b"metadata" if affinity => Some(Member::Metadata),
            b"prompt" if affinity => Some(Member::Prompt),
            b"prompt_cache_key" if affinity => Some(Member::PromptCacheKey),
            b"user" if affinity => Some(Member::User),
            _ => None,
        }
    }

    /// Whether `key`, which is not the key of a member that Zap reads itself, may differ from one only in case. This
    /// check of the first two bytes is cheap and excludes most keys.
    #[inline]
    pub(super) fn may_be_variant(key: &[u8]) -> bool {
        let (first, second) = match key {
            [first, second, ..] => (*first, *second),
            _ => return false,
        };
        matches!(
            [first | 0x20, second | 0x20],
            [b'i', b'n'] | [b'm', b'e' | b'o'] | [b'p', b'r'] | [b's', b't'] | [b'u', b's']
        ) || [first, second].contains(&0xC5)
    }

    /// Returns the member whose key differs from `key` only in case. `key` is not the key of a member that Zap reads
    /// itself.
    pub(super) fn case_variant(key: &[u8], watch: &Watch) -> Option<Self> {
        let read = READ.iter().filter(|(.., always)| *always || watch.affinity);
        let read = read.map(|(name, member, _)| (name.as_bytes(), *member));
        let droppable = watch.droppable.iter().enumerate();
        let droppable = droppable.map(|(i, name)| (name.as_bytes(), Member::Droppable(i)));
        read.chain(droppable).find(|(name, _)| same_but_for_case(key, name)).map(|(_, member)| member)
    }
}

/// The keys that Zap reads; `true`: always, `false`: only for affinity.
const READ: [(&str, Member, bool); 8] = [
    ("messages", Member::Messages, true),
    ("model", Member::Model, true),
    ("stream", Member::Stream, true),
    ("input", Member::Input, false),
    ("metadata", Member::Metadata, false),
    ("prompt", Member::Prompt, false),
    ("prompt_cache_key", Member::PromptCacheKey, false),
    ("user", Member::User, false),
];

/// Whether two keys are equal or differ only in case: ASCII case, U+017F for `s` and U+212A for `k`. These two are the
/// characters that Go's `encoding/json` folds to ASCII when it looks for a field of a struct.
pub(crate) fn same_but_for_case(a: &[u8], b: &[u8]) -> bool {
    // Most keys already differ in their first byte.
    match (a.first(), b.first()) {
        (Some(x), Some(y)) if may_be_equal(*x, *y) => folded(a).eq(folded(b)),
        _ => false,
    }
}

fn folded(mut text: &[u8]) -> impl Iterator<Item = u8> {
    std::iter::from_fn(move || {
        let (byte, rest) = match text {
            [0xC5, 0xBF, rest @ ..] => (b's', rest),
            [0xE2, 0x84, 0xAA, rest @ ..] => (b'k', rest),
            [byte, rest @ ..] => (byte.to_ascii_lowercase(), rest),
            [] => return None,
        };
        text = rest;
        Some(byte)
    })
}

/// The position of a member that may have to be dropped. All numbers are offsets in the body, from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberSpan {
    /// Index in [`Watch::droppable`].
    pub name: usize,
    /// Number of members before this one.
    pub nth: u64,
    /// The comma before the member; meaningless for the first member.
    pub comma: u64,
    /// From the opening quote of the key to just past the value.
    pub span: Range<u64>,
    /// Just past the comma after the member, if there is one.
    pub next: Option<u64>,
}

/// The positions of the values that identify a conversation. `cache_key` and `user` are non-empty strings, quotes
/// included.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// `prompt_cache_key`
    pub cache_key: Option<Range<u64>>,
    /// `user`
    pub user: Option<Range<u64>>,
    /// `metadata`, if it is an object.
    pub metadata: Option<Range<u64>>,
    /// The opening of the conversation, in the first of `messages`, `input` and `prompt` that has one: of an array,
    /// from its start to the end of the first message whose `role` is `user`, or to its end if there is none. A string,
    /// which `messages` cannot be, is an opening as a whole.
    pub opening: Option<Range<u64>>,
}

/// The top-level `model` of the body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Model {
    /// No such member.
    #[default]
    Absent,
    /// A non-empty string.
    Named {
        /// Byte range of the value in the body, quotes included.
        span: Range<u64>,
        /// The unescaped text, truncated to [`MAX_NAME`] bytes.
        name: Arc<str>,
        /// The text was not truncated.
        whole: bool,
    },
    /// `null` or `""`, and its byte range.
    Nothing(Range<u64>),
    /// Any other type.
    Other,
}

/// The JSON type of a member's value, as far as Zap needs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ValueKind {
    /// No such member.
    #[default]
    Absent,
    /// `[...]`
    Array,
    /// `false`
    False,
    /// `null`
    Null,
    /// A number, a string or an object.
    Other,
    /// `true`
    True,
}

/// The members that a scan found at the top level.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    /// `model`
    pub model: Model,
    /// Type of `stream`.
    pub stream: ValueKind,
    /// Offset just past the value of `stream`; 0 without it.
    pub stream_end: u64,
    /// Type of `messages`.
    pub messages: ValueKind,
    /// Offset just past the opening brace.
    pub inside: u64,
    /// Number of members of the object.
    pub members: u64,
    /// The members of [`Watch::droppable`] that the body has, in the order of the body.
    pub droppable: Vec<MemberSpan>,
    /// Empty unless [`Watch::affinity`] is set.
    pub affinity: Affinity,
    /// Length of the body in bytes.
    pub length: u64,
}

//! What a scan of a body looks for, what it finds, and what it refuses: [`crate::json::scan`] fills it in,
//! [`crate::json::patch`] acts on it. All offsets are bytes from the body's first.

use std::ops::Range;
use std::sync::Arc;

/// Longest model name that is kept for logs and routing, in bytes. A longer one is forwarded but matches nothing.
pub(crate) const MAX_NAME: usize = 256;

/// What is wrong with a body, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScanError {
    /// A top-level key equals that of a member that Zap reads except for its case ([`same_but_for_case`]): backends
    /// differ in whether they read it as that member.
    CaseVariant {
        /// The key as sent, without escapes.
        key: Box<str>,
        /// The member that it may be taken for.
        member: Member,
    },
    /// A member that Zap reads stands twice at the top level.
    Duplicate(Member),
    /// Not one RFC 8259 object; `offset` counts bytes from 0.
    Invalid {
        /// First byte that cannot stand where it stands, or the body's length where it ends too early.
        offset: u64,
    },
}

/// What a scan looks for beside `model`, `stream` and `messages`.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// Find what tells one conversation from another: [`Affinity`].
    pub affinity: bool,
    /// Names of top-level members whose [`MemberSpan`] is noted; none of those that Zap reads.
    pub droppable: Vec<Box<str>>,
}

/// Looks for nothing more.
pub(super) static NOTHING: Watch = Watch { affinity: false, droppable: Vec::new() };

/// A top-level member that Zap reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Member {
    /// One of [`Watch::droppable`], by its index.
    Droppable(usize),
    /// `messages`
    Messages,
    /// `model`
    Model,
    /// `prompt_cache_key`
    PromptCacheKey,
    /// `stream`
    Stream,
    /// `user`
    User,
}

impl Member {
    /// The member's key as written in JSON.
    pub fn name(self, watch: &Watch) -> &str {
        match self {
            Member::Droppable(index) => watch.droppable.get(index).map_or("", |name| name),
            Member::Messages => "messages",
            Member::Model => "model",
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
            b"prompt_cache_key" if affinity => Some(Member::PromptCacheKey),
            b"user" if affinity => Some(Member::User),
            _ => None,
        }
    }

    /// Whether a key, which is the key of no member that Zap reads by itself, may differ from one in its case alone: by its
    /// first two bytes. A look at them costs next to nothing, and most keys begin otherwise.
    #[inline]
    pub(super) fn may_be_variant(key: &[u8]) -> bool {
        let (first, second) = match key {
            [first, second, ..] => (*first, *second),
            _ => return false,
        };
        matches!(
            [first | 0x20, second | 0x20],
            [b'm', b'e' | b'o'] | [b'p', b'r'] | [b's', b't'] | [b'u', b's']
        ) || [first, second].contains(&0xC5)
    }

    /// The member whose key equals `key`, which is the key of none, except for its case.
    pub(super) fn case_variant(key: &[u8], watch: &Watch) -> Option<Self> {
        let read = READ.iter().filter(|(.., always)| *always || watch.affinity);
        let read = read.map(|(name, member, _)| (name.as_bytes(), *member));
        let droppable = watch.droppable.iter().enumerate();
        let droppable = droppable.map(|(i, name)| (name.as_bytes(), Member::Droppable(i)));
        read.chain(droppable).find(|(name, _)| same_but_for_case(key, name)).map(|(_, member)| member)
    }
}

/// Keys that Zap reads, and whether it always does or only for affinity.
const READ: [(&str, Member, bool); 5] = [
    ("messages", Member::Messages, true),
    ("model", Member::Model, true),
    ("stream", Member::Stream, true),
    ("prompt_cache_key", Member::PromptCacheKey, false),
    ("user", Member::User, false),
];

/// Whether two keys are equal, or differ in their case alone: ASCII case, U+017F for `s` and U+212A for `k`. These are
/// the characters that Go's `encoding/json` folds to ASCII when it looks for a struct's field.
pub(crate) fn same_but_for_case(a: &[u8], b: &[u8]) -> bool {
    // Most keys differ in their first byte already.
    let may_be = |a: u8, b: u8| a.eq_ignore_ascii_case(&b) || a >= 0x80 || b >= 0x80;
    match (a.first(), b.first()) {
        (Some(x), Some(y)) if may_be(*x, *y) => folded(a).eq(folded(b)),
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

/// Where a member stands that may have to be left out. All are offsets in the body, from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberSpan {
    /// Which of [`Watch::droppable`].
    pub name: usize,
    /// How many members stand before it.
    pub nth: u64,
    /// The comma before it; of no meaning where it is the first.
    pub comma: u64,
    /// Its key's quote, and just past its value.
    pub span: Range<u64>,
    /// Just past the comma behind it, if there is one.
    pub next: Option<u64>,
}

/// What tells one conversation from another, where it stands. Values are strings that are not empty, quotes included.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// `prompt_cache_key`
    pub cache_key: Option<Range<u64>>,
    /// `user`
    pub user: Option<Range<u64>>,
    /// From the beginning of `messages` to the end of the first whose `role` is `user`, or of all.
    pub opening: Option<Range<u64>>,
}

/// The top-level `model` as the body has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Model {
    /// No such member.
    #[default]
    Absent,
    /// A string that is not empty: where it stands (quotes included) and its text.
    Named {
        /// Byte range of the value in the body.
        span: Range<u64>,
        /// The unescaped text, cut at [`MAX_NAME`] bytes.
        name: Arc<str>,
        /// Nothing was cut.
        whole: bool,
    },
    /// `null` or `""`: where it stands.
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

/// What a scan found at the top level.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    /// `model`
    pub model: Model,
    /// Type of `stream`.
    pub stream: ValueKind,
    /// Type of `messages`.
    pub messages: ValueKind,
    /// Offset just past the opening brace.
    pub inside: u64,
    /// Members of the object.
    pub members: u64,
    /// What there is of [`Watch::droppable`], in the body's order.
    pub droppable: Vec<MemberSpan>,
    /// Found only where it is watched for.
    pub affinity: Affinity,
    /// Length of the body in bytes.
    pub length: u64,
}

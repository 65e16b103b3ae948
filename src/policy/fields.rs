//! What a scan of a body looks for, what it finds, and what it refuses: [`crate::policy::scan`] fills it in,
//! [`crate::policy::patch`] acts on it. All offsets are bytes from the body's first.

use std::ops::Range;
use std::sync::Arc;

/// Longest model name that is kept for logs and routing, in bytes. A longer one is forwarded but matches nothing.
pub const MAX_NAME: usize = 256;

/// What is wrong with a body, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanError {
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
    /// Names of top-level members whose [`Place`] is noted; none of those that Zap reads.
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
}

/// Where a member stands that may have to be left out. All are offsets in the body, from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
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
pub enum Kind {
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
    pub stream: Kind,
    /// Type of `messages`.
    pub messages: Kind,
    /// Offset just past the opening brace.
    pub inside: u64,
    /// Members of the object.
    pub members: u64,
    /// What there is of [`Watch::droppable`], in the body's order.
    pub droppable: Vec<Place>,
    /// Found only where it is watched for.
    pub affinity: Affinity,
    /// Length of the body in bytes.
    pub length: u64,
}

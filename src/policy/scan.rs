//! The resumable JSON scanner: reads a request body as it arrives and finds the members that Zap cares about.
//!
//! It accepts exactly what RFC 8259 allows as one object (UTF-8, depth at most [`MAX_DEPTH`]), in one pass, with
//! constant state, whatever the chunking. It keeps no copy of the body: only the name of the model. What else it
//! looks for is a [`Watch`]; of that it notes the places alone. It does not judge what an endpoint needs; that is
//! [`crate::policy::patch`].

use std::ops::Range;

use super::skip;

/// Deepest nesting that is accepted; the object itself is 1.
pub const MAX_DEPTH: u32 = 128;

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
static NOTHING: Watch = Watch { affinity: false, droppable: Vec::new() };

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

    fn of(key: &[u8], affinity: bool) -> Option<Self> {
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
        name: String,
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

/// A scan under way. Feed it chunks in order, then [`finish`](Scanner::finish) it.
#[derive(Debug)]
pub struct Scanner<'w> {
    watch: &'w Watch,
    at: At,
    within: Within,
    /// The container that is read is an object, not an array.
    is_object: bool,
    /// The same of those around it, the next one in the lowest bit. `depth <= MAX_DEPTH`.
    objects: u128,
    depth: u32,
    /// Up to there the chunk is known to be UTF-8.
    sound: usize,
    /// Bytes consumed by earlier chunks.
    base: u64,
    /// The member whose value comes or is being read; only at depth 1.
    member: Option<Member>,
    /// The same, where it is one of [`Watch::droppable`]: it may be both.
    droppable: Option<usize>,
    /// What the string being read is kept for.
    keep: Keep,
    text: Vec<u8>,
    text_is_cut: bool,
    high_surrogate: u16,
    value_start: u64,
    /// Where the last key at the top level began.
    key_start: u64,
    /// The last comma at the top level.
    comma: u64,
    opening: Opening,
    /// `prompt_cache_key` and `user` have stood already, whatever their values.
    seen: (bool, bool),
    fields: Fields,
}

/// How far the search for the first message of a user has come. Messages are at depth 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    /// Inside a message of a user.
    Found,
    /// Not inside `messages`, or done.
    Off,
    /// At the value of a message's `role`.
    Role,
    /// Inside `messages`.
    Seeking,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    Key,
    Name,
    Nothing,
    /// A string's value, of which only its end matters.
    Value,
}

/// Where in the grammar a scan is, between tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// After a value: `,` or the closer.
    AfterValue,
    /// After a key.
    Colon,
    /// After the object: only whitespace.
    End,
    /// After `[`: a value or `]`.
    FirstItem,
    /// After `{`: a key or `}`.
    FirstKey,
    /// After `,` in an object.
    Key,
    /// Before the object.
    Start,
    /// After `:`, or `,` in an array.
    Value,
}

/// The token that a scan is in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Within {
    /// After a backslash.
    Escape { key: bool },
    /// Inside `\uHHHH`: digits still to come and their value so far.
    Hex { key: bool, left: u8, code: u16 },
    /// Inside `true`, `false` or `null`: what must still come.
    Literal(&'static [u8]),
    /// None.
    Nothing,
    /// Inside a number.
    Number(Number),
    /// Inside a string, at an ordinary character.
    Text { key: bool },
    /// Inside a UTF-8 sequence: bytes still to come, and the bounds of the next one.
    Utf8 { key: bool, left: u8, low: u8, high: u8 },
}

/// How far a token was read, and the next index.
enum Read {
    Part(usize),
    Whole(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    /// After `-`.
    Minus,
    /// After a leading `0`.
    Zero,
    /// In the integer part.
    Integer,
    /// After `.`.
    Point,
    /// In the fraction.
    Fraction,
    /// After `e`.
    E,
    /// After the exponent's sign.
    Sign,
    /// In the exponent.
    Exponent,
}

impl Default for Scanner<'_> {
    fn default() -> Self {
        Scanner::new(&NOTHING)
    }
}

impl<'w> Scanner<'w> {
    /// A scanner before the first byte.
    pub fn new(watch: &'w Watch) -> Self {
        Scanner {
            watch,
            at: At::Start,
            within: Within::Nothing,
            is_object: false,
            objects: 0,
            depth: 0,
            sound: 0,
            base: 0,
            member: None,
            droppable: None,
            keep: Keep::Nothing,
            text: Vec::new(),
            text_is_cut: false,
            high_surrogate: 0,
            value_start: 0,
            key_start: 0,
            comma: 0,
            opening: Opening::Off,
            seen: (false, false),
            fields: Fields::default(),
        }
    }

    /// Takes the next bytes of the body.
    ///
    /// # Errors
    /// The first fault. The scanner is of no use afterwards.
    pub fn feed(&mut self, chunk: &[u8]) -> Result<(), ScanError> {
        self.sound = 0;
        let mut i = 0;
        while i < chunk.len() {
            skip::work::add(1);
            i = match self.within {
                Within::Nothing if self.is_noted() => self.structure::<true>(chunk, i)?,
                Within::Nothing => self.structure::<false>(chunk, i)?,
                Within::Text { key } => self.text(chunk, i, key)?,
                Within::Escape { key } => self.escape(chunk[i], i, key)?,
                Within::Hex { key, left, code } => self.hex(chunk[i], i, key, left, code)?,
                Within::Utf8 { key, left, low, high } => self.utf8(chunk[i], i, key, left, low, high)?,
                Within::Number(number) => self.number(chunk, i, number)?,
                Within::Literal(rest) => self.literal(chunk, i, rest)?,
            };
        }
        self.base += chunk.len() as u64;
        Ok(())
    }

    /// Ends the scan.
    ///
    /// # Errors
    /// [`ScanError::Invalid`] at the body's length if the object is not complete.
    pub fn finish(mut self) -> Result<Fields, ScanError> {
        if self.at != At::End {
            return Err(ScanError::Invalid { offset: self.base });
        }
        self.fields.length = self.base;
        Ok(self.fields)
    }

    /// Whether something may have to be noted where the scan is: at the top level, and in the search for the opening.
    fn is_noted(&self) -> bool {
        self.depth <= 1 || self.opening != Opening::Off
    }

    /// Reads tokens as far as they go; returns the next index. Ends where the chunk does, in the middle of a token that
    /// needs care, and where `NOTED` (see [`is_noted`](Self::is_noted)) is no longer right.
    fn structure<const NOTED: bool>(&mut self, chunk: &[u8], mut i: usize) -> Result<usize, ScanError> {
        let mut at = self.at;
        while let Some(&b) = chunk.get(i) {
            skip::work::add(1);
            match at {
                At::Key | At::FirstKey => {
                    if b == b'"' && !NOTED {
                        let is_whole;
                        (at, i, is_whole) = self.members(chunk, i);
                        if !is_whole {
                            break;
                        }
                        continue;
                    }
                    if b == b'"' {
                        match self.noted_key(chunk, i)? {
                            Read::Whole(next) => i = next,
                            Read::Part(next) => {
                                i = next;
                                break;
                            }
                        }
                        at = At::Colon;
                        continue;
                    }
                    if b == b'}' && at == At::FirstKey {
                        at = self.close::<NOTED>(i);
                        i += 1;
                        if NOTED != self.is_noted() {
                            break;
                        }
                        continue;
                    }
                }
                At::Value | At::FirstItem => {
                    if b == b'"' && !NOTED {
                        match self.string(chunk, i, false) {
                            Read::Whole(next) => i = next,
                            Read::Part(next) => {
                                i = next;
                                break;
                            }
                        }
                        at = At::AfterValue;
                        continue;
                    }
                    if b == b'{' || b == b'[' {
                        at = self.open::<NOTED>(b, i)?;
                        i += 1;
                        if NOTED != self.is_noted() {
                            break;
                        }
                        continue;
                    }
                    if b == b']' && at == At::FirstItem {
                        at = self.close::<NOTED>(i);
                        i += 1;
                        if NOTED != self.is_noted() {
                            break;
                        }
                        continue;
                    }
                    if !is_space(b) {
                        i = self.value(chunk, i, b)?;
                        if self.within != Within::Nothing {
                            break;
                        }
                        at = At::AfterValue;
                        continue;
                    }
                }
                At::AfterValue => {
                    if b == b',' {
                        if NOTED && self.depth == 1 {
                            self.comma_at(self.base + i as u64);
                        }
                        at = if self.is_object { At::Key } else { At::Value };
                        i += 1;
                        continue;
                    }
                    if b == if self.is_object { b'}' } else { b']' } {
                        at = self.close::<NOTED>(i);
                        i += 1;
                        if NOTED != self.is_noted() {
                            break;
                        }
                        continue;
                    }
                }
                At::Colon => {
                    if b == b':' {
                        at = At::Value;
                        i += 1;
                        continue;
                    }
                }
                At::Start => {
                    if b == b'{' {
                        at = self.open::<NOTED>(b, i)?;
                        i += 1;
                        continue;
                    }
                }
                At::End => {}
            }
            if !is_space(b) {
                return self.invalid(i);
            }
            i += 1;
        }
        self.at = at;
        Ok(i)
    }

    /// Members that nobody wants to know, from a key's quote at `i` on, for as long as they are strings close together,
    /// as most of a conversation is. Returns where that ends, and whether it is between tokens.
    #[inline(always)] // One place calls it.
    fn members(&mut self, chunk: &[u8], mut i: usize) -> (At, usize, bool) {
        loop {
            skip::work::add(1);
            match self.string(chunk, i, true) {
                Read::Whole(next) => i = next,
                Read::Part(next) => return (At::Key, next, false),
            }
            if chunk.get(i) != Some(&b':') {
                return (At::Colon, i, true);
            }
            i += 1;
            if chunk.get(i) != Some(&b'"') {
                return (At::Value, i, true);
            }
            match self.string(chunk, i, false) {
                Read::Whole(next) => i = next,
                Read::Part(next) => return (At::Value, next, false),
            }
            if chunk.get(i) != Some(&b',') {
                return (At::AfterValue, i, true);
            }
            i += 1;
            if chunk.get(i) != Some(&b'"') {
                return (At::Key, i, true);
            }
        }
    }

    /// A string that nobody wants to know, with its quotes, `i` at the first; where it is not whole here, `within` it.
    #[inline(always)] // Most strings are short, and end in the first block that is looked at.
    fn string(&mut self, chunk: &[u8], i: usize, key: bool) -> Read {
        let end = match skip::short(chunk, i + 1) {
            Ok(end) => return Read::Whole(end + 1),
            Err(from) => skip::text(chunk, from, &mut self.sound),
        };
        if chunk.get(end) == Some(&b'"') {
            return Read::Whole(end + 1);
        }
        self.within = Within::Text { key };
        Read::Part(end)
    }

    #[cold]
    fn invalid<T>(&self, i: usize) -> Result<T, ScanError> {
        Err(ScanError::Invalid { offset: self.base + i as u64 })
    }

    /// A key that may have to be noted, with its quotes, `i` at the first.
    fn noted_key(&mut self, chunk: &[u8], i: usize) -> Result<Read, ScanError> {
        if self.depth == 1 {
            self.key_start = self.base + i as u64;
            self.fields.members += 1;
        } else if self.depth != 3 || self.opening != Opening::Seeking {
            return Ok(self.string(chunk, i, true));
        }
        let end = skip::short(chunk, i + 1).unwrap_or_else(|from| skip::plain(chunk, from));
        if chunk.get(end) == Some(&b'"') {
            // Most often it is here as a whole and plain: then nothing need be kept.
            self.name(&chunk[i + 1..end])?;
            return Ok(Read::Whole(end + 1));
        }
        self.start_keeping(Keep::Key);
        self.within = Within::Text { key: true };
        Ok(Read::Part(i + 1))
    }

    /// A value that is no container begins at `i` with `b`.
    fn value(&mut self, chunk: &[u8], i: usize, b: u8) -> Result<usize, ScanError> {
        if self.depth == 1 {
            self.value_start = self.base + i as u64;
            self.note_kind(b);
        }
        match b {
            b'"' => {
                match self.member {
                    Some(Member::Model) if self.depth == 1 => self.start_keeping(Keep::Name),
                    Some(Member::PromptCacheKey | Member::User) if self.depth == 1 => {
                        self.start_keeping(Keep::Value);
                    }
                    _ if self.depth == 3 && self.opening == Opening::Role => self.start_keeping(Keep::Value),
                    _ => {}
                }
                self.text(chunk, i + 1, false)
            }
            b'-' => self.number(chunk, i + 1, Number::Minus),
            b'0' => self.number(chunk, i + 1, Number::Zero),
            b'1'..=b'9' => self.number(chunk, i + 1, Number::Integer),
            b't' => self.literal(chunk, i + 1, b"rue"),
            b'f' => self.literal(chunk, i + 1, b"alse"),
            b'n' => self.literal(chunk, i + 1, b"ull"),
            _ => self.invalid(i),
        }
    }

    /// Notes the type of a top-level member's value from its first byte.
    fn note_kind(&mut self, b: u8) {
        let kind = match b {
            b'[' => Kind::Array,
            b'f' => Kind::False,
            b'n' => Kind::Null,
            b't' => Kind::True,
            _ => Kind::Other,
        };
        match self.member {
            Some(Member::Messages) => self.fields.messages = kind,
            Some(Member::Stream) => self.fields.stream = kind,
            Some(Member::Model) if b != b'n' && b != b'"' => self.fields.model = Model::Other,
            Some(Member::Droppable(_) | Member::Model | Member::PromptCacheKey | Member::User) | None => {}
        }
    }

    /// A value ended; `end` is the index just past it.
    fn value_ends(&mut self, end: usize) {
        self.at = At::AfterValue;
        self.within = Within::Nothing;
        if self.depth == 1 {
            self.member_ends(self.base + end as u64);
        } else if self.depth == 3 && self.opening == Opening::Role {
            let is_user = self.keep == Keep::Value && self.text == b"user";
            self.opening = if is_user { Opening::Found } else { Opening::Seeking };
            self.keep = Keep::Nothing;
        }
    }

    /// A member at the top level ended just before offset `end`.
    fn member_ends(&mut self, end: u64) {
        let span = self.value_start..end;
        let text = matches!(self.keep, Keep::Name | Keep::Value) && !self.text.is_empty();
        match self.member.take() {
            Some(Member::Model) if self.fields.model == Model::Absent => {
                self.fields.model = if text {
                    let name = String::from_utf8_lossy(&self.text).into_owned();
                    Model::Named { span, name, whole: !self.text_is_cut }
                } else {
                    Model::Nothing(span)
                };
            }
            Some(Member::PromptCacheKey) => self.fields.affinity.cache_key = text.then_some(span),
            Some(Member::User) => self.fields.affinity.user = text.then_some(span),
            Some(Member::Messages) if self.opening != Opening::Off => self.opening_ends(end),
            Some(Member::Droppable(_) | Member::Messages | Member::Model | Member::Stream) | None => {}
        }
        if let Some(name) = self.droppable.take() {
            let nth = self.fields.members - 1;
            let (comma, span) = (self.comma, self.key_start..end);
            self.fields.droppable.push(Place { name, nth, comma, span, next: None });
        }
        self.keep = Keep::Nothing;
    }

    fn comma_at(&mut self, offset: u64) {
        self.comma = offset;
        if let Some(last) = self.fields.droppable.last_mut()
            && last.nth + 1 == self.fields.members
        {
            last.next = Some(offset + 1);
        }
    }

    fn opening_ends(&mut self, end: u64) {
        self.opening = Opening::Off;
        self.fields.affinity.opening = Some(self.value_start..end);
    }

    /// A container begins at `i`, with `b`.
    #[inline(always)] // Without notes it is a handful of instructions.
    fn open<const NOTED: bool>(&mut self, b: u8, i: usize) -> Result<At, ScanError> {
        if self.depth == MAX_DEPTH {
            return self.invalid(i);
        }
        if NOTED && self.depth == 0 {
            self.fields.inside = self.base + i as u64 + 1;
        } else if NOTED && self.depth == 1 {
            self.value_start = self.base + i as u64;
            self.note_kind(b);
            if self.watch.affinity && self.member == Some(Member::Messages) {
                self.opening = if b == b'[' { Opening::Seeking } else { Opening::Off };
            }
        }
        // The one around it is remembered by a bit.
        self.objects = self.objects << 1 | u128::from(self.is_object);
        self.depth += 1;
        self.is_object = b == b'{';
        Ok(if self.is_object { At::FirstKey } else { At::FirstItem })
    }

    /// A container ends at `i`.
    #[inline(always)] // As above.
    fn close<const NOTED: bool>(&mut self, i: usize) -> At {
        self.depth -= 1;
        self.is_object = self.objects & 1 == 1;
        self.objects >>= 1;
        if self.depth == 0 {
            return At::End;
        }
        if NOTED && self.depth == 2 && self.opening == Opening::Found {
            self.opening_ends(self.base + i as u64 + 1);
        }
        if NOTED || self.depth == 1 {
            self.value_ends(i + 1);
        }
        At::AfterValue
    }

    fn number(&mut self, chunk: &[u8], mut i: usize, mut number: Number) -> Result<usize, ScanError> {
        use Number::{E, Exponent, Fraction, Integer, Minus, Point, Sign, Zero};
        loop {
            if matches!(number, Integer | Fraction | Exponent) {
                let digits = chunk[i..].iter().take_while(|b| b.is_ascii_digit()).count();
                skip::work::add(digits);
                i += digits;
            }
            let Some(&b) = chunk.get(i) else { break };
            skip::work::add(1);
            number = match (number, b) {
                (Minus, b'0') => Zero,
                (Minus, b'1'..=b'9') => Integer,
                (Zero | Integer, b'.') => Point,
                (Point, b'0'..=b'9') => Fraction,
                (Zero | Integer | Fraction, b'e' | b'E') => E,
                (E, b'+' | b'-') => Sign,
                (E | Sign, b'0'..=b'9') => Exponent,
                (Zero | Integer | Fraction | Exponent, _) => {
                    self.value_ends(i);
                    return Ok(i);
                }
                (Minus | Point | E | Sign, _) => return self.invalid(i),
            };
            i += 1;
        }
        self.within = Within::Number(number);
        Ok(i)
    }

    fn literal(&mut self, chunk: &[u8], i: usize, rest: &'static [u8]) -> Result<usize, ScanError> {
        let here = &chunk[i..chunk.len().min(i + rest.len())];
        if *here != rest[..here.len()] {
            let wrong = here.iter().zip(rest).position(|(b, want)| b != want);
            return self.invalid(i + wrong.unwrap_or(0));
        }
        let end = i + here.len();
        self.within = Within::Literal(&rest[here.len()..]);
        if here.len() == rest.len() {
            self.value_ends(end);
        }
        Ok(end)
    }

    /// The text of a string, from `i` on.
    fn text(&mut self, chunk: &[u8], i: usize, key: bool) -> Result<usize, ScanError> {
        let end = if self.keep == Keep::Nothing {
            skip::text(chunk, i, &mut self.sound)
        } else {
            let end = skip::plain(chunk, i);
            if end > i {
                self.keep_run(&chunk[i..end]);
            }
            end
        };
        self.within = Within::Text { key };
        let Some(&b) = chunk.get(end) else { return Ok(end) };
        match b {
            b'"' => self.text_ends(end + 1, key)?,
            b'\\' => self.within = Within::Escape { key },
            0x00..0x20 => return self.invalid(end),
            _ => {
                let (left, low, high) = match b {
                    0xC2..=0xDF => (1, 0x80, 0xBF),
                    0xE0 => (2, 0xA0, 0xBF),
                    0xE1..=0xEC | 0xEE..=0xEF => (2, 0x80, 0xBF),
                    0xED => (2, 0x80, 0x9F),
                    0xF0 => (3, 0x90, 0xBF),
                    0xF1..=0xF3 => (3, 0x80, 0xBF),
                    0xF4 => (3, 0x80, 0x8F),
                    _ => return self.invalid(end),
                };
                self.push(b);
                self.within = Within::Utf8 { key, left, low, high };
            }
        }
        Ok(end + 1)
    }

    fn utf8(&mut self, b: u8, i: usize, key: bool, left: u8, low: u8, high: u8) -> Result<usize, ScanError> {
        if b < low || b > high {
            return self.invalid(i);
        }
        self.push(b);
        self.within = match left {
            1 => Within::Text { key },
            _ => Within::Utf8 { key, left: left - 1, low: 0x80, high: 0xBF },
        };
        Ok(i + 1)
    }

    fn text_ends(&mut self, end: usize, key: bool) -> Result<(), ScanError> {
        self.flush_surrogate();
        if !key {
            self.value_ends(end);
            return Ok(());
        }
        self.at = At::Colon;
        self.within = Within::Nothing;
        if self.keep != Keep::Key {
            return Ok(());
        }
        self.keep = Keep::Nothing;
        let text = std::mem::take(&mut self.text);
        let named = self.name(if self.text_is_cut { &[] } else { &text });
        self.text = text;
        named
    }

    /// A key's text is known: a member's at the top level, or a message's.
    fn name(&mut self, text: &[u8]) -> Result<(), ScanError> {
        if self.depth != 1 {
            self.opening = if text == b"role" { Opening::Role } else { Opening::Seeking };
            return Ok(());
        }
        self.member = Member::of(text, self.watch.affinity);
        self.droppable = self.watch.droppable.iter().position(|name| name.as_bytes() == text);
        if let Some(member) = self.member {
            self.note_member(member)?;
        }
        self.droppable.map_or(Ok(()), |name| self.note_member(Member::Droppable(name)))
    }

    /// A member's key stands here: once is enough.
    fn note_member(&mut self, member: Member) -> Result<(), ScanError> {
        let seen = match member {
            Member::Droppable(name) => self.fields.droppable.iter().any(|place| place.name == name),
            Member::Messages => self.fields.messages != Kind::Absent,
            Member::Model => self.fields.model != Model::Absent,
            Member::PromptCacheKey => std::mem::replace(&mut self.seen.0, true),
            Member::Stream => self.fields.stream != Kind::Absent,
            Member::User => std::mem::replace(&mut self.seen.1, true),
        };
        if seen { Err(ScanError::Duplicate(member)) } else { Ok(()) }
    }

    fn escape(&mut self, b: u8, i: usize, key: bool) -> Result<usize, ScanError> {
        let plain = match b {
            b'"' | b'\\' | b'/' => b,
            b'b' => 0x08,
            b'f' => 0x0C,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => {
                self.within = Within::Hex { key, left: 4, code: 0 };
                return Ok(i + 1);
            }
            _ => return self.invalid(i),
        };
        self.flush_surrogate();
        self.push(plain);
        self.within = Within::Text { key };
        Ok(i + 1)
    }

    fn hex(&mut self, b: u8, i: usize, key: bool, left: u8, code: u16) -> Result<usize, ScanError> {
        let Some(digit) = (b as char).to_digit(16) else { return self.invalid(i) };
        let code = code << 4 | digit as u16;
        if left > 1 {
            self.within = Within::Hex { key, left: left - 1, code };
            return Ok(i + 1);
        }
        if self.keep != Keep::Nothing {
            self.push_unit(code);
        }
        self.within = Within::Text { key };
        Ok(i + 1)
    }

    fn start_keeping(&mut self, keep: Keep) {
        self.keep = keep;
        self.text.clear();
        self.text_is_cut = false;
        self.high_surrogate = 0;
    }

    fn push(&mut self, b: u8) {
        self.keep_run(&[b]);
    }

    fn keep_run(&mut self, run: &[u8]) {
        if self.keep == Keep::Nothing {
            return;
        }
        self.flush_surrogate();
        let room = MAX_NAME - self.text.len();
        self.text.extend_from_slice(&run[..run.len().min(room)]);
        self.text_is_cut |= run.len() > room;
    }

    /// Takes one UTF-16 unit of a `\u` escape; a lone surrogate (which RFC 8259 allows) is kept as U+FFFD.
    fn push_unit(&mut self, unit: u16) {
        let high = std::mem::take(&mut self.high_surrogate);
        let units = [high, unit];
        let units = if high == 0 { &units[1..] } else { &units[..] };
        if high == 0 && (0xD800..0xDC00).contains(&unit) {
            self.high_surrogate = unit;
            return;
        }
        for c in char::decode_utf16(units.iter().copied()) {
            let mut buf = [0; 4];
            let c = c.unwrap_or(char::REPLACEMENT_CHARACTER);
            self.keep_run(c.encode_utf8(&mut buf).as_bytes());
        }
    }

    fn flush_surrogate(&mut self) {
        if std::mem::take(&mut self.high_surrogate) != 0 {
            self.keep_run("\u{FFFD}".as_bytes());
        }
    }
}

fn is_space(b: u8) -> bool {
    matches!(b, b' ' | b'\n' | b'\r' | b'\t')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(body: &[u8]) -> Result<Fields, ScanError> {
        scan_for(&NOTHING, body)
    }

    fn scan_for(watch: &Watch, body: &[u8]) -> Result<Fields, ScanError> {
        let mut whole = Scanner::new(watch);
        let all = whole.feed(body).and_then(|()| whole.finish());
        let mut bytewise = Scanner::new(watch);
        let one = body.iter().try_for_each(|b| bytewise.feed(&[*b])).and_then(|()| bytewise.finish());
        assert_eq!(all, one, "chunking changes the verdict on {}", String::from_utf8_lossy(body));
        all
    }

    #[test]
    fn finds_the_members_at_the_top_level_only() {
        let fields =
            scan(br#"{"messages":[{"model":"inner","stream":true}],"stream":false,"model":"gpt"}"#).unwrap();
        assert_eq!(fields.messages, Kind::Array);
        assert_eq!(fields.stream, Kind::False);
        assert_eq!(fields.model, Model::Named { span: 69..74, name: "gpt".into(), whole: true });
        assert_eq!((fields.inside, fields.members, fields.length), (1, 3, 75));
    }

    #[test]
    fn finds_what_tells_one_conversation_from_another() {
        let watch = Watch { affinity: true, droppable: Vec::new() };
        let found = |body: &str| {
            let fields = scan_for(&watch, body.as_bytes()).unwrap();
            let text =
                |span: Option<Range<u64>>| span.map(|s| body[s.start as usize..s.end as usize].to_owned());
            let Affinity { cache_key, user, opening } = fields.affinity;
            (text(cache_key), text(user), text(opening))
        };
        for (body, want) in [
            (r#"{"messages":[]}"#, (None, None, Some("[]"))),
            (r#"{"messages":{"role":"user"}}"#, (None, None, None)),
            (r#"{"us\u0065r":"u","prompt_cache_key":""}"#, (None, Some(r#""u""#), None)),
            (r#"{"us\\u0065r":"u","prompt_cache_key":null}"#, (None, None, None)),
            (r#"{"user":7,"x":{"user":"v"}}"#, (None, None, None)),
            (
                r#"{"messages":[{"role":"system","content":"s"},{"content":[{"role":"user"}],"role":"\u0075ser"},{"role":"user"}]}"#,
                (
                    None,
                    None,
                    Some(
                        r#"[{"role":"system","content":"s"},{"content":[{"role":"user"}],"role":"\u0075ser"}"#,
                    ),
                ),
            ),
            (
                r#"{"messages":[{"role":["user"]},{"role":{"role":"user"}},"user",["role","user"],{"Role":"user"}],"z":1}"#,
                (
                    None,
                    None,
                    Some(
                        r#"[{"role":["user"]},{"role":{"role":"user"}},"user",["role","user"],{"Role":"user"}]"#,
                    ),
                ),
            ),
        ] {
            let (cache_key, user, opening) = want;
            let want = [cache_key, user, opening].map(|part| part.map(str::to_owned));
            assert_eq!(<[_; 3]>::from(found(body)), want, "{body}");
        }
        for (body, member) in [
            (r#"{"user":null,"user":"u"}"#, Member::User),
            (r#"{"prompt_cache_key":1,"prompt_cache_key":2}"#, Member::PromptCacheKey),
        ] {
            assert_eq!(scan_for(&watch, body.as_bytes()), Err(ScanError::Duplicate(member)), "{body}");
        }
    }

    #[test]
    fn notes_the_places_of_what_may_have_to_go() {
        let watch = Watch { affinity: false, droppable: vec!["store".into(), "n".into()] };
        let fields =
            scan_for(&watch, br#"{ "a":1 , "n" : {"store":[1,2]} ,"st\\u006fre":0, "st\u006Fre":1}"#)
                .unwrap();
        let places = vec![
            Place { name: 1, nth: 1, comma: 8, span: 10..31, next: Some(33) },
            Place { name: 0, nth: 3, comma: 48, span: 50..64, next: None },
        ];
        assert_eq!(fields.droppable, places);
        let twice = scan_for(&watch, br#"{"store":1,"st\\u006fre":2,"st\u006fre":3}"#);
        assert_eq!(twice, Err(ScanError::Duplicate(Member::Droppable(0))));
    }

    #[test]
    fn reads_model_in_every_spelling() {
        for (body, want) in [
            (r#"{}"#, Model::Absent),
            (r#"{"Model":"x"}"#, Model::Absent),
            (r#"{"model":null}"#, Model::Nothing(9..13)),
            (r#"{"model": "" }"#, Model::Nothing(10..12)),
            (r#"{"mod\u0065l":"a"}"#, Model::Named { span: 14..17, name: "a".into(), whole: true }),
            (
                r#"{"model":"\ud83d\ude00\n\u00e9é"}"#,
                Model::Named { span: 9..33, name: "😀\néé".into(), whole: true },
            ),
            (
                r#"{"model":"\ud83dx\udc00"}"#,
                Model::Named { span: 9..24, name: "\u{FFFD}x\u{FFFD}".into(), whole: true },
            ),
            (r#"{"model":3}"#, Model::Other),
            (r#"{"model":{"model":1}}"#, Model::Other),
            (r#"{"model":["a"],"x":"y"}"#, Model::Other),
        ] {
            assert_eq!(scan(body.as_bytes()).unwrap().model, want, "{body}");
        }
    }

    #[test]
    fn a_long_name_is_cut_but_not_refused() {
        let body = format!(r#"{{"model":"{}"}}"#, "m".repeat(100_000));
        let Model::Named { span, name, whole } = scan(body.as_bytes()).unwrap().model else {
            panic!("not named")
        };
        assert_eq!((span, name.len(), whole), (9..100_011, MAX_NAME, false));
        let key = format!(r#"{{"model{}":1}}"#, "x".repeat(MAX_NAME));
        assert_eq!(scan(key.as_bytes()).unwrap().model, Model::Absent);
    }

    #[test]
    fn refuses_a_member_that_stands_twice() {
        for (body, member) in [
            (r#"{"model":"a","model":"a"}"#, Member::Model),
            (r#"{"model":null,"mod\u0065l":"b"}"#, Member::Model),
            (r#"{"model":1,"model":2}"#, Member::Model),
            (r#"{"stream":null,"stream":null}"#, Member::Stream),
            (r#"{"messages":[],"\u006dessages":[]}"#, Member::Messages),
        ] {
            assert_eq!(scan(body.as_bytes()), Err(ScanError::Duplicate(member)), "{body}");
        }
        assert!(scan(br#"{"x":1,"x":2,"user":3,"user":4}"#).is_ok());
    }

    #[test]
    fn names_the_offset_of_the_fault() {
        for (body, offset) in [
            (&b""[..], 0),
            (b"[]", 0),
            (b"  3", 2),
            (b"\xEF\xBB\xBF{}", 0),
            (b"{", 1),
            (b"{}x", 2),
            (b"{}{}", 2),
            (br#"{"a":01}"#, 6),
            (br#"{"a":1,}"#, 7),
            (br#"{"a":-}"#, 6),
            (br#"{"a":tru}"#, 8),
            (br#"{"a":[1}"#, 7),
            (br#"{"a":"\x"}"#, 7),
            (br#"{"a":"\u12g4"}"#, 10),
            (b"{\"a\":\"\n\"}", 6),
            (b"{\"a\":\"\x80\"}", 6),
            (b"{\"a\":\"\xC3\"}", 7),
            (b"{\"a\":\"\xED\xA0\x80\"}", 7),
            (b"{\"a\":\"\xF4\x90\x80\x80\"}", 7),
            (br#"{a:1}"#, 1),
            (br#"{"a" 1}"#, 5),
        ] {
            assert_eq!(scan(body), Err(ScanError::Invalid { offset }), "{}", String::from_utf8_lossy(body));
        }
    }

    /// Twice the input is at most twice the work, whatever the input and however it is cut.
    #[test]
    fn the_work_grows_with_the_input_and_no_faster() {
        let watch = Watch {
            affinity: true,
            droppable: vec!["store".into(), "n".into(), "metadata".into(), "user".into()],
        };
        type Shape = (&'static str, fn(usize) -> Vec<u8>);
        let shapes: [Shape; 21] = [
            ("nested arrays", |n| [&b"{\"a\":"[..], &b"[".repeat(n)].concat()),
            ("deep again and again", |n| {
                let deep = format!("{}{}", "[".repeat(126), "]".repeat(126));
                format!("{{\"a\":[{}0]}}", format!("{deep},").repeat(n / 252)).into_bytes()
            }),
            ("brackets in a string", |n| format!("{{\"a\":\"{}\"}}", "[".repeat(n)).into_bytes()),
            ("quotes escaped", |n| format!("{{\"a\":\"{}\"}}", "\\\"".repeat(n / 2)).into_bytes()),
            ("escaped units", |n| format!("{{\"a\":\"{}\"}}", "\\ud83d".repeat(n / 6)).into_bytes()),
            ("quotes unended", |n| format!("{{\"a\":\"{}", "\\\"".repeat(n / 2)).into_bytes()),
            ("two bytes each", |n| format!("{{\"a\":\"{}\"}}", "é".repeat(n / 2)).into_bytes()),
            ("four bytes each", |n| format!("{{\"a\":\"{}\"}}", "😀".repeat(n / 4)).into_bytes()),
            ("few outside of ASCII", |n| {
                format!("{{\"a\":\"{}\"}}", ("x".repeat(99) + "é").repeat(n / 101)).into_bytes()
            }),
            ("wrong at the end", |n| {
                [format!("{{\"a\":\"{}", "é".repeat(n / 2)).as_bytes(), b"\xFF"].concat()
            }),
            ("wrong outside of strings", |n| [&b"{\"a\":"[..], &"é".repeat(n / 2).into_bytes()].concat()),
            ("strings with a character each", |n| {
                format!("{{\"a\":[{}0]}}", "\"é\",".repeat(n / 5)).into_bytes()
            }),
            ("empty strings", |n| format!("{{\"a\":[{}0]}}", "\"\",".repeat(n / 3)).into_bytes()),
            ("members", |n| format!("{{\"b\":0{}}}", ",\"a\":1".repeat(n / 6)).into_bytes()),
            ("droppable twice", |n| format!("{{\"store\":0{}}}", ",\"store\":1".repeat(n / 10)).into_bytes()),
            ("members inside", |n| format!("{{\"a\":{{\"b\":0{}}}}}", ",\"a\":1".repeat(n / 6)).into_bytes()),
            ("roles", |n| {
                format!("{{\"messages\":[{{\"role\":0{}}}]}}", ",\"role\":\"u\"".repeat(n / 11)).into_bytes()
            }),
            ("escaped keys", |n| format!("{{\"b\":0{}}}", ",\"\\u0061\":1".repeat(n / 11)).into_bytes()),
            ("a long key", |n| format!("{{\"{}é\":1}}", "k".repeat(n)).into_bytes()),
            ("a long number", |n| format!("{{\"a\":{}}}", "9".repeat(n)).into_bytes()),
            ("spaces", |n| format!("{{{}}}", " \n".repeat(n / 2)).into_bytes()),
        ];
        for (name, shape) in shapes {
            for piece in [1, 2, 17, 1_000, usize::MAX] {
                let work = |n: usize| {
                    let body = shape(n);
                    let mut scanner = Scanner::new(&watch);
                    skip::work::take();
                    let _ = body.chunks(piece.min(body.len())).try_for_each(|chunk| scanner.feed(chunk));
                    (skip::work::take(), body.len() as u64)
                };
                let ((once, _), (twice, length)) = (work(20_000), work(40_000));
                assert!(twice <= 2 * once + 2_000, "{name} in pieces of {piece}: {once}, then {twice}");
                assert!(twice <= 40 * length + 2_000, "{name} in pieces of {piece}: {twice} for {length}");
            }
        }
    }

    #[test]
    fn nests_to_128_and_no_deeper() {
        let nested = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n), "]".repeat(n));
        assert!(scan(nested(127).as_bytes()).is_ok());
        assert_eq!(scan(nested(128).as_bytes()), Err(ScanError::Invalid { offset: 132 }));
        let mixed = format!("{}1{}", "{\"a\":[".repeat(64), "]}".repeat(64));
        assert!(scan(mixed.as_bytes()).is_ok());
    }
}

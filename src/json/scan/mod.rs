//! The resumable JSON scanner: reads a request body as it arrives and finds the members that Zap needs.
//!
//! The scanner accepts exactly one RFC 8259 object (UTF-8, depth at most [`MAX_DEPTH`]), in one pass, with constant
//! state, with the same result for any chunking. No copy of the body is kept, only the name of the model. A [`Watch`]
//! says which other members to look for; of those, only the positions are noted. [`crate::json::patch`] checks what
//! an endpoint needs. Most of a body is text, which `skip` skips over.

mod members;

mod scalar;

mod skip;

mod text;

use smallvec::SmallVec;

use crate::json::members::{
    Fields, MAX_NAME, Member, MemberSpan, Model, ScanError, ValueKind, WATCH_NONE, Watch,
};

/// Deepest nesting that is accepted; the object itself is 1.
pub(crate) const MAX_DEPTH: u32 = 128;

/// A scan in progress. [`feed`](Scanner::feed) the chunks in order, then [`finish`](Scanner::finish).
#[derive(Debug)]
pub struct Scanner<'w> {
    watch: &'w Watch,
    at: At,
    within: Within,
    /// The innermost open container is an object, not an array.
    is_object: bool,
    /// `is_object` of the enclosing containers, the next one in the lowest bit. `depth <= MAX_DEPTH`.
    objects: u128,
    depth: u32,
    /// Index up to which the chunk is known to be UTF-8.
    valid_until: usize,
    /// Bytes consumed by earlier chunks.
    base: u64,
    /// The top-level member whose value comes next or is being read.
    member: Option<Member>,
    /// The same member's index in [`Watch::droppable`], if it is there. A member may be in both.
    droppable: Option<usize>,
    /// The use for which the current string is kept.
    keep: Keep,
    text: SmallVec<[u8; 32]>,
    text_is_cut: bool,
    high_surrogate: u16,
    value_start: u64,
    /// Offset of the last key at the top level.
    key_start: u64,
    /// Offset of the last comma at the top level.
    comma: u64,
    opening: Opening,
    /// The members of [`Affinity`](crate::json::members::Affinity) that have appeared already, with any value: a bit
    /// each.
    seen: u8,
    fields: Fields,
}

/// The state of the search for the first message of a user. Messages are at depth 3.
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

/// The use for which the text of a string is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    /// A key that may have to be noted.
    Key,
    /// The name of the model.
    Name,
    /// The text is not kept.
    Nothing,
    /// A value of which only the position, or whether it is empty or "user", matters.
    Value,
}

/// The position in the grammar, between tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// After a value: `,` or the closing bracket.
    AfterValue,
    /// After a key.
    Colon,
    /// After the object: only white space.
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
    /// Inside `\uHHHH`: the number of digits still to come, and the value so far.
    Hex { key: bool, left: u8, code: u16 },
    /// Inside `true`, `false` or `null`: the rest that must follow.
    Literal(&'static [u8]),
    /// Between tokens.
    Nothing,
    /// Inside a number.
    NumberPart(NumberPart),
    /// Inside a string, at an ordinary character.
    Text { key: bool },
    /// Inside a UTF-8 sequence.
    Utf8 { key: bool, rest: Utf8Rest },
}

/// What is still to come of a UTF-8 sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Utf8Rest {
    /// Number of bytes.
    left: u8,
    /// Bounds of the next byte.
    low: u8,
    high: u8,
}

/// A boxed error, so that a `Result` without one fits into registers.
type BoxedError = Box<ScanError>;

/// Whether a token was read to its end, with the next index.
enum TokenRead {
    /// The chunk ends inside the token.
    Part(usize),
    /// The token is complete.
    Whole(usize),
}

/// The position inside a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NumberPart {
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
        Scanner::new(&WATCH_NONE)
    }
}

impl<'w> Scanner<'w> {
    /// Creates a scanner that has read no bytes yet.
    pub fn new(watch: &'w Watch) -> Self {
        Scanner {
            watch,
            at: At::Start,
            within: Within::Nothing,
            is_object: false,
            objects: 0,
            depth: 0,
            valid_until: 0,
            base: 0,
            member: None,
            droppable: None,
            keep: Keep::Nothing,
            text: SmallVec::new(),
            text_is_cut: false,
            high_surrogate: 0,
            value_start: 0,
            key_start: 0,
            comma: 0,
            opening: Opening::Off,
            seen: 0,
            fields: Fields::default(),
        }
    }

    /// Takes the next bytes of the body.
    ///
    /// # Errors
    /// Returns the first [`ScanError`] in the body. The scanner must not be used afterwards.
    pub fn feed(&mut self, chunk: &[u8]) -> Result<(), ScanError> {
        self.tokens(chunk).map_err(|fault| *fault)?;
        self.base += chunk.len() as u64;
        Ok(())
    }

    fn tokens(&mut self, chunk: &[u8]) -> Result<(), BoxedError> {
        self.valid_until = 0;
        let mut i = 0;
        while i < chunk.len() {
            skip::work::add(1);
            i = match self.within {
                Within::Nothing if self.is_noted() => self.structure::<true>(chunk, i)?,
                Within::Nothing => self.structure::<false>(chunk, i)?,
                Within::Text { key } => self.text(chunk, i, key)?,
                Within::Escape { key } => self.escape(chunk[i], i, key)?,
                Within::Hex { key, left, code } => self.hex(chunk[i], i, key, left, code)?,
                Within::Utf8 { key, rest } => self.utf8(chunk[i], i, key, rest)?,
                Within::NumberPart(number) => {
                    let read = self.number(chunk, i, number)?;
                    self.value_read(&read)
                }
                Within::Literal(rest) => {
                    let read = self.literal(chunk, i, rest)?;
                    self.value_read(&read)
                }
            };
        }
        Ok(())
    }

    /// Ends the scan.
    ///
    /// # Errors
    /// Returns [`ScanError::Invalid`] with the body's length as the offset if the object is not complete.
    pub fn finish(mut self) -> Result<Fields, ScanError> {
        if self.at != At::End {
            return Err(ScanError::Invalid { offset: self.base });
        }
        self.fields.length = self.base;
        Ok(self.fields)
    }

    /// Whether members may have to be noted at this position: at the top level, and in the search for the opening.
    fn is_noted(&self) -> bool {
        self.depth <= 1 || self.opening != Opening::Off
    }

    /// Reads tokens and returns the next index. Stops at the end of the chunk, inside a token that must be read byte by
    /// byte, and when `NOTED` (the value of [`is_noted`](Self::is_noted)) changes.
    fn structure<const NOTED: bool>(&mut self, chunk: &[u8], mut i: usize) -> Result<usize, BoxedError> {
        let mut at = self.at;
        while let Some(&b) = chunk.get(i) {
            skip::work::add(1);
            let nested = match at {
                At::Key | At::FirstKey if b == b'"' => {
                    (at, i) = if NOTED { self.noted_members(chunk, i)? } else { self.members(chunk, i) };
                    if self.within != Within::Nothing {
                        break;
                    }
                    continue;
                }
                At::FirstKey if b == b'}' => Some(self.close::<NOTED>(i)),
                At::FirstItem if b == b']' => Some(self.close::<NOTED>(i)),
                At::Value | At::FirstItem if b == b'{' || b == b'[' => Some(self.open::<NOTED>(b, i)?),
                At::Start if b == b'{' => Some(self.open::<NOTED>(b, i)?),
                At::Value | At::FirstItem if b == b'"' && !NOTED => {
                    match self.string(chunk, i, false) {
                        TokenRead::Whole(next) => i = next,
                        TokenRead::Part(next) => {
                            i = next;
                            break;
                        }
                    }
                    at = At::AfterValue;
                    continue;
                }
                At::Value | At::FirstItem if !is_space(b) => {
                    i = self.value(chunk, i, b)?;
                    if self.within != Within::Nothing {
                        break;
                    }
                    at = At::AfterValue;
                    continue;
                }
                At::AfterValue if b == b',' => {
                    if NOTED && self.depth == 1 {
                        self.comma_at(self.base + i as u64);
                    }
                    at = if self.is_object { At::Key } else { At::Value };
                    i += 1;
                    continue;
                }
                At::AfterValue if b == if self.is_object { b'}' } else { b']' } => {
                    Some(self.close::<NOTED>(i))
                }
                At::Colon if b == b':' => {
                    at = At::Value;
                    i += 1;
                    continue;
                }
                _ => None,
            };
            if let Some(next) = nested {
                at = next;
                i += 1;
                if NOTED != self.is_noted() {
                    break;
                }
            } else if is_space(b) {
                i += 1;
            } else {
                return self.invalid(i);
            }
        }
        self.at = at;
        Ok(i)
    }

    /// Reads members that need not be noted, from the quote of a key at `i`, as long as their values are strings and
    /// no white space comes between tokens, which is true for most of a conversation. Returns the position after
    /// them: between tokens, or, with `within` set, inside a string.
    #[inline(always)] // Called from a single place.
    fn members(&mut self, chunk: &[u8], mut i: usize) -> (At, usize) {
        loop {
            skip::work::add(1);
            match self.string(chunk, i, true) {
                TokenRead::Whole(next) => i = next,
                TokenRead::Part(next) => return (At::Key, next),
            }
            if chunk.get(i) != Some(&b':') {
                return (At::Colon, i);
            }
            i += 1;
            if chunk.get(i) != Some(&b'"') {
                return (At::Value, i);
            }
            match self.string(chunk, i, false) {
                TokenRead::Whole(next) => i = next,
                TokenRead::Part(next) => return (At::Value, next),
            }
            if chunk.get(i) != Some(&b',') {
                return (At::AfterValue, i);
            }
            i += 1;
            if chunk.get(i) != Some(&b'"') {
                return (At::Key, i);
            }
        }
    }

    /// Reads a string that need not be kept, from its opening quote at `i`. Sets `within` if the string cannot be
    /// read to its end here.
    #[inline(always)] // Most strings are short and end in the first block.
    fn string(&mut self, chunk: &[u8], i: usize, key: bool) -> TokenRead {
        let end = match skip::short_end(chunk, i + 1) {
            Ok(end) => return TokenRead::Whole(end + 1),
            Err(from) => self.text_end(chunk, from),
        };
        if chunk.get(end) == Some(&b'"') {
            return TokenRead::Whole(end + 1);
        }
        self.within = Within::Text { key };
        TokenRead::Part(end)
    }

    #[cold]
    fn invalid<T>(&self, i: usize) -> Result<T, BoxedError> {
        Err(Box::new(ScanError::Invalid { offset: self.base + i as u64 }))
    }

    /// Reads a value that is not a container; it begins at `i` with the byte `b`.
    fn value(&mut self, chunk: &[u8], i: usize, b: u8) -> Result<usize, BoxedError> {
        if self.depth == 1 {
            self.value_start = self.base + i as u64;
            self.note_kind(b);
        }
        if b != b'"' {
            let read = self.scalar(chunk, i, b)?;
            return Ok(self.value_read(&read));
        }
        match self.member {
            Some(Member::Model) if self.depth == 1 => self.start_keeping(Keep::Name),
            Some(Member::PromptCacheKey | Member::User) if self.depth == 1 => self.start_keeping(Keep::Value),
            Some(Member::Input | Member::Prompt) if self.depth == 1 => self.opening_begins(),
            _ if self.depth == 3 && self.opening == Opening::Role => self.start_keeping(Keep::Value),
            _ => {}
        }
        self.text(chunk, i + 1, false)
    }

    /// Ends the value if it was read to its end. Returns the next index.
    fn value_read(&mut self, read: &TokenRead) -> usize {
        match *read {
            TokenRead::Part(next) => next,
            TokenRead::Whole(end) => {
                self.value_ends(end);
                end
            }
        }
    }

    /// Opens a container; it begins at `i` with the byte `b`.
    #[inline(always)] // Only a few instructions without `NOTED`.
    fn open<const NOTED: bool>(&mut self, b: u8, i: usize) -> Result<At, BoxedError> {
        if self.depth == MAX_DEPTH {
            return self.invalid(i);
        }
        if NOTED && self.depth == 0 {
            self.fields.inside = self.base + i as u64 + 1;
        } else if NOTED && self.depth == 1 {
            self.value_start = self.base + i as u64;
            self.note_kind(b);
            self.mark_begins(b);
        }
        // The enclosing container is kept as one bit.
        self.objects = self.objects << 1 | u128::from(self.is_object);
        self.depth += 1;
        self.is_object = b == b'{';
        Ok(if self.is_object { At::FirstKey } else { At::FirstItem })
    }

    /// Closes a container; it ends at `i`.
    #[inline(always)] // Only a few instructions without `NOTED`.
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
}

fn is_space(b: u8) -> bool {
    matches!(b, b' ' | b'\n' | b'\r' | b'\t')
}

#[cfg(test)]
mod tests;

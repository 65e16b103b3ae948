//! The part of the scanner that notes members at the top level, and the messages up to the first one of a user.

use crate::json::scan::skip;
use crate::json::scan::{
    At, BoxedError, Keep, Member, MemberSpan, Model, Opening, ScanError, Scanner, TokenRead, ValueKind,
    Within,
};

impl Scanner<'_> {
    /// Reads members that may have to be noted, from the quote of a key at `i`, as long as they are short and no
    /// white space comes between tokens, which is true for most. Returns the position after them: between tokens, or,
    /// with `within` set, inside one.
    #[inline(always)] // Called from a single place.
    pub(super) fn noted_members(&mut self, chunk: &[u8], mut i: usize) -> Result<(At, usize), BoxedError> {
        loop {
            skip::work::add(1);
            match self.noted_key(chunk, i)? {
                TokenRead::Whole(next) => i = next,
                TokenRead::Part(next) => return Ok((At::Key, next)),
            }
            if self.depth != 1 || chunk.get(i) != Some(&b':') {
                return Ok((At::Colon, i));
            }
            i += 1;
            let Some(&b) = chunk.get(i) else { return Ok((At::Value, i)) };
            let read = match b {
                b'"' if self.member.is_none() && self.keep == Keep::Nothing => self.string(chunk, i, false),
                b'"' | b'{' | b'[' | b' ' | b'\n' | b'\r' | b'\t' => return Ok((At::Value, i)),
                _ => self.scalar(chunk, i, b)?,
            };
            self.value_start = self.base + i as u64;
            self.note_kind(b);
            match read {
                TokenRead::Whole(next) => i = next,
                TokenRead::Part(next) => return Ok((At::Value, next)),
            }
            self.member_ends(self.base + i as u64);
            if chunk.get(i) != Some(&b',') {
                return Ok((At::AfterValue, i));
            }
            self.comma_at(self.base + i as u64);
            i += 1;
            if chunk.get(i) != Some(&b'"') {
                return Ok((At::Key, i));
            }
        }
    }

    /// Reads a key that may have to be noted, from its opening quote at `i`.
    #[inline(always)] // Called from a single place.
    fn noted_key(&mut self, chunk: &[u8], i: usize) -> Result<TokenRead, BoxedError> {
        if self.depth == 1 {
            self.key_start = self.base + i as u64;
            self.fields.members += 1;
        } else if self.depth != 3 || self.opening != Opening::Seeking {
            return Ok(self.string(chunk, i, true));
        }
        let end = skip::short_end(chunk, i + 1).unwrap_or_else(|from| skip::plain_end(chunk, from));
        if chunk.get(end) == Some(&b'"') {
            // Most keys are complete in this chunk and have no escapes: then no text need be kept.
            self.key_read(&chunk[i + 1..end])?;
            return Ok(TokenRead::Whole(end + 1));
        }
        self.start_keeping(Keep::Key);
        self.within = Within::Text { key: true };
        Ok(TokenRead::Part(i + 1))
    }

    /// Notes the type of a top-level member's value from its first byte.
    pub(super) fn note_kind(&mut self, b: u8) {
        let kind = match b {
            b'[' => ValueKind::Array,
            b'f' => ValueKind::False,
            b'n' => ValueKind::Null,
            b't' => ValueKind::True,
            _ => ValueKind::Other,
        };
        match self.member {
            Some(Member::Messages) => self.fields.messages = kind,
            Some(Member::Stream) => self.fields.stream = kind,
            Some(Member::Model) if b != b'n' && b != b'"' => self.fields.model = Model::Other,
            Some(
                Member::Droppable(_)
                | Member::Input
                | Member::Metadata
                | Member::Model
                | Member::Prompt
                | Member::PromptCacheKey
                | Member::User,
            )
            | None => {}
        }
    }

    /// Ends a value; `end` is the index just past it.
    pub(super) fn value_ends(&mut self, end: usize) {
        self.at = At::AfterValue;
        self.within = Within::Nothing;
        if self.depth == 1 {
            self.member_ends(self.base + end as u64);
        } else if self.depth == 3 && self.opening == Opening::Role {
            let is_user = self.keep == Keep::Value && self.text.as_slice() == b"user";
            self.opening = if is_user { Opening::Found } else { Opening::Seeking };
            self.keep = Keep::Nothing;
        }
    }

    /// Ends a member at the top level; `end` is the offset just past it.
    pub(super) fn member_ends(&mut self, end: u64) {
        let span = self.value_start..end;
        let text = matches!(self.keep, Keep::Name | Keep::Value) && !self.text.is_empty();
        match self.member.take() {
            Some(Member::Model) if self.fields.model == Model::Absent => {
                self.fields.model = if text {
                    let name = String::from_utf8_lossy(&self.text).into();
                    Model::Named { span, name, whole: !self.text_is_cut }
                } else {
                    Model::Nothing(span)
                };
            }
            Some(Member::PromptCacheKey) => self.fields.affinity.cache_key = text.then_some(span),
            Some(Member::User) => self.fields.affinity.user = text.then_some(span),
            Some(Member::Input | Member::Messages | Member::Prompt) if self.opening != Opening::Off => {
                self.opening_ends(end);
            }
            Some(Member::Metadata) => {
                self.fields.affinity.metadata.iter_mut().for_each(|metadata| metadata.end = end);
            }
            Some(Member::Stream) => self.fields.stream_end = end,
            Some(
                Member::Droppable(_) | Member::Input | Member::Messages | Member::Model | Member::Prompt,
            )
            | None => {}
        }
        if let Some(name) = self.droppable.take() {
            let nth = self.fields.members - 1;
            let (comma, span) = (self.comma, self.key_start..end);
            self.fields.droppable.push(MemberSpan { name, nth, comma, span, next: None });
        }
        self.keep = Keep::Nothing;
    }

    /// Notes a comma at the top level, and records it as the end of the last member if that member is droppable.
    pub(super) fn comma_at(&mut self, offset: u64) {
        self.comma = offset;
        if let Some(last) = self.fields.droppable.last_mut()
            && last.nth + 1 == self.fields.members
        {
            last.next = Some(offset + 1);
        }
    }

    /// Begins the value of a member that may identify the conversation: a container that begins with `b`.
    pub(super) fn mark_begins(&mut self, b: u8) {
        match self.member.filter(|_| self.watch.affinity) {
            Some(Member::Input | Member::Messages | Member::Prompt) if b == b'[' => self.opening_begins(),
            Some(Member::Metadata) if b == b'{' => {
                self.fields.affinity.metadata = Some(self.value_start..self.value_start);
            }
            _ => {}
        }
    }

    /// Begins the opening of the conversation, unless the body has had one.
    pub(super) fn opening_begins(&mut self) {
        if self.fields.affinity.opening.is_none() {
            self.opening = Opening::Seeking;
        }
    }

    /// Ends the opening of the conversation; `end` is the offset just past it.
    pub(super) fn opening_ends(&mut self, end: u64) {
        self.opening = Opening::Off;
        self.fields.affinity.opening = Some(self.value_start..end);
    }

    /// Ends a string; `end` is the index just past its closing quote.
    pub(super) fn text_ends(&mut self, end: usize, key: bool) -> Result<(), BoxedError> {
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
        let result = self.key_read(if self.text_is_cut { &[] } else { &text });
        self.text = text;
        result
    }

    /// Takes the text of a complete key, either at the top level or in a message.
    pub(super) fn key_read(&mut self, text: &[u8]) -> Result<(), BoxedError> {
        if self.depth != 1 {
            self.opening = if text == b"role" { Opening::Role } else { Opening::Seeking };
            return Ok(());
        }
        self.member = Member::of(text, self.watch.affinity);
        self.droppable = self.watch.droppable.iter().position(|name| name.as_bytes() == text);
        match self.member {
            Some(member) => self.note_member(member)?,
            None if Member::may_be_variant(text) || self.watch.may_be_droppable(text) => {
                self.check_case(text)?
            }
            None => {}
        }
        self.droppable.map_or(Ok(()), |name| self.note_member(Member::Droppable(name)))
    }

    /// Refuses a key that some backends, such as those written in Go, read as a member that Zap reads: they would use
    /// a value that Zap has not checked.
    #[cold]
    fn check_case(&self, text: &[u8]) -> Result<(), BoxedError> {
        match Member::case_variant(text, self.watch) {
            // The configuration lists exactly this key.
            Some(_) if self.droppable.is_some() => Ok(()),
            Some(member) => {
                let key = String::from_utf8_lossy(text).into();
                Err(Box::new(ScanError::CaseVariant { key, member }))
            }
            None => Ok(()),
        }
    }

    /// Notes a member by its bit. Returns whether it was noted before.
    fn see(&mut self, bit: u8) -> bool {
        let seen = self.seen;
        self.seen |= 1 << bit;
        seen == self.seen
    }

    /// Refuses a member whose key has appeared before.
    pub(super) fn note_member(&mut self, member: Member) -> Result<(), BoxedError> {
        let seen = match member {
            Member::Droppable(name) => self.fields.droppable.iter().any(|span| span.name == name),
            Member::Messages => self.fields.messages != ValueKind::Absent,
            Member::Model => self.fields.model != Model::Absent,
            Member::Stream => self.fields.stream != ValueKind::Absent,
            Member::Input => self.see(0),
            Member::Metadata => self.see(1),
            Member::Prompt => self.see(2),
            Member::PromptCacheKey => self.see(3),
            Member::User => self.see(4),
        };
        if seen { Err(Box::new(ScanError::Duplicate(member))) } else { Ok(()) }
    }
}

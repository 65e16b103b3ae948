//! A reader over TOML's spanned tree that records every fault with its line.
//!
//! A [`Section`] returns its keys one by one, checked. A key that was not read
//! when the section ends is unknown. For a wrong value the reader records a fault and
//! returns the default, so that reading continues. A message shows a string value only
//! if the value cannot be a key ([`is_harmless`]).

use std::fmt::Display;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeArray, DeString, DeTable, DeValue};

use crate::config::fault_sink::Sink;
use crate::config::range::{Number, Range};
use crate::config::suggest::{is_harmless, nearest};

/// A string and its line.
pub(super) struct Text {
    pub(super) value: String,
    pub(super) line: usize,
}

/// A table that is being read.
pub(super) struct Section<'s, 'i> {
    sink: &'s Sink<'s>,
    table: DeTable<'i>,
    /// Name of the table in messages, with a dot at the end; empty for the document.
    prefix: String,
    line: usize,
    /// All keys read so far, set or not.
    known: Vec<&'static str>,
}

/// The value of one key, removed from its table.
pub(super) struct Field<'i> {
    pub(super) value: DeValue<'i>,
    pub(super) line: usize,
}

/// Reads the text of `sink`. Returns `None` if the text is not TOML: then the syntax errors are recorded.
pub(super) fn document<'s, R>(sink: &'s Sink<'s>, read: impl FnOnce(&mut Section<'s, '_>) -> R) -> Option<R> {
    let (root, errors) = DeTable::parse_recoverable(sink.text);
    for error in &errors {
        let offset = error.span().map_or(sink.text.len(), |span| span.start);
        let (line, column) = sink.position(offset);
        let what = error.message();
        sink.fault(line, format!("syntax error at column {column}: {what}"));
    }
    errors.is_empty().then(|| {
        let mut section = Section::new(sink, root.into_inner(), String::new(), 1);
        let result = read(&mut section);
        section.finish();
        result
    })
}

impl<'s, 'i> Section<'s, 'i> {
    fn new(sink: &'s Sink<'s>, table: DeTable<'i>, prefix: String, line: usize) -> Self {
        Self { sink, table, prefix, line, known: Vec::new() }
    }

    /// The sink of this section's faults.
    pub(super) fn sink(&self) -> &'s Sink<'s> {
        self.sink
    }

    /// The line of the section's header.
    pub(super) fn line(&self) -> usize {
        self.line
    }

    /// The line of `key`, unless it is not set or was read already.
    pub(super) fn line_of(&self, key: &str) -> Option<usize> {
        let (key, _) = self.table.get_key_value(key)?;
        Some(self.sink.position(key.span().start).0)
    }

    /// Records a fault of `key`: `what` follows its name.
    pub(super) fn fault(&self, line: usize, key: &str, what: &str) {
        let prefix = &self.prefix;
        self.sink.fault(line, format!("`{prefix}{key}` {what}"));
    }

    /// Records that `key` has the wrong value `text`, shown if it cannot be a secret; `allowed` says what it must be.
    pub(super) fn invalid(&self, text: &Text, key: &str, allowed: &str) {
        let value = &text.value;
        let found = if is_harmless(value) { format!("is {value:?}") } else { "is not valid".to_owned() };
        self.fault(text.line, key, &format!("{found}; {allowed}"));
    }

    /// Records that the array or table `key` has the wrong element `text`, shown if it cannot be a secret; `allowed`
    /// says what each element must be.
    pub(super) fn invalid_element(&self, text: &Text, key: &str, allowed: &str) {
        let value = &text.value;
        let found = if is_harmless(value) { format!("{value:?}") } else { "an invalid value".to_owned() };
        self.fault(text.line, key, &format!("contains {found}; {allowed}"));
    }

    /// Reads a number, or returns its default.
    pub(super) fn number<T>(&mut self, key: &'static str, number: Number<T>) -> T
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        self.optional(key, number.range).unwrap_or(number.default)
    }

    /// Reads an optional number.
    pub(super) fn optional<T>(&mut self, key: &'static str, range: Range<T>) -> Option<T>
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        let Field { value, line } = self.take(key)?;
        let DeValue::Integer(integer) = &value else {
            self.wrong_type(line, key, &value, "an integer");
            return None;
        };
        let Range { min, max } = range;
        let Ok(wide) = i128::from_str_radix(integer.as_str(), integer.radix()) else {
            let what = format!("is far out of range; must be from {min} to {max}");
            self.fault(line, key, &what);
            return None;
        };
        match T::try_from(wide) {
            Ok(number) if number >= min && number <= max => Some(number),
            _ => {
                let what = format!("is {wide}; must be from {min} to {max}");
                self.fault(line, key, &what);
                None
            }
        }
    }

    /// Reads a required number. If it is missing or not valid, records a fault and returns `None`.
    pub(super) fn required<T>(&mut self, key: &'static str, range: Range<T>) -> Option<T>
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        if !self.table.contains_key(key) {
            let Range { min, max } = range;
            self.missing(key, &format!("an integer from {min} to {max}"));
        }
        self.optional(key, range)
    }

    /// Reads a number of seconds, or returns its default.
    pub(super) fn seconds(&mut self, key: &'static str, number: Number<u64>) -> Duration {
        Duration::from_secs(self.number(key, number))
    }

    /// Reads a number of milliseconds, or returns its default.
    pub(super) fn millis(&mut self, key: &'static str, number: Number<u64>) -> Duration {
        Duration::from_millis(self.number(key, number))
    }

    /// Reads `true` or `false`, or returns the default.
    pub(super) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        match self.take(key) {
            Some(Field { value: DeValue::Boolean(boolean), .. }) => boolean,
            Some(Field { value, line }) => {
                self.wrong_type(line, key, &value, "`true` or `false`");
                default
            }
            None => default,
        }
    }

    /// Reads an optional string.
    pub(super) fn text(&mut self, key: &'static str) -> Option<Text> {
        match self.take(key)? {
            Field { value: DeValue::String(text), line } => Some(Text { value: text.into_owned(), line }),
            Field { value, line } => {
                self.wrong_type(line, key, &value, "a string");
                None
            }
        }
    }

    /// Reads a required string. If it is missing or not a string, records a fault and returns `None`.
    pub(super) fn required_text(&mut self, key: &'static str) -> Option<Text> {
        if !self.table.contains_key(key) {
            self.missing(key, "a string");
        }
        self.text(key)
    }

    /// Reads a string that must be one of `words`, or returns the default.
    pub(super) fn choice<T: Copy>(&mut self, key: &'static str, default: T, words: &[(&str, T)]) -> T {
        let Some(text) = self.text(key) else {
            return default;
        };
        if let Some((_, chosen)) = words.iter().find(|(word, _)| *word == text.value) {
            return *chosen;
        }
        let words: Vec<_> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
        self.invalid(&text, key, &format!("must be one of {}", words.join(", ")));
        default
    }

    /// Reads a table. If it is not set, `read` gets an empty one.
    pub(super) fn section<R>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Section<'s, '_>) -> R,
    ) -> R {
        let (table, line) = self.table(key).unwrap_or((DeTable::new(), self.line));
        self.child(key, table, line, read)
    }

    /// Reads an optional table. Returns `None` if it is not set, or if it is not a table: then a fault is recorded.
    pub(super) fn optional_section<R>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Section<'s, '_>) -> R,
    ) -> Option<R> {
        let (table, line) = self.table(key)?;
        Some(self.child(key, table, line, read))
    }

    fn table(&mut self, key: &'static str) -> Option<(DeTable<'i>, usize)> {
        match self.take(key)? {
            Field { value: DeValue::Table(table), line } => Some((table, line)),
            Field { value, line } => {
                self.wrong_type(line, key, &value, "a table");
                None
            }
        }
    }

    /// Reads an array of tables, in order. An element that is not a table is a fault and left out.
    /// Returns `None` if the key is not set or is not an array.
    pub(super) fn sections<R>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Section<'s, '_>) -> R,
    ) -> Option<Vec<R>> {
        let array = match self.take(key)? {
            Field { value: DeValue::Array(array), .. } => array,
            Field { value, line } => {
                self.wrong_type(line, key, &value, &format!("an array of tables, `[[{key}]]`"));
                return None;
            }
        };
        let mut results = Vec::new();
        for item in array {
            let (line, _) = self.sink.position(item.span().start);
            match item.into_inner() {
                DeValue::Table(table) => results.push(self.child(key, table, line, &mut read)),
                other => self.wrong_element(line, key, &other, "a table"),
            }
        }
        Some(results)
    }

    /// Reads an array of strings. An element that is not a string is a fault and left out.
    pub(super) fn texts(&mut self, key: &'static str) -> Option<Vec<Text>> {
        match self.take(key)? {
            Field { value: DeValue::Array(array), .. } => Some(self.strings(key, array)),
            Field { value, line } => {
                self.wrong_type(line, key, &value, "an array of strings");
                None
            }
        }
    }

    /// Reads a table of strings, in the order of the file.
    pub(super) fn pairs(&mut self, key: &'static str) -> Option<Vec<(Text, Text)>> {
        match self.take(key)? {
            Field { value: DeValue::Table(table), .. } => Some(self.string_pairs(key, table)),
            Field { value, line } => {
                self.wrong_type(line, key, &value, "a table of strings");
                None
            }
        }
    }

    /// Reads an array of strings, or a table of strings: then each name has its value.
    pub(super) fn texts_or_pairs(&mut self, key: &'static str) -> Option<Vec<(Text, Option<Text>)>> {
        match self.take(key)? {
            Field { value: DeValue::Array(array), .. } => {
                Some(self.strings(key, array).into_iter().map(|text| (text, None)).collect())
            }
            Field { value: DeValue::Table(table), .. } => {
                let pairs = self.string_pairs(key, table).into_iter();
                Some(pairs.map(|(name, value)| (name, Some(value))).collect())
            }
            Field { value, line } => {
                self.wrong_type(line, key, &value, "an array or a table of strings");
                None
            }
        }
    }

    /// Reads a table of tables whose names the operator chooses, in the order of the file.
    pub(super) fn named_sections<R>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Section<'s, '_>, Text) -> R,
    ) -> Vec<R> {
        let table = match self.take(key) {
            None => return Vec::new(),
            Some(Field { value: DeValue::Table(table), .. }) => table,
            Some(Field { value, line }) => {
                self.wrong_type(line, key, &value, "a table of tables");
                return Vec::new();
            }
        };
        let mut results = Vec::new();
        for (name, value) in self.in_order(table) {
            match value {
                DeValue::Table(table) => {
                    // Messages do not show the name: any text is allowed there, so it may be a secret.
                    let inner = format!("{key}.<name>");
                    let line = name.line;
                    results.push(self.child(&inner, table, line, |t| read(t, name)));
                }
                other => self.wrong_element(name.line, key, &other, "a table"),
            }
        }
        results
    }

    fn strings(&self, key: &str, array: DeArray<'_>) -> Vec<Text> {
        let mut texts = Vec::new();
        for item in array {
            let (line, _) = self.sink.position(item.span().start);
            match item.into_inner() {
                DeValue::String(text) => texts.push(Text { value: text.into_owned(), line }),
                other => self.wrong_element(line, key, &other, "a string"),
            }
        }
        texts
    }

    fn string_pairs(&self, key: &str, table: DeTable<'_>) -> Vec<(Text, Text)> {
        let mut pairs = Vec::new();
        for (name, value) in self.in_order(table) {
            match value {
                DeValue::String(text) => {
                    let line = name.line;
                    pairs.push((name, Text { value: text.into_owned(), line }));
                }
                other => self.wrong_element(name.line, key, &other, "a string"),
            }
        }
        pairs
    }

    /// The entries of a table in the order of the file; the TOML parser sorts them by name.
    fn in_order<'v>(&self, table: DeTable<'v>) -> Vec<(Text, DeValue<'v>)> {
        let mut entries: Vec<_> = table.into_iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        let text = |(name, value): (Spanned<DeString<'v>>, Spanned<DeValue<'v>>)| {
            let (line, _) = self.sink.position(name.span().start);
            (Text { value: name.into_inner().into_owned(), line }, value.into_inner())
        };
        entries.into_iter().map(text).collect()
    }

    /// Reads a string, or a table with `read`. `Err` holds the string. Returns `None` if the
    /// key is not set or is neither of the two.
    pub(super) fn text_or_section<R>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Section<'s, '_>) -> R,
    ) -> Option<Result<R, Text>> {
        match self.take(key)? {
            Field { value: DeValue::String(text), line } => {
                Some(Err(Text { value: text.into_owned(), line }))
            }
            Field { value: DeValue::Table(table), line } => Some(Ok(self.child(key, table, line, read))),
            Field { value, line } => {
                self.wrong_type(line, key, &value, "a string or `{ file = \"path\" }`");
                None
            }
        }
    }

    fn child<R>(
        &self,
        key: &str,
        table: DeTable<'_>,
        line: usize,
        read: impl FnOnce(&mut Section<'s, '_>) -> R,
    ) -> R {
        let prefix = format!("{}{key}.", self.prefix);
        let mut section = Section::new(self.sink, table, prefix, line);
        let result = read(&mut section);
        section.finish();
        result
    }

    pub(super) fn take(&mut self, key: &'static str) -> Option<Field<'i>> {
        self.known.push(key);
        let (key, value) = self.table.remove_entry(key)?;
        Some(Field { value: value.into_inner(), line: self.sink.position(key.span().start).0 })
    }

    pub(super) fn missing(&self, key: &str, needed: &str) {
        self.fault(self.line, key, &format!("is missing; {needed} is required"));
    }

    pub(super) fn wrong_type(&self, line: usize, key: &str, found: &DeValue<'_>, needed: &str) {
        self.fault(line, key, &format!("is {}; must be {needed}", type_name(found)));
    }

    fn wrong_element(&self, line: usize, key: &str, found: &DeValue<'_>, needed: &str) {
        self.fault(line, key, &format!("contains {}; each element must be {needed}", type_name(found)));
    }

    /// Ends the section: keys that were not read are unknown.
    fn finish(self) {
        for key in self.table.keys() {
            let (line, _) = self.sink.position(key.span().start);
            let written = key.get_ref().as_ref();
            let name = if is_harmless(written) {
                format!("unknown key `{}{written}`", self.prefix)
            } else {
                match self.prefix.trim_end_matches('.') {
                    "" => "unknown key at the top level".to_owned(),
                    section => format!("unknown key in `{section}`"),
                }
            };
            let hint = match nearest(written, &self.known) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("must be one of `{}`", self.known.join("`, `")),
            };
            self.sink.fault(line, format!("{name}; {hint}"));
        }
    }
}

/// The type of `value`, as messages name it.
fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_from_one() {
        let sink = Sink::new("a\nüb\n\nc", "f");
        for (offset, expected) in [
            (0, (1, 1)),
            (1, (1, 2)),
            (2, (2, 1)),
            (3, (2, 1)),
            (4, (2, 2)),
            (6, (3, 1)),
            (7, (4, 1)),
            (8, (4, 2)),
            (99, (4, 2)),
        ] {
            assert_eq!(sink.position(offset), expected, "{offset}");
        }
    }
}

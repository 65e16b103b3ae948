//! A reader over TOML's spanned tree that notes every fault with its line.
//!
//! A [`Section`] hands out its keys one by one, checked; what nobody asked for
//! when it ends is unknown. A wrong value is noted and its default handed out,
//! so that reading goes on. No message holds a string value, as that may be a key.

use std::{cell::RefCell, fmt::Display, time::Duration};

use toml::Spanned;
use toml::de::{DeArray, DeString, DeTable, DeValue};

use crate::config::suggest::{is_harmless, nearest};

/// Collects faults, each with the line it belongs to.
pub(super) struct Sink<'t> {
    text: &'t str,
    label: &'t str,
    /// Offset of each line's first byte; `line_starts[0] == 0`, ascending.
    line_starts: Vec<usize>,
    faults: RefCell<Vec<(usize, String)>>,
}

/// An inclusive range of allowed numbers.
#[derive(Clone, Copy)]
pub(super) struct Range<T> {
    pub(super) min: T,
    pub(super) max: T,
}

/// A number that need not be given.
#[derive(Clone, Copy)]
pub(super) struct Number<T> {
    pub(super) default: T,
    pub(super) range: Range<T>,
}

/// A string and its line.
pub(super) struct Text {
    pub(super) value: String,
    pub(super) line: usize,
}

/// One table while it is being read.
pub(super) struct Section<'s, 'i> {
    sink: &'s Sink<'s>,
    table: DeTable<'i>,
    /// Its name in messages, with a dot at the end; empty for the document.
    prefix: String,
    line: usize,
    /// Every key asked for so far.
    known: Vec<&'static str>,
}

/// The keys of one entry, as they were taken out of their table.
struct Field<'i> {
    value: DeValue<'i>,
    line: usize,
}

/// Reads the sink's text; `None` if it is no TOML.
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

impl<T> Range<T> {
    /// `min` to `max`, both included.
    pub(super) const fn new(min: T, max: T) -> Self {
        Self { min, max }
    }

    /// This range for a key that may be left out.
    pub(super) const fn or(self, default: T) -> Number<T>
    where
        T: Copy,
    {
        Number { default, range: self }
    }
}

impl<'t> Sink<'t> {
    /// An empty sink for `text`, which messages call `label`.
    pub(super) fn new(text: &'t str, label: &'t str) -> Self {
        let breaks = text.match_indices('\n').map(|(offset, _)| offset + 1);
        Self {
            text,
            label,
            line_starts: std::iter::once(0).chain(breaks).collect(),
            faults: RefCell::default(),
        }
    }

    /// Notes a fault.
    pub(super) fn fault(&self, line: usize, what: impl Into<String>) {
        self.faults.borrow_mut().push((line, what.into()));
    }

    /// How many faults there are by now.
    pub(super) fn count(&self) -> usize {
        self.faults.borrow().len()
    }

    /// All faults in the order of their lines, as `FILE:LINE: what`.
    pub(super) fn into_messages(self) -> Vec<String> {
        let mut faults = self.faults.into_inner();
        faults.sort_by_key(|(line, _)| *line);
        faults.dedup();
        let label = self.label;
        faults.into_iter().map(|(line, what)| format!("{label}:{line}: {what}")).collect()
    }

    /// Line and column (in characters) of a byte offset, both from 1.
    fn position(&self, offset: usize) -> (usize, usize) {
        let line = self.line_starts.partition_point(|start| *start <= offset);
        let start = line.checked_sub(1).and_then(|i| self.line_starts.get(i));
        let before = start.and_then(|start| self.text.get(*start..offset.min(self.text.len())));
        (line.max(1), before.map_or(0, |b| b.chars().count()) + 1)
    }
}

impl<'s, 'i> Section<'s, 'i> {
    fn new(sink: &'s Sink<'s>, table: DeTable<'i>, prefix: String, line: usize) -> Self {
        Self { sink, table, prefix, line, known: Vec::new() }
    }

    /// Where this section's faults go.
    pub(super) fn sink(&self) -> &'s Sink<'s> {
        self.sink
    }

    /// The line of its header.
    pub(super) fn line(&self) -> usize {
        self.line
    }

    /// The line of `key` while it has not been taken yet.
    pub(super) fn line_of(&self, key: &str) -> Option<usize> {
        let (key, _) = self.table.get_key_value(key)?;
        Some(self.sink.position(key.span().start).0)
    }

    /// Notes a fault of `key`: `what` follows its name.
    pub(super) fn fault(&self, line: usize, key: &str, what: &str) {
        let prefix = &self.prefix;
        self.sink.fault(line, format!("`{prefix}{key}` {what}"));
    }

    /// A number, or its default.
    pub(super) fn number<T>(&mut self, key: &'static str, number: Number<T>) -> T
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        self.optional(key, number.range).unwrap_or(number.default)
    }

    /// A number that may be left out.
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
            let what = format!("is far out of range; allowed: {min} to {max}");
            self.fault(line, key, &what);
            return None;
        };
        match T::try_from(wide) {
            Ok(number) if number >= min && number <= max => Some(number),
            _ => {
                let what = format!("is {wide}; allowed: {min} to {max}");
                self.fault(line, key, &what);
                None
            }
        }
    }

    /// A number that must be there; `None` is a noted fault.
    pub(super) fn required<T>(&mut self, key: &'static str, range: Range<T>) -> Option<T>
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        if !self.table.contains_key(key) {
            let Range { min, max } = range;
            self.missing(key, &format!("an integer, {min} to {max}, is needed"));
        }
        self.optional(key, range)
    }

    /// A number of seconds, or its default.
    pub(super) fn seconds(&mut self, key: &'static str, number: Number<u64>) -> Duration {
        Duration::from_secs(self.number(key, number))
    }

    /// A number of milliseconds, or its default.
    pub(super) fn millis(&mut self, key: &'static str, number: Number<u64>) -> Duration {
        Duration::from_millis(self.number(key, number))
    }

    /// `true` or `false`, or its default.
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

    /// A string that may be left out.
    pub(super) fn text(&mut self, key: &'static str) -> Option<Text> {
        match self.take(key)? {
            Field { value: DeValue::String(text), line } => Some(Text { value: text.into_owned(), line }),
            Field { value, line } => {
                self.wrong_type(line, key, &value, "a string");
                None
            }
        }
    }

    /// A string that must be there; `None` is a noted fault.
    pub(super) fn required_text(&mut self, key: &'static str) -> Option<Text> {
        if !self.table.contains_key(key) {
            self.missing(key, "a string is needed");
        }
        self.text(key)
    }

    /// One of a few words, or its default.
    pub(super) fn choice<T: Copy>(&mut self, key: &'static str, default: T, words: &[(&str, T)]) -> T {
        let Some(Text { value, line }) = self.text(key) else {
            return default;
        };
        if let Some((_, chosen)) = words.iter().find(|(word, _)| *word == value) {
            return *chosen;
        }
        let words: Vec<_> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
        let what = format!("is none of its words; allowed: {}", words.join(", "));
        self.fault(line, key, &what);
        default
    }

    /// A table; one that is not there is read as an empty one.
    pub(super) fn section<R>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Section<'s, '_>) -> R,
    ) -> R {
        let (table, line) = match self.take(key) {
            Some(Field { value: DeValue::Table(table), line }) => (table, line),
            Some(Field { value, line }) => {
                self.wrong_type(line, key, &value, "a table");
                (DeTable::new(), line)
            }
            None => (DeTable::new(), self.line),
        };
        self.child(key, table, line, read)
    }

    /// The tables of an array, in order; those that are none are noted. `None`
    /// if the key is absent or no array.
    pub(super) fn sections<R>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Section<'s, '_>) -> R,
    ) -> Option<Vec<R>> {
        let array = match self.take(key)? {
            Field { value: DeValue::Array(array), .. } => array,
            Field { value, line } => {
                let needed = format!("an array of tables, `[[{key}]]`,");
                self.wrong_type(line, key, &value, &needed);
                return None;
            }
        };
        let mut results = Vec::new();
        for item in array {
            let (line, _) = self.sink.position(item.span().start);
            match item.into_inner() {
                DeValue::Table(table) => results.push(self.child(key, table, line, &mut read)),
                other => self.wrong_type(line, key, &other, "a table"),
            }
        }
        Some(results)
    }

    /// An array of strings. One that is no array is noted, and so is what is no string in it.
    pub(super) fn texts(&mut self, key: &'static str) -> Option<Vec<Text>> {
        match self.take(key)? {
            Field { value: DeValue::Array(array), .. } => Some(self.strings(key, array)),
            Field { value, line } => {
                self.wrong_type(line, key, &value, "an array of strings");
                None
            }
        }
    }

    /// A table of strings, in the order of the file.
    pub(super) fn pairs(&mut self, key: &'static str) -> Option<Vec<(Text, Text)>> {
        match self.take(key)? {
            Field { value: DeValue::Table(table), .. } => Some(self.string_pairs(key, table)),
            Field { value, line } => {
                self.wrong_type(line, key, &value, "a table of strings");
                None
            }
        }
    }

    /// An array of strings, or a table of them: then each has its value.
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

    /// A table of tables with names of the operator's own, in the order of the file.
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
                    // Not the name itself: what stands where no key is expected may be a secret.
                    let inner = format!("{key}.<name>");
                    let line = name.line;
                    results.push(self.child(&inner, table, line, |t| read(t, name)));
                }
                other => self.wrong_type(name.line, key, &other, "a table for each name"),
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
                other => self.wrong_type(line, key, &other, "a string in each place"),
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
                other => self.wrong_type(name.line, key, &other, "a string for each name"),
            }
        }
        pairs
    }

    /// The entries of a table in the order of the file; the reader itself sorts them by name.
    fn in_order<'v>(&self, table: DeTable<'v>) -> Vec<(Text, DeValue<'v>)> {
        let mut entries: Vec<_> = table.into_iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        let text = |(name, value): (Spanned<DeString<'v>>, Spanned<DeValue<'v>>)| {
            let (line, _) = self.sink.position(name.span().start);
            (Text { value: name.into_inner().into_owned(), line }, value.into_inner())
        };
        entries.into_iter().map(text).collect()
    }

    /// A string, or a table that `read` makes something of. `Err` holds the
    /// string; `None` if there is neither.
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

    fn take(&mut self, key: &'static str) -> Option<Field<'i>> {
        self.known.push(key);
        let (key, value) = self.table.remove_entry(key)?;
        Some(Field { value: value.into_inner(), line: self.sink.position(key.span().start).0 })
    }

    fn missing(&self, key: &str, needed: &str) {
        self.fault(self.line, key, &format!("is missing; {needed}"));
    }

    fn wrong_type(&self, line: usize, key: &str, found: &DeValue<'_>, needed: &str) {
        let found = match found {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "an integer",
            DeValue::Float(_) => "a float",
            DeValue::Boolean(_) => "a boolean",
            DeValue::Datetime(_) => "a date or time",
            DeValue::Array(_) => "an array",
            DeValue::Table(_) => "a table",
        };
        self.fault(line, key, &format!("is {found}; {needed} is needed"));
    }

    /// Notes what nobody asked for.
    fn finish(self) {
        for key in self.table.keys() {
            let (line, _) = self.sink.position(key.span().start);
            let written = key.get_ref().as_ref();
            let name = if is_harmless(written) {
                format!("unknown key `{}{written}`", self.prefix)
            } else {
                format!("unknown key in `{}`", self.prefix.trim_end_matches('.'))
            };
            let hint = match nearest(written, &self.known) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("allowed: `{}`", self.known.join("`, `")),
            };
            self.sink.fault(line, format!("{name}; {hint}"));
        }
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

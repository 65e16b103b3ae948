//! The strings of a section: single ones, arrays and tables of them. Variables are expanded in each.

use toml::Spanned;
use toml::de::{DeArray, DeString, DeTable, DeValue};

use crate::config::expand::expand;
use crate::config::text::{Text, key_name, shown_name};
use crate::config::toml_reader::{Field, Section};

/// The value of a key that may be either.
pub(super) enum TextOrTable<R> {
    Text(Text),
    /// What was read from the table.
    Table(R),
}

impl<'s> Section<'s, '_> {
    /// Expands the variables of a string. If that fails, records faults and returns `None`.
    pub(super) fn read_text(&self, value: String, place: String, line: usize) -> Option<Text> {
        match expand(&value, self.env) {
            Ok(None) => Some(Text::new(value, None, place, line)),
            Ok(Some(expanded)) => Some(Text::new(expanded, Some(value), place, line)),
            Err(faults) => {
                faults.iter().for_each(|what| self.sink.fault(line, format!("`{place}` {what}")));
                None
            }
        }
    }

    /// Records a fault of `text`: `what` follows its place.
    pub(super) fn fault_of(&self, text: &Text, what: &str) {
        self.sink.fault(text.line, format!("`{}` {what}", text.place));
    }

    /// Records that `text` is wrong, shown if it cannot be a secret; `allowed` says what it must be.
    pub(super) fn invalid(&self, text: &Text, allowed: &str) {
        self.fault_of(text, &format!("{}; {allowed}", text.found()));
    }

    /// Reads an optional string.
    pub(super) fn text(&mut self, key: &'static str) -> Option<Text> {
        match self.take(key)? {
            Field { value: DeValue::String(text), line } => {
                self.read_text(text.into_owned(), self.place_of(key), line)
            }
            Field { value, line } => {
                self.wrong_type(line, key, &value, "a string, in quotes");
                None
            }
        }
    }

    /// Reads a required string. If it is missing or not a string, records a fault and returns `None`.
    pub(super) fn required_text(&mut self, key: &'static str) -> Option<Text> {
        if self.line_of(key).is_none() {
            self.missing(key, "a string");
        }
        self.text(key)
    }

    /// Reads a string that must be one of `words`, or returns the default.
    pub(super) fn choice<T: Copy>(&mut self, key: &'static str, default: T, words: &[(&str, T)]) -> T {
        self.text(key).and_then(|text| self.word(&text, words)).unwrap_or(default)
    }

    /// Returns the value of a word. If `text` is none of `words`, records a fault and returns `None`.
    pub(super) fn word<T: Copy>(&self, text: &Text, words: &[(&str, T)]) -> Option<T> {
        let chosen = words.iter().find(|(word, _)| *word == text.value).map(|(_, value)| *value);
        if chosen.is_none() {
            let words: Vec<_> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
            self.invalid(text, &format!("must be one of {}", words.join(", ")));
        }
        chosen
    }

    /// Reads an array of strings. An element that is not a string is a fault and left out.
    pub(super) fn texts(&mut self, key: &'static str) -> Option<Vec<Text>> {
        match self.take(key)? {
            Field { value: DeValue::Array(array), .. } => Some(self.strings(key, array)),
            Field { value, line } => {
                self.wrong_type(line, key, &value, "an array of strings, such as `[\"a\", \"b\"]`");
                None
            }
        }
    }

    /// Reads an array of strings with `parse`. A string that `parse` refuses is a fault and left out; `allowed` says
    /// what it must be.
    pub(super) fn parsed_texts<T>(
        &mut self,
        key: &'static str,
        allowed: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Vec<T> {
        let mut values = Vec::new();
        for text in self.texts(key).unwrap_or_default() {
            match parse(&text.value) {
                Some(value) => values.push(value),
                None => self.invalid(&text, allowed),
            }
        }
        values
    }

    /// Reads a table of strings, in the order of the file.
    pub(super) fn pairs(&mut self, key: &'static str) -> Option<Vec<(Text, Text)>> {
        match self.take(key)? {
            Field { value: DeValue::Table(table), .. } => Some(self.string_pairs(key, table)),
            Field { value, line } => {
                self.wrong_type(line, key, &value, "a table of strings, such as `{ \"a\" = \"b\" }`");
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
                let needed = "an array of strings, such as `[\"a\", \"b\"]`, or a table of strings, such as \
                              `{ \"a\" = \"b\" }`";
                self.wrong_type(line, key, &value, needed);
                None
            }
        }
    }

    /// Reads a string, or a table with `read`. Returns `None` if the key is not set, or if a fault is recorded.
    pub(super) fn text_or_table<R>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Section<'s, '_>) -> Option<R>,
    ) -> Option<TextOrTable<R>> {
        match self.take(key)? {
            Field { value: DeValue::String(text), line } => {
                self.read_text(text.into_owned(), self.place_of(key), line).map(TextOrTable::Text)
            }
            Field { value: DeValue::Table(table), line } => {
                self.child(key, table, line, read).map(TextOrTable::Table)
            }
            Field { value, line } => {
                self.wrong_type(line, key, &value, "a string, in quotes, or `{ file = \"path\" }`");
                None
            }
        }
    }

    fn strings(&self, key: &str, array: DeArray<'_>) -> Vec<Text> {
        let mut texts = Vec::new();
        for (index, item) in array.into_iter().enumerate() {
            let (line, _) = self.sink.position(item.span().start);
            let place = format!("{}[{index}]", self.place_of(key));
            match item.into_inner() {
                DeValue::String(text) => texts.extend(self.read_text(text.into_owned(), place, line)),
                other => self.wrong_element(line, &place, &other, "a string, in quotes"),
            }
        }
        texts
    }

    fn string_pairs(&self, key: &str, table: DeTable<'_>) -> Vec<(Text, Text)> {
        let mut pairs = Vec::new();
        for (name, value) in self.in_order(key, table) {
            match value {
                DeValue::String(text) => {
                    let value = self.read_text(text.into_owned(), name.place.clone(), name.line);
                    pairs.extend(value.map(|value| (name, value)));
                }
                DeValue::Table(inner) => self.dotted_name(&name, dotted(&name.value, inner).as_str()),
                other => self.wrong_element(name.line, &name.place, &other, "a string, in quotes"),
            }
        }
        pairs
    }

    /// Records that a name with a dot lacks quotes: TOML reads `gpt-4.1` as a table `1` in a table `gpt-4`.
    pub(super) fn dotted_name(&self, outer: &Text, whole: &str) {
        let name = shown_name(whole);
        self.fault_of(outer, &format!("is a table; a name with a dot needs quotes: `{name:?}`"));
    }

    /// The entries of a table in the order of the file; the TOML parser sorts them by name.
    pub(super) fn in_order<'v>(&self, key: &str, table: DeTable<'v>) -> Vec<(Text, DeValue<'v>)> {
        let mut entries: Vec<_> = table.into_iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        let text = |(name, value): (Spanned<DeString<'v>>, Spanned<DeValue<'v>>)| {
            let (line, _) = self.sink.position(name.span().start);
            let name = name.into_inner().into_owned();
            let place = format!("{}.{}", self.place_of(key), key_name(&name));
            (Text::new(name, None, place, line), value.into_inner())
        };
        entries.into_iter().map(text).collect()
    }
}

/// Joins a name that TOML split at its dots: `gpt-4` with a table of the key `1` is `gpt-4.1`.
fn dotted(name: &str, table: DeTable<'_>) -> String {
    let mut name = name.to_owned();
    let mut next = Some(table);
    while let Some((key, value)) = next.take().and_then(|table| table.into_iter().next()) {
        name = format!("{name}.{}", key.into_inner());
        if let DeValue::Table(table) = value.into_inner() {
            next = Some(table);
        }
    }
    name
}

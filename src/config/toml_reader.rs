//! A reader over TOML's spanned tree that records every fault with its line.
//!
//! A [`Section`] returns its keys one by one, checked. A key that was not read
//! when the section ends is unknown. For a wrong value the reader records a fault and
//! returns the default, so that reading continues. A message shows a string value only
//! if the value cannot be a key ([`Text::shown`]).

use toml::de::{DeTable, DeValue};

use crate::config::expand::Env;
use crate::config::fault_sink::Sink;
use crate::config::suggest::{hint, nearest};
use crate::config::syntax;
use crate::config::text::{Text, key_name, may_show, shown_name};

/// A table that is being read.
pub(super) struct Section<'s, 'i> {
    pub(super) sink: &'s Sink<'s>,
    /// Where the values of variables come from.
    pub(super) env: Env<'s>,
    table: DeTable<'i>,
    /// Place of the table in messages, with a dot at the end: `backends[0].`; empty for the document.
    prefix: String,
    /// The table as the manual writes it: `backends`, `models.NAME.targets`; empty for the document.
    kind: String,
    /// The line of its header.
    line: usize,
    /// All keys read so far, set or not.
    known: Vec<&'static str>,
}

/// Where a table is.
struct Position {
    /// As messages write it: `backends[0]`.
    place: String,
    /// As the manual writes it: `backends`.
    kind: String,
    line: usize,
}

/// The value of one key, removed from its table.
pub(super) struct Field<'i> {
    pub(super) value: DeValue<'i>,
    pub(super) line: usize,
}

/// Reads the text of `sink`. Returns `None` if the text is not TOML: then the syntax errors are recorded.
pub(super) fn document<'s, R>(
    sink: &'s Sink<'s>,
    env: Env<'s>,
    read: impl FnOnce(&mut Section<'s, '_>) -> R,
) -> Option<R> {
    let (root, errors) = DeTable::parse_recoverable(sink.text);
    if !errors.is_empty() {
        syntax::record(sink, &errors);
        return None;
    }
    let (table, line) = (root.into_inner(), 1);
    let (prefix, kind, known) = (String::new(), String::new(), Vec::new());
    let mut section = Section { sink, env, table, prefix, kind, line, known };
    let result = read(&mut section);
    section.finish();
    Some(result)
}

impl<'s, 'i> Section<'s, 'i> {
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

    /// The section's own place, as messages write it: `backends[0]`.
    pub(super) fn place(&self) -> &str {
        self.prefix.trim_end_matches('.')
    }

    /// The whole name of the place of `key`, as messages write it.
    pub(super) fn place_of(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Records a fault of `key`: `what` follows its name.
    pub(super) fn fault(&self, line: usize, key: &str, what: &str) {
        let prefix = &self.prefix;
        self.sink.fault(line, format!("`{prefix}{key}` {what}"));
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
                let needed = match self.prefix.as_str() {
                    "" => format!("a table, `[{key}]`"),
                    _ => format!("a table, `{key} = {{ … }}`"),
                };
                self.wrong_type(line, key, &value, &needed);
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
                let needed = match self.kind.as_str() {
                    "" | "admin" | "server" => format!("an array of tables, `[[{}{key}]]`", self.prefix),
                    _ => format!("an array of tables, `{key} = [{{ … }}]`"),
                };
                self.wrong_type(line, key, &value, &needed);
                return None;
            }
        };
        let mut results = Vec::new();
        for (index, item) in array.into_iter().enumerate() {
            let (line, _) = self.sink.position(item.span().start);
            let place = format!("{}[{index}]", self.place_of(key));
            match item.into_inner() {
                DeValue::Table(table) => {
                    let at = Position { place, kind: self.kind_of(key), line };
                    results.push(self.child_at(at, table, &mut read));
                }
                other => self.wrong_element(line, &place, &other, "a table, `{ key = value }`"),
            }
        }
        Some(results)
    }

    /// Reads a table of tables whose names the operator chooses, in the order of the file. `members` are the keys
    /// that each table may have; a table under another key is the rest of a name with a dot.
    pub(super) fn named_sections<R>(
        &mut self,
        key: &'static str,
        members: &[&str],
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
        for (name, value) in self.in_order(key, table) {
            match value {
                DeValue::Table(mut table) => {
                    let is_split = self.split_names(key, &name.value, &mut table, members);
                    if !is_split || !table.is_empty() {
                        let kind = format!("{}.NAME", self.kind_of(key));
                        let at = Position { place: name.place.clone(), kind, line: name.line };
                        results.push(self.child_at(at, table, |t| read(t, name)));
                    }
                }
                other => {
                    let needed = format!("a table with `{}`", members.first().unwrap_or(&"keys"));
                    self.wrong_element(name.line, &name.place, &other, &needed);
                }
            }
        }
        results
    }

    /// Removes from the table `name` all tables that are the rest of a name with a dot, and records a fault for each.
    /// Returns whether there was any. The parser limits the depth.
    fn split_names(&self, key: &str, name: &str, table: &mut DeTable<'_>, members: &[&str]) -> bool {
        let is_rest =
            |part: &str| !members.contains(&part) && nearest(part, members).is_none() && !part.is_empty();
        let parts = table.iter().filter(|(part, value)| {
            matches!(value.get_ref(), DeValue::Table(_)) && is_rest(part.get_ref().as_ref())
        });
        let parts: Vec<String> = parts.map(|(part, _)| part.get_ref().as_ref().to_owned()).collect();
        for part in &parts {
            let Some((part, value)) = table.remove_entry(part.as_str()) else { continue };
            let (line, _) = self.sink.position(part.span().start);
            let whole = format!("{name}.{}", part.get_ref());
            let DeValue::Table(mut inner) = value.into_inner() else { continue };
            if !self.split_names(key, &whole, &mut inner, members) || !inner.is_empty() {
                let name = shown_name(&whole);
                let (as_written, fixed) = match self.prefix.as_str() {
                    "" => (format!("[{key}.{name}]"), format!("[{key}.{name:?}]")),
                    _ => (self.place_of(key), format!("{name:?}")),
                };
                let what = format!("`{as_written}`: a name with a dot needs quotes: `{fixed}`");
                self.sink.fault(line, what);
            }
        }
        !parts.is_empty()
    }

    fn kind_of(&self, key: &str) -> String {
        if self.kind.is_empty() { key.to_owned() } else { format!("{}.{key}", self.kind) }
    }

    pub(super) fn child<R>(
        &self,
        key: &str,
        table: DeTable<'_>,
        line: usize,
        read: impl FnOnce(&mut Section<'s, '_>) -> R,
    ) -> R {
        self.child_at(Position { place: self.place_of(key), kind: self.kind_of(key), line }, table, read)
    }

    fn child_at<R>(
        &self,
        at: Position,
        table: DeTable<'_>,
        read: impl FnOnce(&mut Section<'s, '_>) -> R,
    ) -> R {
        let Position { place, kind, line } = at;
        let (sink, env, prefix, known) = (self.sink, self.env, format!("{place}."), Vec::new());
        let mut section = Section { sink, env, table, prefix, kind, line, known };
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

    pub(super) fn wrong_element(&self, line: usize, place: &str, found: &DeValue<'_>, needed: &str) {
        self.sink.fault(line, format!("`{place}` is {}; must be {needed}", type_name(found)));
    }

    /// Ends the section: keys that were not read are unknown.
    fn finish(self) {
        for key in self.table.keys() {
            let (line, _) = self.sink.position(key.span().start);
            let written = key.get_ref().as_ref();
            let name = match (may_show(written), self.place()) {
                (true, _) => format!("unknown key `{}{}`", self.prefix, key_name(written)),
                (_, "") => "unknown key at the top level".to_owned(),
                (_, section) => format!("unknown key in `{section}`"),
            };
            let what = format!("{name}; {}", hint(&self.kind, written, &self.known));
            self.sink.fault(line, what);
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

//! The numbers and booleans of a section. Each may be a string with a variable.

use std::fmt::Display;
use std::time::Duration;

use toml::de::DeValue;

use crate::config::range::{Number, Range};
use crate::config::text::Text;
use crate::config::toml_reader::{Field, Section};

impl<'i> Section<'_, 'i> {
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
        self.integer(key, range, "")
    }

    /// Reads an optional number that limits something.
    pub(super) fn limit<T>(&mut self, key: &'static str, range: Range<T>) -> Option<T>
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        self.integer(key, range, ", or left out for no limit")
    }

    /// Reads an optional number; `more` says what is allowed beside `range`.
    fn integer<T>(&mut self, key: &'static str, range: Range<T>, more: &str) -> Option<T>
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        let field = self.take(key)?;
        let line = field.line;
        let Range { min, max } = range;
        let needed = format!("an integer from {min} to {max}");
        let wide = match self.unquoted(key, field, &needed)? {
            Ok(DeValue::Integer(integer)) => i128::from_str_radix(integer.as_str(), integer.radix()).ok(),
            Ok(other) => {
                self.wrong_type(line, key, &other, &needed);
                return None;
            }
            Err(text) => {
                let number = text.value.parse().ok();
                if number.is_none() {
                    self.invalid(&text, &format!("must be {needed}"));
                    return None;
                }
                number
            }
        };
        let number = wide.and_then(|wide| T::try_from(wide).ok());
        let number = number.filter(|number| (min..=max).contains(number));
        if number.is_none() {
            let found = wide.map_or("far out of range".to_owned(), |wide| wide.to_string());
            self.fault(line, key, &format!("is {found}; must be from {min} to {max}{more}"));
        }
        number
    }

    /// Returns a value that must not be a plain string. `Err` holds a string with a variable, such as `"${PORT}"`, for
    /// the caller to parse. Any other string is a fault; `needed` says what the value must be.
    pub(super) fn unquoted(
        &self,
        key: &str,
        field: Field<'i>,
        needed: &str,
    ) -> Option<Result<DeValue<'i>, Text>> {
        let line = field.line;
        let DeValue::String(text) = field.value else { return Some(Ok(field.value)) };
        let text = self.read_text(text.into_owned(), self.place_of(key), line)?;
        if text.is_variable() {
            return Some(Err(text));
        }
        let found = text.shown().map_or("a string".to_owned(), |shown| format!("the string {shown}"));
        self.fault(line, key, &format!("is {found}; must be {needed}, without quotes"));
        None
    }

    /// Reads a required number. If it is missing or not valid, records a fault and returns `None`.
    pub(super) fn required<T>(&mut self, key: &'static str, range: Range<T>) -> Option<T>
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        if self.line_of(key).is_none() {
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
        const NEEDED: &str = "`true` or `false`";
        let Some(field) = self.take(key) else { return default };
        let line = field.line;
        match self.unquoted(key, field, NEEDED) {
            Some(Ok(DeValue::Boolean(boolean))) => boolean,
            Some(Ok(other)) => {
                self.wrong_type(line, key, &other, NEEDED);
                default
            }
            Some(Err(text)) => text.value.parse().unwrap_or_else(|_invalid| {
                self.invalid(&text, &format!("must be {NEEDED}"));
                default
            }),
            None => default,
        }
    }
}

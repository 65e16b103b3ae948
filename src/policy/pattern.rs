//! The names of models that a configuration lists: whole names and prefixes.

use std::fmt;

/// Longest name that a configuration may contain, in bytes.
pub(crate) const MAX_NAME: usize = crate::json::members::MAX_NAME;

/// A name, or with a trailing `*` a prefix: all names that begin with it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pattern {
    stem: Box<str>,
    is_prefix: bool,
}

impl Pattern {
    /// Parses a pattern: 1 to [`MAX_NAME`] bytes, no control character, `*` only at the end. `None` if it is invalid.
    pub fn parse(text: &str) -> Option<Self> {
        let stem = text.strip_suffix('*').unwrap_or(text);
        let valid = (1..=MAX_NAME).contains(&text.len())
            && !stem.contains('*')
            && !text.chars().any(char::is_control);
        valid.then(|| Pattern { stem: stem.into(), is_prefix: stem.len() < text.len() })
    }

    /// Whether the pattern is a prefix.
    pub fn is_prefix(&self) -> bool {
        self.is_prefix
    }

    /// The name, or the prefix without its `*`.
    pub(crate) fn stem(&self) -> &str {
        &self.stem
    }

    /// Whether the pattern matches `name`.
    pub fn matches(&self, name: &str) -> bool {
        if self.is_prefix { name.starts_with(&*self.stem) } else { *self.stem == *name }
    }
}

/// As the configuration has it.
impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.stem, if self.is_prefix { "*" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_may_have_a_star_only_at_the_end() {
        for (text, valid) in [
            ("a", true),
            ("a*", true),
            ("*", true),
            ("a*b", false),
            ("**", false),
            ("", false),
            ("a\n", false),
        ] {
            assert_eq!(Pattern::parse(text).is_some(), valid, "{text:?}");
        }
        assert!(Pattern::parse(&"x".repeat(MAX_NAME)).is_some());
        assert!(Pattern::parse(&"x".repeat(MAX_NAME + 1)).is_none());
    }
}

//! Reads the keys of backends and clients, from the text, a variable or a file.

use std::io::Read as _;

use crate::config::Secret;
use crate::config::common::Context;
use crate::config::file::{open_regular, unreadable};
use crate::config::strings::TextOrTable;
use crate::config::text::Text;
use crate::config::toml_reader::Section;

/// Largest key file, in bytes.
const MAX_KEY_FILE: usize = 16 << 10;

/// A key that was read.
pub(super) struct ReadKey {
    /// The key; `None` if it is not set or not valid: then a fault is recorded.
    pub(super) key: Option<Secret>,
    /// Whether it is set, valid or not.
    pub(super) is_set: bool,
    /// Whether the text itself contains it.
    pub(super) is_inline: bool,
}

/// Reads a key: a string, or `{ file = "path" }`.
pub(super) fn read_key(t: &mut Section<'_, '_>, name: &'static str, ctx: &Context<'_>) -> ReadKey {
    let line = t.line_of(name);
    let key = match t.text_or_table(name, |t| key_file(t, ctx)) {
        None => return ReadKey { key: None, is_set: line.is_some(), is_inline: false },
        Some(TextOrTable::Text(text)) => return written_key(t, &text),
        Some(TextOrTable::Table(key)) => key,
    };
    let key =
        valid_key(&key, Source::File).map_err(|what| t.fault(line.unwrap_or(t.line()), name, &what)).ok();
    ReadKey { key, is_set: true, is_inline: false }
}

/// Takes a string as a key.
pub(super) fn written_key(t: &Section<'_, '_>, text: &Text) -> ReadKey {
    let source = if is_one_variable(text.written()) { Source::Variable } else { Source::Text };
    let key = valid_key(&text.value, source).map_err(|what| t.fault_of(text, &what)).ok();
    ReadKey { key, is_set: true, is_inline: source == Source::Text }
}

fn valid_key(key: &str, source: Source) -> Result<Secret, String> {
    match placeholder(key, source) {
        Some(what) => Err(what),
        None => Secret::new(key).map_err(str::to_owned),
    }
}

/// Where a key comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The configuration itself.
    Text,
    /// An environment variable.
    Variable,
    /// A file of its own.
    File,
}

/// Whether the text is one variable without a default: then the file does not contain the key.
fn is_one_variable(written: &str) -> bool {
    written.starts_with("${") && written.find('}') == Some(written.len() - 1) && !written.contains(":-")
}

/// Returns a message if `key` is a placeholder, as other programs and examples write them. The message does not contain
/// `key`.
fn placeholder(key: &str, source: Source) -> Option<String> {
    const VARIABLE: &str = "must be the key itself, or `${NAME}` for an environment variable";
    let whole = match source {
        Source::Text => "",
        Source::Variable => " in the variable",
        Source::File => " in the file",
    };
    let (what, allowed) = match key {
        _ if key.starts_with('$') && !key.starts_with("${") => ("begins with `$`", VARIABLE),
        _ if key.starts_with("os.environ/") => ("begins with `os.environ/`, as in litellm", VARIABLE),
        _ if key.starts_with("env.") => ("begins with `env.`", VARIABLE),
        _ if key.starts_with("process.env.") => ("begins with `process.env.`", VARIABLE),
        _ if key.starts_with("{{") => ("begins with `{{`, a template that was not filled in", VARIABLE),
        _ if key.get(..7).is_some_and(|start| start.eq_ignore_ascii_case("bearer ")) => {
            ("begins with `Bearer`, which Zap adds", "must be the key alone")
        }
        _ if key.starts_with('<') && key.ends_with('>') => ("is a placeholder in `<` and `>`", VARIABLE),
        _ if !key.is_empty() && key.chars().all(|c| c == '.' || c == '\u{2026}') => {
            ("is only dots", VARIABLE)
        }
        _ if key.ends_with("...") || key.ends_with('\u{2026}') => {
            ("ends in dots, so a part is missing", "must be the whole key")
        }
        _ if key.starts_with(['"', '\'', '`']) => (
            "begins with a quote",
            "must be without quotes of its own; `docker run --env-file` keeps those of the file",
        ),
        _ => return None,
    };
    Some(format!("{what}{whole}; {allowed}"))
}

/// Reads the content of the file that `{ file = "path" }` names, without its last newline.
fn key_file(t: &mut Section<'_, '_>, ctx: &Context<'_>) -> Option<String> {
    let path = t.required_text("file")?;
    let read = open_regular(&ctx.file(&path)).and_then(|file| {
        let mut key = String::new();
        file.take(MAX_KEY_FILE as u64 + 1).read_to_string(&mut key)?;
        Ok(key)
    });
    match read {
        Ok(key) if key.len() > MAX_KEY_FILE => {
            let what = format!("is too large; must be at most {MAX_KEY_FILE} bytes");
            t.fault_of(&path, &what);
            None
        }
        Ok(mut key) => {
            if key.ends_with('\n') {
                key.pop();
                if key.ends_with('\r') {
                    key.pop();
                }
            }
            Some(key)
        }
        Err(error) => {
            t.fault_of(&path, &unreadable(&error));
            None
        }
    }
}

//! Keys that several sections have, with their ranges, and what the readers of all sections need.

use std::fs::File;
use std::io;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::config::Secret;
use crate::config::range::{Number, Range};
use crate::config::text::Text;
use crate::config::toml_reader::Section;

pub(super) const IN_FLIGHT: Range<usize> = Range::new(1, 1_000_000);
pub(super) const REQUESTS_PER_MINUTE: Range<u32> = Range::new(1, u32::MAX);
pub(super) const TOKENS_PER_MINUTE: Range<u64> = Range::new(1, 1_000_000_000_000);
/// A time in whole seconds.
pub(super) const SECONDS: Range<u64> = Range::new(1, 86_400);
pub(super) const WEIGHT: Range<u32> = Range::new(0, 1000);
pub(super) const PRIORITY: Number<u32> = Range::new(0, 1000).or(0);
/// Longest backend name, in bytes.
pub(super) const MAX_NAME: usize = 64;
/// Largest key file, in bytes.
const MAX_KEY_FILE: usize = 16 << 10;

/// The surroundings of a configuration: the files that the text refers to.
pub(super) struct Context<'a> {
    /// Directory that relative paths are relative to.
    pub(super) base: &'a Path,
}

pub(super) fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

/// Reads `name`. Returns `None` if it is not set, or if it is not valid: then a fault is recorded.
pub(super) fn name(t: &mut Section<'_, '_>) -> Option<Text> {
    let name = t.text("name")?;
    let valid = (1..=MAX_NAME).contains(&name.value.len()) && name.value.chars().all(is_name_char);
    if !valid {
        t.invalid(&name, &format!("must be 1 to {MAX_NAME} characters of `A-Za-z0-9._-`"));
    }
    valid.then_some(name)
}

/// Reads a key. Returns the key, and, if it is set, whether the text itself contains it.
pub(super) fn secret(
    t: &mut Section<'_, '_>,
    name: &'static str,
    ctx: &Context<'_>,
) -> (Option<Secret>, Option<bool>) {
    let Some(line) = t.line_of(name) else {
        let _ = t.text(name);
        return (None, None);
    };
    let (key, source, inline) = match t.text_or_section(name, |t| key_file(t, ctx)) {
        None | Some(Err(None)) => return (None, Some(false)),
        Some(Err(Some(text))) if is_one_variable(text.written()) => (text.value, Source::Variable, false),
        Some(Err(Some(text))) => (text.value, Source::Text, true),
        Some(Ok(None)) => return (None, Some(false)),
        Some(Ok(Some(key))) => (key, Source::File, false),
    };
    let read = match not_a_key(&key, source) {
        Some(what) => Err(what),
        None => Secret::new(&key).map_err(str::to_owned),
    };
    (read.map_err(|what| t.fault(line, name, &what)).ok(), Some(inline))
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

/// Why `key` cannot be a key, if it is what other programs and examples write in place of one. Shows nothing of it.
fn not_a_key(key: &str, source: Source) -> Option<String> {
    const VARIABLE: &str = "must be the key itself, or `${NAME}` for an environment variable";
    let whole = match source {
        Source::Text => "",
        Source::Variable => " in the variable",
        Source::File => " in the file",
    };
    let (what, allowed) = match key {
        _ if key.starts_with('$') && !key.starts_with("${") => ("begins with `$`", VARIABLE),
        _ if key.starts_with("os.environ/") => ("begins with `os.environ/`, as in litellm", VARIABLE),
        _ if key.starts_with("env.") || key.starts_with("process.env.") => ("begins with `env.`", VARIABLE),
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
    let read = open_regular(&ctx.base.join(&path.value)).and_then(|file| {
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

/// Reads `path` of `[ledger]`: a file that may not exist yet. Returns `None` if it is not set, or if it is not valid:
/// then a fault is recorded.
pub(super) fn ledger_path(t: &mut Section<'_, '_>, ctx: &Context<'_>) -> Option<PathBuf> {
    let text = t.text("path")?;
    let path = ctx.base.join(&text.value);
    let found = match path.metadata() {
        _ if text.value.is_empty() => "is empty".to_owned(),
        _ if text.value.ends_with('/') => "is a directory".to_owned(),
        Ok(found) if found.is_file() => return Some(path),
        Ok(found) if found.is_dir() => "is a directory".to_owned(),
        Ok(_) => "is not a regular file".to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Some(path),
        // Only the kind is shown: the path could be a misplaced key.
        Err(error) => format!("cannot be used ({})", error.kind()),
    };
    let allowed = "must be the path of a file, relative to the directory of the configuration";
    t.fault_of(&text, &format!("{found}; {allowed}"));
    None
}

/// Opens a regular file. Anything else is refused, since opening or reading it could block forever.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    if !path.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    File::open(path)
}

/// Describes `error` by its kind only: the path could be a misplaced key.
pub(super) fn unreadable(error: &io::Error) -> String {
    let kind = match error.kind() {
        io::ErrorKind::InvalidData => "not text".to_owned(),
        io::ErrorKind::InvalidInput => "not a regular file".to_owned(),
        io::ErrorKind::NotFound => "no such file".to_owned(),
        kind => kind.to_string(),
    };
    format!(
        "cannot be read ({kind}); must be a readable file, \
         relative to the directory of the configuration"
    )
}

//! Syntax errors of a file that is not TOML, and the guess that it is another format.

use toml::de::Error;

use crate::config::fault_sink::Sink;
use crate::config::text::may_show;

/// Records why the text is not TOML: one fault for a text in another format, else each error with its column.
pub(super) fn record(sink: &Sink<'_>, errors: &[Error]) {
    let places: Vec<(usize, usize)> = errors
        .iter()
        .map(|error| sink.position(error.span().map_or(sink.text.len(), |span| span.start)))
        .collect();
    if let Some((line, format)) = other_format(sink.text)
        && places.iter().any(|(other, _)| *other <= line + 1)
    {
        let what =
            "the configuration is TOML: `zap example` prints one, and config.example.toml shows every key";
        sink.fault(line, format!("this looks like {format}; {what}"));
        return;
    }
    let mut last = 0;
    for (error, (line, column)) in errors.iter().zip(places) {
        // The parser reports several errors for most mistakes; the first of a line counts.
        if line != last {
            let written = sink.text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
            let what = in_words(written.trim(), error.message());
            sink.fault(line, format!("syntax error at column {column}: {what}"));
        }
        last = line;
    }
}

/// Explains the error of a line, with a fix for common mistakes. Shows nothing of the line but a key.
fn in_words(line: &str, message: &str) -> String {
    let message = message.lines().next().unwrap_or_default();
    let (key, value) = line.split_once('=').map_or((line, ""), |(key, value)| (key.trim(), value.trim()));
    let is_key = |key: &str| key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
    let key = Some(key).filter(|key| is_key(key) && !key.is_empty() && may_show(key));
    if message.starts_with("duplicate key") {
        return match (line.starts_with('['), key) {
            (true, _) => {
                "duplicate key: this table is there already; must be once, with all its keys".to_owned()
            }
            (false, Some(key)) => format!("duplicate key `{key}`; must be set once in a table"),
            (false, None) => "duplicate key; must be set once in a table".to_owned(),
        };
    }
    if line.starts_with("//") || line.starts_with(';') || value.contains(" //") {
        return "a comment begins with `#`".to_owned();
    }
    if is_of_yaml(line) || message.starts_with("missing assignment") {
        return "a key and its value need `=` between them, not `:`".to_owned();
    }
    let key = key.unwrap_or("key");
    let quoted = || format!("a text needs quotes: `{key} = \"…\"`");
    match value.as_bytes() {
        [] | [b'[' | b'{', ..] => message.to_owned(),
        _ if value.eq_ignore_ascii_case("true") || value.eq_ignore_ascii_case("false") => {
            "must be `true` or `false`, in small letters".to_owned()
        }
        _ if value.ends_with(';') => "`;` does not end a line in TOML; must be left out".to_owned(),
        [b'$', ..] => format!("a text needs quotes, and a variable `${{…}}`: `{key} = \"${{NAME}}\"`"),
        [b'0'..=b'9', ..] if value.matches('.').count() > 1 || value.contains([':', '/']) => quoted(),
        [b'0'..=b'9', ..] if value.ends_with(|c: char| c.is_ascii_alphabetic()) => {
            "a number has no unit; the name of the key has it: `_secs`, `_ms`, `_bytes`".to_owned()
        }
        [b'a'..=b'z' | b'A'..=b'Z' | b'/' | b'.', ..] => quoted(),
        [b'"', ..] if value.contains('\\') => {
            "a backslash in double quotes begins an escape; must be `\\\\`, or the text in single quotes"
                .to_owned()
        }
        [b'"' | b'\'', ..] if message.starts_with("invalid ") => {
            "the text is not closed; must end in the quote that it begins with".to_owned()
        }
        _ if value.starts_with(['\u{201c}', '\u{201d}', '\u{2018}', '\u{2019}']) => {
            "the quotes are typographic; must be `\"` or `'`".to_owned()
        }
        _ => message.to_owned(),
    }
}

/// Guesses another format by the first line that is no comment. Returns the line and the format.
fn other_format(text: &str) -> Option<(usize, &'static str)> {
    let is_said = |line: &str| !line.is_empty() && !line.starts_with('#');
    let mut lines =
        text.lines().enumerate().map(|(i, line)| (i + 1, line)).filter(|(_, l)| is_said(l.trim()));
    let (number, first) = lines.next()?;
    let first = first.trim();
    if first.starts_with('{') || first == "[" || first.starts_with("[{") {
        return Some((number, "JSON"));
    }
    if first == "---" || is_of_yaml(first) {
        return Some((number, "YAML"));
    }
    if first.ends_with('{') && !first.contains('=') {
        return Some((number, "a configuration of nginx or Caddy"));
    }
    let is_export = |line: &str| line.trim().starts_with("export ") && line.contains('=');
    is_export(first).then_some((number, "a shell script"))
}

/// Whether a line is `key:`, `key: value` or `- item`.
fn is_of_yaml(line: &str) -> bool {
    let is_key = |key: &str| {
        !key.is_empty()
            && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
    };
    let key = line.strip_suffix(':').or_else(|| Some(line.split_once(": ")?.0));
    line.starts_with("- ") || key.is_some_and(is_key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_formats_are_recognized_by_their_first_line() {
        for (text, expected) in [
            ("# x\n\nmodel_list:\n  - a: b", Some((3, "YAML"))),
            ("---\na: 1", Some((1, "YAML"))),
            ("- a", Some((1, "YAML"))),
            ("port: 80", Some((1, "YAML"))),
            ("{\n\"server\": {}}", Some((1, "JSON"))),
            ("[\n  {", Some((1, "JSON"))),
            ("upstream llm {\n", Some((1, "a configuration of nginx or Caddy"))),
            ("export A=b\n", Some((1, "a shell script"))),
            ("[server]\nport: 80", None),
            ("[[backends]]\n", None),
            ("url = \"http://a: b\"", None),
            ("a = {", None),
            ("", None),
        ] {
            assert_eq!(other_format(text), expected, "{text}");
        }
    }
}

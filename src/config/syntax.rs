//! Syntax errors of a file that is not TOML, and the guess that it is another format.

use toml::de::Error;

use crate::config::fault_sink::Sink;

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
    for (error, (line, column)) in errors.iter().zip(places) {
        let what = in_words(sink.text, line, error.message());
        sink.fault(line, format!("syntax error at column {column}: {what}"));
    }
}

/// The message of the parser, with the fix for the most common mistake. Quotes nothing of the file.
fn in_words(text: &str, line: usize, message: &str) -> String {
    let written = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
    let value = written.split_once('=').map_or("", |(_, value)| value.trim_start());
    let is_unquoted = value.starts_with(|c: char| c.is_ascii_alphabetic() || c == '$' || c == '/');
    // The parser repeats itself over several lines.
    let message = message.lines().next().unwrap_or_default();
    match is_unquoted && !value.starts_with("true") && !value.starts_with("false") {
        true => format!("{message}; a text needs quotes: `key = \"value\"`"),
        false => message.to_owned(),
    }
}

/// The line by which the text looks like another format, and the format.
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
    // A list of variables, as `docker run --env-file` reads it.
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

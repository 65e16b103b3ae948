//! How a line of the log is written: as a JSON object, as text, or as short text for a person at a terminal.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::SystemTime;

use crate::clock;
use crate::config::LogFormat;
use crate::time::{MILLI, Nanos};

/// The style of all lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// A JSON object.
    Json,
    /// Text with all that is known.
    Text,
    /// Text for a terminal: a short time, and less about a request.
    Short {
        /// Whether the text has colours.
        is_coloured: bool,
    },
}

impl Style {
    /// The style for a log that goes to a file or a pipe.
    pub(crate) fn for_file(format: LogFormat) -> Self {
        match format {
            LogFormat::Auto | LogFormat::Json => Style::Json,
            LogFormat::Text => Style::Text,
        }
    }

    /// The style for a log that goes to a terminal.
    pub(crate) fn for_terminal(format: LogFormat, is_coloured: bool) -> Self {
        match format {
            LogFormat::Json => Style::Json,
            LogFormat::Auto | LogFormat::Text => Style::Short { is_coloured },
        }
    }

    /// Whether lines are short.
    pub(crate) fn is_short(self) -> bool {
        matches!(self, Style::Short { .. })
    }

    /// Appends `text` in a colour, if the style has colours.
    pub(crate) fn push_in(self, colour: Colour, text: &str, out: &mut String) {
        match (self, colour) {
            (Style::Short { is_coloured: true }, colour) => {
                let _ = write!(out, "\u{1b}[{}m{text}\u{1b}[0m", colour as u8);
            }
            _ => out.push_str(text),
        }
    }

    /// Appends the beginning of a line of text: the time, and the level unless a short line is as usual.
    pub(crate) fn push_start(self, at: SystemTime, level: &str, out: &mut String) {
        let time = clock::timestamp(at);
        match self {
            Style::Short { .. } => {
                // Hours, minutes and seconds.
                self.push_in(Colour::Dim, time.get(11..19).unwrap_or_default(), out);
                out.push(' ');
                if level != "info" {
                    let colour = if level == "warn" { Colour::Yellow } else { Colour::Red };
                    self.push_in(colour, level, out);
                    out.push(' ');
                }
            }
            Style::Json | Style::Text => {
                let _ = write!(out, "{time} {level} ");
            }
        }
    }

    /// The line of an event.
    pub(crate) fn event(
        self,
        at: SystemTime,
        (level, event): (&str, &str),
        text: &str,
        more: &Fields,
    ) -> String {
        let mut line = String::with_capacity(96 + text.len() + more.0.len());
        if self == Style::Json {
            push_json_start(&mut line, at, level, event);
            line.push_str(",\"message\":");
            push_json(&mut line, text);
            line.push_str(&more.0);
            line.push('}');
            return line;
        }
        self.push_start(at, level, &mut line);
        self.push_in(Colour::Bold, event, &mut line);
        line.push_str(": ");
        push_plain(&mut line, text);
        line
    }
}

/// The colours of a terminal, by the numbers of ECMA-48.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Colour {
    Bold = 1,
    Dim = 2,
    Red = 31,
    Green = 32,
    Yellow = 33,
}

/// Whether stderr is a terminal, and then whether it takes colours. `NO_COLOR` (<https://no-color.org>) and
/// `TERM=dumb` switch them off.
pub(crate) fn terminal() -> Option<bool> {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    std::io::stderr().is_terminal().then(|| !is_set("NO_COLOR") && !is_dumb)
}

/// Members of the JSON object of an event, beside its message.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fields(String);

impl Fields {
    /// Adds a text.
    pub(crate) fn text(mut self, name: &str, value: &str) -> Self {
        let _ = write!(self.0, ",\"{name}\":");
        push_json(&mut self.0, value);
        self
    }

    /// Adds a text, or null.
    pub(crate) fn text_or_null(mut self, name: &str, value: Option<&str>) -> Self {
        let _ = write!(self.0, ",\"{name}\":");
        push_json_or_null(&mut self.0, value);
        self
    }

    /// Adds a list of texts.
    pub(crate) fn list<T: AsRef<str>>(mut self, name: &str, values: impl IntoIterator<Item = T>) -> Self {
        let _ = write!(self.0, ",\"{name}\":[");
        for (i, value) in values.into_iter().enumerate() {
            self.0.push_str(if i == 0 { "" } else { "," });
            push_json(&mut self.0, value.as_ref());
        }
        self.0.push(']');
        self
    }

    /// Adds a number.
    pub(crate) fn number(mut self, name: &str, value: u64) -> Self {
        let _ = write!(self.0, ",\"{name}\":{value}");
        self
    }

    /// Adds a truth value.
    pub(crate) fn flag(mut self, name: &str, value: bool) -> Self {
        let _ = write!(self.0, ",\"{name}\":{value}");
        self
    }

    /// Adds a time as milliseconds with three decimals.
    pub(crate) fn ms(mut self, name: &str, value: Nanos) -> Self {
        let _ = write!(self.0, ",\"{name}\":{:.3}", ms(value));
        self
    }
}

/// A span of time in milliseconds.
pub(crate) fn ms(span: Nanos) -> f64 {
    span as f64 / MILLI as f64
}

/// A span of time for a person: `0.4 ms`, `312 ms`, `12.3 s`.
pub(crate) fn in_words(span: Nanos) -> String {
    match span / MILLI {
        0..10 => format!("{:.1} ms", ms(span)),
        10..10_000 => format!("{:.0} ms", ms(span)),
        _ => format!("{:.1} s", ms(span) / 1e3),
    }
}

/// Appends the beginning of a JSON line: what all lines have.
pub(crate) fn push_json_start(out: &mut String, at: SystemTime, level: &str, event: &str) {
    let time = clock::timestamp(at);
    let _ = write!(out, "{{\"time\":\"{time}\",\"level\":\"{level}\",\"event\":\"{event}\"");
}

/// Appends `text`; control characters (C0, DEL, C1) are escaped.
pub(crate) fn push_plain(out: &mut String, text: &str) {
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
}

/// Appends `text` to `out` as a JSON string; control characters (C0, DEL, C1) are escaped.
pub(crate) fn push_json(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Appends a JSON string, or null.
pub(crate) fn push_json_or_null(out: &mut String, text: Option<&str>) {
    match text {
        Some(text) => push_json(out, text),
        None => out.push_str("null"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn escapes_every_control_character() {
        let mut out = String::new();
        push_json(&mut out, "a\"\\\r\n\u{1b}[0m\u{7f}\u{9b}é");
        assert_eq!(out, "\"a\\\"\\\\\\u000d\\u000a\\u001b[0m\\u007f\\u009bé\"");
        let back: String = serde_json::from_str(&out).unwrap();
        assert_eq!(back, "a\"\\\r\n\u{1b}[0m\u{7f}\u{9b}é");
    }

    #[test]
    fn the_style_follows_the_format_and_the_terminal() {
        use LogFormat::{Auto, Json, Text};
        let file = [Auto, Text, Json].map(Style::for_file);
        assert_eq!(file, [Style::Json, Style::Text, Style::Json]);
        for is_coloured in [false, true] {
            let terminal = [Auto, Text, Json].map(|format| Style::for_terminal(format, is_coloured));
            assert_eq!(terminal, [Style::Short { is_coloured }, Style::Short { is_coloured }, Style::Json]);
        }
    }

    #[test]
    fn an_event_has_a_line_in_every_style() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_490_422_123);
        let more = Fields::default()
            .text("backend", "a\"")
            .text_or_null("url", None)
            .list("models", ["m", "n"])
            .number("status", 200)
            .flag("key", true)
            .ms("ms", 3 * MILLI / 2);
        let plain = Style::Short { is_coloured: false };
        let coloured = Style::Short { is_coloured: true };
        for (style, level, want) in [
            (
                Style::Json,
                "info",
                "{\"time\":\"2026-11-24T03:20:22.123Z\",\"level\":\"info\",\"event\":\"x\",\"message\":\"a\\u000ab\",\
                 \"backend\":\"a\\\"\",\"url\":null,\"models\":[\"m\",\"n\"],\"status\":200,\"key\":true,\"ms\":1.500}",
            ),
            (Style::Text, "info", "2026-11-24T03:20:22.123Z info x: a\\u{a}b"),
            (plain, "info", "03:20:22 x: a\\u{a}b"),
            (plain, "warn", "03:20:22 warn x: a\\u{a}b"),
            (coloured, "info", "\u{1b}[2m03:20:22\u{1b}[0m \u{1b}[1mx\u{1b}[0m: a\\u{a}b"),
            (
                coloured,
                "error",
                "\u{1b}[2m03:20:22\u{1b}[0m \u{1b}[31merror\u{1b}[0m \u{1b}[1mx\u{1b}[0m: a\\u{a}b",
            ),
        ] {
            assert_eq!(style.event(at, (level, "x"), "a\nb", &more), want);
        }
    }
}

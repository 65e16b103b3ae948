//! What the status page says in words: times, spans, numbers, states; and the escaping of HTML.

use serde_json::Value;

use crate::time::Day;

/// How bad a state is, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// Takes no requests, by a fault.
    Bad,
    /// Takes no requests for a while, or fails some.
    Warn,
    /// Takes requests.
    Good,
    /// Is not meant to take requests.
    Off,
}

impl Level {
    /// The class in the style.
    pub(super) fn class(self) -> &'static str {
        match self {
            Level::Bad => "bad",
            Level::Warn => "warn",
            Level::Good => "good",
            Level::Off => "off",
        }
    }

    /// A sign that says the same without its colour.
    pub(super) fn sign(self) -> &'static str {
        match self {
            Level::Bad => "\u{2715}",
            Level::Warn => "!",
            Level::Good => "\u{2713}",
            Level::Off => "\u{2013}",
        }
    }
}

/// The level of a backend, and its state in words.
pub(super) fn state_of(backend: &Value) -> (Level, &'static str) {
    match backend["state"].as_str().unwrap_or_default() {
        "ejected" => (Level::Bad, "down"),
        "misconfigured" | "unauthorized" => (Level::Bad, "key refused"),
        "cooling" => (Level::Warn, "cooling down"),
        "full" => (Level::Warn, "full"),
        "quota" => (Level::Warn, "quota used up"),
        "budget" => (Level::Warn, "budget spent"),
        "drained" => (Level::Off, "drained"),
        _ if text_of(&backend["why"]).is_empty() => (Level::Good, "up"),
        _ => (Level::Warn, "up, with faults"),
    }
}

/// When the backend may take requests again, if that is known.
pub(super) fn again(backend: &Value) -> String {
    let secs =
        ["cooling_secs", "quota_opens_secs", "retry_secs"].iter().find_map(|name| backend[*name].as_f64());
    match (secs, backend["state"] == "budget") {
        (Some(secs), _) if secs > 0.0 => format!(", again in {}", span(secs.ceil() as u64)),
        (_, true) => format!(", again on {}", escape(text_of(&backend["budget"]["opens"]))),
        _ => String::new(),
    }
}

/// The text of a JSON string; empty if it is none.
pub(super) fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Escapes a text for an element or an attribute in quotes. Control characters, and those that change the direction of
/// the text after them, become U+FFFD.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' => out.push(char::REPLACEMENT_CHARACTER),
            c if c.is_control() => out.push(char::REPLACEMENT_CHARACTER),
            c => out.push(c),
        }
    }
    out
}

/// A span in words: `95 s`, `3 min`, `2 h 5 min`, `3 d`.
pub(super) fn span(secs: u64) -> String {
    match (secs / 60, secs / 3600) {
        (0..2, _) => format!("{secs} s"),
        (minutes @ 2..60, _) => format!("{minutes} min"),
        (minutes, hours @ 1..48) => format!("{hours} h {} min", minutes % 60),
        (_, hours) => format!("{} d", hours / 24),
    }
}

/// A number a second, with as many digits as matter.
pub(super) fn rate(value: &Value) -> String {
    match value.as_f64() {
        None => "\u{2013}".into(),
        Some(0.0) => "0".into(),
        Some(rate) if rate < 10.0 => format!("{:.1}", rate.max(0.1)),
        Some(rate) => grouped(rate.round() as u64),
    }
}

/// A number of milliseconds: `45 ms`, `1.2 s`.
pub(super) fn millis(value: &Value) -> String {
    match value.as_f64() {
        None => "\u{2013}".into(),
        Some(ms) if ms < 1000.0 => format!("{ms:.0} ms"),
        Some(ms) => format!("{:.1} s", ms / 1000.0),
    }
}

/// A sum of money as a number; `/status` has it as a text with all digits.
pub(super) fn usd_of(value: &Value) -> f64 {
    text_of(value).parse().unwrap_or_default()
}

/// A sum of money.
pub(super) fn dollars(value: &Value) -> String {
    match usd_of(value) {
        0.0 => "$0".into(),
        usd if usd < 0.0001 => "< $0.0001".into(),
        usd if usd < 1.0 => format!("${usd:.4}"),
        usd => format!("${usd:.2}"),
    }
}

/// A part of a hundred, rounded down: 100% means that all is used. A little is not nothing.
pub(super) fn percent(part: f64) -> String {
    if part > 0.0 && part < 1.0 { "under 1%".into() } else { format!("{:.0}%", part.floor()) }
}

/// A whole number with its thousands apart.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// So many things.
pub(super) fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// Knows the time of the status, to which others relate.
pub(super) struct Words {
    now: u64,
    day: String,
}

impl Words {
    /// The words at the time of a status.
    pub(super) fn of(status: &Value) -> Self {
        let time = text_of(&status["time"]);
        Words { now: seconds(time).unwrap_or_default(), day: time.get(..10).unwrap_or_default().to_owned() }
    }

    /// How long ago a point in time was, in seconds.
    pub(super) fn age(&self, time: &Value) -> u64 {
        seconds(text_of(time)).map_or(0, |then| self.now.saturating_sub(then))
    }

    /// A point in time: `10:31:02`, on another day with its date.
    pub(super) fn clock(&self, time: &Value) -> String {
        let time = text_of(time);
        let (day, clock) = (time.get(..10).unwrap_or_default(), time.get(11..19).unwrap_or_default());
        if day == self.day { clock.to_owned() } else { format!("{day} {clock}") }
    }
}

/// The seconds since 1970 of a time that [`crate::clock::timestamp`] has written.
fn seconds(time: &str) -> Option<u64> {
    let day = Day::parse(time.get(..10)?)?;
    let part = |from: usize| time.get(from..from + 2)?.parse::<u64>().ok();
    Some(u64::from(day.number()) * 86_400 + part(11)? * 3600 + part(14)? * 60 + part(17)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nothing_that_is_markup_is_left() {
        let text = "<script>alert(\"1\")</script> & 'x'\u{7}\u{202E}\u{e9}";
        let want =
            "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &#39;x&#39;\u{FFFD}\u{FFFD}\u{e9}";
        assert_eq!(escape(text), want);
    }

    #[test]
    fn numbers_and_spans_are_short() {
        for (secs, want) in [
            (0, "0 s"),
            (119, "119 s"),
            (120, "2 min"),
            (3599, "59 min"),
            (7500, "2 h 5 min"),
            (172_800, "2 d"),
        ] {
            assert_eq!(span(secs), want);
        }
        for (n, want) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(n), want);
        }
        for (n, want) in [
            (json!(null), "\u{2013}"),
            (json!(0), "0"),
            (json!(0.04), "0.1"),
            (json!(3.24), "3.2"),
            (json!(1234.5), "1,235"),
        ] {
            assert_eq!(rate(&n), want);
        }
        for (part, want) in [(0.0, "0%"), (0.96, "under 1%"), (1.0, "1%"), (99.9, "99%"), (140.0, "140%")] {
            assert_eq!(percent(part), want);
        }
        for (n, want) in [(json!(45.2), "45 ms"), (json!(1234.0), "1.2 s"), (json!(null), "\u{2013}")] {
            assert_eq!(millis(&n), want);
        }
        for (n, want) in [
            (json!("0.000000000"), "$0"),
            (json!("0.000010000"), "< $0.0001"),
            (json!("0.012300000"), "$0.0123"),
            (json!("12.346000000"), "$12.35"),
        ] {
            assert_eq!(dollars(&n), want);
        }
    }

    #[test]
    fn times_relate_to_that_of_the_status() {
        let words = Words::of(&json!({ "time": "2026-11-27T00:00:05.900Z" }));
        let yesterday = json!("2026-11-26T23:59:58.000Z");
        assert_eq!((words.age(&yesterday), words.clock(&yesterday)), (7, "2026-11-26 23:59:58".into()));
        assert_eq!(words.clock(&json!("2026-11-27T00:00:01.000Z")), "00:00:01");
        assert_eq!(words.age(&json!(null)), 0);
    }
}

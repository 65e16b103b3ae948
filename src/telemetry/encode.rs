//! An encoder for the Prometheus text format 0.0.4.

use std::fmt::Write as _;

use crate::counter::Total;
use crate::policy::prices::usd;
use crate::time::SECOND;

/// `Content-Type` of the format.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Writes metrics to a text.
#[derive(Debug, Default)]
pub struct Encoder {
    out: String,
}

/// A label: name and value.
pub(crate) type Label<'a> = (&'static str, &'a str);

impl Encoder {
    /// Begins a metric family; `kind` is `counter`, `gauge` or `histogram`.
    pub fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.put(&["# HELP ", name, " ", help, "\n# TYPE ", name, " ", kind, "\n"]);
    }

    /// Writes one sample with an integer value.
    pub fn sample(&mut self, name: &str, labels: &[Label<'_>], value: u64) {
        self.series(name, "", labels, None);
        self.out.push_str(itoa::Buffer::new().format(value));
        self.out.push('\n');
    }

    /// Writes one sample in USD; `value` is in nano-USD.
    pub(crate) fn money(&mut self, name: &str, labels: &[Label<'_>], value: u64) {
        self.series(name, "", labels, None);
        self.put(&[&usd(value), "\n"]);
    }

    /// Writes one sample with a fractional value.
    pub fn fraction(&mut self, name: &str, labels: &[Label<'_>], value: f64) {
        self.series(name, "", labels, None);
        self.number(value);
        self.out.push('\n');
    }

    /// Writes a histogram of times; `total` is in nanoseconds, the output in seconds.
    pub fn histogram(&mut self, name: &str, labels: &[Label<'_>], total: &Total) {
        let seconds = |nanos: u64| nanos as f64 / SECOND as f64;
        for (bound, count) in &total.cumulative {
            self.series(name, "_bucket", labels, Some(seconds(*bound)));
            self.put(&[itoa::Buffer::new().format(*count), "\n"]);
        }
        self.series(name, "_bucket", labels, Some(f64::INFINITY));
        self.put(&[itoa::Buffer::new().format(total.count), "\n"]);
        self.series(name, "_sum", labels, None);
        self.number(seconds(total.sum));
        self.out.push('\n');
        self.series(name, "_count", labels, None);
        self.put(&[itoa::Buffer::new().format(total.count), "\n"]);
    }

    /// Returns the text.
    pub fn finish(self) -> String {
        self.out
    }

    fn series(&mut self, name: &str, suffix: &str, labels: &[Label<'_>], le: Option<f64>) {
        self.put(&[name, suffix]);
        let mut open = '{';
        for (key, value) in labels {
            self.out.push(std::mem::replace(&mut open, ','));
            self.put(&[key, "=\""]);
            self.escaped(value);
            self.out.push('"');
        }
        if let Some(le) = le {
            self.out.push(std::mem::replace(&mut open, ','));
            self.put(&["le=\""]);
            self.number(le);
            self.out.push('"');
        }
        self.out.push_str(if open == ',' { "} " } else { " " });
    }

    fn escaped(&mut self, value: &str) {
        for c in value.chars() {
            match c {
                '\\' => self.out.push_str("\\\\"),
                '"' => self.out.push_str("\\\""),
                '\n' => self.out.push_str("\\n"),
                c => self.out.push(c),
            }
        }
    }

    fn number(&mut self, value: f64) {
        if value.is_infinite() {
            self.out.push_str("+Inf");
        } else {
            // Writing to a String cannot fail.
            let _ = write!(self.out, "{value}");
        }
    }

    fn put(&mut self, parts: &[&str]) {
        parts.iter().for_each(|p| self.out.push_str(p));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_the_text_format_exactly() {
        let mut e = Encoder::default();
        e.family("a_total", "counter", "Things.");
        e.sample("a_total", &[], 3);
        e.sample("a_total", &[("x", "a\"b\\c\nd"), ("y", "é")], 4);
        e.family("b", "gauge", "Part.");
        e.fraction("b", &[], 0.25);
        e.family("c", "histogram", "Times.");
        let total = Total { cumulative: vec![(5_000_000, 1), (SECOND, 2)], count: 3, sum: 5 * SECOND / 2 };
        e.histogram("c", &[("k", "v")], &total);
        let want = "# HELP a_total Things.\n# TYPE a_total counter\na_total 3\na_total{x=\"a\\\"b\\\\c\\nd\",y=\"é\"} 4\n\
            # HELP b Part.\n# TYPE b gauge\nb 0.25\n\
            # HELP c Times.\n# TYPE c histogram\n\
            c_bucket{k=\"v\",le=\"0.005\"} 1\nc_bucket{k=\"v\",le=\"1\"} 2\nc_bucket{k=\"v\",le=\"+Inf\"} 3\n\
            c_sum{k=\"v\"} 2.5\nc_count{k=\"v\"} 3\n";
        assert_eq!(e.finish(), want);
    }
}

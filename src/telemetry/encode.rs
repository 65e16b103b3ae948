//! An encoder for the Prometheus text format 0.0.4 and for OpenMetrics 1.0.0.
//!
//! In OpenMetrics the name of a family has neither `_total` nor `_info`, a family has a unit if its name ends with it,
//! a bound is always written as a fraction, buckets may have exemplars, and the text has an end.

use std::fmt::Write as _;

use crate::counter::{Exemplar, Total};
use crate::http1::trace_context::digits_of;
use crate::policy::prices::usd;
use crate::time::SECOND;

/// The format of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Format {
    /// The text format of Prometheus, version 0.0.4.
    #[default]
    Prometheus,
    /// OpenMetrics, version 1.0.0.
    OpenMetrics,
}

impl Format {
    /// The `Content-Type`.
    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Format::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The units that a name may end with.
const UNITS: [&str; 2] = ["bytes", "seconds"];

/// Writes metrics to a text.
#[derive(Debug, Default)]
pub struct Encoder {
    out: String,
    format: Format,
    /// The length of the text at which the thread gives way to others that wait for its core.
    gives_way_at: usize,
}

/// Bytes that are written between two times of giving way: about a tenth of a millisecond.
const STRETCH: usize = 16 << 10;

/// A label: name and value.
pub(crate) type Label<'a> = (&'static str, &'a str);

impl Encoder {
    /// Begins a text.
    pub(crate) fn new(format: Format) -> Self {
        Encoder { format, ..Encoder::default() }
    }

    /// Begins a metric family; `kind` is `counter`, `gauge` or `histogram`.
    pub fn family(&mut self, name: &str, kind: &str, help: &str) {
        if self.format == Format::OpenMetrics {
            let (name, kind) = match (name.strip_suffix("_total"), name.strip_suffix("_info")) {
                (Some(name), _) if kind == "counter" => (name, kind),
                (_, Some(name)) if kind == "gauge" => (name, "info"),
                _ => (name, kind),
            };
            self.put(&["# TYPE ", name, " ", kind, "\n"]);
            let is_unit = |unit: &&&str| name.strip_suffix(**unit).is_some_and(|rest| rest.ends_with('_'));
            if let Some(unit) = UNITS.iter().find(is_unit) {
                self.put(&["# UNIT ", name, " ", unit, "\n"]);
            }
            self.put(&["# HELP ", name, " ", help, "\n"]);
            return;
        }
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
        let bounds = total.cumulative.iter().map(|(bound, count)| (seconds(*bound), *count));
        for (at, (bound, count)) in bounds.chain([(f64::INFINITY, total.count)]).enumerate() {
            self.series(name, "_bucket", labels, Some(bound));
            self.put(&[itoa::Buffer::new().format(count)]);
            if self.format == Format::OpenMetrics
                && let Some(Some(exemplar)) = total.exemplars.get(at)
            {
                self.exemplar(exemplar);
            }
            self.out.push('\n');
        }
        self.series(name, "_sum", labels, None);
        self.number(seconds(total.sum));
        self.out.push('\n');
        self.series(name, "_count", labels, None);
        self.put(&[itoa::Buffer::new().format(total.count), "\n"]);
    }

    /// Returns the text.
    pub fn finish(mut self) -> String {
        if self.format == Format::OpenMetrics {
            self.put(&["# EOF\n"]);
        }
        self.out
    }

    /// Writes the exemplar of a bucket.
    fn exemplar(&mut self, exemplar: &Exemplar) {
        let Exemplar { trace_id, value, unix_millis } = exemplar;
        self.put(&[" # {trace_id=\""]);
        let digits = trace_id.iter().flat_map(|byte| digits_of(*byte));
        digits.for_each(|digit| self.out.push(digit.into()));
        let (secs, millis) = (unix_millis / 1000, unix_millis % 1000);
        // Writing to a String cannot fail.
        let _ = write!(self.out, "\"}} {} {secs}.{millis:03}", *value as f64 / SECOND as f64);
    }

    fn series(&mut self, name: &str, suffix: &str, labels: &[Label<'_>], le: Option<f64>) {
        if self.out.len() >= self.gives_way_at {
            self.gives_way_at = self.out.len() + STRETCH;
            std::thread::yield_now();
        }
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
            // OpenMetrics, section "Numbers": 1.0, not 1.
            if self.format == Format::OpenMetrics && le.is_finite() && le.fract() == 0.0 {
                self.put(&[".0"]);
            }
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

    fn total() -> Total {
        let exemplar = Exemplar { trace_id: [0xA5; 16], value: SECOND / 2, unix_millis: 1_700_000_000_042 };
        Total {
            cumulative: vec![(5_000_000, 1), (SECOND, 2)],
            count: 3,
            sum: 5 * SECOND / 2,
            exemplars: vec![None, Some(exemplar), None],
        }
    }

    #[test]
    fn writes_openmetrics_exactly() {
        let mut e = Encoder::new(Format::OpenMetrics);
        e.family("a_total", "counter", "Things.");
        e.sample("a_total", &[("x", "a\"b")], 4);
        e.family("cpu_seconds_total", "counter", "Time.");
        e.fraction("cpu_seconds_total", &[], 0.25);
        e.family("b_info", "gauge", "Facts.");
        e.sample("b_info", &[("v", "1")], 1);
        e.family("milliseconds", "gauge", "No unit.");
        e.family("c_seconds", "histogram", "Times.");
        e.histogram("c_seconds", &[("k", "v")], &total());
        let want = "# TYPE a counter\n# HELP a Things.\na_total{x=\"a\\\"b\"} 4\n\
            # TYPE cpu_seconds counter\n# UNIT cpu_seconds seconds\n# HELP cpu_seconds Time.\ncpu_seconds_total 0.25\n\
            # TYPE b info\n# HELP b Facts.\nb_info{v=\"1\"} 1\n\
            # TYPE milliseconds gauge\n# HELP milliseconds No unit.\n\
            # TYPE c_seconds histogram\n# UNIT c_seconds seconds\n# HELP c_seconds Times.\n\
            c_seconds_bucket{k=\"v\",le=\"0.005\"} 1\n\
            c_seconds_bucket{k=\"v\",le=\"1.0\"} 2 # {trace_id=\"a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5\"} 0.5 1700000000.042\n\
            c_seconds_bucket{k=\"v\",le=\"+Inf\"} 3\nc_seconds_sum{k=\"v\"} 2.5\nc_seconds_count{k=\"v\"} 3\n# EOF\n";
        assert_eq!(e.finish(), want);
    }

    #[test]
    fn writes_the_text_format_exactly() {
        let mut e = Encoder::default();
        e.family("a_total", "counter", "Things.");
        e.sample("a_total", &[], 3);
        e.sample("a_total", &[("x", "a\"b\\c\nd"), ("y", "é")], 4);
        e.family("b", "gauge", "Part.");
        e.fraction("b", &[], 0.25);
        e.family("c", "histogram", "Times.");
        let total = total();
        e.histogram("c", &[("k", "v")], &total);
        let want = "# HELP a_total Things.\n# TYPE a_total counter\na_total 3\na_total{x=\"a\\\"b\\\\c\\nd\",y=\"é\"} 4\n\
            # HELP b Part.\n# TYPE b gauge\nb 0.25\n\
            # HELP c Times.\n# TYPE c histogram\n\
            c_bucket{k=\"v\",le=\"0.005\"} 1\nc_bucket{k=\"v\",le=\"1\"} 2\nc_bucket{k=\"v\",le=\"+Inf\"} 3\n\
            c_sum{k=\"v\"} 2.5\nc_count{k=\"v\"} 3\n";
        assert_eq!(e.finish(), want);
    }
}

//! Reports of the ledger: the query string of `GET /usage`, and the rows as JSON or CSV.
//!
//! Costs are text with nine decimals of a USD, `"0.001234567"`, in both formats: a JSON number passes through a float
//! in most readers, which would lose digits.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use rusqlite::Connection;

use crate::http1::percent::percent_decoded;
use crate::policy::prices::usd;
use crate::telemetry::ledger::file::visit;
use crate::telemetry::ledger::table::{Amounts, Labels, Table};
use crate::telemetry::line::push_json;
use crate::time::Day;

/// Largest number of rows of a report.
const MAX_ROWS: usize = 100_000;

/// A column that rows are grouped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// The day in UTC.
    Day,
    /// The name of the client key.
    Client,
    /// The name of the backend.
    Backend,
    /// The model.
    Model,
}

impl Group {
    const ALL: [(&'static str, Group); 4] = [
        ("day", Group::Day),
        ("client", Group::Client),
        ("backend", Group::Backend),
        ("model", Group::Model),
    ];

    fn name(self) -> &'static str {
        Group::ALL[self as usize].0
    }
}

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// A JSON object.
    Json,
    /// CSV after RFC 4180, with a header.
    Csv,
}

/// What a report is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UsageQuery {
    /// The first day.
    pub from: Day,
    /// The last day.
    pub to: Day,
    /// The columns that rows are grouped by, at least one, each once.
    pub by: Vec<Group>,
    /// How the report is written.
    pub format: Format,
}

impl UsageQuery {
    /// Parses the query string of `GET /usage`. The default is `by=client&format=json`, up to `today`, from the first
    /// day of the last day's month.
    ///
    /// # Errors
    /// A message for the client: the parameter and what it must be.
    pub(crate) fn parse(query: Option<&str>, today: Day) -> Result<UsageQuery, String> {
        let (mut from, mut to, mut by, mut format) = (None, None, None, None);
        for pair in query.unwrap_or("").split('&').filter(|_| query.is_some_and(|query| !query.is_empty())) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = decoded(name)?;
            let value = decoded(value)?;
            match name.as_str() {
                "from" => once(&name, &mut from, day(&name, &value)?)?,
                "to" => once(&name, &mut to, day(&name, &value)?)?,
                "by" => once(&name, &mut by, groups(&value)?)?,
                "format" => once(&name, &mut format, format_of(&value)?)?,
                _ => {
                    let name = shown(&name);
                    return Err(format!("unknown parameter {name}; must be one of from, to, by, format"));
                }
            }
        }
        let to = to.unwrap_or(today);
        let from = from.unwrap_or(to.first_of_month());
        if from > to {
            return Err(format!("`from` is {from}, which is after `to`, {to}"));
        }
        let by = by.unwrap_or_else(|| vec![Group::Client]);
        Ok(UsageQuery { from, to, by, format: format.unwrap_or(Format::Json) })
    }
}

fn once<T>(name: &str, slot: &mut Option<T>, value: T) -> Result<(), String> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("`{name}` is given twice")),
    }
}

fn day(name: &str, value: &str) -> Result<Day, String> {
    let fault = || format!("`{name}` is {}; must be a day such as 2026-11-25", shown(value));
    Day::parse(value).ok_or_else(fault)
}

fn groups(value: &str) -> Result<Vec<Group>, String> {
    let mut groups = Vec::new();
    for word in value.split(',') {
        let Some((_, group)) = Group::ALL.iter().find(|(name, _)| *name == word) else {
            let word = shown(word);
            return Err(format!("`by` has {word}; must be one or more of day, client, backend, model"));
        };
        if groups.contains(group) {
            return Err(format!("`by` has {} twice", shown(word)));
        }
        groups.push(*group);
    }
    Ok(groups)
}

fn format_of(value: &str) -> Result<Format, String> {
    match value {
        "json" => Ok(Format::Json),
        "csv" => Ok(Format::Csv),
        _ => Err(format!("`format` is {}; must be json or csv", shown(value))),
    }
}

/// A text of the client for a message: its first 40 characters, in quotes.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(40).collect();
    let dots = if short.len() < text.len() { "..." } else { "" };
    format!("\"{}{dots}\"", short.escape_debug())
}

/// Decodes `%2C` and `+`.
fn decoded(text: &str) -> Result<String, String> {
    let decoded = percent_decoded(&text.replace('+', " ")).and_then(|bytes| String::from_utf8(bytes).ok());
    decoded.ok_or_else(|| format!("{} is not valid percent-encoding of UTF-8", shown(text)))
}

/// Why there is no report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ReportError {
    /// The report has too many rows; the message says what the client can change.
    TooLarge(String),
    /// The file cannot be read at the moment.
    Unavailable(String),
}

impl From<rusqlite::Error> for ReportError {
    fn from(error: rusqlite::Error) -> Self {
        ReportError::Unavailable(format!("the ledger cannot be read: {error}"))
    }
}

/// The answer to a query.
#[derive(Debug)]
pub(crate) struct Report {
    query: UsageQuery,
    /// By the values of the columns of `by`.
    rows: BTreeMap<Vec<Box<str>>, Amounts>,
}

impl Report {
    pub(super) fn new(query: UsageQuery) -> Report {
        Report { query, rows: BTreeMap::new() }
    }

    /// Adds the rows of the file.
    pub(super) fn add_file(&mut self, connection: &Connection) -> Result<(), ReportError> {
        let UsageQuery { from, to, .. } = self.query;
        visit(connection, from, to, |day, labels, amounts| self.add(day, labels, amounts))?;
        self.check_size()
    }

    /// Adds the rows of a table.
    pub(super) fn add_table(&mut self, table: &Table) -> Result<(), ReportError> {
        let UsageQuery { from, to, .. } = self.query;
        table.rows(from, to).for_each(|(day, labels, amounts)| self.add(day, labels, amounts));
        self.check_size()
    }

    fn add(&mut self, day: Day, labels: Labels<'_>, amounts: Amounts) {
        let value = |group: &Group| match group {
            Group::Day => day.to_string().into(),
            Group::Client => labels.client.into(),
            Group::Backend => labels.backend.into(),
            Group::Model => labels.model.into(),
        };
        let values = self.query.by.iter().map(value).collect();
        // One row more than allowed shows that there are too many.
        if self.rows.len() <= MAX_ROWS || self.rows.contains_key(&values) {
            *self.rows.entry(values).or_default() += amounts;
        }
    }

    fn check_size(&self) -> Result<(), ReportError> {
        if self.rows.len() <= MAX_ROWS {
            return Ok(());
        }
        let text =
            format!("the report has more than {MAX_ROWS} rows; ask for fewer days or fewer columns in `by`");
        Err(ReportError::TooLarge(text))
    }

    /// `Content-Type` and text of the report. Rows are sorted by the columns of `by`.
    pub(crate) fn encode(&self) -> (&'static str, String) {
        match self.query.format {
            Format::Json => ("application/json", self.json()),
            Format::Csv => ("text/csv; charset=utf-8; header=present", self.csv()),
        }
    }

    // Writing to a String cannot fail.

    fn json(&self) -> String {
        let UsageQuery { from, to, by, .. } = &self.query;
        let mut out = String::with_capacity(128 + 160 * self.rows.len());
        let names: Vec<String> = by.iter().map(|group| format!("\"{}\"", group.name())).collect();
        let _ = write!(out, "{{\"from\":\"{from}\",\"to\":\"{to}\",\"by\":[{}],\"rows\":[", names.join(","));
        for (number, (values, amounts)) in self.rows.iter().enumerate() {
            out.push_str(if number == 0 { "{" } else { ",{" });
            for (name, value) in names.iter().zip(values) {
                out.push_str(name);
                out.push(':');
                push_json(&mut out, value);
                out.push(',');
            }
            for (name, amount) in counts(amounts) {
                let _ = write!(out, "\"{name}\":{amount},");
            }
            let _ = write!(out, "\"cost_usd\":\"{}\"}}", usd(amounts.cost_nano_usd));
        }
        out.push_str("]}\n");
        out
    }

    fn csv(&self) -> String {
        let mut out = String::with_capacity(128 + 80 * self.rows.len());
        for group in &self.query.by {
            out.push_str(group.name());
            out.push(',');
        }
        for (name, _) in counts(&Amounts::default()) {
            out.push_str(name);
            out.push(',');
        }
        out.push_str("cost_usd\r\n");
        for (values, amounts) in &self.rows {
            for value in values {
                push_csv(&mut out, value);
                out.push(',');
            }
            for (_, amount) in counts(amounts) {
                let _ = write!(out, "{amount},");
            }
            let _ = write!(out, "{}\r\n", usd(amounts.cost_nano_usd));
        }
        out
    }
}

/// Names and values of all columns but the cost.
fn counts(amounts: &Amounts) -> impl Iterator<Item = (&'static str, u64)> {
    Amounts::COLUMNS.into_iter().zip(amounts.columns()).take(Amounts::COLUMNS.len() - 1)
}

/// Appends a field of CSV: RFC 4180, section 2, rules 5 to 7.
fn push_csv(out: &mut String, text: &str) {
    if text.contains(['"', ',', '\r', '\n']) {
        out.push('"');
        out.push_str(&text.replace('"', "\"\""));
        out.push('"');
    } else {
        out.push_str(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn day(text: &str) -> Day {
        Day::parse(text).unwrap()
    }

    fn parse(query: &str) -> Result<UsageQuery, String> {
        UsageQuery::parse(Some(query), day("2026-11-25"))
    }

    #[test]
    fn the_default_is_this_month_by_client_as_json() {
        let (from, to) = (day("2026-11-01"), day("2026-11-25"));
        let want = UsageQuery { from, to, by: vec![Group::Client], format: Format::Json };
        assert_eq!(UsageQuery::parse(None, to), Ok(want.clone()));
        assert_eq!(parse(""), Ok(want.clone()));
        let october = UsageQuery { from: day("2026-10-01"), to: day("2026-10-09"), ..want.clone() };
        assert_eq!(parse("to=2026-10-09"), Ok(october));
        assert_eq!(parse("from=2026-09-30"), Ok(UsageQuery { from: day("2026-09-30"), ..want.clone() }));
        let by = vec![Group::Model, Group::Day, Group::Client, Group::Backend];
        let all = UsageQuery { from: to, to, by, format: Format::Csv };
        for query in [
            "from=2026-11-25&to=2026-11-25&by=model,day,client,backend&format=csv",
            "format=cs%76&by=model%2Cday%2cclient,backend&to=2026-11-25&from=2026%2D11-25",
        ] {
            assert_eq!(parse(query), Ok(all.clone()), "{query}");
        }
    }

    #[test]
    fn faults_of_a_query_name_the_parameter_and_what_it_must_be() {
        for (query, want) in [
            ("form=2026-11-01", "unknown parameter \"form\"; must be one of from, to, by, format"),
            ("From=2026-11-01", "unknown parameter \"From\"; must be one of from, to, by, format"),
            ("by=day&", "unknown parameter \"\"; must be one of from, to, by, format"),
            ("a%0A\"b=1", "unknown parameter \"a\\n\\\"b\"; must be one of from, to, by, format"),
            ("from=2026-11-31", "`from` is \"2026-11-31\"; must be a day such as 2026-11-25"),
            ("to=yesterday", "`to` is \"yesterday\"; must be a day such as 2026-11-25"),
            ("to", "`to` is \"\"; must be a day such as 2026-11-25"),
            ("from=2026-11-02&to=2026-11-01", "`from` is 2026-11-02, which is after `to`, 2026-11-01"),
            ("from=2026-12-01", "`from` is 2026-12-01, which is after `to`, 2026-11-25"),
            ("by=team", "`by` has \"team\"; must be one or more of day, client, backend, model"),
            ("by=", "`by` has \"\"; must be one or more of day, client, backend, model"),
            ("by=day,", "`by` has \"\"; must be one or more of day, client, backend, model"),
            ("by=day,+model", "`by` has \" model\"; must be one or more of day, client, backend, model"),
            ("by=day,model,day", "`by` has \"day\" twice"),
            ("by=day&by=day", "`by` is given twice"),
            ("from=2026-11-01&%66rom=2026-11-01", "`from` is given twice"),
            ("format=xml", "`format` is \"xml\"; must be json or csv"),
            ("format=CSV", "`format` is \"CSV\"; must be json or csv"),
            ("by=%2", "\"%2\" is not valid percent-encoding of UTF-8"),
            ("by=%+1", "\"%+1\" is not valid percent-encoding of UTF-8"),
            ("by=%ff", "\"%ff\" is not valid percent-encoding of UTF-8"),
        ] {
            assert_eq!(parse(query), Err(want.into()), "{query}");
        }
        let long = parse(&format!("format={}", "é".repeat(10_000))).unwrap_err();
        assert_eq!(long, format!("`format` is \"{}...\"; must be json or csv", "é".repeat(40)));
    }

    fn amounts(requests: u64, cost_nano_usd: u64) -> Amounts {
        Amounts { requests, estimated: 1, input: 30, cached: 10, output: 20, reasoning: 5, cost_nano_usd }
    }

    fn report(query: &str) -> Report {
        let mut report = Report::new(parse(query).unwrap());
        let mut table = Table::default();
        for (day_text, client, backend, model, cost) in [
            ("2026-10-31", "a", "x", "m", 1_000_000_000_000),
            ("2026-11-01", "a", "x", "m", 1),
            ("2026-11-01", "a", "y", "m", 20),
            ("2026-11-02", "b", "x", "n", 300),
            ("2026-11-25", "b", "x", "m", 4_000),
            ("2026-11-26", "b", "x", "m", 5_000_000_000_000),
        ] {
            table.add(day(day_text), Labels { client, backend, model }, amounts(1, cost));
        }
        report.add_table(&table).unwrap();
        report
    }

    #[test]
    fn every_grouping_adds_up_to_the_same_total() {
        let words = ["day", "client", "backend", "model"];
        let mut groupings = vec![vec![]];
        for _ in 0..4 {
            let longer = |words_before: &Vec<&'static str>| {
                let before = words_before.clone();
                let rest = words.into_iter().filter(move |word| !before.contains(word));
                let before = words_before.clone();
                rest.map(move |word| before.iter().copied().chain([word]).collect::<Vec<_>>())
                    .collect::<Vec<_>>()
            };
            let more: Vec<_> = groupings.iter().flat_map(longer).collect();
            groupings.extend(more);
            groupings.sort();
            groupings.dedup();
        }
        groupings.retain(|by| !by.is_empty());
        assert_eq!(groupings.len(), 4 + 12 + 24 + 24);
        for by in groupings {
            let report = report(&format!("by={}", by.join(",")));
            let (_, text) = report.encode();
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(json["by"], serde_json::json!(by));
            let rows = json["rows"].as_array().unwrap();
            let total: u64 = rows.iter().map(|row| row["requests"].as_u64().unwrap()).sum();
            let cost: u64 = report.rows.values().map(|amounts| amounts.cost_nano_usd).sum();
            assert_eq!((total, cost), (4, 4_321), "{text}");
            let counts = [("day", 3), ("client", 2), ("backend", 2), ("model", 2)];
            for (word, count) in counts {
                let mut values: Vec<_> = rows.iter().map(|row| row[word].to_string()).collect();
                values.sort();
                values.dedup();
                assert_eq!(values.len(), if by.contains(&word) { count } else { 1 }, "{word} in {text}");
            }
            assert!(report.rows.keys().is_sorted() && report.rows.keys().all(|key| key.len() == by.len()));
        }
    }

    #[test]
    fn json_and_csv_are_written_exactly() {
        let (kind, text) = report("by=client,day&from=2026-10-31&to=2026-11-01").encode();
        assert_eq!(kind, "application/json");
        let want = r#"{"from":"2026-10-31","to":"2026-11-01","by":["client","day"],"rows":[{"client":"a","day":"2026-10-31","requests":1,"estimated":1,"input":30,"cached":10,"output":20,"reasoning":5,"cost_usd":"1000.000000000"},{"client":"a","day":"2026-11-01","requests":2,"estimated":2,"input":60,"cached":20,"output":40,"reasoning":10,"cost_usd":"0.000000021"}]}
"#;
        assert_eq!(text, want);
        let (kind, text) = report("by=backend&format=csv").encode();
        assert_eq!(kind, "text/csv; charset=utf-8; header=present");
        let want = "backend,requests,estimated,input,cached,output,reasoning,cost_usd\r\n\
            x,3,3,90,30,60,15,0.000004301\r\n\
            y,1,1,30,10,20,5,0.000000020\r\n";
        assert_eq!(text, want);
        let (_, text) = report("from=2025-01-01&to=2025-01-31").encode();
        assert_eq!(text, "{\"from\":\"2025-01-01\",\"to\":\"2025-01-31\",\"by\":[\"client\"],\"rows\":[]}\n");
        assert_eq!(usd(u64::MAX), "18446744073.709551615");
    }

    #[test]
    fn odd_labels_are_quoted() {
        for (label, csv) in [
            ("plain one", "plain one"),
            ("a,b", "\"a,b\""),
            ("a\"b", "\"a\"\"b\""),
            ("a\r\nb", "\"a\r\nb\""),
            ("", ""),
        ] {
            let mut report = Report::new(parse("by=model&format=csv").unwrap());
            report.add(day("2026-11-25"), Labels { client: "", backend: "", model: label }, amounts(1, 0));
            let (_, text) = report.encode();
            let row = text.split_once("\r\n").unwrap().1;
            assert_eq!(row, format!("{csv},1,1,30,10,20,5,0.000000000\r\n"));
            report.query.format = Format::Json;
            let json: serde_json::Value = serde_json::from_str(&report.encode().1).unwrap();
            assert_eq!(json["rows"][0]["model"], label);
        }
    }

    #[test]
    fn a_report_of_too_many_rows_is_refused() {
        let mut report = Report::new(parse("by=client").unwrap());
        for n in 0..MAX_ROWS + 10 {
            let client = &n.to_string();
            report.add(day("2026-11-25"), Labels { client, backend: "", model: "" }, amounts(1, 0));
        }
        assert_eq!(report.rows.len(), MAX_ROWS + 1);
        let text = "the report has more than 100000 rows; ask for fewer days or fewer columns in `by`";
        assert_eq!(report.check_size(), Err(ReportError::TooLarge(text.into())));
    }
}

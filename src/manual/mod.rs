//! The manual: pages in Markdown, and look-ups in their tables. `zap help` prints both.

pub(crate) mod example;

pub(crate) mod print;

mod recipes;

use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::policy::near::hint;

/// Columns of a printed entry.
const WIDTH: usize = 100;

/// A page of the manual, or a file that `zap print` prints.
struct Page {
    name: &'static str,
    summary: &'static str,
    text: &'static str,
}

/// The names and the summaries of `pages`, a line each, below a title.
fn list(title: &str, pages: &[Page]) -> String {
    let longest = pages.iter().map(|page| page.name.len()).max().unwrap_or(0);
    let mut out = format!("{title}\n\n");
    for page in pages {
        let _ = writeln!(out, "  {:longest$}  {}", page.name, page.summary);
    }
    out
}

/// All pages, in reading order.
const TOPICS: [Page; 10] = [
    Page {
        name: "tour",
        summary: "every feature by hand: commands with their expected output",
        text: include_str!("tour.md"),
    },
    Page {
        name: "configuration",
        summary: "every key with default and range; models and routes",
        text: include_str!("configuration.md"),
    },
    Page {
        name: "api",
        summary: "endpoints, request bodies, headers, who is counted, limits of the listener",
        text: include_str!("api.md"),
    },
    Page {
        name: "errors",
        summary: "every error code: status, type, when, what to do",
        text: include_str!("errors.md"),
    },
    Page { name: "metrics", summary: "every metric with its labels", text: include_str!("metrics.md") },
    Page {
        name: "operations",
        summary: "signals, exit codes, reload, health, /status, log, security",
        text: include_str!("operations.md"),
    },
    Page {
        name: "usage",
        summary: "tokens and money: what is counted, estimates, prices, the ledger, GET /usage",
        text: include_str!("usage.md"),
    },
    Page {
        name: "limits",
        summary: "limits by tokens, by money and by requests at once: reservations, budgets, what is refused",
        text: include_str!("limits.md"),
    },
    Page {
        name: "request",
        summary: "how a request travels: tries, waiting, streams, connections to backends",
        text: include_str!("request.md"),
    },
    Page { name: "cost", summary: "CPU and memory beside nginx and HAProxy", text: include_str!("cost.md") },
];

/// A row of a table whose first cell begins with a name in backquotes.
struct Entry {
    topic: &'static str,
    names: Vec<&'static str>,
    /// The other columns: heading and cell.
    cells: Vec<(&'static str, &'static str)>,
}

/// The topics with a line each.
pub(crate) fn overview() -> String {
    let mut out = list("zap help TOPIC prints a page:", &TOPICS);
    out.push_str(
        "\nzap help WORD prints what the manual says of a key, section, error code, status, metric, endpoint,\n\
         header, event or log field:\n\n\
         \x20 zap help queue.max_size\n\
         \x20 zap help queue_full\n\
         \x20 zap help zap_queue_depth\n\
         \x20 zap help /v1/models\n",
    );
    out
}

/// The page of a topic, or the entries of any other word.
///
/// # Errors
/// The manual does not have the word; the message suggests similar ones.
pub(crate) fn look_up(word: &str) -> Result<String, String> {
    let wanted = word.to_lowercase();
    if let Some(topic) = TOPICS.iter().find(|topic| topic.name == wanted) {
        return Ok(topic.text.to_owned());
    }
    let entries = entries();
    let (exact, others): (Vec<&Entry>, Vec<&Entry>) = entries
        .iter()
        .filter(|entry| entry.is_meant_by(&wanted))
        .partition(|entry| entry.names.iter().any(|name| name.to_lowercase() == wanted));
    let found: Vec<String> = exact.into_iter().chain(others).map(Entry::print).collect();
    if found.is_empty() { Err(unknown(word, &entries)) } else { Ok(found.join("\n")) }
}

fn unknown(word: &str, entries: &[Entry]) -> String {
    let names = entries.iter().flat_map(|entry| &entry.names).copied();
    // A key may be asked for without its section.
    let keys = names.clone().filter_map(|name| name.rsplit('.').next());
    let known: BTreeSet<&str> = TOPICS.iter().map(|topic| topic.name).chain(names).chain(keys).collect();
    // Only so many words are compared: first those with the same beginning.
    let begins = |known: &&str| known.chars().next() == word.chars().next();
    let (likely, others): (Vec<&str>, Vec<&str>) = known.into_iter().partition(begins);
    let hint = hint(word, likely.into_iter().chain(others), 3);
    let word: String = word.chars().take(WIDTH).collect();
    format!("the manual has no entry \"{}\"{hint}", word.escape_debug())
}

impl Entry {
    /// Whether `word` is a name of this entry, its section or its key without the section, or its status.
    fn is_meant_by(&self, word: &str) -> bool {
        let is_name = |name: &&str| {
            let name = name.to_lowercase();
            name == word
                || name.strip_suffix(word).is_some_and(|rest| rest.ends_with('.'))
                || name.strip_prefix(word).is_some_and(|rest| rest.starts_with('.'))
        };
        self.names.iter().any(is_name) || self.cells.contains(&("status", word))
    }

    fn print(&self) -> String {
        let mut out = format!("{}  (zap help {})\n", self.names.join(", "), self.topic);
        let longest = self.cells.iter().map(|(heading, _)| heading.len()).max().unwrap_or(0);
        for (heading, cell) in &self.cells {
            let mut line = format!("  {heading:longest$} ");
            for word in cell.replace('`', "").split_whitespace() {
                if line.chars().count() + word.chars().count() >= WIDTH {
                    let _ = writeln!(out, "{line}");
                    line = " ".repeat(longest + 3);
                }
                line.push(' ');
                line.push_str(word);
            }
            let _ = writeln!(out, "{}", line.trim_end());
        }
        out
    }
}

/// The entries of all pages.
fn entries() -> Vec<Entry> {
    TOPICS.iter().flat_map(entries_of).collect()
}

fn entries_of(topic: &Page) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut headings: Vec<&str> = Vec::new();
    for line in topic.text.lines() {
        let Some(cells) = cells(line) else {
            headings.clear();
            continue;
        };
        if headings.is_empty() {
            headings = cells;
        } else if let Some(first) = cells.first().filter(|first| first.starts_with('`')) {
            let names = first.split('`').skip(1).step_by(2).collect();
            let cells = headings.iter().copied().zip(cells.iter().copied()).skip(1).collect();
            entries.push(Entry { topic: topic.name, names, cells });
        }
    }
    entries
}

/// The cells of a line that is a row of a table.
fn cells(line: &str) -> Option<Vec<&str>> {
    let row = line.strip_prefix('|')?.strip_suffix('|')?;
    Some(row.split('|').map(str::trim).collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Config;

    #[test]
    fn every_table_is_whole() {
        for topic in &TOPICS {
            assert!(topic.text.starts_with("# ") && topic.text.ends_with('\n'), "{}", topic.name);
            let mut columns = None;
            let prose = topic.text.split("```").step_by(2).collect::<String>();
            for line in prose.lines() {
                let count = cells(line).map(|cells| cells.len());
                assert!(columns.is_none() || count.is_none() || count == columns, "{}: {line}", topic.name);
                assert!(count.is_none() || line.matches('`').count() % 2 == 0, "{}: {line}", topic.name);
                columns = count;
            }
        }
    }

    #[test]
    fn a_word_finds_its_page_or_its_entries() {
        assert!(look_up("errors").unwrap().starts_with("# Errors\n"));
        for (word, first, parts) in [
            (
                "queue.max_size",
                "queue.max_size  (zap help configuration)",
                &["default  1000", "0 to 1000000"][..],
            ),
            ("MAX_SIZE", "queue.max_size", &[]),
            ("queue", "queue.max_size", &["queue.timeout_secs"]),
            ("weight", "name, weight, priority", &["\nbackends.weight", "models.NAME.targets.weight"]),
            ("backend", "backend  (zap help operations)", &["models.NAME.targets.backend"]),
            ("queue_full", "queue_full  (zap help errors)", &["status      503", "what to do  retry"]),
            ("404", "model_not_found", &["unknown_url"]),
            ("zap_queue_depth", "zap_queue_depth  (zap help metrics)", &["gauge"]),
            ("/v1/models", "/v1/models, /models  (zap help api)", &["GET, HEAD"]),
            ("/models", "/v1/models, /models  (zap help api)", &[]),
            ("backend_down", "backend_down  (zap help operations)", &[]),
        ] {
            let text = look_up(word).unwrap();
            assert!(text.starts_with(first), "{word}: {text}");
            assert!(parts.iter().all(|part| text.contains(part)), "{word}: {text}");
            let too_long = |line: &&str| line.chars().count() > WIDTH && line.starts_with(' ');
            assert_eq!(text.lines().find(too_long), None, "{word}");
        }
    }

    #[test]
    fn every_default_is_that_of_the_parser() {
        let text = "[[backends]]\nname = \"a\"\nurl = \"http://a\"\nweight = 1\n";
        let c = Config::of(text).unwrap();
        let unix = Config::of(&format!("[server]\nunix = \"a\"\n{text}")).unwrap();
        let admin = Config::of(&format!("[admin]\n{text}")).unwrap().server.admin.unwrap();
        let keyed = format!("{text}[[client_keys]]\nname = \"k\"\nkey = \"zk-1\"\n");
        let (b, keyed) = (&c.backends[0], Config::of(&keyed).unwrap());
        let (secs, ms) = (|d: Duration| d.as_secs().to_string(), |d: Duration| d.as_millis().to_string());
        let word = |word: &dyn std::fmt::Debug| format!("{word:?}");
        let defaults = [
            ("models_from", word(&c.models_from)),
            ("server.host", format!("\"{}\"", c.server.host)),
            ("server.port", c.server.port.to_string()),
            ("server.open_metrics", c.server.open_metrics.to_string()),
            ("admin.host", format!("\"{}\"", admin.ip())),
            ("admin.port", admin.port().to_string()),
            ("server.unix_mode", format!("{:o}", unix.server.unix.unwrap().mode)),
            ("server.max_body_bytes", c.server.max_body_bytes.to_string()),
            ("server.max_connections", c.server.max_connections.to_string()),
            ("server.drain_secs", secs(c.server.drain)),
            ("server.drain_delay_secs", secs(c.server.drain_delay)),
            ("server.keep_alive_secs", secs(c.server.keep_alive)),
            ("queue.max_size", c.queue.max_size.to_string()),
            ("queue.max_in_flight", c.queue.max_in_flight.to_string()),
            ("queue.backend_share", (f64::from(c.queue.backend_share) / 1e6).to_string()),
            ("queue.max_wait_secs", secs(c.queue.max_wait)),
            ("queue.timeout_secs", secs(c.queue.timeout)),
            ("load_balancer.strategy", word(&c.strategy)),
            ("load_balancer.prefix_bytes", c.prefix_bytes.to_string()),
            ("health.interval_secs", secs(c.health.interval)),
            ("health.timeout_secs", secs(c.health.timeout)),
            ("health.failure_threshold", c.health.failure_threshold.to_string()),
            ("health.success_threshold", c.health.success_threshold.to_string()),
            ("retry.max_retries", c.retry.max_retries.to_string()),
            ("retry.base_delay_ms", ms(c.retry.base_delay)),
            ("retry.max_delay_ms", ms(c.retry.max_delay)),
            ("retry.budget_percent", c.retry.budget_percent.to_string()),
            ("timeouts.connect_ms", ms(c.timeouts.connect)),
            ("timeouts.first_byte_secs", secs(c.timeouts.first_byte)),
            ("timeouts.first_token_secs", secs(c.timeouts.first_token)),
            ("timeouts.stream_idle_secs", secs(c.timeouts.stream_idle)),
            ("stream.hold_secs", secs(c.stream.hold)),
            ("stream.heartbeat_secs", secs(c.stream.heartbeat)),
            ("rate_limit.max_keys", c.rate_limit.max_keys.to_string()),
            ("affinity.max_ids", c.max_ids.to_string()),
            ("reload.watch", c.watch.to_string()),
            ("log.requests", c.log.requests.to_string()),
            ("log.format", word(&c.log.format)),
            ("log.probes", c.log.probes.to_string()),
            ("client_keys.priority", keyed.clients[0].priority.to_string()),
            ("backends.health_path", word(&b.health_path)),
            ("backends.health.enabled", b.health.is_enabled.to_string()),
            ("backends.chat_path", word(&b.chat_path)),
            ("backends.priority", b.priority.to_string()),
            ("backends.usage", word(&b.usage)),
            ("backends.protocols", word(&b.protocols)),
            ("backends.forward_authorization", b.forward_authorization.to_string()),
        ];
        let plain = |text: &str| text.replace(['`', '_', '"'], "").to_lowercase();
        for entry in entries() {
            let Some((_, default)) = entry.cells.iter().find(|(heading, _)| *heading == "default") else {
                continue;
            };
            let name = entry.names[0];
            match defaults.iter().find(|(key, _)| *key == name) {
                Some((_, want)) => assert_eq!(plain(default), plain(want), "{name}"),
                None => assert!(
                    !default.starts_with(['`', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9']),
                    "nothing checks the default of {name}"
                ),
            }
        }
    }

    #[test]
    fn an_unknown_word_gets_suggestions() {
        for (word, want) in [
            ("max_sise", "max_size"),
            ("queue.max_sise", "queue.max_size"),
            ("queue_ful", "queue_full"),
            ("configration", "configuration"),
            ("zap_queue_dept", "zap_queue_depth"),
        ] {
            let message = look_up(word).unwrap_err();
            assert!(message.contains(&format!("did you mean {want}")), "{message}");
        }
        for word in ["", "\u{1b}[31m", ".", &"x".repeat(100_000)] {
            let message = look_up(word).unwrap_err();
            assert!(message.len() < 500 && !message.contains('\u{1b}'), "{message}");
        }
    }
}

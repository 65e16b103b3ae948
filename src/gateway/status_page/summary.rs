//! The head of the status page: what is wrong, since when, why, and for whom.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

use crate::gateway::status_page::words::{
    Level, Words, again, counted, escape, grouped, span, state_of, text_of,
};

/// Most backends, and most clients, that the head names one by one.
const MAX_NAMED: usize = 8;

/// A failed request is news for so long, in seconds.
const RECENT: u64 = 300;

/// Renders the head; returns the title of the page, too.
pub(super) fn render(status: &Value, words: &Words) -> (String, String) {
    let verdict = verdict(status);
    let mut out = format!("<h1>{verdict}</h1>\n");
    let (down, troubled): (Vec<_>, Vec<_>) =
        backends(status, words).partition(|(level, _)| *level == Level::Bad);
    let hurt = hurt(status, words);
    let has_hurt = !hurt.is_empty();
    let unserved = unserved(status);
    let lists = [unserved, named(down, "backend"), named(hurt, "client"), named(troubled, "backend")];
    let problems: Vec<_> = lists.into_iter().flatten().chain(reload(status, words)).collect();
    if !problems.is_empty() {
        out.push_str("<ul>\n");
        for (level, text) in problems {
            let _ = writeln!(out, "<li class=\"{}\">{text}</li>", level.class());
        }
        out.push_str("</ul>\n");
    }
    if !has_hurt {
        out.push_str("<p class=\"soft\">No client has got an error in the last 5 minutes.</p>\n");
    }
    facts(&mut out, status, words);
    (format!("{verdict} - Zap"), out)
}

/// A sentence that names the models which no backend serves, unless no backend takes requests at all.
fn unserved(status: &Value) -> Vec<(Level, String)> {
    let names: Vec<_> = status["unserved_models"].as_array().into_iter().flatten().map(text_of).collect();
    let has_taking = states(status).any(|(_, word)| is_taking(word));
    if names.is_empty() || !has_taking {
        return Vec::new();
    }
    let few = names.iter().take(MAX_NAMED).map(|name| format!("<strong>{}</strong>", escape(name)));
    let more = match names.len().saturating_sub(MAX_NAMED) {
        0 => String::new(),
        more => format!(" and {}", counted(more, "more model")),
    };
    vec![(Level::Bad, format!("No backend can serve {}{more} now.", few.collect::<Vec<_>>().join(", ")))]
}

/// The states of all backends.
fn states(status: &Value) -> impl Iterator<Item = (Level, &'static str)> {
    status["backends"].as_array().into_iter().flatten().map(state_of)
}

/// Whether a backend in this state takes requests. A full one works as much as it may.
fn is_taking(word: &str) -> bool {
    word.starts_with("up") || word == "full"
}

/// The first of the sentences, and how many more there are.
fn named(mut all: Vec<(Level, String)>, what: &str) -> Vec<(Level, String)> {
    let more = all.len().saturating_sub(MAX_NAMED);
    all.truncate(MAX_NAMED);
    if more > 0 {
        all.push((Level::Warn, format!("and {}", counted(more, &format!("more {what}")))));
    }
    all
}

/// The state of the whole in one sentence.
fn verdict(status: &Value) -> String {
    let meant = states(status).filter(|(level, _)| *level != Level::Off).count();
    let taking = states(status).filter(|(_, word)| is_taking(word)).count();
    let failing =
        states(status).filter(|(level, word)| *level == Level::Warn && word.starts_with("up")).count();
    if status["draining"] == true {
        return "Zap is shutting down".into();
    }
    match (taking, meant) {
        (0, _) => "No backend takes requests".into(),
        (taking, meant) if taking < meant => format!("{taking} of {meant} backends take requests"),
        (1, _) if failing == 0 => "The backend takes requests".into(),
        (1, _) => "The backend takes requests, but fails some".into(),
        (all, _) if failing == 0 => format!("All {all} backends take requests"),
        (all, _) if failing == 1 => format!("All {all} backends take requests, but one fails some"),
        (all, _) => format!("All {all} backends take requests, but {failing} fail some"),
    }
}

/// A sentence for each backend with a fault, the worst first.
fn backends<'s>(status: &'s Value, words: &'s Words) -> impl Iterator<Item = (Level, String)> + 's {
    let mut all: Vec<_> =
        status["backends"].as_array().into_iter().flatten().map(|b| (state_of(b), b)).collect();
    all.retain(|((level, word), _)| *level <= Level::Warn && *word != "full");
    all.sort_by_key(|((level, _), _)| *level);
    all.into_iter().map(|((level, word), backend)| {
        let (name, why) = (escape(text_of(&backend["name"])), escape(text_of(&backend["why"])));
        let since = &backend["since"];
        let age = span(words.age(since));
        let text = match word {
            "up, with faults" => format!("<strong>{name}</strong> is up, but {why}."),
            _ => {
                let clock = words.clock(since);
                // A backend that is down may fail its next trial.
                let left = if level == Level::Warn { again(backend) } else { String::new() };
                format!(
                    "<strong>{name}</strong> is {} since {clock} UTC ({age}){}. {}.",
                    as_state(word),
                    left,
                    capital(&why)
                )
            }
        };
        (level, text)
    })
}

/// The text with its first letter as a capital.
fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

fn as_state(word: &str) -> &str {
    match word {
        "key refused" | "quota used up" | "budget spent" => "out",
        word => word,
    }
}

/// A sentence about a reload that was rejected.
fn reload(status: &Value, words: &Words) -> Option<(Level, String)> {
    let reload = &status["last_reload"];
    let fault = reload["fault"].as_str()?;
    let at = words.clock(&reload["at"]);
    Some((
        Level::Warn,
        format!(
            "<strong>The reload of {at} UTC was rejected</strong>, the old configuration stays in effect: {}",
            escape(fault)
        ),
    ))
}

/// A sentence for each client whose requests have failed a short time ago.
fn hurt(status: &Value, words: &Words) -> Vec<(Level, String)> {
    struct Hurt<'s> {
        count: u64,
        first: &'s Value,
        last: u64,
        models: Vec<&'s str>,
    }
    let mut clients: BTreeMap<&str, Hurt<'_>> = BTreeMap::new();
    let failures = status["failures"].as_array().into_iter().flatten();
    for failure in failures.filter(|f| f["hurt"] == true && words.age(&f["at"]) <= RECENT) {
        let (last, first) = (words.age(&failure["at"]), &failure["first_at"]);
        let client = clients.entry(text_of(&failure["client"])).or_insert(Hurt {
            count: 0,
            first,
            last,
            models: Vec::new(),
        });
        client.count += failure["count"].as_u64().unwrap_or_default();
        client.last = client.last.min(last);
        if text_of(first) < text_of(client.first) {
            client.first = first;
        }
        let model = text_of(&failure["model"]);
        if !model.is_empty() && !client.models.contains(&model) {
            client.models.push(model);
        }
    }
    let sentence = |(name, hurt): (&&str, &Hurt<'_>)| {
        let models = match hurt.models.as_slice() {
            [] => String::new(),
            few if few.len() <= 3 => format!(" ({})", escape(&few.join(", "))),
            many => format!(" ({})", counted(many.len(), "model")),
        };
        let (times, first) = (grouped(hurt.count), words.clock(hurt.first));
        let requests = if hurt.count == 1 { "request" } else { "requests" };
        let text = format!(
            "Client <strong>{}</strong>{models} got an error on {times} {requests} since {first} UTC, the last {} ago.",
            escape(name),
            span(hurt.last)
        );
        (Level::Warn, text)
    };
    let mut all: Vec<_> = clients.iter().collect();
    all.sort_by_key(|(_, hurt)| std::cmp::Reverse(hurt.count));
    all.into_iter().map(sentence).collect()
}

/// The facts about the process.
fn facts(out: &mut String, status: &Value, words: &Words) {
    let of = |used: &str, max: &str| {
        format!(
            "{} of {}",
            status[used].as_u64().unwrap_or_default(),
            status[max].as_u64().unwrap_or_default()
        )
    };
    let reload = match (&status["last_reload"], status["last_reload"]["applied"] == true) {
        (Value::Null, _) => "none since the start".into(),
        (reload, true) => format!("{} UTC, in effect", words.clock(&reload["at"])),
        (reload, false) => format!("{} UTC, rejected", words.clock(&reload["at"])),
    };
    out.push_str("<dl>");
    for (name, value) in [
        ("Requests in flight", of("in_flight", "max_in_flight")),
        ("Waiting in the queue", of("queue_depth", "queue_size")),
        ("Last reload", reload),
        ("Uptime", span(status["uptime_secs"].as_u64().unwrap_or_default())),
        ("Version", escape(text_of(&status["version"]))),
        ("As of", format!("{} UTC", words.clock(&status["time"]))),
    ] {
        let _ = write!(out, "<div><dt>{name}</dt><dd>{value}</dd></div>");
    }
    out.push_str("</dl>\n");
}

//! Compares the manual with the program: each must have every name that the other has.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{CHAT, File, OK, Running, ask, config, provider, run, stderr, zap};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn page(topic: &str) -> String {
    let output = run(&["help", topic]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// The rows of a page's tables whose first column is `heading`: the names in the first cell, and the other cells.
fn rows(topic: &str, heading: &str) -> BTreeMap<String, Vec<String>> {
    let mut rows = BTreeMap::new();
    let mut wanted = None;
    for line in page(topic).lines() {
        let Some(row) = line.strip_prefix('|').and_then(|row| row.strip_suffix('|')) else {
            wanted = None;
            continue;
        };
        let mut cells = row.split('|').map(|cell| cell.trim().to_owned());
        let first = cells.next().unwrap();
        if *wanted.get_or_insert(first == heading) {
            let cells: Vec<String> = cells.collect();
            for name in first.split('`').skip(1).step_by(2) {
                assert!(rows.insert(name.to_owned(), cells.clone()).is_none(), "{name} is listed twice");
            }
        }
    }
    assert!(!rows.is_empty(), "{topic} has no table with the heading {heading}");
    rows
}

pub(super) fn names(topic: &str, heading: &str) -> BTreeSet<String> {
    rows(topic, heading).into_keys().collect()
}

/// The values of a label in `metrics`.
fn labels(metrics: &str, label: &str) -> BTreeSet<String> {
    let mark = format!("{label}=\"");
    metrics.split(&mark).skip(1).map(|rest| rest.split('"').next().unwrap().to_owned()).collect()
}

/// The text of each source file, without tests.
fn sources() -> Vec<String> {
    fn collect(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    collect(&Path::new(ROOT).join("src"), &mut found);
    let text = |path: PathBuf| std::fs::read_to_string(path).unwrap();
    found.into_iter().map(text).map(|t| t.split("#[cfg(test)]\nmod ").next().unwrap().to_owned()).collect()
}

/// The faults that `zap check` reports for a configuration.
fn faults_of(text: &str) -> String {
    let file = File::new(&format!("keys-{:x}", fastrand::u64(..)), text);
    stderr(&run(&["check", "--config", file.path()]))
}

/// The keys that are allowed in the table that `header` opens; `None` if no such table is allowed.
fn keys_of(header: &str) -> Option<Vec<String>> {
    const UNKNOWN: &str = "qqqqqqqqqqqqqqqqqqqq";
    let faults = faults_of(&format!("{header}{UNKNOWN} = 1\n"));
    let (_, rest) = faults.split_once(&format!("{UNKNOWN}`; must be "))?;
    let list = rest.lines().next().unwrap();
    Some(list.split('`').skip(1).step_by(2).map(str::to_owned).collect())
}

/// Collects every key that the parser knows below `path`, with the header of its table.
fn walk(path: &str, header: &str, leaves: &mut BTreeMap<String, String>, tables: &mut BTreeSet<String>) {
    for key in keys_of(header).unwrap() {
        let key = if path.is_empty() { key } else { format!("{path}.{key}") };
        let forms = [
            (key.clone(), format!("{header}[{key}]\n")),
            (key.clone(), format!("{header}[[{key}]]\n")),
            (format!("{key}.NAME"), format!("{header}[{key}.NAME]\n")),
        ];
        match forms.iter().find(|(_, header)| keys_of(header).is_some()) {
            Some((path, header)) => {
                tables.insert(key);
                walk(path, header, leaves, tables);
            }
            None => drop(leaves.insert(key, header.to_owned())),
        }
    }
}

#[test]
fn the_manual_has_every_configuration_key_with_its_range() {
    let (mut leaves, mut tables) = (BTreeMap::new(), BTreeSet::new());
    walk("", "", &mut leaves, &mut tables);
    let manual = rows("configuration", "key");
    for key in leaves.keys() {
        assert!(manual.contains_key(key), "the manual lacks {key}");
    }
    for (key, cells) in &manual {
        assert!(leaves.contains_key(key) || tables.contains(key), "{key} is not a key");
        let range = &cells[1];
        let is_number = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        if range.split(" to ").count() == 2 && range.split(" to ").all(is_number) {
            let last = key.rsplit('.').next().unwrap();
            let faults = faults_of(&format!("{}{last} = 9999999999999\n", leaves[key]));
            assert!(faults.contains(&format!("is 9999999999999; must be from {range}")), "{key}: {faults}");
        }
    }
}

#[test]
fn the_manual_has_every_code_and_every_metric() {
    let zap = Running::with(&config(provider(OK, Duration::ZERO), ""));
    let metrics = ask(zap.address, "GET /metrics HTTP/1.1", "");
    // The reasons of this metric are no codes.
    let with_codes: Vec<&str> =
        metrics.lines().filter(|line| !line.starts_with("zap_prelude_failovers_total")).collect();
    let with_codes = with_codes.join("\n");
    let mut codes = labels(&with_codes, "reason");
    codes.extend(labels(&metrics, "kind"));
    codes.insert("stream_interrupted".into());
    assert_eq!(names("errors", "code"), codes);

    let kinds: BTreeMap<String, String> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
        .collect();
    let manual = rows("metrics", "name");
    assert_eq!(manual.keys().collect::<Vec<_>>(), kinds.keys().collect::<Vec<_>>());
    for (name, cells) in manual {
        assert_eq!(cells[0].split(',').next(), Some(&*kinds[&name]), "{name}");
    }
}

#[test]
fn the_manual_has_every_endpoint() {
    let zap = Running::with(&config(provider(OK, Duration::ZERO), ""));
    let is_served = |path: &str| {
        !ask(zap.address, &format!("GET {path} HTTP/1.1"), "").contains("\"code\":\"unknown_url\"")
    };
    let manual = rows("api", "path");
    for (path, cells) in &manual {
        let refused = ask(zap.address, &format!("PUT {} HTTP/1.1", path.replace("{id}", "a")), "");
        assert!(refused.contains(&format!("\r\nallow: {}\r\n", cells[0])), "{path}: {refused}");
    }
    // Every string in the sources that is a served path must be in the manual.
    let is_path = |text: &&str| text.bytes().all(|b| b.is_ascii_lowercase() || b"/0123456789_-".contains(&b));
    let sources = sources();
    let literals = sources.iter().flat_map(|source| source.split("\"/").skip(1));
    let paths: BTreeSet<&str> =
        literals.map(|rest| rest.split('"').next().unwrap()).filter(is_path).collect();
    let mut served = 0;
    for path in paths.iter().map(|path| format!("/{path}")).filter(|path| is_served(path)) {
        served += 1;
        assert!(manual.contains_key(path.as_str()) || path == "/models/", "the manual lacks {path}");
    }
    assert!(served > 10, "the sources name {served} endpoints");
    let text = page("metrics");
    let words: BTreeSet<&str> = text.split(|c: char| !c.is_ascii_lowercase() && c != '_').collect();
    for label in labels(&ask(zap.address, "GET /metrics HTTP/1.1", ""), "endpoint") {
        assert!(words.contains(label.as_str()), "the manual lacks the endpoint label {label}");
    }
}

#[test]
fn the_manual_has_every_log_field_every_event_and_every_member_of_status() {
    let zap = Running::with(&config(provider(OK, Duration::ZERO), ""));
    ask(zap.address, "POST /chat HTTP/1.1\r\nx-request-id: fields", CHAT);
    let keys =
        |json: &serde_json::Value| json.as_object().unwrap().keys().cloned().collect::<BTreeSet<String>>();
    let line = serde_json::from_str(&zap.line("\"fields\"")).unwrap();
    assert_eq!(names("operations", "field"), keys(&line));

    let mut events = BTreeSet::from(["request".to_owned()]);
    for source in sources() {
        for level in ["\"info\",", "\"warn\",", "\"error\","] {
            for rest in source.split(level).skip(1) {
                if let Some(rest) = rest.trim_start().strip_prefix('"') {
                    events.insert(rest.split('"').next().unwrap().to_owned());
                }
            }
        }
    }
    assert_eq!(names("operations", "event"), events);

    let status = ask(zap.address, "GET /status HTTP/1.1", "");
    let status: serde_json::Value = serde_json::from_str(status.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    let text = page("operations");
    for key in keys(&status).union(&keys(&status["backends"][0])) {
        assert!(text.contains(&format!("`{key}`")), "the manual lacks {key} of /status");
    }
}

#[test]
fn references_in_the_manual_and_the_readme_exist() {
    let readme = std::fs::read_to_string(format!("{ROOT}/README.md")).unwrap();
    assert!(readme.lines().count() <= 200);
    let topics = run(&["help"]);
    let topics = String::from_utf8(topics.stdout).unwrap();
    let topics = topics.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let topics: Vec<&str> = topics.filter(|topic| *topic != "zap").collect();
    assert_eq!(topics.len(), 10);
    let texts = topics.iter().map(|topic| page(topic)).chain([readme]);
    for text in texts {
        for span in text.split('`').skip(1).step_by(2) {
            // A word in capitals is a placeholder.
            let word =
                span.strip_prefix("zap help ").filter(|word| word.contains(|c: char| c.is_lowercase()));
            if let Some(word) = word {
                assert_eq!(run(&["help", word]).status.code(), Some(0), "{span}");
            }
            if span.starts_with("src/") || span.starts_with("benches/") || span.starts_with("tests/") {
                let path = span.split(' ').next().unwrap();
                assert!(Path::new(ROOT).join(path).exists(), "{path} does not exist");
            }
        }
    }
}

/// The sections that a text refers to, as in `see "Browsers" and "TLS" in `zap help operations``: each name with its
/// topic; the topic is `None` if the section is in the text itself.
fn sections_meant(text: &str) -> Vec<(&str, Option<&str>)> {
    let mut meant = Vec::new();
    let starts = ["see \"", " in \""]
        .into_iter()
        .flat_map(|mark| text.match_indices(mark).map(move |(at, _)| at + mark.len()));
    for start in starts {
        let mut rest = &text[start..];
        let mut names = Vec::new();
        while let Some((name, after)) = rest.split_once('"') {
            names.push(name);
            let Some(next) = after.strip_prefix(" and \"") else {
                rest = after;
                break;
            };
            rest = next;
        }
        let topic = [" in `zap help ", " of `zap help "].iter().find_map(|mark| rest.strip_prefix(mark));
        let topic = topic.and_then(|topic| topic.split('`').next());
        meant.extend(names.into_iter().map(|name| (name, topic)));
    }
    meant
}

/// Whether a page has a heading with this name, or a paragraph that begins with it in bold.
fn has_section(page: &str, name: &str) -> bool {
    let is_heading = |line: &str| line.starts_with('#') && line.trim_start_matches('#').trim() == name;
    let is_paragraph = |line: &str| {
        line.trim_start_matches("- ")
            .strip_prefix("**")
            .is_some_and(|line| line.starts_with(&format!("{name}.**")))
    };
    page.lines().any(|line| is_heading(line) || is_paragraph(line))
}

#[test]
fn sections_that_the_manual_refers_to_exist() {
    let text = "see \"A\" and \"B c\" in `zap help api`, as in \"D\" of `zap help usage`; see \"E\" below";
    let meant = [("A", Some("api")), ("B c", Some("api")), ("E", None), ("D", Some("usage"))];
    assert_eq!(sections_meant(text), meant);
    assert!(!has_section("## Files and connections\n**Files** are", "Files"));
    let overview = String::from_utf8(run(&["help"]).stdout).unwrap();
    let topics = overview.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let mut count = 0;
    for topic in topics.filter(|topic| *topic != "zap") {
        let words: Vec<String> = page(topic).split_whitespace().map(str::to_owned).collect();
        for (name, other) in sections_meant(&words.join(" ")) {
            let other = other.unwrap_or(topic);
            assert!(has_section(&page(other), name), "{topic} refers to \"{name}\" in {other}");
            count += 1;
        }
    }
    assert!(count >= 15, "{count}");
}

#[test]
fn help_prints_a_key_suggests_similar_words_and_tolerates_a_closed_pipe() {
    let key = run(&["help", "max_size"]);
    assert_eq!(key.status.code(), Some(0));
    let text = String::from_utf8(key.stdout).unwrap();
    assert!(text.starts_with("queue.max_size") && text.contains("0 to 1000000"), "{text}");
    let unknown = run(&["help", "max_sise"]);
    assert_eq!((unknown.status.code(), unknown.stdout.len()), (Some(2), 0));
    assert!(stderr(&unknown).contains("did you mean max_size"), "{}", stderr(&unknown));
    assert_eq!(run(&["help", "queue", "max_size"]).status.code(), Some(2));

    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = zap().args(["help", "configuration"]).stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
}

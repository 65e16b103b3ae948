//! The shape of `src`: layers only look down, no files import one another in a circle, no file is long.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test that cannot go on must say so.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// From the top down; a line holds modules that may not import each other unless they stand in this order.
const LAYERS: [&[&str]; 7] = [
    &["main", "cli", "manual", "demo", "lib", "fuzzing"],
    &["server"],
    &["gateway"],
    &["client", "telemetry", "upstream"],
    &["config"],
    &["policy", "protocol", "http1", "json"],
    &["clock", "code", "counter", "time"],
];

fn rank(module: &str) -> (usize, usize) {
    let found = LAYERS
        .iter()
        .enumerate()
        .find_map(|(layer, modules)| Some((layer, modules.iter().position(|known| *known == module)?)));
    found.unwrap_or_else(|| panic!("{module} stands in no layer"))
}

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, into),
            false if path.extension().is_some_and(|e| e == "rs") => into.push(path),
            false => {}
        }
    }
}

/// All files of `src` by their path in it, without their tests.
fn code() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 50, "the sources are elsewhere");
    let mut code = BTreeMap::new();
    for file in files.iter().filter(|file| !file.ends_with("tests.rs")) {
        let path = file.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(file).unwrap();
        code.insert(path, text.split("#[cfg(test)]\nmod tests").next().unwrap().to_owned());
    }
    code
}

/// The modules that a file names behind `crate::`, its tests left out.
fn imports(text: &str) -> BTreeSet<&str> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let names = code.flat_map(|line| line.split("crate::").skip(1));
    names.filter_map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()).collect()
}

#[test]
fn layers_only_look_down() {
    let mut faults = Vec::new();
    for (path, text) in code() {
        let first = path.split('/').next().unwrap();
        let module = first.strip_suffix(".rs").unwrap_or(first);
        for import in imports(&text).into_iter().filter(|import| *import != module && !import.is_empty()) {
            // What is named at the root of the crate is no module: `crate::run`.
            if import == "run" || import == "RunError" {
                continue;
            }
            let (here, there) = (rank(module), rank(import));
            if there.0 < here.0 || there.0 == here.0 && there.1 < here.1 {
                faults.push(format!("{path}: crate::{import}"));
            }
        }
    }
    assert!(faults.is_empty(), "imports that look up:\n{}", faults.join("\n"));
}

/// The files that `text` imports from by `use crate::`, each by the longest path that is a file.
fn imported_files<'c>(text: &str, code: &'c BTreeMap<String, String>) -> BTreeSet<&'c str> {
    let mut found = BTreeSet::new();
    for statement in text.split("use crate::").skip(1) {
        let statement = statement.split(';').next().unwrap();
        let (path, items) = statement.split_once('{').unwrap_or((statement, ""));
        let items: Vec<String> = match items {
            "" => vec![path.to_owned()],
            items => items.split([',', '}', '{']).map(|item| format!("{path}{}", item.trim())).collect(),
        };
        for item in items {
            let names: Vec<&str> = item.split("::").filter(|name| !name.is_empty()).collect();
            let file = (1..=names.len()).rev().find_map(|length| {
                let path = names[..length].join("/");
                let known = [format!("{path}.rs"), format!("{path}/mod.rs")];
                known.iter().find_map(|path| code.get_key_value(path)).map(|(path, _)| path.as_str())
            });
            found.extend(file);
        }
    }
    found
}

#[test]
fn no_files_import_one_another_in_a_circle() {
    let code = code();
    let mut edges: BTreeMap<&str, BTreeSet<&str>> =
        code.iter().map(|(path, text)| (path.as_str(), imported_files(text, &code))).collect();
    // A module may use what the module that it is a part of defines.
    let is_part =
        |path: &str, of: &str| of.strip_suffix("mod.rs").is_some_and(|folder| path.starts_with(folder));
    edges.iter_mut().for_each(|(path, files)| files.retain(|file| file != path && !is_part(path, file)));
    assert!(edges.values().map(BTreeSet::len).sum::<usize>() > 200, "imports are written in another way");
    // Files without imports leave, then those that imported only these, and so on; a circle stays.
    while let Some(done) = edges.iter().find_map(|(path, files)| files.is_empty().then_some(*path)) {
        edges.remove(done);
        for files in edges.values_mut() {
            files.remove(done);
        }
    }
    // Nor is a file on a circle that no other imports.
    loop {
        let imported: BTreeSet<&str> = edges.values().flatten().copied().collect();
        let before = edges.len();
        edges.retain(|path, _| imported.contains(path));
        if edges.len() == before {
            break;
        }
    }
    assert!(edges.is_empty(), "files in a circle: {edges:#?}");
}

#[test]
fn no_file_is_long_and_few_functions_have_many_parameters() {
    let mut many = Vec::new();
    for (path, text) in code() {
        let lines = text.lines().count();
        assert!(lines <= 450, "{path} has {lines} lines without its tests");
        for function in text.split("fn ").skip(1) {
            let name: String = function.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let (mut depth, mut colons, mut previous) = (0, 0, ' ');
            let mut receiver = false;
            for (at, c) in function.char_indices().skip_while(|(_, c)| *c != '(') {
                match c {
                    '(' | '[' | '{' | '<' => depth += 1,
                    ')' | ']' | '}' => depth -= 1,
                    '>' if previous != '-' => depth -= 1,
                    ':' if depth == 1 && previous != ':' && !function[at + 1..].starts_with(':') => {
                        colons += 1
                    }
                    's' if depth == 1 && function[at..].starts_with("self") && colons == 0 => receiver = true,
                    _ => {}
                }
                previous = c;
                if depth == 0 {
                    break;
                }
            }
            if colons + usize::from(receiver) >= 6 {
                many.push(format!("{path}: {name}"));
            }
        }
    }
    assert!(many.len() <= 2, "functions with six or more parameters: {many:?}");
}

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
    for file in &files {
        let path = file.strip_prefix(&root).unwrap();
        if path.iter().any(|part| part == "tests" || part == "tests.rs") {
            continue;
        }
        let path = path.to_str().unwrap().to_owned();
        let text = fs::read_to_string(file).unwrap();
        code.insert(path, text.split("#[cfg(test)]\nmod tests").next().unwrap().to_owned());
    }
    code
}

/// All paths behind `crate::`, in `use` statements and elsewhere, with their braces expanded.
fn paths(text: &str) -> Vec<String> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code = lines.collect::<Vec<_>>().join("\n");
    assert!(!code.replace("pub(super)", "").contains("super::"), "write `crate::` in place of `super::`");
    let mut paths = Vec::new();
    for rest in code.split("crate::").skip(1) {
        expand("", rest, &mut paths);
    }
    paths
}

/// Expands one `use` tree at the start of `text`; returns the rest.
fn expand<'t>(prefix: &str, text: &'t str, into: &mut Vec<String>) -> &'t str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = expand(prefix, rest, into).trim_start();
            match rest.split_at_checked(1) {
                Some((",", more)) => rest = more,
                Some((_, more)) => return more,
                None => return "",
            }
        }
    }
    let (name, rest) =
        text.split_at(text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len()));
    let path = format!("{prefix}{name}");
    match rest.strip_prefix("::") {
        Some(rest) => expand(&format!("{path}::"), rest, into),
        None => {
            into.push(path);
            rest
        }
    }
}

#[test]
fn paths_are_expanded() {
    let text = "use crate::{a::B, c};\nuse crate::d::{E, f::{self, G}};\nlet x = crate::h::i();\n// crate::j";
    let found = paths(text);
    assert_eq!(found, ["a::B", "c", "d::E", "d::f::self", "d::f::G", "h::i"]);
}

#[test]
fn layers_only_look_down() {
    let mut faults = Vec::new();
    for (path, text) in code() {
        let first = path.split('/').next().unwrap();
        let module = first.strip_suffix(".rs").unwrap_or(first);
        let paths = paths(&text);
        for import in paths.iter().filter_map(|path| path.split("::").next()) {
            // Items at the root of the crate are no modules.
            if import == module || matches!(import, "run" | "RunError") {
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

/// The files that `text` imports from, each by the longest path that is a file.
fn imported_files<'c>(text: &str, code: &'c BTreeMap<String, String>) -> BTreeSet<&'c str> {
    let file_of = |path: &String| {
        let names: Vec<&str> = path.split("::").collect();
        (1..=names.len()).rev().find_map(|length| {
            let path = names[..length].join("/");
            let known = [format!("{path}.rs"), format!("{path}/mod.rs")];
            known.iter().find_map(|path| code.get_key_value(path)).map(|(path, _)| path.as_str())
        })
    };
    paths(text).iter().filter_map(file_of).collect()
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
fn comments_fit_into_120_columns() {
    for (path, text) in code() {
        let is_prose = |line: &&str| line.trim_start().starts_with("//") && !line.contains("| ");
        let long = text.lines().filter(is_prose).find(|line| line.chars().count() > 120);
        assert_eq!(long, None, "{path}");
    }
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

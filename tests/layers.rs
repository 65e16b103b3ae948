//! Layers only look down: no module of `src` imports one of a higher layer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test that cannot go on must say so.

use std::collections::BTreeSet;
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

/// The modules that a file names behind `crate::`, its tests left out.
fn imports(text: &str) -> BTreeSet<&str> {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let names = code.flat_map(|line| line.split("crate::").skip(1));
    names.filter_map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()).collect()
}

#[test]
fn layers_only_look_down() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 50, "the sources are elsewhere");
    let mut faults = Vec::new();
    for file in files {
        let path = file.strip_prefix(&root).unwrap();
        if path.ends_with("tests.rs") {
            continue;
        }
        let first = path.iter().next().unwrap().to_str().unwrap();
        let module = first.strip_suffix(".rs").unwrap_or(first);
        let text = fs::read_to_string(&file).unwrap();
        for import in imports(&text).into_iter().filter(|import| *import != module && !import.is_empty()) {
            // What is named at the root of the crate is no module: `crate::run`.
            if import == "run" || import == "RunError" {
                continue;
            }
            let (here, there) = (rank(module), rank(import));
            if there.0 < here.0 || there.0 == here.0 && there.1 < here.1 {
                faults.push(format!("{}: crate::{import}", path.display()));
            }
        }
    }
    assert!(faults.is_empty(), "imports that look up:\n{}", faults.join("\n"));
}

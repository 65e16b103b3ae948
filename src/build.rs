//! Tells the program which commit it is built from, as the variable `ZAP_VERSION` of the build.
//!
//! The same commit gives the same text: there is no time in it. Without git, or outside a repository of Zap's own, the
//! text is the version alone.

use std::env;
use std::path::Path;
use std::process::Command;

/// What makes a build differ from its commit.
const SOURCES: [&str; 3] = ["src", "Cargo.toml", "Cargo.lock"];

fn main() {
    let version = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let version = commit().map_or(version.clone(), |commit| format!("{version} ({commit})"));
    println!("cargo::rustc-env=ZAP_VERSION={version}");
    // The crate is rebuilt for a change of these anyway.
    SOURCES.iter().for_each(|path| println!("cargo::rerun-if-changed={path}"));
    // A commit writes one of the last two.
    for name in ["HEAD", "logs/HEAD", "packed-refs"] {
        let path = git(&["rev-parse", "--git-path", name]);
        if let Some(path) = path.filter(|path| Path::new(path).exists()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
}

/// The commit, with a mark if the sources differ from it.
fn commit() -> Option<String> {
    // A copy of the sources within another repository has a prefix there.
    if !git(&["rev-parse", "--show-prefix"])?.is_empty() {
        return None;
    }
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changes = git(&[&["status", "--porcelain", "--untracked-files=no", "--"][..], &SOURCES].concat())?;
    Some(if changes.is_empty() { commit } else { format!("{commit}, with changes") })
}

/// What git prints, without the newline; `None` if git fails or is missing.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(["--no-optional-locks"]).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim_end().to_owned())
}

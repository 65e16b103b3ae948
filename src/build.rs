//! Sets `ZAP_VERSION` to the version and the commit of this build.
//!
//! The text has no time in it, so one commit always gives the same text. Without git, or outside a repository of Zap's
//! own, the text is the version alone.

use std::env;
use std::path::Path;
use std::process::Command;

/// If one of these has uncommitted changes, the version says `with changes`.
const SOURCES: [&str; 3] = ["src", "Cargo.toml", "Cargo.lock"];

fn main() {
    let version = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let version = commit().map_or(version.clone(), |commit| format!("{version} ({commit})"));
    println!("cargo::rustc-env=ZAP_VERSION={version}");
    // Cargo rebuilds the crate anyway when one of these changes.
    SOURCES.iter().for_each(|path| println!("cargo::rerun-if-changed={path}"));
    // `git commit` writes `logs/HEAD` and the ref of the branch.
    let branch = git(&["symbolic-ref", "-q", "HEAD"]);
    for name in ["HEAD", "logs/HEAD"].into_iter().chain(branch.as_deref()) {
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

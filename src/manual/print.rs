//! `zap print`, `zap completions` and `zap man`: files for running and watching Zap, and for the shell.

use crate::manual::recipes::RECIPES;
use crate::manual::{Page, TOPICS, list};
use crate::policy::near::hint;

/// The files that `zap print` prints.
const FILES: [Page; 8] = [
    Page {
        name: "grafana",
        summary: "a dashboard: a panel for each metric",
        text: include_str!("print/grafana.json"),
    },
    Page {
        name: "alerts",
        summary: "alerts for Prometheus (alerts.yml)",
        text: include_str!("print/alerts.yml"),
    },
    Page {
        name: "alerts-test",
        summary: "their tests, for promtool test rules",
        text: include_str!("print/alerts-test.yml"),
    },
    Page {
        name: "systemd",
        summary: "a unit with a sandbox (zap.service)",
        text: include_str!("print/zap.service"),
    },
    Page {
        name: "socket",
        summary: "its port, which systemd keeps over a restart (zap.socket)",
        text: include_str!("print/zap.socket"),
    },
    Page { name: "dockerfile", summary: "an image without a shell", text: include_str!("print/Dockerfile") },
    Page {
        name: "compose",
        summary: "that image for Docker Compose",
        text: include_str!("print/compose.yml"),
    },
    Page {
        name: "k8s",
        summary: "Deployment, Service and ConfigMap for Kubernetes",
        text: include_str!("print/k8s.yml"),
    },
];

/// The shells, and their completions with marks for the words.
const SHELLS: [(&str, &str); 3] = [
    ("bash", include_str!("print/zap.bash")),
    ("zsh", include_str!("print/zap.zsh")),
    ("fish", include_str!("print/zap.fish")),
];

const MAN: &str = include_str!("print/zap.1");

/// The commands of `zap`, for the completions.
const COMMANDS: [&str; 8] =
    ["check", "completions", "demo", "example", "healthcheck", "help", "man", "print"];

/// The file of this name; without a name the list of all.
///
/// # Errors
/// There is no such file; the message suggests similar names.
pub(crate) fn file(name: Option<&str>) -> Result<String, String> {
    let Some(name) = name else {
        return Ok(list("zap print NAME prints a file:", &FILES));
    };
    match FILES.iter().find(|file| file.name == name) {
        Some(file) => Ok(file.text.to_owned()),
        None => Err(unknown("print", name, FILES.iter().map(|file| file.name))),
    }
}

/// The completions of a shell.
///
/// # Errors
/// The shell is not known; the message names those that are.
pub(crate) fn completions(shell: &str) -> Result<String, String> {
    match SHELLS.iter().find(|(name, _)| *name == shell) {
        Some((_, text)) => Ok(with_words(text)),
        None => Err(unknown("completions", shell, SHELLS.iter().map(|(name, _)| *name))),
    }
}

/// The names of the shells.
pub(crate) fn shells() -> String {
    joined(SHELLS.iter().map(|(name, _)| *name), ", ")
}

/// The man page, in roff.
pub(crate) fn man() -> String {
    with_words(MAN)
}

fn unknown(command: &str, word: &str, known: impl Iterator<Item = &'static str> + Clone) -> String {
    let hint = hint(word, known.clone(), 1);
    let word: String = word.chars().take(40).collect();
    format!("{command} has no \"{}\"{hint} It has {}.", word.escape_debug(), joined(known, ", "))
}

fn with_words(text: &str) -> String {
    let separator = if text.starts_with(".\\\"") { ", " } else { " " };
    text.replace("@COMMANDS_OR@", &COMMANDS.join(" | "))
        .replace("@COMMANDS@", &COMMANDS.join(" "))
        .replace("@FILES@", &joined(FILES.iter().map(|file| file.name), separator))
        .replace("@PROVIDERS@", &joined(RECIPES.iter().map(|recipe| recipe.name), separator))
        .replace("@SHELLS@", &joined(SHELLS.iter().map(|(name, _)| *name), separator))
        .replace("@TOPICS@", &joined(TOPICS.iter().map(|topic| topic.name), separator))
        .replace("@VERSION@", env!("CARGO_PKG_VERSION"))
}

fn joined(words: impl Iterator<Item = &'static str>, separator: &str) -> String {
    words.collect::<Vec<_>>().join(separator)
}

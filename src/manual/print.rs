//! `zap print`: files for running and watching Zap.

use std::fmt::Write as _;

use crate::policy::near::nearest;

/// A file that `zap print` prints.
struct File {
    name: &'static str,
    summary: &'static str,
    text: &'static str,
}

const FILES: [File; 7] = [
    File {
        name: "grafana",
        summary: "a dashboard: a panel for each metric",
        text: include_str!("print/grafana.json"),
    },
    File {
        name: "alerts",
        summary: "alerts for Prometheus (alerts.yml)",
        text: include_str!("print/alerts.yml"),
    },
    File {
        name: "alerts-test",
        summary: "their tests, for promtool test rules",
        text: include_str!("print/alerts-test.yml"),
    },
    File {
        name: "systemd",
        summary: "a unit with a sandbox (zap.service)",
        text: include_str!("print/zap.service"),
    },
    File { name: "dockerfile", summary: "an image without a shell", text: include_str!("print/Dockerfile") },
    File {
        name: "compose",
        summary: "that image for Docker Compose",
        text: include_str!("print/compose.yml"),
    },
    File {
        name: "k8s",
        summary: "Deployment, Service and ConfigMap for Kubernetes",
        text: include_str!("print/k8s.yml"),
    },
];

/// The file of this name; without a name the list of all.
///
/// # Errors
/// There is no such file; the message suggests similar names.
pub(crate) fn file(name: Option<&str>) -> Result<String, String> {
    let Some(name) = name else {
        let mut out = String::from("zap print NAME prints a file:\n\n");
        for file in &FILES {
            let _ = writeln!(out, "  {:12} {}", file.name, file.summary);
        }
        return Ok(out);
    };
    match FILES.iter().find(|file| file.name == name) {
        Some(file) => Ok(file.text.to_owned()),
        None => Err(unknown("print", name, FILES.iter().map(|file| file.name))),
    }
}

fn unknown(command: &str, word: &str, known: impl Iterator<Item = &'static str> + Clone) -> String {
    let hint = match nearest(word, known.clone(), 1).first() {
        Some(near) => format!("; did you mean {near}?"),
        None => String::new(),
    };
    let word: String = word.chars().take(40).collect();
    format!("{command} has no \"{}\"{hint} It has {}.", word.escape_debug(), joined(known, ", "))
}

fn joined(words: impl Iterator<Item = &'static str>, separator: &str) -> String {
    words.collect::<Vec<_>>().join(separator)
}

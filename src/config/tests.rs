//! Tests of whole configurations, and what the tests of all modules read them with.

mod faults;
mod files;
mod folder;
mod mangled;
mod tls;
mod valid;

use std::path::Path;

pub(crate) use crate::config::tests::folder::Folder;
use crate::config::{Config, Faults};

const BACKEND: &str = "[[backends]]\nurl = \"http://a\"\nweight = 1\n";

fn env(name: &str) -> Option<String> {
    match name {
        "PORT" => Some("9000".to_owned()),
        "KEY" => Some("sk-CANARY".to_owned()),
        "BAD_KEY" => Some("sk-CANARY\nx".to_owned()),
        "EMPTY" => Some(String::new()),
        _ => None,
    }
}

fn parse(text: &str) -> Result<Config, Faults> {
    Config::parse(text, "config.toml", Path::new("/nonexistent"), &env)
}

fn faults(text: &str) -> Vec<String> {
    parse(text).err().map_or(Vec::new(), |faults| faults.0)
}

impl Config {
    /// Reads a text without variables and files.
    pub(crate) fn of(text: &str) -> Result<Self, String> {
        Config::parse(text, "test", Path::new(""), &|_| None).map_err(|faults| faults.to_string())
    }

    /// Reads one backend with further lines, which begin at line 4.
    pub(crate) fn of_backend(more: &str) -> Result<Self, String> {
        Config::of(&format!("{BACKEND}{more}\n"))
    }
}

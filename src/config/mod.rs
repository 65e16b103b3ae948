//! The configuration: strict TOML, read once, valid by construction.
//!
//! [`Config::load`] reads a file, [`Config::parse`] a text. Both report every
//! fault at once, each with its line, and no message ever holds a key.
//!
//! # Layout
//!
//! `toml_reader` walks the spanned tree (types, ranges, unknown keys), `suggest`
//! guesses what an unknown key means, `raw`, `backend`, `models` and `clients` name
//! every key with its default and range, `url` and `expand` read one value each,
//! `secret` keeps a key out of sight. To add a key: one field here, one line (and a const) there.

mod backend;
mod clients;
mod expand;
mod models;
mod raw;
mod secret;
mod suggest;
mod toml_reader;
mod url;

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use http::{HeaderName, HeaderValue};
use ipnet::IpNet;

pub(crate) use crate::config::backend::HEALTH_PATH;
pub(crate) use crate::config::secret::Secret;
use crate::config::toml_reader::Sink;
pub(crate) use crate::config::url::BaseUrl;
use crate::policy::route::{Named, Pattern, Rule};

/// Bytes of the largest configuration file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Everything Zap is told at its start; every value is within its range.
#[derive(Clone, Debug)]
pub struct Config {
    /// `[server]`: the listener and its limits.
    pub server: Server,
    /// `[queue]`: admission.
    pub queue: Queue,
    /// `load_balancer.strategy`.
    pub strategy: Strategy,
    /// `load_balancer.prefix_bytes`: how much of a conversation's opening tells it from others, at least 1.
    pub prefix_bytes: usize,
    /// `[health]`: active checks.
    pub health: Health,
    /// `[retry]`: further tries.
    pub retry: Retry,
    /// `[timeouts]`: of the upstream side.
    pub timeouts: Timeouts,
    /// `[rate_limit]`: per client key.
    pub rate_limit: RateLimit,
    /// `[log]`: what is logged, and how.
    pub log: Log,
    /// `[[backends]]` in the file's order: never empty, names unique.
    pub backends: Vec<Backend>,
    /// `[models.NAME]` in the file's order; their backends exist, none is empty.
    pub routes: Vec<Named>,
    /// `[[client_keys]]`: names and keys unique. Empty: anyone may call.
    pub clients: Vec<ClientKey>,
    /// What is allowed but unwise, one line each, no newline at the end.
    pub warnings: Vec<String>,
    /// The file it was read from, if any: a reload reads it again.
    pub file: Option<PathBuf>,
}

/// `[server]`: the listener and its limits.
#[derive(Clone, Debug)]
pub struct Server {
    /// Address listened on; `"localhost"` is read as 127.0.0.1.
    pub host: IpAddr,
    /// Port listened on; 0 lets the system pick one.
    pub port: u16,
    /// Worker threads, 1 to 1024.
    pub workers: usize,
    /// Largest request body, in bytes.
    pub max_body_bytes: u64,
    /// Open client connections, over all workers.
    pub max_connections: usize,
    /// How long SIGTERM waits for running requests, in whole seconds, may be 0.
    pub drain: Duration,
    /// Idle time after which a client connection is closed, in whole seconds.
    pub keep_alive: Duration,
    /// Peers whose `x-forwarded-for` is believed.
    pub trusted_proxies: Vec<IpNet>,
}

impl Server {
    /// The keys in which `other` is not the same, in the file's words.
    pub fn differs(&self, other: &Server) -> Vec<&'static str> {
        [
            ("server.host", self.host != other.host),
            ("server.port", self.port != other.port),
            ("server.workers", self.workers != other.workers),
            ("server.max_body_bytes", self.max_body_bytes != other.max_body_bytes),
            ("server.max_connections", self.max_connections != other.max_connections),
            ("server.drain_secs", self.drain != other.drain),
            ("server.keep_alive_secs", self.keep_alive != other.keep_alive),
            ("server.trusted_proxies", self.trusted_proxies != other.trusted_proxies),
        ]
        .into_iter()
        .filter_map(|(key, differs)| differs.then_some(key))
        .collect()
    }
}

/// `[queue]`: admission.
#[derive(Clone, Debug)]
pub struct Queue {
    /// Requests that may wait for a slot; 0: none.
    pub max_size: usize,
    /// Requests being served at once, over all backends.
    pub max_in_flight: usize,
    /// Longest wait for a cooling backend or a quota window, in whole seconds.
    pub max_wait: Duration,
    /// From a request's arrival to its response's first byte, in whole seconds.
    pub timeout: Duration,
}

/// How a backend is picked among those eligible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// The smallest (in flight + 1) / weight.
    LeastLoaded,
    /// Each conversation at its own backend, by a hash.
    PrefixHash,
    /// Smooth weighted order.
    RoundRobin,
}

/// `[health]`: active checks.
#[derive(Clone, Debug)]
pub struct Health {
    /// Between two checks of one backend, in whole seconds.
    pub interval: Duration,
    /// Longest check, in whole seconds.
    pub timeout: Duration,
    /// Failures in a row that take a backend out, 1 to 1000.
    pub failure_threshold: u32,
    /// Successes in a row that take it back, 1 to 1000.
    pub success_threshold: u32,
}

/// `[retry]`: further tries.
#[derive(Clone, Debug)]
pub struct Retry {
    /// Tries after the first, 0 to 10.
    pub max_retries: u32,
    /// Backoff's base, in whole milliseconds; never above `max_delay`.
    pub base_delay: Duration,
    /// Backoff's cap, in whole milliseconds.
    pub max_delay: Duration,
    /// Retries allowed as a share of the offered requests, 0 to 100 percent.
    pub budget_percent: u32,
}

/// `[timeouts]`: of the upstream side.
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// Name look-up, TCP and TLS together, in whole milliseconds.
    pub connect: Duration,
    /// Longest silence within a response, in whole seconds.
    pub stream_idle: Duration,
}

/// `[rate_limit]`: per client key.
#[derive(Clone, Debug)]
pub struct RateLimit {
    /// Requests in any 60 s per client key, at least 1; `None`: unlimited.
    pub requests_per_minute: Option<u32>,
    /// The same per peer address, in the open mode alone.
    pub requests_per_minute_per_address: Option<u32>,
    /// Client keys tracked at once.
    pub max_keys: usize,
}

/// `[log]`: what is logged, and how.
#[derive(Clone, Debug)]
pub struct Log {
    /// Whether each request's completion is logged.
    pub requests: bool,
    /// The shape of every other line.
    pub events: LogFormat,
}

/// The shape of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// Plain words.
    Text,
}

/// One `[[backends]]` entry.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    /// Unique label, 1 to 64 of `A-Za-z0-9._-`.
    pub name: String,
    /// Where it is; `chat_path` and `health_path` are appended, a `/v1` that both have once.
    pub url: BaseUrl,
    /// Share of the traffic, 0 to 1000; 0: listed but drained.
    pub weight: u32,
    /// Path of its health check; begins with `/`, may have a query.
    pub health_path: String,
    /// Sent as `Authorization: Bearer`, or as `auth_header` says.
    pub api_key: Option<Secret>,
    /// The header that carries `api_key` bare; `None`: `Authorization: Bearer`.
    pub auth_header: Option<HeaderName>,
    /// Headers it is sent beside Zap's own; the values are marked sensitive.
    pub extra_headers: Vec<(HeaderName, HeaderValue)>,
    /// Top-level members of a body that it is not sent.
    pub drop_fields: Vec<Box<str>>,
    /// What it serves; `None`: any model.
    pub models: Option<Vec<Rule>>,
    /// Model put in where the client names none; its own name for it.
    pub default_model: Option<String>,
    /// Path of its chat endpoint; begins with `/`, may have a query.
    pub chat_path: String,
    /// Lower is asked first, 0 to 1000.
    pub priority: u32,
    /// PEM of further roots: resolved, and could be opened when it was read.
    pub ca_file: Option<PathBuf>,
    /// Its own limit of requests at once, at least 1.
    pub max_in_flight: Option<usize>,
    /// Its own quota of requests in any 60 s, at least 1.
    pub requests_per_minute: Option<u32>,
    /// Whether the client's own `Authorization` is passed on; never with `api_key`.
    pub forward_authorization: bool,
}

/// One `[[client_keys]]` entry.
#[derive(Clone, PartialEq)]
pub struct ClientKey {
    /// Unique label, 1 to 64 of `A-Za-z0-9._-`.
    pub name: String,
    /// SHA-256 of the key; the key itself is kept nowhere.
    pub digest: [u8; 32],
    /// In place of `rate_limit.requests_per_minute`.
    pub requests_per_minute: Option<u32>,
    /// The models it may name; `None`: all.
    pub models: Option<Vec<Pattern>>,
}

impl fmt::Debug for ClientKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientKey").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Every fault of a configuration, in the order of its lines; never empty.
///
/// Displayed one per line, each `FILE:LINE: what is wrong, what is allowed`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(Vec<String>);

/// Why no configuration could be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// The file is there but not right, or cannot be read.
    Invalid(Faults),
    /// No file at this path.
    Missing(PathBuf),
}

impl Config {
    /// Reads the file at `path`; relative paths inside are relative to its
    /// directory, `${NAME}` is taken from the process's environment.
    ///
    /// # Errors
    ///
    /// [`LoadError::Missing`] if there is no such file, else every fault.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let label = path.display().to_string();
        let bytes = match read_bounded(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(LoadError::Missing(path.to_owned()));
            }
            Err(error) => {
                let kind = error.kind();
                let what = format!("cannot be read ({kind}); a readable text file is needed");
                return Err(LoadError::Invalid(Faults::at_first_line(&label, &what)));
            }
        };
        if bytes.len() as u64 > MAX_FILE_BYTES {
            let what = format!("is too large; allowed: up to {MAX_FILE_BYTES} bytes");
            return Err(LoadError::Invalid(Faults::at_first_line(&label, &what)));
        }
        let Ok(text) = String::from_utf8(bytes) else {
            let what = "is not UTF-8; TOML is UTF-8 text";
            return Err(LoadError::Invalid(Faults::at_first_line(&label, what)));
        };
        let base = path.parent().unwrap_or(Path::new(""));
        let env = |name: &str| std::env::var(name).ok();
        let mut read = read(&text, &label, base, &env).map_err(LoadError::Invalid)?;
        if read.inline_key && world_readable(path) {
            read.config.warnings.push(format!(
                "{label} holds a key and every user may read it; \
                 `chmod o-r` it, or take the key from the environment or a file"
            ));
        }
        read.config.file = Some(path.to_owned());
        Ok(read.config)
    }

    /// Reads `text`, calling it `label` in messages; relative paths inside are
    /// relative to `base`, `${NAME}` is asked of `env`.
    ///
    /// # Errors
    ///
    /// Every fault, or, if the text is no TOML, every syntax error.
    pub fn parse(
        text: &str,
        label: &str,
        base: &Path,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, Faults> {
        read(text, label, base, env).map(|read| read.config)
    }
}

/// [`Config::parse`], and whether the text itself sets a key.
fn read(
    text: &str,
    label: &str,
    base: &Path,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<raw::Parsed, Faults> {
    let sink = Sink::new(text, label);
    let surroundings = raw::Surroundings { base, env };
    let read = toml_reader::document(&sink, |root| raw::config(root, &surroundings));
    match (read, sink.into_messages()) {
        (Some(read), messages) if messages.is_empty() => Ok(read),
        (_, messages) => Err(Faults(messages)),
    }
}

/// At most one byte more than [`MAX_FILE_BYTES`], so that more can be told.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(unix)]
fn world_readable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o004 != 0)
}

#[cfg(not(unix))]
fn world_readable(_: &Path) -> bool {
    false
}

impl Faults {
    /// The faults, each one line `FILE:LINE: ...`.
    pub fn lines(&self) -> &[String] {
        &self.0
    }

    fn at_first_line(label: &str, what: &str) -> Self {
        Self(vec![format!("{label}:1: the file {what}")])
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Faults {}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(faults) => faults.fmt(f),
            Self::Missing(path) => write!(f, "no configuration file at {}", path.display()),
        }
    }
}

impl std::error::Error for LoadError {}

#[cfg(test)]
mod tests;

//! The configuration: strict TOML, read once, valid by construction.
//!
//! [`Config::load`] reads a file, [`Config::parse`] reads a text. Both report every fault at once, each with its line,
//! and no message ever contains a key.
//!
//! # Layout
//!
//! - `file` reads the text, and the files that it names; `files` notices when one of them changes.
//! - `address` reads where Zap listens and nothing else.
//! - `fault_sink` collects the faults, each with its line.
//! - `toml_reader` walks the spanned tree and checks types and unknown keys; `numbers` and `strings` read the values.
//! - `text` is a string with its place, and knows which strings a message may show; `syntax` explains a text that is
//!   not TOML; `suggest` guesses which known key an unknown key means; `aliases` lists the names of other programs.
//! - `raw`, `admin`, `backend`, `models`, `clients` and `money` name every key with its default and range.
//! - `charges` checks that what is limited by tokens or money can be read and priced; `sent_models` says which models a
//!   backend may be sent.
//! - `base_url`, `browsers`, `headers`, `proxy`, `no_proxy`, `identity`, `tls`, `url` and `expand` each read one
//!   subject.
//! - `certificate` says which names a certificate has, and when it ends.
//! - `warnings` finds settings that are allowed but unwise.
//! - `otlp` reads where traces go, from the file and from the variables of OpenTelemetry.
//! - `keys` reads the keys of backends and clients; `key_pool` those of one backend; `secret` keeps a key from being
//!   printed.
//!
//! A new key needs a field here and a line (and a const) in `raw`, `backend`, `models`, `clients` or `money`.

mod address;
mod admin;
mod aliases;
mod backend;
mod base_url;
mod browsers;
mod certificate;
mod charges;
mod clients;
mod common;
mod expand;
mod fault_sink;
mod file;
mod files;
mod headers;
mod identity;
mod key_pool;
mod keys;
mod memory_limit;
mod models;
mod money;
mod no_proxy;
mod numbers;
mod otlp;
mod proxy;
mod range;
mod raw;
mod secret;
mod sent_models;
mod server;
mod strings;
mod suggest;
mod syntax;
mod text;
mod tls;
mod toml_reader;
mod unix_socket;
mod url;
mod warnings;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use rustls::pki_types::ServerName;

pub(crate) use crate::config::address::{Listen, listen_address};
pub(crate) use crate::config::admin::AdminAccess;
pub(crate) use crate::config::backend::{BackendHealth, HEALTH_PATH, UsageMode};
pub(crate) use crate::config::certificate::common_name;
pub(crate) use crate::config::clients::{ANONYMOUS, ClientKey};
use crate::config::common::Context;
use crate::config::fault_sink::Sink;
pub use crate::config::fault_sink::{Faults, LoadError};
pub(crate) use crate::config::files::Files;
pub(crate) use crate::config::identity::Identity;
pub(crate) use crate::config::key_pool::{PoolPlace, scale};
pub(crate) use crate::config::memory_limit::memory_limit;
pub use crate::config::models::ModelsFrom;
pub(crate) use crate::config::money::Budget;
pub(crate) use crate::config::otlp::Otlp;
pub(crate) use crate::config::proxy::{Proxy, ProxySource};
pub(crate) use crate::config::secret::Secret;
pub(crate) use crate::config::server::Server;
pub(crate) use crate::config::text::{is_like_a_key, quoted};
pub(crate) use crate::config::tls::{ServerTls, ends as certificate_ends};
pub(crate) use crate::config::unix_socket::UnixSocket;
pub(crate) use crate::config::url::BaseUrl;
use crate::http1::header_rules::HeaderRules;
use crate::policy::route::{Named, Rule};
use crate::protocol::endpoint::Protocol;

/// The whole configuration; every value is within its range.
#[derive(Clone, Debug)]
pub struct Config {
    /// `[server]`: the listener and its limits.
    pub server: Server,
    /// `[[server.tls]]`: TLS of the listener; `None`: plain HTTP. Unlike `server`, a reload replaces it.
    pub tls: Option<ServerTls>,
    /// `[admin]`: who may use the admin listener. Its address is in `server`.
    pub(crate) admin: AdminAccess,
    /// `[queue]`: admission.
    pub queue: Queue,
    /// `load_balancer.strategy`.
    pub strategy: Strategy,
    /// `load_balancer.prefix_bytes`: bytes of a conversation's first messages that identify it, at least 1.
    pub prefix_bytes: usize,
    /// `affinity.max_ids`: ids of responses, items and conversations whose backend is known, at least 1.
    pub max_ids: usize,
    /// `[health]`: active checks.
    pub health: Health,
    /// `[retry]`: retries.
    pub retry: Retry,
    /// `[timeouts]`: timeouts of the upstream side.
    pub timeouts: Timeouts,
    /// `[stream]`: streamed responses.
    pub stream: Stream,
    /// `[rate_limit]`: limits per client key.
    pub rate_limit: RateLimit,
    /// `[log]`: what is logged, and how.
    pub log: LogSettings,
    /// `models_from`: what `/v1/models` lists.
    pub models_from: ModelsFrom,
    /// `[[backends]]` in the file's order: never empty, names unique.
    pub backends: Vec<Backend>,
    /// `[models.NAME]` in the file's order. Every named backend exists; no route is empty.
    pub routes: Vec<Named>,
    /// `[[client_keys]]`: names and keys unique. If empty, every client is admitted.
    pub clients: Vec<ClientKey>,
    /// `reload.watch`: whether a change of [`files`](Self::files) reloads the configuration.
    pub watch: bool,
    /// `ledger.path`: the file that keeps what was used; the path is resolved. It may not exist yet. `None`: no ledger.
    pub ledger: Option<PathBuf>,
    /// `[otlp]`: where traces go; `None`: there are none.
    pub otlp: Option<Arc<Otlp>>,
    /// Settings that are allowed but unwise: one line each, without a newline.
    pub warnings: Vec<String>,
    /// The file that the configuration was read from, if any; a reload reads it again.
    pub file: Option<PathBuf>,
    /// That file and the files that it names.
    pub files: Files,
}

/// `[queue]`: admission.
#[derive(Clone, Debug)]
pub struct Queue {
    /// Most requests that may wait for a permit; 0: none may wait.
    pub max_size: usize,
    /// Most requests served at once, over all backends.
    pub max_in_flight: usize,
    /// The part of `max_in_flight` that one backend may have if there are several, in millionths: 1 to 1,000,000.
    pub backend_share: u32,
    /// Longest wait for a cooling backend or a quota window, in whole seconds.
    pub max_wait: Duration,
    /// Longest time from the end of a request's body to the first content of a stream, or the first byte of any other
    /// response, in whole seconds.
    pub timeout: Duration,
}

/// How to pick one of the eligible backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// Of two backends at random, the one with the smallest expected time to first content x (in flight + 1) / weight.
    LeastLatency,
    /// The backend with the smallest (in flight + 1) / weight.
    LeastLoaded,
    /// The same backend for every request of a conversation, chosen by a hash.
    PrefixHash,
    /// Smooth weighted round robin.
    RoundRobin,
}

/// `[health]`: active checks.
#[derive(Clone, Debug)]
pub struct Health {
    /// Time between two checks of a backend, in whole seconds.
    pub interval: Duration,
    /// Longest check, in whole seconds.
    pub timeout: Duration,
    /// Failures in a row that eject a backend, 1 to 1000; checks and requests are counted separately.
    pub failure_threshold: u32,
    /// Successes in a row after which the backend comes back, 1 to 1000.
    pub success_threshold: u32,
}

/// `[retry]`: retries.
#[derive(Clone, Debug)]
pub struct Retry {
    /// Tries after the first, 0 to 10.
    pub max_retries: u32,
    /// Base of the backoff, in whole milliseconds; at most `max_delay`.
    pub base_delay: Duration,
    /// Cap of the backoff, in whole milliseconds.
    pub max_delay: Duration,
    /// Retries allowed as a share of the offered requests, 0 to 100 percent.
    pub budget_percent: u32,
}

/// `[timeouts]`: timeouts of the upstream side.
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// Time for the name look-up, TCP and TLS together, in whole milliseconds.
    pub connect: Duration,
    /// Time from a streamed request to the head of its response, if another target is left, in whole seconds; 0: no
    /// limit.
    pub first_byte: Duration,
    /// Time from a streamed request to the first content, if another target is left, in whole seconds; 0: no limit.
    pub first_token: Duration,
    /// Longest silence within a response, in whole seconds.
    pub stream_idle: Duration,
}

/// `[stream]`: streamed responses.
#[derive(Clone, Debug)]
pub struct Stream {
    /// How long a stream is held back before its first content, if another target is left, in whole seconds; 0: never.
    pub hold: Duration,
    /// The silence after which the client hears a comment, in whole seconds; 0: never.
    pub heartbeat: Duration,
}

/// `[rate_limit]`: limits per client key.
#[derive(Clone, Debug)]
pub struct RateLimit {
    /// Requests in any 60 s per client key, at least 1; `None`: unlimited.
    pub requests_per_minute: Option<u32>,
    /// The same per peer address; applies only if no client keys are configured.
    pub requests_per_minute_per_address: Option<u32>,
    /// Tokens in any 60 s of a client key without its own limit, and of a credential if no client keys are configured.
    pub tokens_per_minute: Option<u64>,
    /// Most client keys and addresses tracked at once.
    pub max_keys: usize,
}

/// `[log]`: what is logged, and how.
#[derive(Clone, Debug)]
pub struct LogSettings {
    /// The format of all lines.
    pub format: LogFormat,
    /// Whether each request gets a log line when it ends.
    pub requests: bool,
    /// Whether requests to `/health`, `/ready`, `/metrics`, `/status`, `/usage` and the page get one, too.
    pub probes: bool,
}

/// The format of the log's lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, otherwise JSON.
    Auto,
    /// One JSON object per line.
    Json,
    /// Text; short on a terminal.
    Text,
}

/// One `[[backends]]` entry.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    /// Unique label, 1 to 64 of `A-Za-z0-9._-`.
    pub name: String,
    /// Base URL; `chat_path` and `health_path` are appended. A `/v1` at its end is dropped before a path that begins
    /// with `/v1/`, and before the default `health_path`.
    pub url: BaseUrl,
    /// Share of the traffic, 0 to 1000; 0: listed but drained.
    pub weight: u32,
    /// Path of the health check; begins with `/`, may have a query.
    pub health_path: String,
    /// What differs from `[health]`.
    pub health: BackendHealth,
    /// Key sent as `Authorization: Bearer`, or in `auth_header`.
    pub api_key: Option<Secret>,
    /// The keys of `api_keys`, if there are several; `api_key` is the first of them.
    pub key_pool: Vec<Secret>,
    /// The place in a pool of a [backend with one of its keys](Config::with_a_backend_per_key).
    pub pool: Option<PoolPlace>,
    /// Header that carries `api_key` without a scheme; `None`: `Authorization: Bearer`.
    pub auth_header: Option<HeaderName>,
    /// Headers sent in addition to Zap's own; the values are marked sensitive.
    pub extra_headers: Vec<(HeaderName, HeaderValue)>,
    /// Which of the client's headers it gets beside the standard list, and which it does not.
    pub header_rules: HeaderRules,
    /// Top-level members of a request body that are not sent to this backend.
    pub drop_fields: Vec<Box<str>>,
    /// Models that the backend serves; `None`: any model.
    pub models: Option<Vec<Rule>>,
    /// Model to send if the client names none, as the backend calls it.
    pub default_model: Option<String>,
    /// Path of the chat endpoint; begins with `/`, may have a query.
    pub chat_path: String,
    /// Priority, 0 to 1000; the lowest is tried first.
    pub priority: u32,
    /// PEM file of additional root certificates: the path is resolved, and the file could be opened at load time.
    pub ca_file: Option<PathBuf>,
    /// The proxy on the way to this backend.
    pub proxy: Option<Proxy>,
    /// The certificate that Zap shows this backend; only with `https`.
    pub client_identity: Option<Identity>,
    /// The name in this backend's certificate, if it is not the host of `url`; only with `https`.
    pub server_name: Option<ServerName<'static>>,
    /// Most requests at once to this backend, at least 1.
    pub max_in_flight: Option<usize>,
    /// Quota of this backend: requests in any 60 s, at least 1.
    pub requests_per_minute: Option<u32>,
    /// Quota of this backend: tokens in any 60 s, at least 1.
    pub tokens_per_minute: Option<u64>,
    /// How the usage of its answers is read; never [`UsageMode::Off`] where a limit or a budget needs it.
    pub usage: UsageMode,
    /// Prices by model as sent: (pattern, [input, cached, cache_write, output] in pico-USD a token). A pattern is a
    /// name, or with a trailing `*` a prefix; no pattern is there twice.
    pub prices: Vec<(String, [u64; 4])>,
    /// Most that this backend may cost; every model that it may be sent has a price.
    pub budget: Option<Budget>,
    /// Protocols that the backend speaks: at least one, each once.
    pub protocols: Vec<Protocol>,
    /// Whether the client's own `Authorization` is passed on; never true with `api_key`.
    pub forward_authorization: bool,
}

impl Config {
    /// Reads the file at `path`. Relative paths in it are relative to its directory; `${NAME}` comes from the
    /// environment.
    ///
    /// # Errors
    ///
    /// Returns [`LoadError::Missing`] if there is no file at `path`, and
    /// [`LoadError::Invalid`] with every fault if the file cannot be read or is not valid.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        Config::load_and_list(path, &mut Files::default())
    }

    /// Reads the file at `path` as [`load`](Self::load) does, and adds it and the files that it names to `files`, even
    /// if there are faults.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub(crate) fn load_and_list(path: &Path, files: &mut Files) -> Result<Self, LoadError> {
        let label = path.display().to_string();
        files.add(path);
        let text = file::read_text(path, &label)?;
        let env = |name: &str| std::env::var(name).ok();
        let base = path.parent().unwrap_or(Path::new(""));
        let ctx = Context { base, files: RefCell::new(std::mem::take(files)) };
        let read = read(&text, &label, &ctx, &env);
        *files = ctx.files.into_inner();
        let mut read = read.map_err(LoadError::Invalid)?;
        if read.inline_key && file::world_readable(path) {
            read.config.warnings.push(format!(
                "{label} contains a key and every user may read it; \
                 run `chmod o-r` on it, or take the key from the environment or a file"
            ));
        }
        read.config.file = Some(path.to_owned());
        read.config.files = files.clone();
        Ok(read.config)
    }

    /// Reads `text`; messages call it `label`. Relative paths in it are relative to `base`; `${NAME}` comes from `env`.
    ///
    /// # Errors
    ///
    /// Returns every fault, or every syntax error if `text` is not TOML.
    pub fn parse(
        text: &str,
        label: &str,
        base: &Path,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, Faults> {
        let ctx = Context { base, files: RefCell::default() };
        read(text, label, &ctx, env).map(|read| read.config)
    }
}

/// Does the work of [`Config::parse`], and says whether the text itself contains a key.
fn read(
    text: &str,
    label: &str,
    ctx: &Context<'_>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<raw::ReadConfig, Faults> {
    let sink = Sink::new(text, label);
    let read = toml_reader::document(&sink, env, |root| raw::config(root, ctx));
    match (read, sink.into_messages()) {
        (Some(read), messages) if messages.is_empty() => Ok(read),
        (_, messages) => Err(Faults(messages)),
    }
}

#[cfg(test)]
mod tests;

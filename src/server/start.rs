//! What Zap logs of itself at the start: its version, its configuration in short, and where it listens. No key.

use crate::client::peer::Listener;
use crate::config::{Backend, Config, Listen, is_like_a_key};
use crate::protocol::Endpoint;
use crate::server::listeners::tls_of;
use crate::server::setup::Setup;
use crate::telemetry::line::Fields;
use crate::telemetry::log::Log;
use crate::upstream::fleet::Snapshot;
use crate::upstream::paths::{path, shown_url};
use crate::upstream::{Upstream, proxy};

/// Most lines of one kind, and most names that an event lists.
pub(crate) const MAX_LINES: usize = 50;

/// Most names in a sentence.
const MAX_NAMES: usize = 5;

/// Logs the start: the version and the file first, the addresses last.
pub(crate) fn log_start(log: &Log, fleet: &Snapshot, setup: &Setup) {
    let config = &*fleet.config;
    let version = env!("ZAP_VERSION");
    let file = config.file.as_ref().map(|file| file.display().to_string());
    let of_file = file.as_ref().map_or(String::new(), |file| format!(" with {file}"));
    let fields = Fields::default().text("version", version).text_or_null("file", file.as_deref());
    log.event_with("info", "start", &format!("zap {version}{of_file}"), &fields);
    log_backends(log, fleet);
    log_routes(log, config);
    log_clients(log, config);
    for warning in &config.warnings {
        log.event("warn", "config", warning);
    }
    if let Some(text) = proxy::summary(&config.backends) {
        log.event("info", "proxy", &text);
    }
    let is_tls = |listener: Listener| tls_of(listener, config).is_some();
    for (address, listener) in setup.addresses() {
        let is_tls = is_tls(listener);
        let fields = Fields::default().text("address", &address).flag("tls", is_tls);
        let with = if is_tls { " with TLS" } else { "" };
        let whom = if listener == Listener::Admin { " for operators" } else { "" };
        log.event_with("info", "start", &format!("listening on {address}{with}{whom}"), &fields);
    }
    if let Some((address, listener)) = setup.page() {
        let page = Listen { address, is_tls: is_tls(listener) }.url("/");
        log.event_with("info", "start", &format!("the page: {page}"), &Fields::default().text("page", &page));
    }
}

/// The backends of the configuration: of several keys, the first.
pub(crate) fn configured(fleet: &Snapshot) -> impl Iterator<Item = &Upstream> {
    let all = fleet.backends.iter().enumerate();
    all.filter(|(id, _)| fleet.pool(*id) == *id).map(|(_, backend)| &**backend)
}

fn log_backends(log: &Log, fleet: &Snapshot) {
    for backend in configured(fleet).take(MAX_LINES) {
        let conf = &backend.conf;
        let name = backend.configured_name();
        let endpoint = [Endpoint::Chat, Endpoint::Messages].into_iter().find_map(|e| path(conf, e));
        let url = shown_url(conf, &endpoint.unwrap_or_default());
        let models = conf.models.as_ref();
        let models =
            models.map(|rules| rules.iter().map(|rule| shown(&rule.public.to_string())).collect::<Vec<_>>());
        let models_in_words = match &models {
            Some(models) => format!("models {}", some_of(models)),
            None => "any model".to_owned(),
        };
        let drained = if conf.weight == 0 { ", weight 0" } else { "" };
        let text = format!("{name}: {url}, {}, {models_in_words}{drained}", key_in_words(conf));
        let fields = Fields::default().text("backend", name).text("url", &url);
        let fields = fields.flag("key", conf.api_key.is_some());
        let fields = match &models {
            Some(models) => fields.list("models", models.iter().take(MAX_LINES)),
            None => fields.text_or_null("models", None),
        };
        log.event_with("info", "backend", &text, &fields);
    }
    if let Some(more) = more_than(MAX_LINES, configured(fleet).count()) {
        log.event("info", "backend", &format!("and {more} more backends"));
    }
}

fn key_in_words(conf: &Backend) -> String {
    match (&conf.pool, &conf.api_key) {
        (Some(pool), _) => format!("{} keys", pool.size),
        (None, Some(_)) => "key set".to_owned(),
        (None, None) if conf.forward_authorization => "the client's key".to_owned(),
        (None, None) => "no key".to_owned(),
    }
}

fn log_routes(log: &Log, config: &Config) {
    for route in config.routes.iter().take(MAX_LINES) {
        let mut targets: Vec<String> = Vec::new();
        for target in &route.targets {
            let backend = config.backends[target.backend].configured_name();
            let text = match &target.model {
                Some(model) => format!("{backend} as {}", shown(model)),
                None => backend.to_owned(),
            };
            // The keys of a pool are one target of the file.
            if targets.last() != Some(&text) {
                targets.push(text);
            }
        }
        let name = shown(&route.name);
        let text = format!("{name} to {}", some_of(&targets));
        let listed = targets.iter().take(MAX_LINES);
        let fields = Fields::default().text("model", &name).list("targets", listed);
        log.event_with("info", "route", &text, &fields);
    }
    if let Some(more) = more_than(MAX_LINES, config.routes.len()) {
        log.event("info", "route", &format!("and {more} more routes"));
    }
}

fn log_clients(log: &Log, config: &Config) {
    let names: Vec<&str> = config.clients.iter().map(|client| &*client.name).collect();
    let text = match names.len() {
        0 => "no client keys: every client is admitted".to_owned(),
        _ => format!("clients with a key: {}", some_of(&names)),
    };
    let listed = names.iter().take(MAX_LINES);
    let fields = Fields::default().number("count", names.len() as u64).list("clients", listed);
    log.event_with("info", "client_keys", &text, &fields);
}

/// The name of a model; a stand-in for what looks like a key in its place.
fn shown(name: &str) -> String {
    if is_like_a_key(name) { "***".to_owned() } else { name.to_owned() }
}

/// The first names, and how many there are beside them.
fn some_of<T: AsRef<str>>(names: &[T]) -> String {
    let listed: Vec<&str> = names.iter().take(MAX_NAMES).map(AsRef::as_ref).collect();
    match more_than(MAX_NAMES, names.len()) {
        Some(more) => format!("{} and {more} more", listed.join(", ")),
        None => listed.join(", "),
    }
}

fn more_than(max: usize, count: usize) -> Option<usize> {
    count.checked_sub(max).filter(|more| *more > 0)
}

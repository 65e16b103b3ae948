//! `[[backends]]`: every key by name, with its default and its range.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use crate::config::Backend;
use crate::config::base_url::base_url;
use crate::config::charges::BackendLines;
use crate::config::common::{
    Context, IN_FLIGHT, MAX_NAME, PRIORITY, REQUESTS_PER_MINUTE, SECONDS, TOKENS_PER_MINUTE, WEIGHT,
    is_name_char, name,
};
use crate::config::file::ca_file;
use crate::config::headers::{auth_header, extra_headers, header_rules};
use crate::config::identity::{client_identity, server_name};
use crate::config::key_pool::{ReadKeys, read_keys};
use crate::config::models::{model_name, rules};
use crate::config::money::{budget, prices};
use crate::config::proxy::proxy;
use crate::config::text::Text;
use crate::config::toml_reader::Section;
use crate::config::url::is_path;
use crate::json::members::same_but_for_case;
use crate::protocol::endpoint::Protocol;

/// The default `health_path`.
pub(crate) const HEALTH_PATH: &str = "/health";
const CHAT_PATH: &str = "/v1/chat/completions";
const USAGE_MODES: [(&str, UsageMode); 4] = [
    ("auto", UsageMode::Auto),
    ("inject", UsageMode::Inject),
    ("passive", UsageMode::Passive),
    ("off", UsageMode::Off),
];
const PROTOCOLS: [(&str, Protocol); 2] = [("openai", Protocol::OpenAi), ("anthropic", Protocol::Anthropic)];
/// Members that are never dropped.
const REQUIRED_FIELDS: [&str; 3] = ["messages", "model", "stream"];

/// `backends.health`: what differs from `[health]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendHealth {
    /// Time between two checks, in whole seconds; `None`: that of `[health]`.
    pub interval: Option<Duration>,
    /// Whether the backend is checked; if not, real requests alone decide.
    pub is_enabled: bool,
}

/// How the usage of a backend's answers is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageMode {
    /// Zap requests the usage of a stream if a limit, a budget or a price depends on it.
    Auto,
    /// Zap requests the usage of every stream.
    Inject,
    /// Zap reads the usage and changes no request.
    Passive,
    /// Zap does not read the usage.
    Off,
}

/// A backend whose name may still be missing.
struct Unnamed {
    name: Option<Text>,
    backend: Backend,
    lines: BackendLines,
    inline_key: bool,
}

/// All backends.
pub(super) struct ReadBackends {
    pub(super) backends: Vec<Backend>,
    /// By index of the backend.
    pub(super) lines: Vec<BackendLines>,
    /// Whether the text itself contains a backend's key.
    pub(super) inline_key: bool,
}

/// Reads the backends.
pub(super) fn backends(root: &mut Section<'_, '_>, ctx: &Context<'_>) -> ReadBackends {
    let sink = root.sink();
    let line = root.line_of("backends");
    let faults = sink.count();
    let read = root.sections("backends", |t| backend(t, ctx));
    if read.as_ref().is_none_or(Vec::is_empty) && sink.count() == faults {
        let what = "no backends; at least one `[[backends]]` with `url` and `weight` is required";
        sink.fault(line.unwrap_or(root.line()), what);
    }
    let read: Vec<Unnamed> = read.into_iter().flatten().flatten().collect();
    let inline_key = read.iter().any(|unnamed| unnamed.inline_key);

    let names = read.iter().filter_map(|unnamed| unnamed.name.as_ref());
    let mut lines: HashMap<&str, usize> = HashMap::new();
    for name in names {
        if let Some(first) = lines.insert(&name.value, name.line) {
            let what = format!("repeats the name at line {first}; each backend must have its own name");
            root.fault_of(name, &what);
        }
    }
    let mut taken: HashSet<String> = lines.into_keys().map(str::to_owned).collect();
    let (backends, lines) = read
        .into_iter()
        .map(|Unnamed { name, backend, lines, .. }| {
            let name = match name {
                Some(name) => name.value,
                None => free_name(&backend.url.host, &mut taken),
            };
            (Backend { name, ..backend }, lines)
        })
        .unzip();
    ReadBackends { backends, lines, inline_key }
}

/// Makes a name from `host` that is not in `taken`, and adds it there.
fn free_name(host: &str, taken: &mut HashSet<String>) -> String {
    let host: String = host.chars().map(|c| if is_name_char(c) { c } else { '-' }).collect();
    let cut = |reserved: usize| host.chars().take(MAX_NAME - reserved).collect::<String>();
    let mut name = cut(0);
    let mut count = 1;
    while !taken.insert(name.clone()) {
        count += 1;
        let suffix = format!("-{count}");
        name = cut(suffix.len()) + &suffix;
    }
    name
}

/// Reads one backend. Returns `None` if a required key is missing or not valid: then a fault is recorded.
fn backend(t: &mut Section<'_, '_>, ctx: &Context<'_>) -> Option<Unnamed> {
    let name = name(t);
    let url = base_url(t);
    let weight = t.required("weight", WEIGHT);
    let (health_path, health) = health(t);
    let ReadKeys { first: api_key, pool: key_pool } = read_keys(t, ctx);
    let auth_header = auth_header(t, api_key.is_set);
    let key_header = api_key.is_set.then(|| auth_header.clone().unwrap_or(http::header::AUTHORIZATION));
    let extra_headers = extra_headers(t, key_header.as_ref());
    let header_rules = header_rules(t);
    let drop_fields = drop_fields(t);
    let models = rules(t);
    let default_model = model_name(t, "default_model");
    let chat_path = path(t, "chat_path", CHAT_PATH);
    let priority = t.number("priority", PRIORITY);
    let ca_file = ca_file(t, ctx);
    let (proxy, inline_password) = proxy(t, url.as_ref());
    let client_identity = client_identity(t, url.as_ref(), ctx);
    let server_name = server_name(t, url.as_ref());
    let max_in_flight = t.limit("max_in_flight", IN_FLIGHT);
    let requests_per_minute = t.limit("requests_per_minute", REQUESTS_PER_MINUTE);
    let tokens_per_minute = t.limit("tokens_per_minute", TOKENS_PER_MINUTE);
    let line_of = |key: &str| t.line_of(key).unwrap_or(t.line());
    let lines = BackendLines { usage: line_of("usage"), budget: line_of("budget") };
    let usage = t.choice("usage", UsageMode::Auto, &USAGE_MODES);
    let prices = prices(t);
    let budget = budget(t);
    let protocols = protocols(t);
    let forward_line = t.line_of("forward_authorization");
    let forward_authorization = t.boolean("forward_authorization", false);
    if forward_authorization && api_key.is_set {
        let what = "is true and `api_key` is set; must be only one of the two";
        t.fault(forward_line.unwrap_or(t.line()), "forward_authorization", what);
    }
    Some(Unnamed {
        name,
        lines,
        inline_key: api_key.is_inline || inline_password,
        backend: Backend {
            name: String::new(),
            url: url?,
            weight: weight?,
            health_path,
            health,
            api_key: api_key.key,
            key_pool,
            pool: None,
            auth_header,
            extra_headers,
            header_rules,
            drop_fields,
            models,
            default_model,
            chat_path,
            priority,
            ca_file,
            proxy,
            client_identity,
            server_name,
            max_in_flight,
            requests_per_minute,
            tokens_per_minute,
            usage,
            prices,
            budget,
            protocols,
            forward_authorization,
        },
    })
}

fn path(t: &mut Section<'_, '_>, key: &'static str, default: &str) -> String {
    let Some(text) = t.text(key) else {
        return default.to_owned();
    };
    let (path, query) = text.value.split_once('?').unwrap_or((&text.value, "q"));
    let is_query = !query.is_empty() && query.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#');
    if !is_path(path) || !is_query {
        let allowed = "must begin with `/` and be visible ASCII without `#`; it may have a query after `?`";
        t.invalid(&text, allowed);
    }
    text.value
}

/// Reads `health` and `health_path`. The path may stand in either, but not in both.
fn health(t: &mut Section<'_, '_>) -> (String, BackendHealth) {
    let old_line = t.line_of("health_path");
    let old = path(t, "health_path", HEALTH_PATH);
    let read = t.optional_section("health", |t| {
        let is_set = t.line_of("path").is_some();
        let new = Some(path(t, "path", HEALTH_PATH)).filter(|_| is_set);
        let interval = t.optional("interval_secs", SECONDS).map(Duration::from_secs);
        (new, BackendHealth { interval, is_enabled: t.boolean("enabled", true) })
    });
    let (new, health) = read.unwrap_or((None, BackendHealth { interval: None, is_enabled: true }));
    if let (Some(line), Some(_)) = (old_line, &new) {
        t.fault(line, "health_path", "is set and `health.path` too; must be only one of the two");
    }
    (new.unwrap_or(old), health)
}

/// Reads the protocols that the backend speaks.
fn protocols(t: &mut Section<'_, '_>) -> Vec<Protocol> {
    let line = t.line_of("protocols").unwrap_or(t.line());
    let Some(texts) = t.texts("protocols") else { return vec![Protocol::OpenAi] };
    if texts.is_empty() {
        let what = "is empty; must have \"openai\", \"anthropic\" or both";
        t.fault(line, "protocols", what);
    }
    let mut protocols = Vec::new();
    for text in texts {
        if let Some(protocol) = t.word(&text, &PROTOCOLS)
            && !protocols.contains(&protocol)
        {
            protocols.push(protocol);
        }
    }
    protocols
}

/// Reads the names of the top-level members that this backend does not accept.
fn drop_fields(t: &mut Section<'_, '_>) -> Vec<Box<str>> {
    // Case does not count: Zap refuses a request with such a member in another case, since some providers ignore case.
    let is_required =
        |name: &str| REQUIRED_FIELDS.iter().any(|field| same_but_for_case(field.as_bytes(), name.as_bytes()));
    let mut fields: Vec<Box<str>> = Vec::new();
    for text in t.texts("drop_fields").unwrap_or_default() {
        if !(1..=MAX_NAME).contains(&text.value.len()) || is_required(&text.value) {
            let allowed = format!(
                "must be 1 to {MAX_NAME} bytes and not `{}`, in any case",
                REQUIRED_FIELDS.join("`, `")
            );
            t.invalid(&text, &allowed);
        } else if !fields.iter().any(|field| **field == *text.value) {
            fields.push(text.value.into());
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn health_may_differ_by_backend() {
        let of = |more: &str| {
            let backend = Config::of_backend(more).unwrap().backends.remove(0);
            (backend.health_path, backend.health.interval.map(|t| t.as_secs()), backend.health.is_enabled)
        };
        assert_eq!(of(""), ("/health".into(), None, true));
        assert_eq!(of("health = { path = \"/p\", interval_secs = 7 }"), ("/p".into(), Some(7), true));
        assert_eq!(of("health_path = \"/p\"\nhealth = { enabled = false }"), ("/p".into(), None, false));
        for (more, want) in [
            (
                "health = { interval_secs = 0 }",
                "4: `backends[0].health.interval_secs` is 0; must be from 1 to 86400",
            ),
            (
                "health = { enabled = 1 }",
                "4: `backends[0].health.enabled` is an integer; must be `true` or `false`",
            ),
        ] {
            assert_eq!(Config::of_backend(more).unwrap_err(), format!("test:{want}"));
        }
        let path = Config::of_backend("health = { path = \"x\" }").unwrap_err();
        assert!(
            path.starts_with("test:4: `backends[0].health.path` is \"x\"; must begin with `/`"),
            "{path}"
        );
    }
}

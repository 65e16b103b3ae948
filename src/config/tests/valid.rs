//! Configurations that load: the defaults, and every key.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::tests::{BACKEND, faults, parse};
use crate::config::*;
use crate::http1::origin::Origins;
use crate::policy::pattern::Pattern;
use crate::policy::spend::Period;

/// A configuration that sets every key but those that name files other than the ledger; the secret is `sk-CANARY`.
pub(super) const FULL: &str = r#"# every key that names no file
models_from = "config"

[server]
host = "::1"
port = 0
unix = "/run/zap.sock"
unix_mode = "600"
workers = 3
max_body_bytes = 1_024
max_connections = 5
drain_secs = 44
drain_delay_secs = 45
keep_alive_secs = 7
trusted_proxies = ["10.0.0.0/8", "::1"]
cors_origins = ["https://App.example:443", "app://obsidian.md"]
allowed_hosts = ["zap.example", "[::1]:8000"]

[admin]
host = "10.0.0.1"
port = 62
token = "zt-1"

[queue]
max_size = 46
max_in_flight = 8
max_wait_secs = 9
timeout_secs = 10

[affinity]
max_ids = 61

[load_balancer]
strategy = "least_loaded"
prefix_bytes = 23

[health]
interval_secs = 11
timeout_secs = 12
failure_threshold = 13
success_threshold = 14

[retry]
max_retries = 6
base_delay_ms = 15
max_delay_ms = 47
budget_percent = 48

[timeouts]
connect_ms = 16
stream_idle_secs = 17
first_byte_secs = 40
first_token_secs = 41

[stream]
hold_secs = 42
heartbeat_secs = 43

[rate_limit]
requests_per_minute = 18
requests_per_minute_per_address = 24
tokens_per_minute = 31
max_keys = 19

[log]
requests = false
format = "json"
probes = true

[reload]
watch = true

[ledger]
path = "zap.db"

[otlp]
endpoint = "https://collector:4318"
headers = { authorization = "sk-CANARY" }
sample_ratio = 0.5

[[client_keys]]
name = "team"
key = "sk-CANARY"
requests_per_minute = 25
tokens_per_minute = 29
max_in_flight = 30
models = ["smart", "gpt-*"]

[[client_keys]]
name = "other"
sha256 = "E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855"

[models.smart]
targets = [
  { backend = "b", model = "big" },
  { backend = "Main_1", weight = 26, priority = 27 },
]
[models."*"]
targets = [{ backend = "b" }]

[[backends]]
name = "Main_1"
url = "https://api.example.com/v1/"
weight = 1000
health_path = "/h"
health = { interval_secs = 49, enabled = false }
api_key = "sk-CANARY"
default_model = "m"
chat_path = "/c?v=1"
auth_header = "api-key"
extra_headers = { X-Title = "it ${PORT}", "HTTP-Referer" = "sk-CANARY" }
forward_headers = ["X-Trace"]
drop_headers = ["x-stainless-*"]
proxy = "http://u:sk-CANARY@p:1"
server_name = "tls.example"
drop_fields = ["store", "n", "store"]
models = { "z*" = "own/*", "a" = "b" }
priority = 20
max_in_flight = 21
requests_per_minute = 22
tokens_per_minute = 28
usage = "inject"
prices = { "own/*" = { input = 2.50, cached = 1.25, cache_write = 3, output = 10.0 }, "*" = { input = 1e-6, output = 0 } }
budget = { usd = 0.5, per = "day" }

[[backends]]
url = "http://[::1]:${PORT}"
weight = 0
api_keys = ["${KEY}", "sk-CANARY-2"]
models = ["m-1", "m-*"]

[[backends]]
url = "http://b"
weight = 1
health = { path = "/hp" }
forward_authorization = true
protocols = ["anthropic", "openai", "anthropic"]
"#;

#[test]
fn a_simple_configuration_loads() {
    let config = parse(
        r#"
[server]
host = "0.0.0.0"
port = 8000

[queue]
max_size = 1000
timeout_secs = 30

[[backends]]
name = "one"
url = "http://localhost:11434"
weight = 2
health_path = "/health"
api_key = "k"
default_model = "llama3"

[[backends]]
url = "http://localhost:11435"
weight = 1
health_path = "/health"

[rate_limit]
requests_per_minute = 60
"#,
    )
    .unwrap();
    assert_eq!(config.queue.timeout, Duration::from_secs(30));
    assert_eq!(config.rate_limit.requests_per_minute, Some(60));
    assert_eq!(config.backends[0].name, "one");
    assert_eq!(config.backends[1].name, "localhost");
    assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
}

#[test]
fn keys_that_are_not_set_have_their_defaults() {
    let c = parse(BACKEND).unwrap();
    let secs = Duration::from_secs;
    let millis = Duration::from_millis;
    assert_eq!(c.server.host.to_string(), "0.0.0.0");
    assert_eq!(c.server.port, 8000);
    assert!(c.server.workers >= 1);
    assert_eq!(c.server.max_body_bytes, 33_554_432);
    assert_eq!(c.server.max_connections, 10_000);
    assert_eq!((c.server.drain, c.server.keep_alive), (secs(30), secs(75)));
    assert_eq!((c.queue.max_size, c.queue.max_in_flight), (1000, 1024));
    assert_eq!((c.queue.max_wait, c.queue.timeout), (secs(30), secs(300)));
    assert_eq!(c.strategy, Strategy::RoundRobin);
    assert_eq!((c.health.interval, c.health.timeout), (secs(10), secs(5)));
    assert_eq!(c.health.failure_threshold, 3);
    assert_eq!(c.health.success_threshold, 1);
    assert_eq!((c.retry.max_retries, c.retry.budget_percent), (2, 20));
    assert_eq!(c.retry.base_delay, millis(100));
    assert_eq!(c.retry.max_delay, millis(2000));
    assert_eq!(c.timeouts.connect, millis(2000));
    assert_eq!(c.timeouts.stream_idle, secs(120));
    assert_eq!((c.timeouts.first_byte, c.timeouts.first_token), (secs(60), secs(0)));
    assert_eq!((c.stream.hold, c.stream.heartbeat), (secs(10), secs(30)));
    assert_eq!((c.rate_limit.requests_per_minute, c.rate_limit.tokens_per_minute), (None, None));
    assert!(!c.watch);
    assert_eq!((&c.ledger, &c.otlp), (&None, &None));
    assert_eq!(c.rate_limit.max_keys, 100_000);
    assert!(c.log.requests);
    assert!(!c.log.probes);
    assert_eq!(c.log.format, LogFormat::Auto);
    let backend = Backend {
        name: "a".to_owned(),
        url: BaseUrl::parse("http://a").unwrap(),
        weight: 1,
        health_path: "/health".to_owned(),
        health: BackendHealth { interval: None, is_enabled: true },
        api_key: None,
        key_pool: vec![],
        pool: None,
        auth_header: None,
        extra_headers: vec![],
        header_rules: Default::default(),
        drop_fields: vec![],
        models: None,
        default_model: None,
        chat_path: "/v1/chat/completions".to_owned(),
        priority: 0,
        ca_file: None,
        proxy: None,
        client_identity: None,
        server_name: None,
        max_in_flight: None,
        requests_per_minute: None,
        tokens_per_minute: None,
        usage: UsageMode::Auto,
        prices: vec![],
        budget: None,
        protocols: vec![Protocol::OpenAi],
        forward_authorization: false,
    };
    assert_eq!(c.backends, [backend]);
}

#[test]
fn every_key_is_read() {
    let c = parse(FULL).unwrap();
    assert_eq!(c.server.unix, Some(UnixSocket { path: "/run/zap.sock".into(), mode: 0o600 }));
    assert_eq!(c.server.admin, "10.0.0.1:62".parse().ok());
    assert_eq!(c.admin.token.as_ref().map(Secret::expose), Some("zt-1"));
    let numbers = [
        c.server.workers as u64,
        c.server.max_body_bytes,
        c.server.max_connections as u64,
        c.server.drain.as_secs(),
        c.server.keep_alive.as_secs(),
        c.queue.max_size as u64,
        c.queue.max_in_flight as u64,
        c.queue.max_wait.as_secs(),
        c.queue.timeout.as_secs(),
        c.health.interval.as_secs(),
        c.health.timeout.as_secs(),
        c.health.failure_threshold.into(),
        c.health.success_threshold.into(),
        c.retry.max_retries.into(),
        c.retry.base_delay.as_millis() as u64,
        c.retry.max_delay.as_millis() as u64,
        c.retry.budget_percent.into(),
        c.timeouts.connect.as_millis() as u64,
        c.timeouts.stream_idle.as_secs(),
        c.rate_limit.requests_per_minute.unwrap().into(),
        c.rate_limit.max_keys as u64,
        c.backends[0].weight.into(),
        c.backends[0].priority.into(),
        c.backends[0].max_in_flight.unwrap() as u64,
        c.backends[0].requests_per_minute.unwrap().into(),
        c.prefix_bytes as u64,
        c.rate_limit.requests_per_minute_per_address.unwrap().into(),
        c.clients[0].requests_per_minute.unwrap().into(),
        c.routes[0].targets[1].weight.unwrap().into(),
        c.routes[0].targets[1].priority.unwrap().into(),
        c.backends[0].tokens_per_minute.unwrap(),
        c.clients[0].tokens_per_minute.unwrap(),
        c.clients[0].max_in_flight.unwrap() as u64,
        c.rate_limit.tokens_per_minute.unwrap(),
        c.timeouts.first_byte.as_secs(),
        c.timeouts.first_token.as_secs(),
        c.stream.hold.as_secs(),
        c.stream.heartbeat.as_secs(),
        c.server.drain_delay.as_secs(),
        c.backends[0].health.interval.unwrap().as_secs(),
    ];
    let expected = [
        3, 1024, 5, 44, 7, 46, 8, 9, 10, 11, 12, 13, 14, 6, 15, 47, 48, 16, 17, 18, 19, 1000, 20, 21, 22, 23,
        24, 25, 26, 27, 28, 29, 30, 31, 40, 41, 42, 43, 45, 49,
    ];
    assert_eq!(numbers, expected);
    assert_eq!(c.server.host.to_string(), "::1");
    assert_eq!(c.strategy, Strategy::LeastLoaded);
    assert!(!c.log.requests);
    assert!(c.log.probes);
    assert_eq!(c.log.format, LogFormat::Json);
    let names: Vec<_> = c.backends.iter().map(|b| b.name.as_str()).collect();
    assert_eq!(names, ["Main_1", "--1", "b"]);
    assert_eq!(c.backends[0].url.path, "/v1");
    let health: Vec<_> = c.backends.iter().map(|b| (b.health_path.as_str(), b.health.is_enabled)).collect();
    assert_eq!(health, [("/h", false), ("/health", true), ("/hp", true)]);
    let rules = &c.backends[0].header_rules;
    assert!(rules.forwards("x-trace") && rules.drops("x-stainless-os"));
    assert_eq!(c.backends[0].proxy.as_ref().unwrap().to_string(), "http://p:1");
    assert_eq!(c.backends[0].server_name.as_ref().unwrap().to_str(), "tls.example");
    assert_eq!(c.models_from, ModelsFrom::Config);
    assert_eq!(c.backends[0].chat_path, "/c?v=1");
    assert_eq!(c.backends[0].auth_header.as_ref().unwrap(), "api-key");
    let extra: Vec<_> = c.backends[0].extra_headers.iter().map(|(n, v)| (n.as_str(), v.as_bytes())).collect();
    assert_eq!(extra, [("x-title", &b"it 9000"[..]), ("http-referer", b"sk-CANARY")]);
    assert_eq!(c.backends[0].drop_fields, ["store".into(), "n".into()]);
    let rule = |public: &str, own: Option<&str>| Rule {
        public: Pattern::parse(public).unwrap(),
        own: own.map(Into::into),
    };
    assert_eq!(c.backends[0].models, Some(vec![rule("z*", Some("own/*")), rule("a", Some("b"))]));
    assert_eq!(c.backends[1].models, Some(vec![rule("m-1", None), rule("m-*", None)]));
    assert_eq!(c.backends[2].models, None);
    let names: Vec<_> = c.routes.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["smart", "*"]);
    let targets: Vec<_> = c.routes[0].targets.iter().map(|t| (t.backend, t.model.as_deref())).collect();
    assert_eq!(targets, [(2, Some("big")), (0, None)]);
    assert_eq!((c.clients[0].name.as_str(), c.clients[1].name.as_str()), ("team", "other"));
    let models = c.clients[0].models.as_ref().unwrap();
    assert!(models[0].matches("smart") && models[1].matches("gpt-5") && c.clients[1].models.is_none());
    let digests = [0, 1].map(|i| c.clients[i].digest.unwrap());
    assert_eq!((digests[0][0], &digests[1][..3]), (0x8F, &[0xE3, 0xB0, 0xC4][..]));
    let proxies: Vec<_> = c.server.trusted_proxies.iter().map(ToString::to_string).collect();
    assert_eq!(proxies, ["10.0.0.0/8", "::1/128"]);
    let origins = vec!["https://app.example".into(), "app://obsidian.md".into()];
    assert_eq!(c.server.cors_origins, Origins::Listed(origins));
    assert_eq!(c.server.allowed_hosts.0.len(), 2);
    assert_eq!(c.backends[0].default_model.as_deref(), Some("m"));
    assert_eq!(c.backends[1].url.authority, "[::1]:9000");
    assert_eq!(c.backends[1].api_key.as_ref().unwrap().expose(), "sk-CANARY");
    assert_eq!(
        c.backends[1].key_pool.iter().map(Secret::expose).collect::<Vec<_>>(),
        ["sk-CANARY", "sk-CANARY-2"]
    );
    assert!(c.backends[2].forward_authorization);
    assert_eq!(c.backends[2].protocols, [Protocol::Anthropic, Protocol::OpenAi]);
    let modes: Vec<_> = c.backends.iter().map(|b| b.usage).collect();
    assert_eq!(modes, [UsageMode::Inject, UsageMode::Auto, UsageMode::Auto]);
    let prices = [
        ("own/*".to_owned(), [2_500_000, 1_250_000, 3_000_000, 10_000_000]),
        ("*".to_owned(), [1, 1, 1, 0]), //
    ];
    assert_eq!(c.backends[0].prices, prices);
    assert_eq!(c.backends[0].budget, Some(Budget { nano_usd: 500_000_000, per: Period::Day }));
    let other = &c.clients[1];
    assert_eq!((other.tokens_per_minute, other.max_in_flight, other.budget), (None, None, None));
    assert!(c.watch);
    assert_eq!(c.ledger, Some(PathBuf::from("/nonexistent/zap.db")));
    let otlp = c.otlp.as_ref().unwrap();
    assert_eq!((&*otlp.url.authority, &*otlp.url.path), ("collector:4318", "/v1/traces"));
    assert_eq!((otlp.headers.len(), otlp.sample_millionths), (1, 500_000));
    assert!(c.warnings.is_empty());
    assert!(!format!("{c:?}").contains("CANARY"));
}

#[test]
fn backend_names_are_unique() {
    let entry = |name: &str, host: &str| {
        let name = if name.is_empty() { String::new() } else { format!("name = \"{name}\"\n") };
        format!("[[backends]]\n{name}url = \"http://{host}\"\nweight = 0\n")
    };
    let long = ["abcdefghij"; 7].join(".");
    let text = [
        entry("", "a"),
        entry("", "a"),
        entry("a-2", "x"),
        entry("", "a:9"),
        entry("", "x"),
        entry("", "[fe80::1]"),
        entry("", &long),
        entry("", &long),
    ]
    .concat();
    let config = parse(&text).unwrap();
    let names: Vec<_> = config.backends.iter().map(|b| b.name.clone()).collect();
    assert_eq!(names[..6], ["a", "a-3", "a-2", "a-4", "x", "fe80--1"]);
    assert!(names.iter().all(|name| name.len() <= 64));
    assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());

    let text = [entry("n", "a"), entry("m", "b"), entry("n", "c")].concat();
    assert_eq!(
        faults(&text),
        [
            "config.toml:10: `backends[2].name` repeats the name at line 2; each backend must have its own name"
        ]
    );
}

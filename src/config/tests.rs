//! Tests of whole configurations: those that load, and every fault with its line.

use std::{collections::HashSet, fs};

use super::*;
use crate::config::file::MAX_FILE_BYTES;

const BACKEND: &str = "[[backends]]\nurl = \"http://a\"\nweight = 1\n";

/// A configuration that sets every key but those that name files other than the ledger; the secret is `sk-CANARY`.
const FULL: &str = r#"# every key that names no file
models_from = "config"

[server]
host = "::1"
port = 0
workers = 3
max_body_bytes = 1_024
max_connections = 5
drain_secs = 44
drain_delay_secs = 45
keep_alive_secs = 7
trusted_proxies = ["10.0.0.0/8", "::1"]
cors_origins = ["https://App.example:443", "app://obsidian.md"]
allowed_hosts = ["zap.example", "[::1]:8000"]

[queue]
max_size = 46
max_in_flight = 8
max_wait_secs = 9
timeout_secs = 10

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
events = "json"

[ledger]
path = "zap.db"

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
api_key = "${KEY}"
models = ["m-1", "m-*"]

[[backends]]
url = "http://b"
weight = 1
health = { path = "/hp" }
forward_authorization = true
protocols = ["anthropic", "openai", "anthropic"]
"#;

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

/// A fresh directory; dropping it deletes the directory.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("zap-config-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

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
    assert_eq!(c.ledger, None);
    assert_eq!(c.rate_limit.max_keys, 100_000);
    assert!(c.log.requests);
    assert_eq!(c.log.events, LogFormat::Text);
    let backend = Backend {
        name: "a".to_owned(),
        url: BaseUrl::parse("http://a").unwrap(),
        weight: 1,
        health_path: "/health".to_owned(),
        health: BackendHealth { interval: None, is_enabled: true },
        api_key: None,
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
    assert_eq!(c.log.events, LogFormat::Json);
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
    assert_eq!((c.clients[0].digest[0], c.clients[1].digest[..3].to_vec()), (0x8F, vec![0xE3, 0xB0, 0xC4]));
    let proxies: Vec<_> = c.server.trusted_proxies.iter().map(ToString::to_string).collect();
    assert_eq!(proxies, ["10.0.0.0/8", "::1/128"]);
    let origins = vec!["https://app.example".into(), "app://obsidian.md".into()];
    assert_eq!(c.server.cors_origins, Origins::Listed(origins));
    assert_eq!(c.server.allowed_hosts.0.len(), 2);
    assert_eq!(c.backends[0].default_model.as_deref(), Some("m"));
    assert_eq!(c.backends[1].url.authority, "[::1]:9000");
    assert_eq!(c.backends[1].api_key.as_ref().unwrap().expose(), "sk-CANARY");
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
    assert_eq!(c.ledger, Some(PathBuf::from("/nonexistent/zap.db")));
    assert!(c.warnings.is_empty());
    assert!(!format!("{c:?}").contains("CANARY"));
}

/// Each text is put before a valid backend; the second element holds all its faults.
#[test]
fn faults_of_sections_name_the_line_and_what_is_allowed() {
    for (text, expected) in [
        ("[server]\n\nport = 70000", "3: `server.port` is 70000; must be from 0 to 65535"),
        ("[server]\nport = -1", "2: `server.port` is -1; must be from 0 to 65535"),
        ("server.port = 0x1_0000", "1: `server.port` is 65536; must be from 0 to 65535"),
        ("[server]\nport = 1.5", "2: `server.port` is a float; must be an integer from 0 to 65535"),
        ("[server]\nport = {}", "2: `server.port` is a table; must be an integer from 0 to 65535"),
        (
            "[server]\nport = 1979-05-27",
            "2: `server.port` is a date or time; must be an integer from 0 to 65535",
        ),
        (
            "[server]\nworkers = 99999999999999999999999999999999999999999999",
            "2: `server.workers` is far out of range; must be from 1 to 1024",
        ),
        ("[server]\nworkers = 0", "2: `server.workers` is 0; must be from 1 to 1024"),
        ("[server]\nmax_body_bytes = 1", "2: `server.max_body_bytes` is 1; must be from 1024 to 1073741824"),
        ("[server]\ndrain_secs = 86401", "2: `server.drain_secs` is 86401; must be from 0 to 86400"),
        ("[server]\ndrain_delay_secs = 3601", "2: `server.drain_delay_secs` is 3601; must be from 0 to 3600"),
        ("[server]\nhost = true", "2: `server.host` is a boolean; must be a string, in quotes"),
        (
            "[server]\nhost = \"a.b\"",
            "2: `server.host` is \"a.b\"; must be an IPv4 address, an IPv6 address or \"localhost\"",
        ),
        ("[server]\nprot = 1", "2: unknown key `server.prot`; did you mean `port`?"),
        ("[queue]\nmax_sise = 1", "2: unknown key `queue.max_sise`; did you mean `max_size`?"),
        (
            "[queue]\ncolour = 1",
            "2: unknown key `queue.colour`; must be one of `max_size`, `max_in_flight`, \
             `max_wait_secs`, `timeout_secs`",
        ),
        (
            "[queue]\n\"sk-CANARY\" = 1",
            "2: unknown key in `queue`; must be one of `max_size`, `max_in_flight`, \
             `max_wait_secs`, `timeout_secs`",
        ),
        (
            "\"sk-CANARY\" = 1",
            "1: unknown key at the top level; must be one of `server`, `queue`, `load_balancer`, \
             `health`, `retry`, `timeouts`, `stream`, `rate_limit`, `log`, `ledger`, `backends`, \
             `models`, `client_keys`, `models_from`",
        ),
        ("\n[retries]\nx = 1", "2: unknown key `retries`; did you mean `retry`?"),
        (
            "[server.tls]\nx = 1",
            "1: unknown key `server.tls`; Zap listens without TLS: put a proxy with TLS in front of it",
        ),
        ("server = 1", "1: `server` is an integer; must be a table, `[server]`"),
        (
            "[load_balancer]\nstrategy = \"sk-CANARY\"",
            "2: `load_balancer.strategy` is not valid; must be one of \"round_robin\", \
             \"least_loaded\", \"prefix_hash\"",
        ),
        (
            "[load_balancer]\nprefix_bytes = 0",
            "2: `load_balancer.prefix_bytes` is 0; must be from 1 to 1048576",
        ),
        (
            "[server]\ntrusted_proxies = [\"10.0.0.0/8\",\n\"lan\"]",
            "3: `server.trusted_proxies[1]` is \"lan\"; must be an address such as `10.0.0.1` or \
             a network such as `10.0.0.0/8`",
        ),
        (
            "[server]\ntrusted_proxies = [\"10.0.0.0/8\",\n\"sk-CANARY\"]",
            "3: `server.trusted_proxies[1]` is not valid; must be an address such as `10.0.0.1` \
             or a network such as `10.0.0.0/8`",
        ),
        (
            "[server]\ncors_origins = [\"*\", \"https://app.example/\"]",
            "2: `server.cors_origins[1]` is \"https://app.example/\"; must be `*` or an origin such as \
             `https://app.example`, without a slash at its end",
        ),
        (
            "[server]\ncors_origins = [\"https://app.example/chat\"]",
            "2: `server.cors_origins[0]` is \"https://app.example/chat\"; must be `*` or an origin such as \
             `https://app.example`, without a path",
        ),
        (
            "[server]\ncors_origins = [\"app://obsidian.md\",\n\"localhost\"]",
            "3: `server.cors_origins[1]` is \"localhost\"; must be `*` or an origin such as `https://app.example`, with its scheme",
        ),
        (
            "[server]\nallowed_hosts = [\"zap.example:8000\", \"http://zap.example\"]",
            "2: `server.allowed_hosts[1]` is \"http://zap.example\"; must be a host such as `zap.example`, `zap.example:8000` or `[::1]`, \
             without scheme and path",
        ),
        (
            "[server]\ntrusted_proxies = \"10.0.0.1\"",
            "2: `server.trusted_proxies` is a string; must be an array of strings, such as \
             `[\"a\", \"b\"]`",
        ),
        (
            "[models.\"sk-CANARY*\"]\ntargets = [{ backend = \"a\" }]",
            "1: `models.<name>` is not a valid name; must be 1 to 256 bytes without control \
             characters and without `*`, or only `*` for all other names",
        ),
        (
            "[models.x]\ntargets = []",
            "2: `models.x.targets` is missing or empty; at least one `{ backend = \"name\", model \
             = \"name\" }` is required",
        ),
        ("[models]\nx = 1", "2: `models.x` is an integer; must be a table with `targets`"),
        (
            "[models.x]\ntargets = [{ backend = \"b\" }]",
            "2: `models.x.targets[0].backend` is \"b\"; must be the name of a backend; did you \
             mean `a`?",
        ),
        (
            "[models.x]\ntargets = [{ backend = \"somebody\" }]",
            "2: `models.x.targets[0].backend` is \"somebody\"; must be the name of a backend: `a`",
        ),
        (
            "[models.x]\ntargets = [{ backend = \"sk-CANARY\" }]",
            "2: `models.x.targets[0].backend` is not valid; must be the name of a backend: `a`",
        ),
        (
            "[models.x]\ntargets = [{ backend = \"a\", weight = 1001 }]",
            "2: `models.x.targets[0].weight` is 1001; must be from 0 to 1000",
        ),
        (
            "[models.x]\ntarget = 1",
            "1: `models.x.targets` is missing or empty; at least one `{ backend = \"name\", model \
             = \"name\" }` is required\nconfig.toml:2: unknown key `models.x.target`; did you \
             mean `targets`?",
        ),
        ("[[client_keys]]\nkey = \"sk-CANARY\"", "1: `client_keys[0].name` is missing; a string is required"),
        (
            "[[client_keys]]\nname = \"anonymous\"\nkey = \"sk-CANARY\"",
            "2: `client_keys[0].name` is \"anonymous\", the name of requests without a key; must \
             be another name",
        ),
        (
            "[[client_keys]]\nname = \"a\"",
            "1: `client_keys[0].key` is missing; either `key` or `sha256` is required",
        ),
        (
            "[[client_keys]]\nname = \"a\"\nkey = \"sk-CANARY\"\nsha256 = \"00\"",
            "4: `client_keys[0].sha256` is not a SHA-256; must be 64 hexadecimal digits: `printf \
             %s KEY | sha256sum`\nconfig.toml:4: `client_keys[0].sha256` is set and `key` is set; \
             must be only one of the two",
        ),
        (
            "[[client_keys]]\nname = \"a\"\nkey = \"sk-CANARY\"\n[[client_keys]]\nname = \"b\"\nkey = \"sk-CANARY\"",
            "4: `client_keys[1].key` repeats the key at line 1; each client must have its own key",
        ),
        (
            "[[client_keys]]\nname = \"a\"\nkey = \"x\"\n[[client_keys]]\nname = \"a\"\nkey = \"y\"",
            "4: `client_keys[1].name` repeats the name at line 1; each client key must have its \
             own name",
        ),
        ("[health]\nfailure_threshold = 0", "2: `health.failure_threshold` is 0; must be from 1 to 1000"),
        ("[retry]\nmax_retries = 11", "2: `retry.max_retries` is 11; must be from 0 to 10"),
        ("[retry]\nbudget_percent = 101", "2: `retry.budget_percent` is 101; must be from 0 to 100"),
        (
            "[retry]\nmax_retries = 1\nbase_delay_ms = 3000",
            "3: `retry.base_delay_ms` is 3000 and `retry.max_delay_ms` is 2000; must be from 1 to 2000",
        ),
        (
            "[retry]\nmax_delay_ms = 5",
            "2: `retry.base_delay_ms` is 100 and `retry.max_delay_ms` is 5; must be from 1 to 5",
        ),
        ("[timeouts]\nconnect_ms = 600001", "2: `timeouts.connect_ms` is 600001; must be from 1 to 600000"),
        (
            "[rate_limit]\ntokens_per_minute = 0",
            "2: `rate_limit.tokens_per_minute` is 0; must be from 1 to 1000000000000, or left out \
             for no limit",
        ),
        ("[ledger]\npath = 1", "2: `ledger.path` is an integer; must be a string, in quotes"),
        ("[ledger]\npaht = \"a\"", "2: unknown key `ledger.paht`; did you mean `path`?"),
        (
            "[[client_keys]]\nname = \"a\"\nkey = \"x\"\ntokens_per_minute = 1000000000001",
            "4: `client_keys[0].tokens_per_minute` is 1000000000001; must be from 1 to \
             1000000000000, or left out for no limit",
        ),
        (
            "[[client_keys]]\nname = \"a\"\nkey = \"x\"\nmax_in_flight = 0",
            "4: `client_keys[0].max_in_flight` is 0; must be from 1 to 1000000, or left out for \
             no limit",
        ),
        (
            "[[client_keys]]\nname = \"a\"\nkey = \"x\"\nbudget = { usd = 5, per = \"week\" }",
            "4: `client_keys[0].budget.per` is \"week\"; must be one of \"day\", \"month\"",
        ),
        ("[log]\nrequests = 1", "2: `log.requests` is an integer; must be `true` or `false`"),
        ("[log]\nevents = \"xml\"", "2: `log.events` is \"xml\"; must be one of \"text\", \"json\""),
    ] {
        let expected = format!("config.toml:{expected}");
        assert_eq!(faults(&format!("{text}\n{BACKEND}")).join("\n"), expected, "{text}");
    }
}

/// Each text is put at line 4 of a backend that has `url` and `weight`.
#[test]
fn faults_of_backends_name_the_line_and_never_show_a_secret() {
    for (text, expected) in [
        ("name = \"\"", "`backends[0].name` is \"\"; must be 1 to 64 characters of `A-Za-z0-9._-`"),
        (
            "name = \"sk-CANARY!\"",
            "`backends[0].name` is not valid; must be 1 to 64 characters of `A-Za-z0-9._-`",
        ),
        ("priority = 1001", "`backends[0].priority` is 1001; must be from 0 to 1000"),
        (
            "max_in_flight = 0",
            "`backends[0].max_in_flight` is 0; must be from 1 to 1000000, or left out for no limit",
        ),
        (
            "tokens_per_minute = 0",
            "`backends[0].tokens_per_minute` is 0; must be from 1 to 1000000000000, or left out \
             for no limit",
        ),
        (
            "usage = \"on\"",
            "`backends[0].usage` is \"on\"; must be one of \"auto\", \"inject\", \"passive\", \"off\"",
        ),
        (
            "api_key = 7",
            "`backends[0].api_key` is an integer; must be a string, in quotes, or `{ file = \"path\" }`",
        ),
        ("api_key = \"\"", "`backends[0].api_key` is empty; must have at least one character"),
        (
            "api_key = \"sk-CANARY\\n\"",
            "`backends[0].api_key` contains a space, a control character or a non-ASCII \
             character; must be visible ASCII on one line",
        ),
        (
            "api_key = \"${BAD_KEY}\"",
            "`backends[0].api_key` contains a space, a control character or a non-ASCII \
             character; must be visible ASCII on one line",
        ),
        (
            "api_key = \"sk-CANARY${NONE}\"",
            "`backends[0].api_key` uses the environment variable `NONE`, which is unset or empty; \
             must be set, or have a default: `${NONE:-default}`",
        ),
        (
            "api_key = \"sk-CANARY${\"",
            "`backends[0].api_key` contains a malformed `${`; must be `${NAME}` or \
             `${NAME:-default}`, NAME of `A-Za-z0-9_` and not beginning with a digit; a plain \
             `${` is written `$${`",
        ),
        (
            "api_key = { file = \"sk-CANARY\" }",
            "`backends[0].api_key.file` cannot be read (no such file); must be a readable file, \
             relative to the directory of the configuration",
        ),
        ("api_key = {}", "`backends[0].api_key.file` is missing; a string is required"),
        (
            "ca_file = \"sk-CANARY\"",
            "`backends[0].ca_file` cannot be read (no such file); must be a readable file, \
             relative to the directory of the configuration",
        ),
        ("api_keys = \"sk-CANARY\"", "unknown key `backends[0].api_keys`; did you mean `api_key`?"),
        (
            "health_path = \"/h#x\"",
            "`backends[0].health_path` is not valid; must begin with `/` and be visible ASCII \
             without `#`; it may have a query after `?`",
        ),
        (
            "extra_headers = { \"sk-CANARY \" = \"x\" }",
            "`backends[0].extra_headers.<name>` cannot be added; must be a header that Zap does \
             not set itself and that is not hop-by-hop",
        ),
        (
            "extra_headers = { X-A = \"sk-CANARY\", \"x-a\" = \"2\" }",
            "`backends[0].extra_headers.x-a` repeats a header; must be different names, and case \
             does not count",
        ),
        (
            "extra_headers = { x = \"sk-CANARY\\n\" }",
            "`backends[0].extra_headers.x` has a value with a control character; must be visible \
             ASCII and spaces",
        ),
        (
            "extra_headers = { x = 1 }",
            "`backends[0].extra_headers.x` is an integer; must be a string, in quotes",
        ),
        (
            "drop_fields = [\"model\"]",
            "`backends[0].drop_fields[0]` is \"model\"; must be 1 to 64 bytes and not `messages`, \
             `model`, `stream`, in any case",
        ),
        (
            "drop_fields = [\"Model\"]",
            "`backends[0].drop_fields[0]` is \"Model\"; must be 1 to 64 bytes and not `messages`, \
             `model`, `stream`, in any case",
        ),
        ("drop_fields = [1]", "`backends[0].drop_fields[0]` is an integer; must be a string, in quotes"),
        ("models = []", "`backends[0].models` is empty; must be left out if the backend serves any model"),
        (
            "models = [\"a*b\"]",
            "`backends[0].models[0]` is \"a*b\"; must be 1 to 256 bytes without control \
             characters, `*` only at the end",
        ),
        ("models = [\"a\", \"a\"]", "`backends[0].models[1]` repeats a name; each name must be listed once"),
        (
            "models = { a = \"b*\" }",
            "`backends[0].models.a` maps a name without `*` to a name that ends in `*`; both \
             names must end in `*`",
        ),
        (
            "models = { a = \"\" }",
            "`backends[0].models.a` is \"\"; must be 1 to 256 bytes without control characters, \
             `*` only at the end",
        ),
        (
            "models = true",
            "`backends[0].models` is a boolean; must be an array of strings, such as `[\"a\", \
             \"b\"]`, or a table of strings, such as `{ \"a\" = \"b\" }`",
        ),
        (
            "default_model = \"\"",
            "`backends[0].default_model` is \"\"; must be 1 to 256 bytes without control characters",
        ),
    ] {
        let expected = format!("config.toml:4: {expected}");
        assert_eq!(faults(&format!("{BACKEND}{text}\n")), [expected], "{text}");
    }
}

#[test]
fn bad_urls_and_missing_keys_are_faults() {
    for (text, expected) in [
        ("x\nurl = \"http://u:sk-CANARY@h\"", "has a user or a password"),
        ("x\nurl = \"sk-CANARY\"", "has no valid scheme"),
        ("x\nurl = \"http://${NONE}\"", "`NONE`"),
        ("", "`backends[0].url` is missing; a string is required"),
    ] {
        let line = if text.is_empty() { 2 } else { 4 };
        let text = text.replacen('x', "[[backends]]\nweight = 1", 1);
        let text = if text.is_empty() { "[[backends]]\nweight = 1".to_owned() } else { text };
        let faults = faults(&format!("\n{text}\n"));
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].starts_with(&format!("config.toml:{line}: ")), "{faults:?}");
        assert!(faults[0].contains(expected), "{faults:?}");
    }
}

#[test]
fn no_backend_is_a_fault() {
    let what = "no backends; at least one `[[backends]]` with `url` and `weight` is required";
    for (text, line) in [("", 1), ("# x\n\n[server]\n", 1), ("\nbackends = []", 2)] {
        assert_eq!(faults(text), [format!("config.toml:{line}: {what}")], "{text}");
    }
    let what = "`backends[0]` is an integer; must be a table, `{ key = value }`";
    assert_eq!(faults("backends = [1]"), [format!("config.toml:1: {what}")]);
}

#[test]
fn all_faults_are_reported_at_once_in_line_order() {
    let text = "[queue]\nmax_size = -1\n[server]\nport = \"x\"\nprot = 1\n\n[[backends]]\nurl = 1\n";
    let faults = parse(text).unwrap_err();
    assert_eq!(
        faults.to_string(),
        "config.toml:2: `queue.max_size` is -1; must be from 0 to 1000000\n\
         config.toml:4: `server.port` is the string \"x\"; must be an integer from 0 to 65535, without quotes\n\
         config.toml:5: unknown key `server.prot`; did you mean `port`?\n\
         config.toml:7: `backends[0].weight` is missing; an integer from 0 to 1000 is required\n\
         config.toml:8: `backends[0].url` is an integer; must be a string, in quotes"
    );
    assert_eq!(faults.lines().len(), 5);
    assert_eq!(
        self::faults("[[backends]]\nurl = \"http://a\"\nwieght = 1\n")[1],
        "config.toml:3: unknown key `backends[0].wieght`; did you mean `weight`?"
    );
}

#[test]
fn syntax_errors_name_line_and_column_and_quote_nothing() {
    for (text, place) in [
        ("[server]\nport = = 1\n", "config.toml:2: syntax error at column 8: "),
        ("[server]\nport = 1\nport = 2\n", "config.toml:3: syntax error at column 1: duplicate key"),
        ("[a]\nx = \"sk-CANARY\n", "config.toml:2: syntax error at column "),
        ("x = sk-CANARY\n", "config.toml:1: syntax error at column "),
        ("sk-CANARY\n", "config.toml:1: syntax error at column "),
    ] {
        let faults = faults(text);
        assert!(faults[0].starts_with(place), "{faults:?}");
        assert!(!faults.concat().contains("CANARY"), "{faults:?}");
    }
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

#[test]
fn file_paths_are_relative_and_one_trailing_newline_is_dropped() {
    let directory = Directory::new("files");
    for (content, expected) in [
        ("sk-1", Ok("sk-1")),
        ("sk-1\n", Ok("sk-1")),
        ("sk-1\r\n", Ok("sk-1")),
        ("sk-CANARY\n\n", Err("contains a space")),
        ("sk-CANARY\r", Err("contains a space")),
        ("\n", Err("is empty")),
        ("", Err("is empty")),
    ] {
        let ca_file = directory.write("key", content);
        let text = format!("{BACKEND}api_key = {{ file = \"key\" }}\nca_file = \"key\"\n");
        match (Config::parse(&text, "f", &directory.0, &env), expected) {
            (Ok(config), Ok(key)) => {
                assert_eq!(config.backends[0].api_key.as_ref().unwrap().expose(), key);
                assert_eq!(config.backends[0].ca_file, Some(ca_file));
            }
            (Err(faults), Err(part)) => {
                assert!(faults.lines()[0].starts_with("f:4: `backends[0].api_key`"), "{faults}");
                assert!(faults.to_string().contains(part), "{faults}");
                assert!(!faults.to_string().contains("CANARY"), "{faults}");
            }
            (got, _) => panic!("{content:?}: {got:?}"),
        }
    }
    let text = format!("{BACKEND}ca_file = \".\"\napi_key = {{ file = \"/dev/zero\" }}\n");
    let faults = Config::parse(&text, "f", &directory.0, &env).unwrap_err();
    assert_eq!(faults.lines().len(), 2, "{faults}");
    assert!(faults.to_string().contains("not a regular file"), "{faults}");
}

#[test]
fn load_distinguishes_a_missing_file_from_an_invalid_one() {
    let directory = Directory::new("load");
    let missing = directory.0.join("none.toml");
    let error = Config::load(&missing).unwrap_err();
    assert_eq!(error, LoadError::Missing(missing));
    let large = vec![b'\n'; MAX_FILE_BYTES as usize + 1];
    for (name, content) in [("latin1", &b"x = \"\xe4\""[..]), ("large", &large)] {
        let path = directory.write(name, content);
        let error = Config::load(&path).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}:1: ", path.display())), "{error}");
    }
    let error = Config::load(&directory.0).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}:1: ", directory.0.display())), "{error}");
}

#[cfg(unix)]
#[test]
fn a_world_readable_key_causes_a_warning() {
    use std::os::unix::fs::PermissionsExt;
    let directory = Directory::new("mode");
    directory.write("key", "k");
    for (key, mode, warnings) in [
        ("api_key = \"sk-CANARY\"", 0o644, 1),
        ("api_key = \"sk-CANARY\"", 0o640, 0),
        ("api_key = { file = \"key\" }", 0o644, 0),
        ("api_key = \"${PATH}\"", 0o644, 0),
        ("api_key = \"sk-${PATH}\"", 0o644, 1),
        ("[[client_keys]]\nname = \"t\"\nkey = \"sk-CANARY\"", 0o644, 1),
        ("[[client_keys]]\nname = \"t\"\nkey = \"sk-CANARY\"", 0o640, 0),
        ("[[client_keys]]\nname = \"t\"\nkey = { file = \"key\" }", 0o644, 0),
        ("[[client_keys]]\nname = \"t\"\nkey = \"${PATH}\"", 0o644, 0),
        ("", 0o644, 0),
    ] {
        let path = directory.write("config.toml", format!("server.host = \"127.0.0.1\"\n{BACKEND}{key}\n"));
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let config = Config::load(&path).unwrap();
        assert_eq!(config.warnings.len(), warnings, "{key} {mode:o}");
        assert!(!config.warnings.concat().contains("CANARY"));
    }
}

#[test]
fn the_path_of_the_ledger_is_relative_and_must_be_able_to_become_a_file() {
    let directory = Directory::new("ledger");
    directory.write("old.db", "");
    let read = |path: &str| {
        let text = format!("[ledger]\npath = \"{path}\"\n{BACKEND}");
        Config::parse(&text, "f", &directory.0, &env).map_err(|faults| faults.to_string())
    };
    for path in ["new.db", "old.db", "sub/zap.db"] {
        assert_eq!(read(path).unwrap().ledger, Some(directory.0.join(path)), "{path}");
    }
    for (path, what) in [
        ("", "is empty"),
        (".", "is a directory"),
        ("sk-CANARY/", "is a directory"),
        ("/dev/null", "is not a regular file"),
        ("old.db/zap.db", "cannot be used (not a directory)"),
    ] {
        let allowed = "must be the path of a file, relative to the directory of the configuration";
        let expected = format!("f:2: `ledger.path` {what}; {allowed}");
        assert_eq!(read(path).unwrap_err(), expected, "{path}");
    }
}

/// Calls `check` with every truncation of `text`, with every byte flipped in several ways, removed
/// or doubled, and with every line removed, doubled or swapped with the next.
fn mangle(text: &str, mut check: impl FnMut(&str)) {
    let bytes = text.as_bytes();
    let mut emit = |mangled: &[u8]| {
        if let Ok(mangled) = str::from_utf8(mangled) {
            check(mangled);
        }
    };
    for (i, byte) in bytes.iter().enumerate() {
        emit(&bytes[..i]);
        emit(&bytes[i..]);
        emit(&[&bytes[..i], &bytes[i + 1..]].concat());
        emit(&[&bytes[..=i], &bytes[i..]].concat());
        let flips = [0x01, 0x04, 0x10, 0x40].map(|bit| byte ^ bit);
        for other in flips.into_iter().chain(*b"\"'\n\r\0.=[]{}#$,\\ -") {
            emit(&[&bytes[..i], &[other], &bytes[i + 1..]].concat());
        }
    }
    let lines: Vec<_> = text.split_inclusive('\n').collect();
    for i in 0..lines.len() {
        let (before, after) = (&lines[..i], &lines[i + 1..]);
        emit([before, after].concat().concat().as_bytes());
        emit([before, &lines[i..=i], &lines[i..]].concat().concat().as_bytes());
        let mut swapped = lines.clone();
        swapped.swap(i, (i + 1) % lines.len());
        emit(swapped.concat().as_bytes());
    }
}

#[test]
fn mangled_texts_cause_no_panic_and_no_fault_shows_the_key() {
    let texts = [
        FULL.to_owned(),
        format!("{BACKEND}api_key = {{ file = \"sk-CANARY\" }}\n"),
        "backends = [{ url = 'http://sk-CANARY@h', weight = 1, \
         api_key = \"\"\"\nsk-CANARY\"\"\" }]\n"
            .to_owned(),
    ];
    let (mut valid, mut invalid) = (0, 0);
    for text in &texts {
        mangle(text, |mangled| match parse(mangled) {
            Ok(config) => {
                valid += 1;
                assert!(!config.backends.is_empty());
                let names: HashSet<_> = config.backends.iter().map(|b| &b.name).collect();
                assert_eq!(names.len(), config.backends.len());
            }
            Err(faults) => {
                invalid += 1;
                assert!(!faults.lines().is_empty());
                assert!(!faults.to_string().contains("CANARY"), "{faults}\n{mangled}");
                let has_line = |line: &String| {
                    let number = line.strip_prefix("config.toml:").and_then(|l| l.split_once(": "));
                    number.is_some_and(|(n, _)| n.parse().is_ok_and(|n: usize| n > 0))
                };
                assert!(faults.lines().iter().all(has_line), "{faults}");
            }
        });
    }
    assert!(valid > 1000 && invalid > 1000, "{valid} {invalid}");
}

#[test]
fn all_origins_without_client_keys_get_a_warning() {
    let key = "[[client_keys]]\nname = \"a\"\nkey = \"k\"\n";
    for (origins, more, warnings) in
        [("\"*\"", "", 1), ("\"*\"", key, 0), ("\"https://a\"", "", 0), ("", "", 0)]
    {
        let text = format!("[server]\ncors_origins = [{origins}]\n{BACKEND}{more}");
        let config = Config::of(&text).unwrap();
        assert_eq!(config.warnings.len(), warnings, "{origins} {more}");
    }
}

#[test]
fn deep_nesting_is_refused_without_recursion() {
    for unit in ["a.", "a=[", "[", "a={", "[a.", "[[a."] {
        assert!(parse(&unit.repeat(100_000)).is_err());
        assert!(parse(&format!("{}a=1", unit.repeat(100_000))).is_err());
    }
    let keys = "a.".repeat(50_000);
    assert!(parse(&format!("{keys}a=1")).is_err());
    assert!(parse(&format!("[{keys}a]\nx=1\n{BACKEND}")).is_err());
}

//! Every section and key by name, with its default and its range. `backend`, `models` and `clients` read
//! `[[backends]]`, `[models.NAME]` and `[[client_keys]]`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread;

use ipnet::IpNet;

use crate::config::admin::ReadAdmin;
use crate::config::backend::ReadBackends;
use crate::config::browsers::{allowed_hosts, cors_origins};
use crate::config::charges::Lines;
use crate::config::clients::ReadClients;
use crate::config::common::{Context, IN_FLIGHT, REQUESTS_PER_MINUTE, SECONDS, TOKENS_PER_MINUTE, host};
use crate::config::file::ledger_path;
use crate::config::money::amount;
use crate::config::otlp::{ReadOtlp, otlp};
use crate::config::range::{Number, Range};
use crate::config::tls::{ReadTls, server_tls};
use crate::config::toml_reader::Section;
use crate::config::unix_socket::unix_socket;
use crate::config::warnings::warnings;
use crate::config::{
    Config, Files, Health, LogFormat, LogSettings, Queue, RateLimit, Retry, Server, Strategy, Stream,
    Timeouts, admin, backend, charges, clients, models,
};

const HOST: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const PORT: Number<u16> = Range::new(0, u16::MAX).or(8000);
const WORKERS: Range<usize> = Range::new(1, 1024);
const MAX_BUFFERED_BYTES: Range<u64> = Range::new(1 << 20, 1 << 43);
const MAX_BODY_BYTES: Number<u64> = Range::new(1024, 1 << 30).or(32 << 20);
const MAX_CONNECTIONS: Number<usize> = Range::new(1, 1_000_000).or(10_000);

const DRAIN_SECS: Number<u64> = Range::new(0, SECONDS.max).or(30);

const DRAIN_DELAY_SECS: Number<u64> = Range::new(0, 3600).or(0);
const KEEP_ALIVE_SECS: Number<u64> = SECONDS.or(75);
const MAX_WAIT_SECS: Number<u64> = SECONDS.or(30);
const TIMEOUT_SECS: Number<u64> = SECONDS.or(300);
const HEALTH_INTERVAL_SECS: Number<u64> = SECONDS.or(10);
const HEALTH_TIMEOUT_SECS: Number<u64> = SECONDS.or(5);
const STREAM_IDLE_SECS: Number<u64> = SECONDS.or(120);
const FIRST_BYTE_SECS: Number<u64> = Range::new(0, SECONDS.max).or(60);
const FIRST_TOKEN_SECS: Number<u64> = Range::new(0, SECONDS.max).or(0);
const HOLD_SECS: Number<u64> = Range::new(0, 300).or(10);
const HEARTBEAT_SECS: Number<u64> = Range::new(0, 300).or(30);

const MILLIS: Range<u64> = Range::new(1, 600_000);
const BASE_DELAY_MS: Number<u64> = MILLIS.or(100);
const MAX_DELAY_MS: Number<u64> = MILLIS.or(2000);
const CONNECT_MS: Number<u64> = MILLIS.or(2000);

const MAX_SIZE: Number<usize> = Range::new(0, 1_000_000).or(1000);
const MAX_IN_FLIGHT: Number<usize> = IN_FLIGHT.or(1024);

const THRESHOLD: Range<u32> = Range::new(1, 1000);
const FAILURE_THRESHOLD: Number<u32> = THRESHOLD.or(3);
const SUCCESS_THRESHOLD: Number<u32> = THRESHOLD.or(1);

/// In millionths.
const BACKEND_SHARE: Range<u64> = Range::new(1, 1_000_000);
const DEFAULT_SHARE: u32 = 750_000;

const MAX_RETRIES: Number<u32> = Range::new(0, 10).or(2);
const BUDGET_PERCENT: Number<u32> = Range::new(0, 100).or(20);

const PREFIX_BYTES: Number<usize> = Range::new(1, 1 << 20).or(4096);
/// Ids that are known at once.
const MAX_IDS: Number<usize> = Range::new(1, 10_000_000).or(100_000);
const MAX_KEYS: Number<usize> = Range::new(1, 10_000_000).or(100_000);

/// A configuration; valid only if its sink has no fault.
pub(super) struct ReadConfig {
    pub(super) config: Config,
    /// Whether the text itself contains a key of a backend or of a client.
    pub(super) inline_key: bool,
}

/// Reads the whole document.
pub(super) fn config(root: &mut Section<'_, '_>, ctx: &Context<'_>) -> ReadConfig {
    let (mut server, ReadTls { tls, has_client_ca }) =
        root.section("server", |t| (server(t, ctx), server_tls(t, ctx)));
    let ReadAdmin { address, access: admin, inline_token } =
        admin::admin(root, ctx, SocketAddr::new(server.host, server.port));
    server.admin = address;
    let queue = root.section("queue", |t| Queue {
        max_size: t.number("max_size", MAX_SIZE),
        max_in_flight: t.number("max_in_flight", MAX_IN_FLIGHT),
        backend_share: amount(t, "backend_share", BACKEND_SHARE)
            .and_then(|share| u32::try_from(share).ok())
            .unwrap_or(DEFAULT_SHARE),
        max_wait: t.seconds("max_wait_secs", MAX_WAIT_SECS),
        timeout: t.seconds("timeout_secs", TIMEOUT_SECS),
    });
    let max_ids = root.section("affinity", |t| t.number("max_ids", MAX_IDS));
    let (strategy, prefix_bytes) = root.section("load_balancer", |t| {
        let words = [
            ("round_robin", Strategy::RoundRobin),
            ("least_loaded", Strategy::LeastLoaded),
            ("prefix_hash", Strategy::PrefixHash),
            ("least_latency", Strategy::LeastLatency),
        ];
        (t.choice("strategy", Strategy::RoundRobin, &words), t.number("prefix_bytes", PREFIX_BYTES))
    });
    let health = root.section("health", |t| Health {
        interval: t.seconds("interval_secs", HEALTH_INTERVAL_SECS),
        timeout: t.seconds("timeout_secs", HEALTH_TIMEOUT_SECS),
        failure_threshold: t.number("failure_threshold", FAILURE_THRESHOLD),
        success_threshold: t.number("success_threshold", SUCCESS_THRESHOLD),
    });
    let retry = root.section("retry", retry);
    let timeouts = root.section("timeouts", |t| Timeouts {
        connect: t.millis("connect_ms", CONNECT_MS),
        first_byte: t.seconds("first_byte_secs", FIRST_BYTE_SECS),
        first_token: t.seconds("first_token_secs", FIRST_TOKEN_SECS),
        stream_idle: t.seconds("stream_idle_secs", STREAM_IDLE_SECS),
    });
    let stream = root.section("stream", |t| Stream {
        hold: t.seconds("hold_secs", HOLD_SECS),
        heartbeat: t.seconds("heartbeat_secs", HEARTBEAT_SECS),
    });
    let rate_limit = root.section("rate_limit", |t| RateLimit {
        requests_per_minute: t.limit("requests_per_minute", REQUESTS_PER_MINUTE),
        requests_per_minute_per_address: t.limit("requests_per_minute_per_address", REQUESTS_PER_MINUTE),
        tokens_per_minute: t.limit("tokens_per_minute", TOKENS_PER_MINUTE),
        max_keys: t.number("max_keys", MAX_KEYS),
    });
    let log = root.section("log", |t| LogSettings {
        format: {
            let words = [("auto", LogFormat::Auto), ("text", LogFormat::Text), ("json", LogFormat::Json)];
            t.choice("format", LogFormat::Auto, &words)
        },
        requests: t.boolean("requests", true),
        probes: t.boolean("probes", false),
    });
    let watch = root.section("reload", |t| t.boolean("watch", false));
    let ledger = root.section("ledger", |t| ledger_path(t, ctx));
    let ReadOtlp { otlp, inline_key: inline_header } = root.section("otlp", otlp);
    let faults = root.sink().count();
    let ReadBackends { backends, lines, inline_key: inline_backend_key } = backend::backends(root, ctx);
    let routes = models::named_routes(root, &backends, root.sink().count() == faults);
    let ReadClients { clients, budget_lines, inline_key: inline_client_key } =
        clients::clients(root, ctx, has_client_ca);
    let models_from = models::models_from(root);
    let mut config = Config {
        server,
        tls,
        admin,
        queue,
        strategy,
        prefix_bytes,
        max_ids,
        health,
        retry,
        timeouts,
        stream,
        rate_limit,
        log,
        models_from,
        backends,
        routes,
        clients,
        watch,
        ledger,
        otlp: otlp.map(Arc::new),
        warnings: Vec::new(),
        file: None,
        files: Files::default(),
    };
    if root.sink().count() == faults {
        charges::check(root.sink(), &config, &Lines { backends: lines, client_budgets: budget_lines });
    }
    if root.sink().count() == 0 {
        config.warnings = warnings(&config);
    }
    let inline_key = inline_backend_key || inline_client_key || inline_token || inline_header;
    ReadConfig { config, inline_key }
}

/// Reads `[server]`, without the admin listener, which has a section of its own.
pub(super) fn server(t: &mut Section<'_, '_>, ctx: &Context<'_>) -> Server {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    Server {
        host: host(t).unwrap_or(HOST),
        port: t.number("port", PORT),
        unix: unix_socket(t, ctx),
        admin: None,
        open_metrics: t.boolean("open_metrics", false),
        workers: t.number("workers", WORKERS.or(cores.clamp(WORKERS.min, WORKERS.max))),
        max_body_bytes: t.number("max_body_bytes", MAX_BODY_BYTES),
        max_buffered_bytes: t.optional("max_buffered_bytes", MAX_BUFFERED_BYTES),
        max_connections: t.number("max_connections", MAX_CONNECTIONS),
        drain: t.seconds("drain_secs", DRAIN_SECS),
        drain_delay: t.seconds("drain_delay_secs", DRAIN_DELAY_SECS),
        keep_alive: t.seconds("keep_alive_secs", KEEP_ALIVE_SECS),
        trusted_proxies: {
            let parse = |text: &str| text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).ok();
            let allowed = "must be an address such as `10.0.0.1` or a network such as `10.0.0.0/8`";
            t.parsed_texts("trusted_proxies", allowed, parse)
        },
        cors_origins: cors_origins(t),
        allowed_hosts: allowed_hosts(t),
    }
}

fn retry(t: &mut Section<'_, '_>) -> Retry {
    let line = t.line_of("base_delay_ms").or(t.line_of("max_delay_ms"));
    let faults = t.sink().count();
    let retry = Retry {
        max_retries: t.number("max_retries", MAX_RETRIES),
        base_delay: t.millis("base_delay_ms", BASE_DELAY_MS),
        max_delay: t.millis("max_delay_ms", MAX_DELAY_MS),
        budget_percent: t.number("budget_percent", BUDGET_PERCENT),
    };
    if retry.base_delay > retry.max_delay && t.sink().count() == faults {
        let base = retry.base_delay.as_millis();
        let max = retry.max_delay.as_millis();
        let what = format!("is {base} and `retry.max_delay_ms` is {max}; must be from 1 to {max}");
        t.fault(line.unwrap_or(t.line()), "base_delay_ms", &what);
    }
    retry
}

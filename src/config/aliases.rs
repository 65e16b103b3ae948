//! Names of keys in other programs: litellm, the OpenAI SDKs, nginx, HAProxy, Envoy.

/// A table, names that other programs use there, and Zap's key or a sentence.
type Row = (&'static str, &'static [&'static str], &'static str);

/// Names are written without `_` and `-`, in lower case.
const ALIASES: &[Row] = &[
    (
        "",
        &[
            "modellist",
            "providers",
            "provider",
            "upstreams",
            "upstream",
            "servers",
            "endpoints",
            "targets",
            "deployments",
        ],
        "backends are written as `[[backends]]` tables, one for each",
    ),
    ("", &["backend"], "backends are written as `[[backends]]`"),
    (
        "",
        &["litellmsettings", "routersettings", "generalsettings", "environmentvariables"],
        "Zap does not read the configuration of litellm: `zap example` prints one of Zap's own",
    ),
    (
        "",
        &[
            "clients",
            "clientkey",
            "client",
            "users",
            "auth",
            "virtualkeys",
            "keys",
            "apikeys",
            "masterkey",
            "tokens",
        ],
        "keys of clients are written as `[[client_keys]]` tables with `name` and `key`",
    ),
    (
        "",
        &["routes", "route", "router", "model", "aliases", "modelaliases", "modelgroupalias", "fallbacks"],
        "models",
    ),
    (
        "",
        &["port", "host", "listen", "bind", "workers", "address"],
        "it belongs in `[server]`, as `host`, `port` or `workers`",
    ),
    (
        "",
        &["url", "baseurl", "apibase", "apikey", "weight", "name", "defaultmodel", "healthpath", "chatpath"],
        "it belongs in a `[[backends]]` table",
    ),
    ("", &["strategy", "routingstrategy", "loadbalancing", "balance", "lb"], "load_balancer"),
    ("", &["ratelimits", "ratelimiting", "limits", "rpm", "tpm"], "rate_limit"),
    ("", &["logging", "logs", "logger", "loglevel"], "log"),
    ("", &["healthcheck", "healthchecks", "healthz"], "health"),
    ("", &["database", "db", "databaseurl", "usage", "sqlite"], "ledger"),
    ("", &["numretries", "retrypolicy"], "retry"),
    ("", &["streaming"], "stream"),
    (
        "server",
        &["listen", "bind", "address", "addr", "listenaddress"],
        "an address is written as two keys: `host = \"127.0.0.1\"` and `port = 8000`",
    ),
    ("server", &["threads", "workerprocesses", "numworkers", "workerthreads", "processes"], "workers"),
    (
        "server",
        &["clientmaxbodysize", "maxbodysize", "bodylimit", "maxrequestsize", "maxbody"],
        "max_body_bytes",
    ),
    ("server", &["workerconnections", "maxconn", "maxclients"], "max_connections"),
    ("server", &["keepalivetimeout", "idletimeout", "keepalive"], "keep_alive_secs"),
    (
        "server",
        &["shutdowntimeout", "graceperiod", "drain", "draintimeout", "gracefulshutdown"],
        "drain_secs",
    ),
    ("server", &["proxies", "realipfrom", "setrealipfrom", "forwardedallowips"], "trusted_proxies"),
    (
        "server",
        &["apikey", "masterkey", "key", "keys", "auth", "token"],
        "keys of clients are written as `[[client_keys]]` tables with `name` and `key`",
    ),
    (
        "server",
        &["cert", "certfile", "ssl", "sslcertificate", "sslkeyfile", "sslcertfile", "https", "certificate"],
        "a certificate of the listener is written as a `[[server.tls]]` table with `cert` and `key`",
    ),
    (
        "server.tls",
        &["certfile", "certificate", "sslcertificate", "tlscert", "chain", "fullchain", "crt", "pem"],
        "cert",
    ),
    ("server.tls", &["keyfile", "sslcertificatekey", "tlskey", "privatekey"], "key"),
    ("server.tls", &["ca", "cafile", "clientcafile", "sslclientcertificate", "clientcas"], "client_ca"),
    ("server.tls", &["sni", "name", "names", "host", "servername"], "the names are those of the certificate"),
    ("server", &["loglevel", "log"], "it belongs in `[log]`"),
    ("server", &["timeout", "requesttimeout"], "it is `timeout_secs` in `[queue]`"),
    (
        "backends",
        &[
            "baseurl",
            "apibase",
            "endpoint",
            "apiurl",
            "host",
            "address",
            "server",
            "target",
            "proxypass",
            "upstream",
            "uri",
            "azureendpoint",
            "openaiapibase",
            "hostname",
        ],
        "url",
    ),
    (
        "backends",
        &[
            "key",
            "token",
            "secret",
            "apitoken",
            "bearer",
            "bearertoken",
            "openaiapikey",
            "password",
            "accesstoken",
            "apikey",
        ],
        "api_key",
    ),
    ("backends", &["rpm", "ratelimit", "maxrpm", "requestsperminute", "rate"], "requests_per_minute"),
    ("backends", &["tpm", "maxtpm", "tokensperminute"], "tokens_per_minute"),
    (
        "backends",
        &[
            "maxparallelrequests",
            "concurrency",
            "maxconcurrency",
            "maxconns",
            "maxconnections",
            "maxconn",
            "parallel",
        ],
        "max_in_flight",
    ),
    (
        "backends",
        &["model", "modelname", "deployment", "deploymentname"],
        "it is `default_model` for requests that name no model, and `models` for the names that the backend serves",
    ),
    (
        "backends",
        &["headers", "defaultheaders", "httpheaders", "addheaders", "proxysetheader"],
        "extra_headers",
    ),
    ("backends", &["order", "tier", "backup", "fallback"], "priority"),
    ("backends", &["dropparams", "dropparam", "additionaldropparams", "ignorefields"], "drop_fields"),
    ("backends", &["healthcheck", "healthurl", "healthendpoint", "healthcheckpath", "probe"], "health_path"),
    ("backends", &["path", "apipath", "chatendpoint", "completionspath", "chatcompletionspath"], "chat_path"),
    ("backends", &["apiversion"], "it is a query of `chat_path`: `/chat/completions?api-version=…`"),
    (
        "backends",
        &["organization", "org", "orgid", "project"],
        "it is a header: `extra_headers = { \"OpenAI-Organization\" = \"…\" }`",
    ),
    (
        "backends",
        &["verify", "sslverify", "tlsverify", "insecure", "verifyssl", "cacert", "ca", "sslca", "cabundle"],
        "ca_file",
    ),
    (
        "backends",
        &["retries", "maxretries", "numretries"],
        "it is `max_retries` in `[retry]`, for all backends",
    ),
    (
        "backends",
        &[
            "timeout",
            "requesttimeout",
            "streamtimeout",
            "connecttimeout",
            "readtimeout",
            "proxyreadtimeout",
            "timeoutsecs",
        ],
        "limits of time are in `[timeouts]` and `[queue]`, for all backends",
    ),
    (
        "backends",
        &["provider", "type", "kind", "customllmprovider", "apitype", "format"],
        "a backend has no type: `zap example` prints the keys for each provider",
    ),
    ("backends", &["inputcostpertoken", "outputcostpertoken", "price", "pricing", "cost", "costs"], "prices"),
    ("backends", &["maxbudget", "budgetduration", "spend"], "budget"),
    ("backends", &["enabled", "disabled", "drain", "down"], "a backend with `weight = 0` gets no requests"),
    ("backends", &["id", "label", "alias"], "name"),
    ("backends", &["authheader", "authorization", "auth", "apikeyheader", "authtype"], "auth_header"),
    ("backends", &["modelmap", "modelalias", "modelaliases", "modelmapping", "mapping"], "models"),
    (
        "backends",
        &["httpproxy", "httpsproxy", "proxyurl", "proxies", "outboundproxy", "forwardproxy"],
        "proxy",
    ),
    (
        "backends",
        &["cert", "certfile", "sslcert", "sslcertificate", "tlscert", "clientcertificate"],
        "client_cert",
    ),
    ("backends", &["keyfile", "sslkey", "sslcertificatekey", "tlskey", "clientcertkey"], "client_key"),
    ("backends", &["sni", "tlsservername", "sslservername", "proxysslname", "serverhostname"], "server_name"),
    (
        "backends",
        &["passheaders", "allowheaders", "proxypassheader", "forwardclientheaders", "headerstoforward"],
        "forward_headers",
    ),
    ("backends", &["removeheaders", "stripheaders", "hideheaders", "proxyhideheader"], "drop_headers"),
    ("backends.health", &["url", "uri", "endpoint"], "path"),
    ("backends.health", &["interval", "period", "every"], "interval_secs"),
    ("backends.health", &["enable", "active", "disabled", "disable"], "enabled"),
    (
        "backends.health",
        &["timeout", "timeoutsecs", "failurethreshold", "successthreshold", "fall", "rise"],
        "it belongs in `[health]`, for all backends",
    ),
    ("backends.budget", &["limit", "amount", "max", "dollars", "maxbudget"], "usd"),
    ("backends.budget", &["period", "duration", "budgetduration", "window", "interval"], "per"),
    ("client_keys.budget", &["limit", "amount", "max", "dollars", "maxbudget"], "usd"),
    ("client_keys.budget", &["period", "duration", "budgetduration", "window", "interval"], "per"),
    ("backends.prices.NAME", &["prompt", "inputcostpertoken", "in"], "input"),
    ("backends.prices.NAME", &["completion", "outputcostpertoken", "out"], "output"),
    ("client_keys", &["token", "apikey", "secret", "value", "bearer", "password"], "key"),
    ("client_keys", &["cert", "commonname", "cn", "subject", "clientcert", "mtls"], "certificate"),
    ("client_keys", &["hash", "keyhash", "digest", "sha", "tokenhash"], "sha256"),
    ("client_keys", &["rpm", "rpmlimit", "ratelimit", "requestsperminute"], "requests_per_minute"),
    ("client_keys", &["tpm", "tpmlimit", "tokensperminute"], "tokens_per_minute"),
    ("client_keys", &["maxparallelrequests", "concurrency"], "max_in_flight"),
    ("client_keys", &["maxbudget", "spend"], "budget"),
    ("client_keys", &["allowedmodels", "model"], "models"),
    ("client_keys", &["user", "userid", "id", "alias", "keyalias", "keyname", "label", "team"], "name"),
    ("rate_limit", &["rpm", "rate", "limit", "requests"], "requests_per_minute"),
    ("rate_limit", &["tpm", "tokens"], "tokens_per_minute"),
    ("retry", &["numretries", "retries", "attempts", "maxattempts", "count", "max"], "max_retries"),
    ("retry", &["backoff", "delay", "retryafter", "initialdelayms", "delayms"], "base_delay_ms"),
    ("timeouts", &["connect", "connecttimeout", "connectsecs", "proxyconnecttimeout"], "connect_ms"),
    (
        "timeouts",
        &["request", "requesttimeout", "timeout", "total", "requestsecs"],
        "it is `timeout_secs` in `[queue]`",
    ),
    (
        "timeouts",
        &["read", "readtimeout", "idle", "idletimeout", "proxyreadtimeout", "readsecs", "idlesecs"],
        "stream_idle_secs",
    ),
    ("health", &["path", "url", "uri"], "it is `health_path` of each backend"),
    ("health", &["interval", "period", "every"], "interval_secs"),
    ("health", &["fall", "unhealthythreshold", "maxfails", "allowedfails"], "failure_threshold"),
    ("health", &["rise", "healthythreshold"], "success_threshold"),
    (
        "health",
        &["enabled", "disabled", "enable"],
        "it is `health = { enabled = false }` in a `[[backends]]` table",
    ),
    ("log", &["events", "jsonlogs", "json"], "format"),
    ("log", &["accesslog", "access"], "requests"),
    (
        "log",
        &["level", "loglevel", "verbose", "setverbose"],
        "Zap has no log level: `requests = false` drops the lines of requests",
    ),
    ("load_balancer", &["type", "policy", "algorithm", "method", "routingstrategy", "balance"], "strategy"),
    ("ledger", &["file", "db", "database", "url", "databaseurl"], "path"),
    ("models.NAME", &["backends", "backend", "deployments", "fallbacks", "providers", "members"], "targets"),
    ("models.NAME.targets", &["provider", "name", "upstream", "server"], "backend"),
    ("models.NAME.targets", &["order", "tier"], "priority"),
    ("models.NAME.targets", &["modelname", "alias"], "model"),
];

/// The key that `written` stands for in the table `kind`, or a sentence about it.
pub(super) fn meaning(kind: &str, written: &str) -> Option<&'static str> {
    let plain = written.replace(['_', '-', ' '], "").to_lowercase();
    let is_meant = |(table, names, _): &&Row| *table == kind && names.contains(&plain.as_str());
    ALIASES.iter().find(is_meant).map(|(_, _, meant)| *meant)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_name_is_listed_twice_and_all_are_plain() {
        let mut seen = HashSet::new();
        for (table, names, _) in ALIASES {
            for name in *names {
                assert!(seen.insert((table, name)), "{table} {name}");
                assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()), "{name}");
            }
        }
    }

    #[test]
    fn spelling_does_not_count() {
        for written in ["base_url", "base-url", "baseURL", "BASE_URL", "baseurl"] {
            assert_eq!(meaning("backends", written), Some("url"), "{written}");
        }
        assert_eq!(meaning("backends.prices.NAME", "prompt"), Some("input"));
        assert_eq!(meaning("queue", "base_url"), None);
    }
}

//! Every fault with its line and its whole message.

use crate::config::tests::{BACKEND, faults, parse};

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
             `backend_share`, `max_wait_secs`, `timeout_secs`",
        ),
        (
            "[queue]\n\"sk-CANARY\" = 1",
            "2: unknown key in `queue`; must be one of `max_size`, `max_in_flight`, \
             `backend_share`, `max_wait_secs`, `timeout_secs`",
        ),
        (
            "\"sk-CANARY\" = 1",
            "1: unknown key at the top level; must be one of `server`, `admin`, `queue`, `affinity`, `load_balancer`, \
             `health`, `retry`, `timeouts`, `stream`, `rate_limit`, `log`, `reload`, `ledger`, `otlp`, `backends`, \
             `models`, `client_keys`, `models_from`",
        ),
        ("\n[retries]\nx = 1", "2: unknown key `retries`; did you mean `retry`?"),
        ("[server.tls]\nx = 1", "1: `server.tls` is a table; must be an array of tables, `[[server.tls]]`"),
        (
            "[server]\ncert = \"a.pem\"",
            "2: unknown key `server.cert`; a certificate of the listener is written as a `[[server.tls]]` table with \
             `cert` and `key`",
        ),
        ("server = 1", "1: `server` is an integer; must be a table, `[server]`"),
        (
            "[load_balancer]\nstrategy = \"sk-CANARY\"",
            "2: `load_balancer.strategy` is not valid; must be one of \"round_robin\", \
             \"least_loaded\", \"prefix_hash\", \"least_latency\"",
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
            "1: `client_keys[0].key` is missing; `key`, `sha256` or `certificate` is required",
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
        (
            "[log]\nformat = \"xml\"",
            "2: `log.format` is \"xml\"; must be one of \"auto\", \"text\", \"json\"",
        ),
        (
            "[log]\nprobes = \"no\"",
            "2: `log.probes` is the string \"no\"; must be `true` or `false`, without quotes",
        ),
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
        ("api_kees = \"sk-CANARY\"", "unknown key `backends[0].api_kees`; did you mean `api_keys`?"),
        (
            "api_keys = \"sk-CANARY\"",
            "`backends[0].api_keys` is a string; must be an array of strings, such as `[\"a\", \"b\"]`",
        ),
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
fn deep_nesting_is_refused_without_recursion() {
    for unit in ["a.", "a=[", "[", "a={", "[a.", "[[a."] {
        assert!(parse(&unit.repeat(100_000)).is_err());
        assert!(parse(&format!("{}a=1", unit.repeat(100_000))).is_err());
    }
    let keys = "a.".repeat(50_000);
    assert!(parse(&format!("{keys}a=1")).is_err());
    assert!(parse(&format!("[{keys}a]\nx=1\n{BACKEND}")).is_err());
}

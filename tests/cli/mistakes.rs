//! Mistakes in a configuration as operators make them, each with the whole message.

use std::path::Path;

use zap::internals::{Config, Faults};

/// Stands for `{B}` in the tables: a valid backend of three lines.
const BACKEND: &str = "[[backends]]\nurl = \"http://a\"\nweight = 1\n";

/// Texts, and their faults without the name of the file.
const MISTAKES: &[(&str, &str)] = &[
    (
        "model_list:\n  - model_name: gpt-4o\n",
        "1: this looks like YAML; the configuration is TOML: `zap example` prints one, and config.example.toml \
         shows every key",
    ),
    (
        "---\nserver:\n  port: 8000\n",
        "1: this looks like YAML; the configuration is TOML: `zap example` prints one, and config.example.toml \
         shows every key",
    ),
    (
        "{\n  \"server\": { \"port\": 8000 }\n}\n",
        "1: this looks like JSON; the configuration is TOML: `zap example` prints one, and config.example.toml \
         shows every key",
    ),
    (
        "upstream llm {\n  server 127.0.0.1:8001;\n}\n",
        "1: this looks like a configuration of nginx or Caddy; the configuration is TOML: `zap example` prints \
         one, and config.example.toml shows every key",
    ),
    (
        "export OPENAI_API_KEY=sk-CANARY\n",
        "1: this looks like a shell script; the configuration is TOML: `zap example` prints one, and \
         config.example.toml shows every key",
    ),
    (
        "{B}default_model = gpt-4o\n",
        "4: syntax error at column 17: a text needs quotes: `default_model = \"…\"`",
    ),
    (
        "{B}api_key = $OPENAI_API_KEY\n",
        "4: syntax error at column 11: a text needs quotes, and a variable `${…}`: `api_key = \"${NAME}\"`",
    ),
    ("{B}api_key = sk-CANARY\n", "4: syntax error at column 11: a text needs quotes: `api_key = \"…\"`"),
    (
        "{B}api_key = 'sk-CANARY\n",
        "4: syntax error at column 21: the text is not closed; must end in the quote that it begins with",
    ),
    ("{B}weight = 2\n", "4: syntax error at column 1: duplicate key `weight`; must be set once in a table"),
    ("{B}models = [\"a\", \"b\"\n", "4: syntax error at column 19: unclosed array, expected `]`"),
    ("{B}priority: 1\n", "4: syntax error at column 11: a key and its value need `=` between them, not `:`"),
    (
        "{B}extra_headers = { \"X-Title\": \"Zap\" }\n",
        "4: syntax error at column 28: a key and its value need `=` between them, not `:`",
    ),
    (
        "{B}forward_authorization = True\n",
        "4: syntax error at column 25: must be `true` or `false`, in small letters",
    ),
    (
        "{B}ca_file = \"C:\\certs\\ca.pem\"\n",
        "4: syntax error at column 15: a backslash in double quotes begins an escape; must be `\\\\`, or the \
         text in single quotes",
    ),
    (
        "[server]\nport = 8000;\n{B}",
        "2: syntax error at column 8: `;` does not end a line in TOML; must be left out",
    ),
    ("[server]\nport = 8000 // the port\n{B}", "2: syntax error at column 8: a comment begins with `#`"),
    ("[server]\nhost = 127.0.0.1\n{B}", "2: syntax error at column 13: a text needs quotes: `host = \"…\"`"),
    (
        "[server]\nkeep_alive_secs = 30s\n{B}",
        "2: syntax error at column 19: a number has no unit; the name of the key has it: `_secs`, `_ms`, \
         `_bytes`",
    ),
    (
        "[server]\nport = 1\n[server]\nworkers = 2\n{B}",
        "3: syntax error at column 2: duplicate key: this table is there already; must be once, with all its \
         keys",
    ),
    (
        "[[backends]\nurl = \"http://a\"\nweight = 1\n",
        "1: syntax error at column 12: unclosed array table, expected `]`",
    ),
    ("{B}priority = 1 // first\n", "4: syntax error at column 12: a comment begins with `#`"),
    (
        "{B}api_key = “sk-CANARY”\n",
        "4: syntax error at column 11: the quotes are typographic; must be `\"` or `'`",
    ),
    (
        "{B}name = \"a\"\n\n[[client_keys]]\nname = \"t\"\nkey = \"${OPENAI_API_KEY:-}\"\n",
        "8: `client_keys[0].key` is empty; must have at least one character",
    ),
    (
        "[backends]\nurl = \"http://a\"\nweight = 1\n",
        "1: `backends` is a table; must be an array of tables, `[[backends]]`",
    ),
    (
        "[backends.openai]\nurl = \"http://a\"\nweight = 1\n",
        "1: `backends` is a table; must be an array of tables, `[[backends]]`",
    ),
    ("[[server]]\nport = 1\n{B}", "1: `server` is an array; must be a table, `[server]`"),
    ("port = 8000\n{B}", "1: unknown key `port`; it belongs in `[server]`, as `host`, `port` or `workers`"),
    (
        "url = \"http://a\"\n",
        "1: no backends; at least one `[[backends]]` with `url` and `weight` is required\n1: unknown key `url`; \
         it belongs in a `[[backends]]` table",
    ),
    ("", "1: no backends; at least one `[[backends]]` with `url` and `weight` is required"),
    (
        "[[backend]]\nurl = \"http://a\"\nweight = 1\n",
        "1: no backends; at least one `[[backends]]` with `url` and `weight` is required\n1: unknown key \
         `backend`; backends are written as `[[backends]]`",
    ),
    (
        "[[backends]]\nbase_url = \"http://a\"\nkey = \"sk-CANARY\"\nrpm = 5\nweight = 1\n",
        "1: `backends[0].url` is missing; a string is required\n2: unknown key `backends[0].base_url`; did you \
         mean `url`?\n3: unknown key `backends[0].key`; did you mean `api_key`?\n4: unknown key \
         `backends[0].rpm`; did you mean `requests_per_minute`?",
    ),
    (
        "[[backends]]\nprovider = \"openai\"\nurl = \"http://a\"\nweight = 1\n",
        "2: unknown key `backends[0].provider`; a backend has no type: `zap example` prints the keys for each \
         provider",
    ),
    (
        "{B}timeout = 30\n",
        "4: unknown key `backends[0].timeout`; limits of time are in `[timeouts]` and `[queue]`, for all \
         backends",
    ),
    (
        "{B}organization = \"org-1\"\n",
        "4: unknown key `backends[0].organization`; it is a header: `extra_headers = { \"OpenAI-Organization\" = \
         \"…\" }`",
    ),
    (
        "[server]\nlisten = \"0.0.0.0:8000\"\n{B}",
        "2: unknown key `server.listen`; an address is written as two keys: `host = \"127.0.0.1\"` and `port = \
         8000`",
    ),
    (
        "[server]\nssl_certificate = \"a.pem\"\n{B}",
        "2: unknown key `server.ssl_certificate`; a certificate of the listener is written as a `[[server.tls]]` table with `cert` and `key`",
    ),
    (
        "[litellm_settings]\nnum_retries = 3\n{B}",
        "1: unknown key `litellm_settings`; Zap does not read the configuration of litellm: `zap example` prints \
         one of Zap's own",
    ),
    ("[retry]\nnum_retries = 3\n{B}", "2: unknown key `retry.num_retries`; did you mean `max_retries`?"),
    (
        "[log]\nlevel = \"debug\"\n{B}",
        "2: unknown key `log.level`; Zap has no log level: `requests = false` drops the lines of requests",
    ),
    (
        "[[client_keys]]\nkey_alias = \"team\"\nkey = \"sk-CANARY\"\n{B}",
        "1: `client_keys[0].name` is missing; a string is required\n2: unknown key `client_keys[0].key_alias`; \
         did you mean `name`?",
    ),
    (
        "[models.gpt-4.1]\ntargets = [{ backend = \"a\" }]\n{B}",
        "1: `[models.gpt-4.1]`: a name with a dot needs quotes: `[models.\"gpt-4.1\"]`",
    ),
    (
        "[models.gpt-4]\ntargets = [{ backend = \"a\" }]\n[models.gpt-4.1-mini]\ntargets = [{ backend = \"a\" }]\n{B}",
        "3: `[models.gpt-4.1-mini]`: a name with a dot needs quotes: `[models.\"gpt-4.1-mini\"]`",
    ),
    (
        "{B}models = { gpt-4.1 = \"gpt\" }\n",
        "4: `backends[0].models.gpt-4` is a table; a name with a dot needs quotes: `\"gpt-4.1\"`",
    ),
    (
        "{B}prices = { gpt-4.1 = { input = 2, output = 8 } }\n",
        "4: `backends[0].prices`: a name with a dot needs quotes: `\"gpt-4.1\"`",
    ),
    (
        "[models.smart]\ntargets = [\"a\"]\n{B}",
        "2: `models.smart.targets[0]` is a string; must be a table, `{ key = value }`",
    ),
    ("[models]\nsmart = [\"a\"]\n{B}", "2: `models.smart` is an array; must be a table with `targets`"),
    (
        "[models.smart]\ntargets = [{ backend = \"a\" }, { backend = \"opnai\", model = \"gpt-4o\" }]\n[[backends]]\nname = \"openai\"\nurl = \"http://a\"\nweight = 1\n[[backends]]\nname = \"a\"\nurl = \"http://b\"\nweight = 1\n",
        "2: `models.smart.targets[1].backend` is \"opnai\"; must be the name of a backend; did you mean \
         `openai`?",
    ),
    (
        "[[backends]]\nurl = \"https://api.openai.com/v1/chat/completions\"\nweight = 1\n",
        "2: `backends[0].url` ends in `/chat/completions`, which Zap appends itself; must be \
         \"https://api.openai.com\"",
    ),
    (
        "[[backends]]\nurl = \"https://api.perplexity.ai/chat/completions\"\nweight = 1\n",
        "2: `backends[0].url` ends in `/chat/completions`, which Zap appends itself; must be \
         \"https://api.perplexity.ai\", with `chat_path = \"/chat/completions\"`",
    ),
    (
        "[[backends]]\nurl = \"https://x.openai.azure.com/openai?api-version=2024-10-21\"\nweight = 1\n",
        "2: `backends[0].url` has a query; must have only a scheme, a host, a port and a path: a query belongs \
         in `chat_path`",
    ),
    (
        "[[backends]]\nurl = \"api.openai.com/v1\"\nweight = 1\n",
        "2: `backends[0].url` is \"api.openai.com/v1\", which has no scheme; must begin with `http://` or \
         `https://`: \"https://api.openai.com/v1\"",
    ),
    (
        "[[backends]]\nurl = \"localhost:11434\"\nweight = 1\n",
        "2: `backends[0].url` is \"localhost:11434\", which has no scheme; must begin with `http://` or \
         `https://`: \"http://localhost:11434\"",
    ),
    (
        "[[backends]]\nurl = \"https://user:sk-CANARY@a.example\"\nweight = 1\n",
        "2: `backends[0].url` has a user or a password; must have none, a key belongs in `api_key`",
    ),
    (
        "[[backends]]\nurl = \"http://${OLLAMA_HOST}:11434\"\nweight = 1\n",
        "2: `backends[0].url` uses the environment variable `OLLAMA_HOST`, which is unset or empty; must be set, \
         or have a default: `${OLLAMA_HOST:-default}`",
    ),
    (
        "[[backends]]\nurl = \"http://a:port\"\nweight = 1\n",
        "2: `backends[0].url` is \"http://a:port\", which has no valid port; must be from 1 to 65535",
    ),
    (
        "{B}api_key = \"$OPENAI_API_KEY\"\n",
        "4: `backends[0].api_key` begins with `$`; must be the key itself, or `${NAME}` for an environment \
         variable",
    ),
    (
        "{B}api_key = \"os.environ/OPENAI_API_KEY\"\n",
        "4: `backends[0].api_key` begins with `os.environ/`, as in litellm; must be the key itself, or `${NAME}` \
         for an environment variable",
    ),
    (
        "{B}api_key = \"env.OPENAI_API_KEY\"\n",
        "4: `backends[0].api_key` begins with `env.`; must be the key itself, or `${NAME}` for an environment \
         variable",
    ),
    (
        "{B}api_key = \"process.env.OPENAI_API_KEY\"\n",
        "4: `backends[0].api_key` begins with `process.env.`; must be the key itself, or `${NAME}` for an \
         environment variable",
    ),
    (
        "{B}api_key = \"{{ openai_key }}\"\n",
        "4: `backends[0].api_key` begins with `{{`, a template that was not filled in; must be the key itself, \
         or `${NAME}` for an environment variable",
    ),
    (
        "{B}api_key = \"...\"\n",
        "4: `backends[0].api_key` is only dots; must be the key itself, or `${NAME}` for an environment variable",
    ),
    (
        "{B}api_key = \"sk-CANARY...\"\n",
        "4: `backends[0].api_key` ends in dots, so a part is missing; must be the whole key",
    ),
    (
        "{B}api_key = '\"sk-CANARY\"'\n",
        "4: `backends[0].api_key` begins with a quote; must be without quotes of its own; `docker run \
         --env-file` keeps those of the file",
    ),
    (
        "{B}api_key = \"${QUOTED}\"\n",
        "4: `backends[0].api_key` begins with a quote in the variable; must be without quotes of its own; \
         `docker run --env-file` keeps those of the file",
    ),
    (
        "{B}api_key = \"<your key>\"\n",
        "4: `backends[0].api_key` is a placeholder in `<` and `>`; must be the key itself, or `${NAME}` for an \
         environment variable",
    ),
    (
        "{B}api_key = \"${LINE}\"\n",
        "4: `backends[0].api_key` uses the environment variable `LINE`, whose value ends in a newline; must be \
         set without it: `export LINE=\"$(cat FILE)\"` drops it",
    ),
    (
        "{B}api_key = \"${NONE}\"\n",
        "4: `backends[0].api_key` uses the environment variable `NONE`, which is unset or empty; must be set, or \
         have a default: `${NONE:-default}`",
    ),
    (
        "{B}api_key = \"${OPENAI-KEY}\"\n",
        "4: `backends[0].api_key` contains a malformed `${`; must be `${NAME}` or `${NAME:-default}`, NAME of \
         `A-Za-z0-9_` and not beginning with a digit; a plain `${` is written `$${`",
    ),
    (
        "{B}api_key = \"Bearer sk-CANARY\"\n",
        "4: `backends[0].api_key` begins with `Bearer`, which Zap adds; must be the key alone",
    ),
    (
        "{B}api_key = { file = \"/nowhere/key\" }\n",
        "4: `backends[0].api_key.file` cannot be read (no such file); must be a readable file, relative to the \
         directory of the configuration",
    ),
    (
        "{B}api_key = { path = \"key\" }\n",
        "4: `backends[0].api_key.file` is missing; a string is required\n4: unknown key \
         `backends[0].api_key.path`; must be `file`",
    ),
    (
        "{B}api_key = [\"sk-CANARY\", \"sk-CANARY2\"]\n",
        "4: `backends[0].api_key` is an array; must be a string, in quotes, or `{ file = \"path\" }`",
    ),
    (
        "{B}auth_header = \"api-key\"\n",
        "4: `backends[0].auth_header` is set without `api_key`; must be set with `api_key` or not at all",
    ),
    (
        "{B}api_key = \"k\"\nextra_headers = { Authorization = \"Bearer sk-CANARY\" }\n",
        "5: `backends[0].extra_headers.Authorization` is the header of `api_key`; must be only one of the two",
    ),
    (
        "{B}api_key = \"sk-CANARY\"\nforward_authorization = true\n",
        "5: `backends[0].forward_authorization` is true and `api_key` is set; must be only one of the two",
    ),
    (
        "[[client_keys]]\nname = \"team\"\nsha256 = \"sk-CANARY\"\n{B}",
        "3: `client_keys[0].sha256` is not a SHA-256; must be 64 hexadecimal digits: `printf %s KEY | sha256sum`",
    ),
    (
        "[server]\nport = \"8000\"\n{B}",
        "2: `server.port` is the string \"8000\"; must be an integer from 0 to 65535, without quotes",
    ),
    (
        "[server]\nport = \"${NUMBER}\"\nworkers = \"${WORD}\"\n{B}",
        "2: `server.port` is 70000; must be from 0 to 65535\n3: `server.workers` is \"${WORD}\", whose value is \
         not valid; must be an integer from 1 to 1024",
    ),
    ("[server]\nport = 80000\n{B}", "2: `server.port` is 80000; must be from 0 to 65535"),
    (
        "[server]\nhost = \"my-host\"\n{B}",
        "2: `server.host` is \"my-host\"; must be an IPv4 address, an IPv6 address or \"localhost\"",
    ),
    (
        "[server]\nhost = \"0.0.0.0:8000\"\n{B}",
        "2: `server.host` is \"0.0.0.0:8000\"; must be an IPv4 address, an IPv6 address or \"localhost\"; the \
         port belongs in `port`",
    ),
    (
        "[queue]\ntimeout_secs = 0.5\n{B}",
        "2: `queue.timeout_secs` is a float; must be an integer from 1 to 86400",
    ),
    (
        "[log]\nrequests = \"yes\"\n{B}",
        "2: `log.requests` is the string \"yes\"; must be `true` or `false`, without quotes",
    ),
    (
        "[load_balancer]\nstrategy = \"least-busy\"\n{B}",
        "2: `load_balancer.strategy` is \"least-busy\"; must be one of \"round_robin\", \"least_loaded\", \
         \"prefix_hash\", \"least_latency\"",
    ),
    (
        "[rate_limit]\nrequests_per_minute = 0\n{B}",
        "2: `rate_limit.requests_per_minute` is 0; must be from 1 to 4294967295, or left out for no limit",
    ),
    (
        "[[backends]]\nurl = \"http://a\"\nweight = 0.5\n",
        "3: `backends[0].weight` is a float; must be an integer from 0 to 1000",
    ),
    (
        "[[backends]]\nurl = \"http://a\"\n",
        "1: `backends[0].weight` is missing; an integer from 0 to 1000 is required",
    ),
    (
        "{B}models = \"gpt-4o\"\n",
        "4: `backends[0].models` is a string; must be an array of strings, such as `[\"a\", \"b\"]`, or a table \
         of strings, such as `{ \"a\" = \"b\" }`",
    ),
    (
        "{B}chat_path = \"chat/completions\"\n",
        "4: `backends[0].chat_path` is \"chat/completions\"; must begin with `/` and be visible ASCII without \
         `#`; it may have a query after `?`",
    ),
    ("{B}budget = 50\n", "4: `backends[0].budget` is an integer; must be a table, `budget = { … }`"),
    (
        "{B}budget = { usd = 50, per = \"week\" }\n",
        "4: `backends[0].budget.per` is \"week\"; must be one of \"day\", \"month\"",
    ),
    (
        "{B}budget = { usd = 50, per = \"day\" }\n",
        "4: `backends[0].budget` of `a` may be charged for models of the backend `a` that have no price: \"*\"; \
         each must have a price in `backends[0].prices`; the name `\"*\"` there is for all others",
    ),
    (
        "{B}proxy = \"socks5://proxy:1080\"\n",
        "4: `backends[0].proxy` is \"socks5://proxy:1080\", which names a kind of proxy that Zap does not speak \
         to; must be \"none\", or `http://`, a host, an optional port and an optional `user:password@`",
    ),
    (
        "{B}proxy = \"https://proxy:3128\"\n",
        "4: `backends[0].proxy` is \"https://proxy:3128\", which begins with `https://`, but Zap speaks plain \
         HTTP to a proxy; must be \"none\", or `http://`, a host, an optional port and an optional \
         `user:password@`",
    ),
    (
        "{B}proxy = \"http://user:sk-CANARY%@proxy:3128\"\n",
        "4: `backends[0].proxy` has a user or a password that is not valid; must be \"none\", or `http://`, a \
         host, an optional port and an optional `user:password@`",
    ),
    (
        "{B}proxy = \"http://${PROXY_HOST}:3128\"\n",
        "4: `backends[0].proxy` uses the environment variable `PROXY_HOST`, which is unset or empty; must be set, \
         or have a default: `${PROXY_HOST:-default}`",
    ),
    (
        "{B}proxy = \"\"\n",
        "4: `backends[0].proxy` is \"\", which is not valid; must be \"none\", or `http://`, a host, an optional \
         port and an optional `user:password@`",
    ),
    ("{B}proxy = false\n", "4: `backends[0].proxy` is a boolean; must be a string, in quotes"),
    (
        "{B}http_proxy = \"http://proxy:3128\"\n",
        "4: unknown key `backends[0].http_proxy`; did you mean `proxy`?",
    ),
    (
        "{B}forward_headers = [\"X-Title\", \"Authorization\"]\n",
        "4: `backends[0].forward_headers[1]` is \"Authorization\"; must be the name of a header, with or without \
         a `*` at its end, and not a credential, a cookie, a hop-by-hop header or a header that Zap sets itself",
    ),
    (
        "{B}forward_headers = \"X-Title\"\n",
        "4: `backends[0].forward_headers` is a string; must be an array of strings, such as `[\"a\", \"b\"]`",
    ),
    (
        "{B}drop_headers = [\"*\"]\n",
        "4: `backends[0].drop_headers[0]` is \"*\"; must be the name of a header, with or without a `*` at its \
         end, and not a credential, a cookie, a hop-by-hop header or a header that Zap sets itself",
    ),
    (
        "[[backends]]\nurl = \"https://a\"\nweight = 1\nclient_cert = \"a.pem\"\n",
        "4: `backends[0].client_cert` is set without `client_key`; both must be set, or none",
    ),
    (
        "[[backends]]\nurl = \"https://a\"\nweight = 1\ncert = \"a.pem\"\nkey_file = \"a.key\"\n",
        "4: unknown key `backends[0].cert`; did you mean `client_cert`?\n5: unknown key `backends[0].key_file`; \
         did you mean `client_key`?",
    ),
    (
        "{B}client_cert = \"a.pem\"\nclient_key = \"a.key\"\n",
        "4: `backends[0].client_cert` is set, but `url` has no TLS; must be set with `https://` or not at all\n4: \
         `backends[0].client_cert` cannot be read (no such file); must be a readable file, relative to the \
         directory of the configuration\n5: `backends[0].client_key` cannot be read (no such file); must be a \
         readable file, relative to the directory of the configuration",
    ),
    (
        "{B}server_name = \"b\"\n",
        "4: `backends[0].server_name` is set, but `url` has no TLS; must be set with `https://` or not at all",
    ),
    (
        "[[backends]]\nurl = \"https://a\"\nweight = 1\nserver_name = \"https://b\"\n",
        "4: `backends[0].server_name` is \"https://b\"; must be a host name, or an IP address without brackets",
    ),
    (
        "{B}health_path = \"/health\"\nhealth = { path = \"/healthz\" }\n",
        "4: `backends[0].health_path` is set and `health.path` too; must be only one of the two",
    ),
    ("{B}health = \"/healthz\"\n", "4: `backends[0].health` is a string; must be a table, `health = { … }`"),
    (
        "{B}health = { interval = 5 }\n",
        "4: unknown key `backends[0].health.interval`; did you mean `interval_secs`?",
    ),
    (
        "{B}health = { timeout_secs = 5 }\n",
        "4: unknown key `backends[0].health.timeout_secs`; it belongs in `[health]`, for all backends",
    ),
    (
        "{B}[backends.health]\nenabled = \"no\"\n",
        "5: `backends[0].health.enabled` is the string \"no\"; must be `true` or `false`, without quotes",
    ),
    (
        "[health]\nenabled = false\n{B}",
        "2: unknown key `health.enabled`; it is `health = { enabled = false }` in a `[[backends]]` table",
    ),
    (
        "models_from = \"backend\"\n{B}",
        "1: `models_from` is \"backend\"; must be one of \"backends\", \"config\"",
    ),
    ("models_from = [\"openai\"]\n{B}", "1: `models_from` is an array; must be a string, in quotes"),
    (
        "{B}protocols = [\"openai\", \"claude\"]\n",
        "4: `backends[0].protocols[1]` is \"claude\"; must be one of \"openai\", \"anthropic\"",
    ),
    ("{B}protocol = \"anthropic\"\n", "4: unknown key `backends[0].protocol`; did you mean `protocols`?"),
    (
        "{B}protocols = \"anthropic\"\n",
        "4: `backends[0].protocols` is a string; must be an array of strings, such as `[\"a\", \"b\"]`",
    ),
    (
        "{B}protocols = []\n",
        "4: `backends[0].protocols` is empty; must have \"openai\", \"anthropic\" or both",
    ),
    (
        "[[backends]]\nname = \"a\"\nurl = \"http://a\"\nweight = 1\n[[backends]]\nname = \"a\"\nurl = \"http://a\"\nweight = 1\n",
        "6: `backends[1].name` repeats the name at line 2; each backend must have its own name",
    ),
];

/// Texts that load, and their only warning.
const UNWISE: &[(&str, &str)] = &[
    (
        "[server]\nport = 8001\nhost = \"127.0.0.1\"\n[[backends]]\nurl = \"http://localhost:8001\"\nweight = 1\n",
        "`backends[0].url` is the address of Zap itself, so Zap would send requests to itself; set the address \
         of the provider, or another `server.port`",
    ),
    (
        "[server]\nport = 8001\nhost = \"127.0.0.1\"\n[[backends]]\nurl = \"http://zap.localhost:8001\"\nweight = 1\n",
        "`backends[0].url` is the address of Zap itself, so Zap would send requests to itself; set the address \
         of the provider, or another `server.port`",
    ),
    (
        "[[backends]]\nurl = \"http://a\"\nweight = 0\n",
        "no backend gets a request, since all have `weight = 0`; set a weight of 1 or more",
    ),
    (
        "{B}api_key = \"sk-CANARY\"\n",
        "every machine that reaches port 8000 can spend the keys of the backends, since `server.host` is \
         \"0.0.0.0\" and there is no `[[client_keys]]`; set `host = \"127.0.0.1\"`, or add client keys",
    ),
    (
        "[models.smart]\ntargets = [{ backend = \"a\", weight = 0 }]\n{B}",
        "`models.smart` serves no request, since all its targets have weight 0; set a weight of 1 or more for a \
         target and its backend",
    ),
    (
        "[[client_keys]]\nname = \"t\"\nkey = \"k\"\nmodels = [\"gpt-4o\", \"lama-3\"]\n{B}models = [\"gpt-*\", \"llama-3\"]\n",
        "`client_keys[0].models[1]` is \"lama-3\", which no backend and no route serves; the client gets 404 for \
         it",
    ),
];

fn env(name: &str) -> Option<String> {
    let value = match name {
        "QUOTED" => "\"sk-CANARY\"",
        "LINE" => "sk-CANARY\n",
        "NUMBER" => "70000",
        "WORD" => "sk-CANARY",
        _ => return None,
    };
    Some(value.to_owned())
}

fn load(text: &str) -> Result<Config, Faults> {
    Config::parse(&text.replace("{B}", BACKEND), "config.toml", Path::new("/nonexistent"), &env)
}

#[test]
fn every_mistake_gets_a_message_that_names_the_place_and_the_fix_and_shows_no_key() {
    for (text, expected) in MISTAKES {
        let found = load(text).map(|_| ()).expect_err(text).to_string();
        assert_eq!(found.replace("config.toml:", ""), *expected, "{text}");
        assert!(!found.contains("CANARY"), "{found}");
    }
}

#[test]
fn unwise_settings_load_with_a_warning() {
    for (text, expected) in UNWISE {
        let config = load(text).unwrap_or_else(|faults| panic!("{faults}\n{text}"));
        assert_eq!(config.warnings, [*expected], "{text}");
    }
}

#[test]
fn what_is_no_mistake_loads_without_a_warning() {
    for text in [
        "{B}",
        "[server]\nport = \"${NUMBER2:-8001}\"\nworkers = \"${N:-2}\"\n[log]\nrequests = \"${LOG:-false}\"\n{B}",
        "[server]\nhost = \"127.0.0.1\"\n{B}api_key = \"${KEY:-sk-CANARY}\"\n",
        "{B}extra_headers = { x = \"$${NOT_A_VARIABLE} costs $5\" }\n",
        "{B}prices = { m = { input = \"${PRICE:-2.5}\", output = 8 } }\n",
        "[models.\"gpt-4.1\"]\ntargets = [{ backend = \"a\", model = \"${MODEL:-gpt-4.1}\" }]\n{B}",
        "[server]\nport = 8001\n[[backends]]\nurl = \"http://localhost:8002\"\nweight = 1\n",
        "[[client_keys]]\nname = \"t\"\nkey = \"k\"\nmodels = [\"gpt-*\"]\n{B}models = [\"gpt-4o\"]\napi_key = \"k\"\n",
        "\u{feff}[server]\nport = 1\n{B}",
    ] {
        let config = load(text).unwrap_or_else(|faults| panic!("{faults}\n{text}"));
        assert_eq!(config.warnings, [""; 0], "{text}");
    }
}

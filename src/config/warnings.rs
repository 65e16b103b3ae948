//! Settings that are allowed but unwise.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use httpdate::fmt_http_date;

use crate::config::sent_models::is_served;
use crate::config::text::{key_name, quoted};
use crate::config::{Backend, Config, Server, ServerTls};
use crate::http1::origin::Origins;
use crate::policy::route::NamedTarget;

/// The usual port of OTLP over gRPC.
const GRPC_PORT: u16 = 4317;

/// One line for each unwise setting.
pub(super) fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    let Config { server, tls, admin, backends, clients, routes, .. } = config;
    let has_budget = backends.iter().map(|b| &b.budget).chain(clients.iter().map(|c| &c.budget));
    if config.ledger.is_none() && has_budget.flatten().next().is_some() {
        warnings
            .push("a budget starts at zero at each start without a `[ledger]`; set `ledger.path`".to_owned());
    }
    if backends.iter().all(|backend| backend.weight == 0) {
        warnings.push(
            "no backend gets a request, since all have `weight = 0`; set a weight of 1 or more".to_owned(),
        );
    }
    for route in routes {
        let has_weight =
            |target: &NamedTarget| target.weight != Some(0) && backends[target.backend].weight > 0;
        if !route.targets.iter().any(has_weight) && backends.iter().any(|backend| backend.weight > 0) {
            warnings.push(format!(
                "`models.{}` serves no request, since all its targets have weight 0; \
                 set a weight of 1 or more for a target and its backend",
                key_name(&route.name)
            ));
        }
    }
    for (index, client) in clients.iter().enumerate() {
        for (at, pattern) in client.models.iter().flatten().enumerate().filter(|(_, p)| !is_served(config, p))
        {
            let name = pattern.to_string();
            warnings.push(format!(
                "`client_keys[{index}].models[{at}]` is {}, which no backend and no route serves; \
                 the client gets 404 for it",
                quoted(&name).unwrap_or_else(|| "a name".to_owned()),
            ));
        }
    }
    if server.cors_origins == Origins::Any && clients.is_empty() {
        warnings.push(
            "`server.cors_origins` has \"*\" and there are no client keys: every web page may spend the keys \
             of the backends; list the origins, or add `[[client_keys]]`"
                .to_owned(),
        );
    }
    let has_keys = backends.iter().any(|backend| backend.api_key.is_some());
    let verifies_clients = tls.as_ref().is_some_and(ServerTls::verifies_clients);
    if server.host.is_unspecified() && has_keys && clients.is_empty() && !verifies_clients {
        warnings.push(format!(
            "every machine that reaches port {} can spend the keys of the backends, since `server.host` is \"{}\" and \
             there is no `[[client_keys]]`; set `host = \"127.0.0.1\"`, or add client keys",
            server.port, server.host
        ));
    }
    let has_tls = tls.is_some();
    for (index, _) in
        backends.iter().enumerate().filter(|(_, b)| b.url.https == has_tls && is_itself(server, b))
    {
        warnings.push(format!(
            "`backends[{index}].url` is the address of Zap itself, so Zap would send requests to itself; \
             set the address of the provider, or another `server.port`"
        ));
    }
    let asks_certificate = admin.tls.as_ref().is_some_and(ServerTls::verifies_clients);
    if let Some(address) = server.admin
        && !address.ip().is_loopback()
        && admin.token.is_none()
        && !asks_certificate
    {
        warnings.push(format!(
            "every machine that reaches port {} can read the status, the usage and the metrics, since `admin.host` \
             is \"{}\" and there is no `admin.token`; set a token, or `host = \"127.0.0.1\"`",
            address.port(),
            address.ip()
        ));
    }
    if server.admin.is_some() && server.open_metrics {
        warnings.push(
            "`server.open_metrics` has no effect, since the listener of `[admin]` serves `/metrics`; remove it"
                .to_owned(),
        );
    }
    if let Some(otlp) = config.otlp.as_ref().filter(|otlp| otlp.url.port == GRPC_PORT) {
        warnings.push(format!(
            "traces go to port {GRPC_PORT} of {}, where collectors take gRPC, which Zap does not speak; \
             set the port for HTTP, usually 4318",
            otlp.url.host
        ));
    }
    if let Some(otlp) = &config.otlp
        && !otlp.headers.is_empty()
        && !otlp.url.https
        && !otlp.url.is_loopback()
    {
        warnings.push(
            "`otlp.headers` go out unencrypted, since the collector's URL begins with `http://`; \
             set an `https://` URL"
                .to_owned(),
        );
    }
    for (section, tls) in [("server", tls), ("admin", &admin.tls)] {
        let Some(tls) = tls else { continue };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        warnings.extend(certificate_warnings((section, tls), i64::try_from(now).unwrap_or(i64::MAX)));
    }
    warnings
}

/// The warnings about certificates of a listener that are not valid at `now`, in seconds since 1970. `section`: that of
/// the listener.
fn certificate_warnings((section, tls): (&str, &ServerTls), now: i64) -> impl Iterator<Item = String> {
    let date = |secs: i64| {
        let secs = Duration::from_secs(u64::try_from(secs).unwrap_or(0));
        UNIX_EPOCH.checked_add(secs).map_or_else(|| "a far date".to_owned(), fmt_http_date)
    };
    tls.entries.iter().enumerate().filter_map(move |(index, entry)| {
        let facts = &entry.facts;
        let what = match () {
            () if facts.ends < now => format!("expired on {}; renew it", date(facts.ends)),
            () if facts.begins > now => {
                format!("is not valid before {}; check the clock of this machine", date(facts.begins))
            }
            () => return None,
        };
        Some(format!("the certificate of `{section}.tls[{index}].cert`, which clients will refuse, {what}"))
    })
}

/// Whether the backend has the address that Zap listens on.
fn is_itself(server: &Server, backend: &Backend) -> bool {
    let url = &backend.url;
    let is_own = |address: IpAddr| address.is_unspecified() || address == server.host;
    let is_here = url.is_loopback() || url.host.parse().is_ok_and(is_own);
    is_here && url.port == server.port
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_admin_listener_and_a_key_without_effect_get_a_warning() {
        for (text, warning) in [
            ("[admin]", None),
            ("[admin]\nhost = \"0.0.0.0\"\nport = 9", Some("reaches port 9 can read the status")),
            ("[admin]\nhost = \"::1\"", None),
            ("[admin]\nhost = \"0.0.0.0\"\ntoken = \"zt-1\"", None),
            ("[server]\nopen_metrics = true", None),
            ("[server]\nopen_metrics = true\n[admin]", Some("`server.open_metrics` has no effect")),
        ] {
            let text = format!("{text}\n[[backends]]\nurl = \"http://a\"\nweight = 1\n");
            let warnings = Config::of(&text).unwrap().warnings;
            assert_eq!(warnings.len(), usize::from(warning.is_some()), "{warnings:?}");
            assert!(warnings.iter().all(|w| w.contains(warning.unwrap())), "{text}: {warnings:?}");
        }
    }

    #[test]
    fn a_collector_by_grpc_and_headers_in_the_clear_get_a_warning() {
        for (otlp, warnings) in [
            ("endpoint = \"http://a:4318\"", 0),
            ("endpoint = \"http://a:4317\"", 1),
            ("endpoint = \"http://a:4318\"\nheaders = { a = \"b\" }", 1),
            ("endpoint = \"http://localhost:4318\"\nheaders = { a = \"b\" }", 0),
            ("endpoint = \"https://a\"\nheaders = { a = \"b\" }", 0),
        ] {
            let text = format!("[otlp]\n{otlp}\n[[backends]]\nurl = \"http://a\"\nweight = 1\n");
            assert_eq!(Config::of(&text).unwrap().warnings.len(), warnings, "{otlp}");
        }
    }

    #[test]
    fn all_origins_without_client_keys_get_a_warning() {
        let key = "[[client_keys]]\nname = \"a\"\nkey = \"k\"\n";
        for (origins, more, warnings) in
            [("\"*\"", "", 1), ("\"*\"", key, 0), ("\"https://a\"", "", 0), ("", "", 0)]
        {
            let text = format!(
                "[server]\ncors_origins = [{origins}]\n[[backends]]\nurl = \"http://a\"\nweight = 1\n{more}"
            );
            let config = Config::of(&text).unwrap();
            assert_eq!(config.warnings.len(), warnings, "{origins} {more}");
        }
    }
}

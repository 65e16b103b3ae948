//! The starts of the request heads that a backend gets, made in advance: the request line and the backend's own
//! headers.

use std::fmt;

use http::header::{ACCEPT, AUTHORIZATION, HOST, USER_AGENT};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Uri};

use crate::config;
use crate::http1::headers::X_REQUEST_ID;
use crate::protocol::Endpoint;
use crate::protocol::endpoint::Protocol;
use crate::protocol::stored::Stored;
use crate::upstream::link::write_header;
use crate::upstream::paths::{joined, models_path, targets};
use crate::upstream::proxy;

/// Headers of health checks and of requests for the list of models beside a backend's own.
const PROBE_HEADERS: [(HeaderName, &str); 2] =
    [(ACCEPT, "*/*"), (USER_AGENT, concat!("zap/", env!("CARGO_PKG_VERSION")))];

const ANTHROPIC_VERSION: HeaderName = HeaderName::from_static("anthropic-version");

/// The version of Anthropic's API that these ask for.
const CHECKED_VERSION: &str = "2023-06-01";

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// The starts of a backend's heads.
#[derive(Debug)]
pub(super) struct Heads {
    /// For each endpoint, by discriminant; `None` if the endpoint is not served.
    requests: [Option<HeadStart>; Endpoint::COUNT],
    /// The whole head of a health check.
    probe: HeadStart,
    /// The whole head of a request for the list of models; `None` if the backend serves chat only.
    models: Option<HeadStart>,
    /// The target of stored responses: the origin with the path, and the query; `None` if they are not served.
    stored: Option<StoredTarget>,
    /// Names of the headers in them. The client's headers of these names are not sent.
    own_headers: Vec<HeaderName>,
}

/// The target of requests for stored responses. The path may have a key in it.
struct StoredTarget {
    path: String,
    query: Option<String>,
}

impl fmt::Debug for StoredTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// The start of a request head, with the backend's key in it.
struct HeadStart(Vec<u8>);

impl fmt::Debug for HeadStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl HeadStart {
    /// `origin` is empty, or for a proxy the scheme and the authority.
    fn new(method: &str, origin: &str, target: &Uri, headers: &[(HeaderName, HeaderValue)]) -> Self {
        let path = target.path_and_query().map_or("/", |p| p.as_str());
        let line = format!("{method} {origin}{path} HTTP/1.1\r\n");
        HeadStart([line.into_bytes(), Self::headers(headers).0].concat())
    }

    /// A start that has headers alone.
    fn headers(headers: &[(HeaderName, HeaderValue)]) -> Self {
        let mut head = Vec::new();
        headers.iter().for_each(|(name, value)| write_header(&mut head, name, value.as_bytes()));
        HeadStart(head)
    }
}

impl Heads {
    /// Makes the heads of a backend.
    ///
    /// # Errors
    /// The backend's host or one of its paths is not valid; says which.
    pub(super) fn new(conf: &config::Backend) -> Result<Self, &'static str> {
        let host = HeaderValue::from_str(&conf.url.authority).map_err(|_| "its host is not valid")?;
        let own = |protocol| own_headers(conf, &host, protocol);
        let origin = proxy::origin(conf);
        let (mut requests, mut stored) = ([const { None }; Endpoint::COUNT], None);
        for (endpoint, target) in targets(conf)? {
            let own = own(endpoint.protocol());
            requests[endpoint as usize] = Some(match endpoint {
                Endpoint::StoredResponse => {
                    let (path, query) = (format!("{origin}{}", target.path()), target.query());
                    stored = Some(StoredTarget { path, query: query.map(str::to_owned) });
                    HeadStart::headers(&own)
                }
                _ => HeadStart::new("POST", &origin, &target, &own),
            });
        }
        let speaks_openai = conf.protocols.contains(&Protocol::OpenAi);
        let mut checked = own(if speaks_openai { Protocol::OpenAi } else { Protocol::Anthropic });
        let mut further: Vec<_> = PROBE_HEADERS.into();
        if !speaks_openai {
            further.push((ANTHROPIC_VERSION, CHECKED_VERSION));
        }
        further.retain(|(name, _)| checked.iter().all(|(known, _)| known != name));
        checked.extend(further.into_iter().map(|(name, value)| (name, HeaderValue::from_static(value))));
        let get = |path: String| -> Result<HeadStart, &'static str> {
            let target = path.parse().map_err(|_| "its path is not valid")?;
            let mut head = HeadStart::new("GET", &origin, &target, &checked);
            head.0.extend_from_slice(b"connection: close\r\n\r\n");
            Ok(head)
        };
        let probe = get(joined(&conf.url.path, &conf.health_path))?;
        let models = models_path(conf).map(get).transpose()?;
        let names = conf.protocols.iter().flat_map(|protocol| own(*protocol)).map(|(name, _)| name);
        Ok(Heads { requests, probe, models, stored, own_headers: names.collect() })
    }

    /// Writes the request line of a `request` for a stored response, with the client's query.
    pub(super) fn write_stored_line(&self, request: &Parts, head: &mut Vec<u8>) {
        let stored = Stored::of(&request.method, request.uri.path());
        let (Some(StoredTarget { path, query }), Ok(Stored { tail, .. })) = (&self.stored, stored) else {
            return;
        };
        let query =
            joined_query(query.as_deref().unwrap_or_default(), request.uri.query().unwrap_or_default());
        let mark = if query.is_empty() { "" } else { "?" };
        let line = format!("{} {path}/{tail}{mark}{query} HTTP/1.1\r\n", request.method);
        head.extend_from_slice(line.as_bytes());
    }

    /// The start of a request head, without the request line for a stored response; `None` if the backend does not
    /// serve the endpoint.
    pub(super) fn request(&self, endpoint: Endpoint) -> Option<&[u8]> {
        self.requests[endpoint as usize].as_ref().map(|head| &head.0[..])
    }

    /// The head of a health check.
    pub(super) fn probe(&self) -> &[u8] {
        &self.probe.0
    }

    /// The head of a request for the list of models; `None` if the backend serves chat only.
    pub(super) fn models(&self) -> Option<&[u8]> {
        self.models.as_ref().map(|head| &head.0[..])
    }

    /// Whether a head has a header of this name.
    pub(super) fn has_header(&self, name: &HeaderName) -> bool {
        self.own_headers.contains(name)
    }
}

/// The operator's query with the parameters of the client's. A server may take the last of several values, so a
/// client's parameter does not go out if the operator's query has one of its name, or if its name is escaped.
fn joined_query(own: &str, clients: &str) -> String {
    let name = |parameter: &str| parameter.split('=').next().unwrap_or_default().to_owned();
    let is_own = |client: &str| {
        let client = name(client);
        !own.is_empty() && (client.contains(['%', '+']) || own.split('&').any(|known| name(known) == client))
    };
    let clients = clients.split('&').filter(|parameter| !is_own(parameter));
    own.split('&').chain(clients).filter(|parameter| !parameter.is_empty()).collect::<Vec<_>>().join("&")
}

/// The headers of a backend's own for requests of a protocol.
fn own_headers(
    conf: &config::Backend,
    host: &HeaderValue,
    protocol: Protocol,
) -> Vec<(HeaderName, HeaderValue)> {
    let key = conf.api_key.as_ref().map(|key| match (&conf.auth_header, protocol) {
        (Some(name), _) => (name.clone(), key.bare()),
        (None, Protocol::OpenAi) => (AUTHORIZATION, key.bearer()),
        (None, Protocol::Anthropic) => (X_API_KEY, key.bare()),
    });
    let mut own = vec![(HOST, host.clone())];
    own.extend(key);
    // `extra_headers` replace headers of the same name.
    own.retain(|(name, _)| conf.extra_headers.iter().all(|(extra, _)| extra != name));
    own.extend(conf.extra_headers.iter().filter(|(name, _)| *name != X_REQUEST_ID).cloned());
    own.extend(proxy::authorization(conf));
    own
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn heads(more: &str) -> Heads {
        let text = format!("[[backends]]\nurl = \"http://a/api/v1\"\nweight = 1\n{more}");
        let config = Config::of(&text).unwrap();
        Heads::new(&config.backends[0]).unwrap()
    }

    #[test]
    fn a_client_does_not_replace_a_parameter_of_the_operator() {
        for (own, clients, want) in [
            ("", "", ""),
            ("", "a=1&b%5B%5D=2", "a=1&b%5B%5D=2"),
            ("v=1&key=k", "v=2&limit=3&key=x&%76=4", "v=1&key=k&limit=3"),
            ("v=1", "vv=2&", "v=1&vv=2"),
        ] {
            assert_eq!(joined_query(own, clients), want, "{own} {clients}");
        }
    }

    fn text(head: &[u8]) -> String {
        String::from_utf8(head.to_vec()).unwrap()
    }

    #[test]
    fn an_endpoint_is_served_if_its_protocol_is_spoken_and_has_the_key_where_the_protocol_has_it() {
        let key = "api_key = \"k\"\n";
        for (more, chat, messages) in [
            (key.to_owned(), "authorization: Bearer k\r\n", None),
            (format!("{key}protocols = [\"openai\"]"), "authorization: Bearer k\r\n", None),
            (
                format!("{key}protocols = [\"openai\", \"anthropic\"]"),
                "authorization: Bearer k\r\n",
                Some("x-api-key: k\r\n"),
            ),
            (
                format!("{key}protocols = [\"anthropic\", \"openai\"]\nauth_header = \"api-key\""),
                "api-key: k\r\n",
                Some("api-key: k\r\n"),
            ),
        ] {
            let heads = heads(&more);
            let head = |endpoint| heads.request(endpoint).map(text);
            let want =
                |path: &str, key: &str| Some(format!("POST /api/v1/{path} HTTP/1.1\r\nhost: a\r\n{key}"));
            assert_eq!(head(Endpoint::Chat), want("chat/completions", chat), "{more}");
            assert_eq!(head(Endpoint::Messages), messages.and_then(|key| want("messages", key)), "{more}");
            let count = messages.and_then(|key| want("messages/count_tokens", key));
            assert_eq!(head(Endpoint::CountTokens), count, "{more}");
            assert!(!text(heads.probe()).contains("anthropic-version"), "{more}");
        }
    }

    #[test]
    fn a_proxy_that_forwards_requests_gets_whole_urls_and_its_credentials_in_each() {
        let heads = heads("protocols = [\"openai\", \"anthropic\"]\nproxy = \"http://u:p@proxy:3128\"\n");
        let requests = [Endpoint::Chat, Endpoint::Messages].map(|endpoint| heads.request(endpoint));
        for head in requests.into_iter().chain([Some(heads.probe()), heads.models()]) {
            let head = text(head.unwrap());
            assert!(head.split(' ').nth(1).unwrap().starts_with("http://a/api/"), "{head}");
            assert_eq!(head.matches("proxy-authorization: Basic dTpw\r\n").count(), 1, "{head}");
        }
        assert!(text(heads.models().unwrap()).starts_with("GET http://a/api/v1/models HTTP/1.1\r\n"));
    }

    #[test]
    fn a_backend_that_speaks_anthropics_protocol_alone_is_checked_in_it() {
        let more = "api_key = \"k\"\nprotocols = [\"anthropic\"]\nhealth_path = \"/v1/models\"\n";
        let only = heads(more);
        assert!(only.request(Endpoint::Chat).is_none() && only.request(Endpoint::Messages).is_some());
        let probe = text(only.probe());
        assert!(probe.starts_with("GET /api/v1/models HTTP/1.1\r\nhost: a\r\nx-api-key: k\r\n"), "{probe}");
        assert_eq!(probe.matches("anthropic-version: 2023-06-01\r\n").count(), 1);
        let own = heads(&format!("{more}extra_headers = {{ anthropic-version = \"2024-01-01\" }}"));
        let probe = text(own.probe());
        assert_eq!(probe.matches("anthropic-version: ").count(), 1, "{probe}");
        assert!(probe.contains("anthropic-version: 2024-01-01\r\n") && own.has_header(&ANTHROPIC_VERSION));
    }
}

//! Where a request comes from, as browsers tell it: origins of web pages (RFC 6454), `Sec-Fetch-Site`, and the name in
//! `Host` by which the page has reached Zap.

use std::net::IpAddr;

use http::HeaderName;
use http::header::{HOST, HeaderMap, ORIGIN};

use crate::http1::head::is_host;

/// A static: a constant would be built and dropped with each look-up.
static SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The origins whose pages may use Zap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Origins {
    /// None but Zap's own.
    #[default]
    None,
    /// These, as [`parse_origin`] returns them.
    Listed(Vec<Box<str>>),
    /// All, `null` among them.
    Any,
}

impl Origins {
    /// Whether no origin is listed.
    pub(crate) fn is_none(&self) -> bool {
        matches!(self, Origins::None)
    }

    /// Whether an origin is listed.
    pub(crate) fn allow(&self, origin: &[u8]) -> bool {
        match self {
            Origins::None => false,
            Origins::Listed(listed) => listed.iter().any(|o| o.as_bytes().eq_ignore_ascii_case(origin)),
            Origins::Any => true,
        }
    }
}

/// The names by which clients may call Zap in `Host`; empty: any name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts(pub Vec<HostName>);

/// A name or an address, with or without a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostName {
    name: Box<str>,
    /// `None`: any port.
    port: Option<Box<str>>,
}

impl HostName {
    /// Parses `name[:port]`; an IPv6 address stands in brackets. Returns `None` if `text` is not a host.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if !is_host(text.as_bytes()) || text.contains('*') {
            return None;
        }
        let (name, port) = split_port(text);
        let is_port = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
        match port {
            Some(port) if !is_port(port) => None,
            port => Some(HostName { name: name.into(), port: port.map(Into::into) }),
        }
    }

    fn is(&self, host: &str) -> bool {
        let (name, port) = split_port(host);
        name.eq_ignore_ascii_case(&self.name) && (self.port.is_none() || self.port.as_deref() == port)
    }
}

impl Hosts {
    /// Whether the `Host` of a request is one of the names.
    pub(crate) fn allow(&self, headers: &HeaderMap) -> bool {
        self.0.is_empty()
            || header(headers, &HOST).is_some_and(|host| self.0.iter().any(|name| name.is(host)))
    }
}

/// Whether `Host` is a name or an address of this machine alone: `localhost` or a loopback address. A page that uses
/// DNS rebinding names its own site there, and so do most proxies.
pub(crate) fn names_loopback(headers: &HeaderMap) -> bool {
    let Some(host) = header(headers, &HOST) else { return false };
    let (name, _) = split_port(host);
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    address.map_or_else(|_| name.eq_ignore_ascii_case("localhost"), |address| address.is_loopback())
}

/// Whether a browser tells that the page behind a request is neither Zap's own nor of a listed origin. Programs that
/// are no browsers send none of these headers; Node's `fetch` sends `Sec-Fetch-Mode`, which tells nothing.
pub(crate) fn is_foreign(headers: &HeaderMap, listed: &Origins) -> bool {
    match headers.get(ORIGIN) {
        Some(origin) => {
            let is_own = || {
                let host = header(headers, &HOST);
                host.is_some_and(|host| origin.to_str().is_ok_and(|origin| is_same_host(origin, host)))
            };
            !listed.allow(origin.as_bytes()) && !is_own()
        }
        None => {
            let site = headers.get(&SEC_FETCH_SITE);
            site.is_some_and(|site| site == "cross-site") && *listed != Origins::Any
        }
    }
}

/// Parses an origin as it stands in `Origin`: `scheme://host[:port]`. The port that the scheme implies is dropped, as
/// browsers do.
///
/// # Errors
/// Says what is wrong with `text`, as the end of a sentence about it.
pub(crate) fn parse_origin(text: &str) -> Result<Box<str>, &'static str> {
    let Some((scheme, host)) = text.split_once("://") else {
        return Err("with its scheme");
    };
    let is_scheme = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    if !is_scheme {
        return Err("with a valid scheme");
    }
    match host.find(['/', '?', '#']) {
        Some(0) | None => {}
        Some(at) if &host[at..] == "/" => return Err("without a slash at its end"),
        Some(_) => return Err("without a path"),
    }
    if host.contains('*') {
        return Err("without a pattern: only `*` alone stands for all origins");
    }
    let Some(HostName { name, port }) = HostName::parse(host) else {
        return Err("with a host and, if it has one, a port of 1 to 65535");
    };
    let (scheme, name) = (scheme.to_ascii_lowercase(), name.to_ascii_lowercase());
    Ok(match port.filter(|port| Some(&**port) != default_port(&scheme)) {
        Some(port) => format!("{scheme}://{name}:{port}").into(),
        None => format!("{scheme}://{name}").into(),
    })
}

/// Whether `origin` is that of a page that came from `host`, by HTTP or, through a proxy, by HTTPS.
fn is_same_host(origin: &str, host: &str) -> bool {
    let Some((scheme, authority)) = origin.split_once("://") else { return false };
    let Some(implied) = default_port(scheme) else { return false };
    let ((name, port), (own, own_port)) = (split_port(authority), split_port(host));
    name.eq_ignore_ascii_case(own) && port.unwrap_or(implied) == own_port.unwrap_or(implied)
}

fn default_port(scheme: &str) -> Option<&'static str> {
    match scheme {
        "http" => Some("80"),
        "https" => Some("443"),
        _ => None,
    }
}

/// Splits a host that [`is_host`] accepts. An empty port is none.
fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port).filter(|port| !port.is_empty())),
        _ => (host, None),
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn origins_are_read_as_browsers_write_them() {
        for (text, origin) in [
            ("https://app.example", "https://app.example"),
            ("HTTPS://App.Example:443", "https://app.example"),
            ("http://a:80", "http://a"),
            ("http://a:443", "http://a:443"),
            ("http://localhost:3000", "http://localhost:3000"),
            ("http://[::1]:3000", "http://[::1]:3000"),
            ("http://[::1]", "http://[::1]"),
            ("app://obsidian.md", "app://obsidian.md"),
            ("chrome-extension://abcdefghijklmnop", "chrome-extension://abcdefghijklmnop"),
        ] {
            assert_eq!(parse_origin(text).as_deref(), Ok(origin), "{text}");
        }
        for (text, why) in [
            ("app.example", "with its scheme"),
            ("null", "with its scheme"),
            ("", "with its scheme"),
            ("1a://b", "with a valid scheme"),
            ("://b", "with a valid scheme"),
            ("https://app.example/", "without a slash at its end"),
            ("https://app.example/chat", "without a path"),
            ("https://app.example?x", "without a path"),
            ("https://*.example", "without a pattern: only `*` alone stands for all origins"),
            ("https://", "with a host and, if it has one, a port of 1 to 65535"),
            ("file:///", "with a host and, if it has one, a port of 1 to 65535"),
            ("https://a b", "with a host and, if it has one, a port of 1 to 65535"),
            ("https://u@a", "with a host and, if it has one, a port of 1 to 65535"),
            ("https://a:0", "with a host and, if it has one, a port of 1 to 65535"),
            ("https://a:70000", "with a host and, if it has one, a port of 1 to 65535"),
            ("https://::1", "with a host and, if it has one, a port of 1 to 65535"),
        ] {
            assert_eq!(parse_origin(text), Err(why), "{text}");
        }
    }

    #[test]
    fn a_request_of_another_page_is_foreign() {
        let listed = Origins::Listed(vec!["https://app.example".into(), "app://obsidian.md".into()]);
        // The headers, and whether the request is foreign with no origin, these two and all origins listed.
        for (headers, foreign) in [
            (map(&[("host", "a:1")]), [false, false, false]),
            (map(&[("host", "a:1"), ("origin", "http://a:1")]), [false, false, false]),
            (map(&[("host", "A:1"), ("origin", "https://a:1")]), [false, false, false]),
            (map(&[("host", "a"), ("origin", "http://a")]), [false, false, false]),
            (map(&[("host", "a:443"), ("origin", "https://a")]), [false, false, false]),
            (map(&[("host", "[::1]:1"), ("origin", "http://[::1]:1")]), [false, false, false]),
            (map(&[("host", "[::1]"), ("origin", "http://[::1]")]), [false, false, false]),
            (map(&[("host", "a:443"), ("origin", "http://a")]), [true, true, false]),
            (map(&[("host", "a:1"), ("origin", "http://a:2")]), [true, true, false]),
            (map(&[("host", "a:1"), ("origin", "http://a")]), [true, true, false]),
            (map(&[("host", "a:1"), ("origin", "http://b:1")]), [true, true, false]),
            (map(&[("host", "a:1"), ("origin", "http://b.a:1")]), [true, true, false]),
            (map(&[("host", "a"), ("origin", "app://a")]), [true, true, false]),
            (map(&[("host", "a"), ("origin", "null")]), [true, true, false]),
            (map(&[("host", "a"), ("origin", "")]), [true, true, false]),
            (map(&[("origin", "http://")]), [true, true, false]),
            (map(&[("origin", "http://a")]), [true, true, false]),
            (map(&[("host", "a"), ("origin", "https://app.example")]), [true, false, false]),
            (map(&[("host", "a"), ("origin", "https://app.example:1")]), [true, true, false]),
            (map(&[("host", "a"), ("origin", "http://app.example")]), [true, true, false]),
            (map(&[("host", "a"), ("origin", "app://obsidian.md")]), [true, false, false]),
            (map(&[("host", "a"), ("sec-fetch-site", "cross-site")]), [true, true, false]),
            (map(&[("host", "a"), ("sec-fetch-site", "same-site")]), [false, false, false]),
            (map(&[("host", "a"), ("sec-fetch-site", "same-origin")]), [false, false, false]),
            (map(&[("host", "a"), ("sec-fetch-site", "none")]), [false, false, false]),
            (map(&[("host", "a"), ("sec-fetch-mode", "cors")]), [false, false, false]),
            // A listed origin always wins.
            (
                map(&[("host", "a"), ("origin", "https://app.example"), ("sec-fetch-site", "cross-site")]),
                [true, false, false],
            ),
        ] {
            let found = [&Origins::None, &listed, &Origins::Any].map(|listed| is_foreign(&headers, listed));
            assert_eq!(found, foreign, "{headers:?}");
        }
    }

    #[test]
    fn hosts_are_compared_without_case_and_with_a_port_only_if_it_is_listed() {
        let parse = |text| HostName::parse(text).unwrap();
        let hosts = Hosts(["Zap.example", "b:8000", "[2001:DB8::1]", "127.0.0.1"].map(parse).to_vec());
        for (host, allowed) in [
            ("zap.example", true),
            ("ZAP.example:1", true),
            ("zap.example:", true),
            ("b:8000", true),
            ("B:8000", true),
            ("b", false),
            ("b:80", false),
            ("[2001:db8::1]", true),
            ("[2001:db8::1]:8000", true),
            ("[2001:db8::2]", false),
            ("127.0.0.1:8000", true),
            ("127.0.0.2", false),
            ("a.zap.example", false),
            ("zap.example.evil", false),
            ("", false),
        ] {
            assert_eq!(hosts.allow(&map(&[("host", host)])), allowed, "{host}");
            assert!(Hosts::default().allow(&map(&[("host", host)])));
        }
        assert!(!hosts.allow(&HeaderMap::new()) && Hosts::default().allow(&HeaderMap::new()));
        for text in
            ["", "a/", "http://a", "::1", "[::1", "a:", "a:0", "a:99999", "a b", "u@a", "*", "*.a", "é"]
        {
            let parsed = HostName::parse(text);
            assert!(parsed.is_none() || text == "a:" && parsed == HostName::parse("a"), "{text}");
        }
    }
}

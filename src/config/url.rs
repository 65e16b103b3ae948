//! The base URL of a backend: the part of RFC 3986 that a provider's address needs.

use std::net::{IpAddr, Ipv6Addr};

use http::uri::{Authority, PathAndQuery};

/// The base URL of a backend: `http` or `https`, host, port, leading path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseUrl {
    /// Whether the backend speaks TLS.
    pub https: bool,
    /// Lower-case name or address to connect to; no brackets for IPv6.
    pub host: String,
    /// Port to connect to, at least 1.
    pub port: u16,
    /// Value of the `Host` header: `host[:port]`, without the default port, IPv6 in brackets.
    pub authority: String,
    /// Path: empty, or begins with `/`; does not end with `/`.
    pub path: String,
}

impl BaseUrl {
    /// Parses `text`, in which all variables are expanded.
    ///
    /// # Errors
    ///
    /// Returns a message if `text` is not such a URL. The message does not contain `text`, which may hold a key.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(
                "contains a space, a control character or a non-ASCII character; must be visible ASCII",
            );
        }
        let (https, rest) = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (true, rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (false, rest),
            _ => return Err("has no valid scheme; must begin with `http://` or `https://`"),
        };
        if rest.contains('?') {
            return Err(
                "has a query; must have only a scheme, a host, a port and a path: a query belongs in `chat_path`",
            );
        }
        if rest.contains('#') {
            return Err("has a fragment; must have only a scheme, a host, a port and a path");
        }
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if authority.contains('@') {
            return Err("has a user or a password; must have none, a key belongs in `api_key`");
        }
        let (host, port) = split_port(authority)?;
        let (host, shown) = read_host(host)?;
        let default_port = if https { 443 } else { 80 };
        let port = port.unwrap_or(default_port);
        let authority = if port == default_port { shown } else { format!("{shown}:{port}") };
        let path = path.trim_end_matches('/');
        if Authority::try_from(authority.as_str()).is_err() {
            return Err(BAD_HOST);
        }
        if !path.is_empty() && !is_path(path) {
            return Err("has an invalid character in its path; must be percent-encoded there");
        }
        Ok(Self { https, host, port, authority, path: path.to_owned() })
    }

    /// Whether the host is this machine: `localhost`, a name below it, or a loopback address.
    pub(super) fn is_loopback(&self) -> bool {
        let name = self.host.strip_suffix('.').unwrap_or(&self.host);
        match self.host.parse::<IpAddr>() {
            Ok(address) => address.to_canonical().is_loopback(),
            Err(_) => name == "localhost" || name.ends_with(".localhost"),
        }
    }
}

const BAD_HOST: &str = "has no valid host; must be a name of `A-Za-z0-9._-`, \
                        an IPv4 address, or an IPv6 address in brackets";
const BAD_PORT: &str = "has no valid port; must be from 1 to 65535";

/// Whether `text` is a path for a request line: begins with `/`, is visible ASCII
/// and has neither a query nor a fragment.
pub(super) fn is_path(text: &str) -> bool {
    text.starts_with('/')
        && text.bytes().all(|byte| byte.is_ascii_graphic())
        && !text.contains(['?', '#'])
        && PathAndQuery::try_from(text).is_ok()
}

/// Splits off the port, if there is one. The host keeps its brackets.
pub(super) fn split_port(authority: &str) -> Result<(&str, Option<u16>), &'static str> {
    let after_address = authority.rfind(']').map_or(0, |bracket| bracket + 1);
    let (host, port) = match authority.rfind(':') {
        Some(colon) if colon >= after_address => {
            let (host, port) = authority.split_at(colon);
            (host, port.strip_prefix(':'))
        }
        _ => (authority, None),
    };
    let Some(port) = port else {
        return Ok((host, None));
    };
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(BAD_PORT);
    }
    match port.parse() {
        Ok(port) if port > 0 => Ok((host, Some(port))),
        _ => Err(BAD_PORT),
    }
}

/// The host to connect to, and the host as the `Host` header shows it.
fn read_host(host: &str) -> Result<(String, String), &'static str> {
    if let Some(address) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        let address: Ipv6Addr = address.parse().map_err(|_invalid| BAD_HOST)?;
        return Ok((address.to_string(), format!("[{address}]")));
    }
    let labels = host.strip_suffix('.').unwrap_or(host);
    let valid = host.len() <= 253 && labels.split('.').all(is_label);
    if !valid {
        return Err(BAD_HOST);
    }
    let host = host.to_ascii_lowercase();
    Ok((host.clone(), host))
}

/// Whether `label` is a label of RFC 1123. `_` is allowed too, since container names have it.
fn is_label(label: &str) -> bool {
    (1..=63).contains(&label.len())
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_urls_are_parsed() {
        for (text, https, host, port, authority, path) in [
            ("http://a", false, "a", 80, "a", ""),
            ("https://a/", true, "a", 443, "a", ""),
            ("HTTPS://API.Example.com:443/v1/", true, "api.example.com", 443, "api.example.com", "/v1"),
            ("http://a:443", false, "a", 443, "a:443", ""),
            ("http://my_box.:8080/x//", false, "my_box.", 8080, "my_box.:8080", "/x"),
            ("http://[::1]:9", false, "::1", 9, "[::1]:9", ""),
            ("https://[2001:DB8::1]/a/b", true, "2001:db8::1", 443, "[2001:db8::1]", "/a/b"),
            ("http://127.0.0.1:08000", false, "127.0.0.1", 8000, "127.0.0.1:8000", ""),
        ] {
            let expected = BaseUrl {
                https,
                host: host.to_owned(),
                port,
                authority: authority.to_owned(),
                path: path.to_owned(),
            };
            assert_eq!(BaseUrl::parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn localhost_names_below_it_and_loopback_addresses_are_this_machine() {
        for (url, want) in [
            ("http://localhost", true),
            ("http://LOCALHOST.:9", true),
            ("http://x.localhost", true),
            ("http://127.8.9.1", true),
            ("http://[::1]", true),
            ("http://[::ffff:127.0.0.1]", true),
            ("http://xlocalhost", false),
            ("http://localhost.a", false),
            ("http://0.0.0.0", false),
            ("http://10.0.0.1", false),
        ] {
            assert_eq!(BaseUrl::parse(url).unwrap().is_loopback(), want, "{url}");
        }
    }

    #[test]
    fn bad_urls_are_refused() {
        for text in [
            "",
            "a",
            "a:80",
            "//a",
            "ftp://a",
            "http:/a",
            "http://",
            "http:///x",
            "http://:80",
            "http://a:",
            "http://a:0",
            "http://a:65536",
            "http://a:+1",
            "http://a:x",
            "http://u@a",
            "http://u:sk-CANARY@a",
            "http://a?x",
            "http://a/#x",
            "http://a b",
            "http://a/ä",
            "http://ä",
            "http://a\n",
            "http://[::1",
            "http://::1",
            "http://[]",
            "http://[::1]x",
            "http://[::1%eth0]",
            "http://a..b",
            "http://-a",
            "http://.",
            "http://a\\b",
            "http://[a]",
            "http://a]:80",
            "http://a%41",
        ] {
            let fault = BaseUrl::parse(text);
            assert!(fault.is_err(), "{text}: {fault:?}");
        }
    }
}

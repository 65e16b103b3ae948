//! Reads `backends.proxy`, or the proxy variables of the environment as curl does.

use std::fmt;

use data_encoding::BASE64;
use http::HeaderValue;

use crate::config::no_proxy::is_exempt;
use crate::config::text::Text;
use crate::config::toml_reader::Section;
use crate::config::url::{BaseUrl, split_port};
use crate::http1::percent::percent_decoded;

/// The port of a proxy whose URL names none, as curl has it.
const PROXY_PORT: u16 = 1080;

const ALLOWED: &str =
    "must be \"none\", or `http://`, a host, an optional port and an optional `user:password@`";

/// An HTTP proxy in front of a backend.
#[derive(Clone, PartialEq)]
pub struct Proxy {
    /// Host to connect to: a name or an address without brackets.
    pub host: String,
    /// Port to connect to.
    pub port: u16,
    /// Value of `Proxy-Authorization`; marked sensitive.
    pub authorization: Option<HeaderValue>,
    /// Where the proxy is configured.
    pub source: ProxySource,
}

/// Where a proxy is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxySource {
    /// `backends.proxy`.
    File,
    /// The environment variable of this name.
    Variable(&'static str),
}

/// Without the credentials.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Proxy { host, port, .. } = self;
        match host.contains(':') {
            true => write!(f, "http://[{host}]:{port}"),
            false => write!(f, "http://{host}:{port}"),
        }
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The variables that name a proxy for the scheme of a backend, in order of precedence. `HTTP_PROXY` is not
/// one of them: in a CGI program, a client sets it with its header `Proxy`.
fn variables(https: bool) -> &'static [&'static str] {
    if https { &["https_proxy", "HTTPS_PROXY"] } else { &["http_proxy"] }
}

/// Reads `proxy`, or the environment. Returns the proxy, and whether the text itself contains its password.
pub(super) fn proxy(t: &mut Section<'_, '_>, url: Option<&BaseUrl>) -> (Option<Proxy>, bool) {
    let is_set = t.line_of("proxy").is_some();
    match t.text("proxy") {
        Some(text) => return proxy_of(t, &text),
        // A fault is recorded.
        None if is_set => return (None, false),
        None => {}
    }
    let Some(url) = url.filter(|url| !url.is_loopback()) else { return (None, false) };
    let set =
        |name: &&'static str| (t.env)(name).filter(|value| !value.is_empty()).map(|value| (*name, value));
    let Some((name, value)) = variables(url.https).iter().find_map(set) else { return (None, false) };
    let exempt = ["no_proxy", "NO_PROXY"].iter().find_map(set);
    if exempt.is_some_and(|(_, list)| is_exempt(&list, &url.host, url.port)) {
        return (None, false);
    }
    match Proxy::parse(&value, ProxySource::Variable(name)) {
        Ok(proxy) => (Some(proxy), false),
        Err(what) => {
            let what = format!("is not set, and the environment variable `{name}` {what}; {ALLOWED}");
            t.fault(t.line(), "proxy", &what);
            (None, false)
        }
    }
}

/// Reads the value of `proxy`.
fn proxy_of(t: &Section<'_, '_>, text: &Text) -> (Option<Proxy>, bool) {
    if text.value == "none" {
        return (None, false);
    }
    match Proxy::parse(&text.value, ProxySource::File) {
        Ok(proxy) => (Some(proxy), text.value.contains('@') && !text.is_variable()),
        Err(what) => {
            // A variable is shown by its name, unless a default stands beside it.
            let may_show = |shown: &String| match text.is_variable() {
                true => !shown.contains(":-"),
                false => has_no_password(&text.value),
            };
            let found = match text.shown().filter(may_show) {
                Some(shown) if text.is_variable() => format!("is {shown}, whose value {what}"),
                Some(shown) => format!("is {shown}, which {what}"),
                None => what.to_owned(),
            };
            t.fault_of(text, &format!("{found}; {ALLOWED}"));
            (None, false)
        }
    }
}

/// Whether an invalid proxy URL holds no password and may be shown. Operators write `host:port:user:password`.
fn has_no_password(value: &str) -> bool {
    let rest = value.split_once("://").map_or(value, |(_, rest)| rest);
    let is_port = |port: &str| port.trim_end_matches('/').bytes().all(|b| b.is_ascii_digit());
    rest.split_once(':').is_none_or(|(_, port)| is_port(port))
}

impl Proxy {
    /// Parses the URL of a proxy. The scheme may be missing.
    ///
    /// # Errors
    /// Returns a message without the text, which may hold a password.
    fn parse(text: &str, source: ProxySource) -> Result<Self, &'static str> {
        let rest = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some((scheme, _)) if scheme.eq_ignore_ascii_case("https") => {
                return Err("begins with `https://`, but Zap speaks plain HTTP to a proxy");
            }
            Some(_) => return Err("names a kind of proxy that Zap does not speak to"),
            None => text,
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
        let (user, address) = match authority.rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, authority),
        };
        let url = BaseUrl::parse(&format!("http://{address}")).map_err(|_| "is not valid")?;
        let (_, port) = split_port(address).map_err(|_| "is not valid")?;
        let authorization = match user {
            Some(user) => Some(basic(user).ok_or("has a user or a password that is not valid")?),
            None => None,
        };
        Ok(Proxy { host: url.host, port: port.unwrap_or(PROXY_PORT), authorization, source })
    }
}

/// `Basic` credentials (RFC 7617) of a percent-encoded `user:password`.
fn basic(user: &str) -> Option<HeaderValue> {
    let mut decoded = percent_decoded(user)?;
    if !user.contains(':') {
        decoded.push(b':');
    }
    let mut value = HeaderValue::try_from(format!("Basic {}", BASE64.encode(&decoded))).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    /// Reads a backend with this URL in this environment.
    fn read(url: &str, more: &str, env: &[(&str, &str)]) -> Result<Config, String> {
        let text = format!("[[backends]]\nurl = \"{url}\"\nweight = 1\n{more}\n");
        let find = |name: &str| env.iter().find(|(known, _)| *known == name).map(|(_, v)| (*v).to_owned());
        Config::parse(&text, "test", Path::new(""), &find).map_err(|faults| faults.to_string())
    }

    fn proxy_of(url: &str, more: &str, env: &[(&str, &str)]) -> Option<String> {
        let config = read(url, more, env).unwrap();
        config.backends[0].proxy.as_ref().map(|proxy| format!("{proxy} {:?}", proxy.source))
    }

    #[test]
    fn the_file_wins_over_the_environment_and_none_means_none() {
        let env =
            [("https_proxy", "http://low:1"), ("HTTPS_PROXY", "http://up:2"), ("http_proxy", "plain:3")];
        let low = Some("http://low:1 Variable(\"https_proxy\")".to_owned());
        assert_eq!(proxy_of("https://a", "", &env), low);
        let file = Some("http://file:4 File".to_owned());
        assert_eq!(proxy_of("https://a", "proxy = \"http://file:4\"", &env), file);
        assert_eq!(proxy_of("http://127.0.0.1", "proxy = \"http://file:4\"", &env), file);
        assert_eq!(proxy_of("https://a", "proxy = \"none\"", &env), None);
        let plain = Some("http://plain:3 Variable(\"http_proxy\")".to_owned());
        assert_eq!(proxy_of("http://a", "", &env), plain);
        for url in ["https://localhost", "https://x.localhost", "https://127.8.9.1", "https://[::1]:9"] {
            assert_eq!(proxy_of(url, "", &env), None, "{url}");
        }
    }

    #[test]
    fn variables_are_read_as_curl_reads_them() {
        let up = Some("http://up:2 Variable(\"HTTPS_PROXY\")".to_owned());
        assert_eq!(proxy_of("https://a", "", &[("https_proxy", ""), ("HTTPS_PROXY", "up:2")]), up);
        assert_eq!(proxy_of("http://a", "", &[("HTTP_PROXY", "up:2")]), None, "a CGI client could set it");
        assert_eq!(proxy_of("https://a", "", &[("http_proxy", "up:2")]), None);
        let of = |value: &str| {
            read("https://a", "", &[("https_proxy", value)]).map(|config| {
                let proxy = config.backends[0].proxy.clone().unwrap();
                let sent = proxy.authorization.map(|value| value.to_str().unwrap().to_owned());
                (format!("{}:{}", proxy.host, proxy.port), sent)
            })
        };
        for (value, address, sent) in [
            ("http://proxy", "proxy:1080", None),
            ("http://proxy:80/", "proxy:80", None),
            ("HTTP://[::1]:3128", "::1:3128", None),
            ("[::1]", "::1:1080", None),
            ("http://Aladdin:open%20sesame@proxy:1", "proxy:1", Some("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==")),
            ("user@proxy:1", "proxy:1", Some("Basic dXNlcjo=")),
            ("http://u:a%40b@c@proxy:1", "proxy:1", Some("Basic dTphQGJAYw==")),
        ] {
            assert_eq!(of(value), Ok((address.to_owned(), sent.map(str::to_owned))), "{value}");
        }
        for value in [
            "socks5://sk-CANARY:1",
            "https://u:sk-CANARY@p",
            "http://",
            "http://p:0",
            "http://sk-CANARY%@p",
            "http://a b",
        ] {
            let fault = of(value).unwrap_err();
            assert!(
                fault.starts_with(
                    "test:1: `backends[0].proxy` is not set, and the environment variable `https_proxy` "
                ),
                "{fault}"
            );
            assert!(!fault.contains("CANARY"), "{fault}");
        }
        for value in
            ["p:3128:u:CANARY", "socks5://u:CANARY", "u:CANARY:1", "${P:-p:3128:u:CANARY}", "p:CANARY"]
        {
            let fault = read("https://a", &format!("proxy = \"{value}\""), &[]).unwrap_err();
            assert!(!fault.contains("CANARY"), "{fault}");
        }
        let fault = read("https://a", "proxy = \"socks5://u:sk-CANARY@p\"", &[]).unwrap_err();
        assert_eq!(
            fault,
            format!(
                "test:4: `backends[0].proxy` names a kind of proxy that Zap does not speak to; {ALLOWED}"
            )
        );
        let fault = read("https://a", "proxy = \"https://p:1\"", &[]).unwrap_err();
        assert_eq!(
            fault,
            format!(
                "test:4: `backends[0].proxy` is \"https://p:1\", which begins with `https://`, but Zap speaks plain \
                 HTTP to a proxy; {ALLOWED}"
            )
        );
        let fault = read("https://a", "proxy = \"${P}\"", &[("P", "socks5://u:sk-CANARY@p")]).unwrap_err();
        assert_eq!(
            fault,
            format!(
                "test:4: `backends[0].proxy` is \"${{P}}\", whose value names a kind of proxy that Zap does not \
                 speak to; {ALLOWED}"
            )
        );
    }

    #[test]
    fn the_password_is_in_no_debug_text() {
        let config = read("https://a", "proxy = \"http://u:${P}@p:1\"", &[("P", "sk-CANARY")]).unwrap();
        let sent = config.backends[0].proxy.as_ref().and_then(|p| p.authorization.as_ref()).unwrap();
        assert_eq!(sent, "Basic dTpzay1DQU5BUlk=");
        let text = format!("{config:?} {sent:?}");
        assert!(!text.contains("CANARY") && !text.contains("dTpzay1DQU5BUlk"), "{text}");
    }
}

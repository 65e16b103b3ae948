//! Reads `[server]` alone: `zap healthcheck` needs the address of a running Zap, and whether it speaks TLS.

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use crate::config::common::Context;
use crate::config::fault_sink::{Faults, LoadError, Sink};
use crate::config::{file, raw, toml_reader};

/// The address of a running Zap, and whether it speaks TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Listen {
    /// Its host and port.
    pub address: SocketAddr,
    /// Whether it speaks TLS.
    pub is_tls: bool,
}

impl Listen {
    /// The URL of `path` at this Zap. If it listens on all addresses, on loopback.
    pub(crate) fn url(self, path: &str) -> String {
        let Listen { mut address, is_tls } = self;
        if address.ip().is_unspecified() {
            address.set_ip(match address.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        format!("{}://{address}{path}", if is_tls { "https" } else { "http" })
    }
}

/// The host and port of `[server]` in the file at `path`, and whether it has certificates.
///
/// Other faults of the file do not matter: a file that was changed and cannot be applied must not make a healthy Zap
/// look sick.
///
/// # Errors
/// There is no such file, it is not TOML, or `host` or `port` is not valid.
pub(crate) fn listen_address(path: &Path) -> Result<Listen, LoadError> {
    let label = path.display().to_string();
    let text = file::read_text(path, &label)?;
    of_text(&text, &label, &|name: &str| std::env::var(name).ok()).map_err(LoadError::Invalid)
}

fn of_text(text: &str, label: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Listen, Faults> {
    let sink = Sink::new(text, label);
    let ctx = Context { base: Path::new(""), files: RefCell::default() };
    let address = toml_reader::document(&sink, env, |root| {
        root.section("server", |t| {
            let is_tls = t.line_of("tls").is_some();
            let server = raw::server(t, &ctx);
            Listen { address: SocketAddr::new(server.host, server.port), is_tls }
        })
    });
    let is_meant = |fault: &String| fault.contains("`server.host`") || fault.contains("`server.port`");
    let faults = sink.into_messages();
    match address {
        None => Err(Faults(faults)),
        Some(address) => match faults.into_iter().filter(is_meant).collect::<Vec<_>>() {
            faults if faults.is_empty() => Ok(address),
            faults => Err(Faults(faults)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_of_a_zap_on_all_addresses_is_that_of_loopback() {
        for (address, url) in [
            ("0.0.0.0:8000", "http://127.0.0.1:8000/health"),
            ("[::]:1", "http://[::1]:1/health"),
            ("10.0.0.1:80", "http://10.0.0.1:80/health"),
        ] {
            let listen = |is_tls| Listen { address: address.parse().unwrap(), is_tls };
            assert_eq!(listen(false).url("/health"), url);
            assert_eq!(listen(true).url("/health"), url.replace("http:", "https:"));
        }
    }

    #[test]
    fn only_the_address_of_a_file_matters() {
        let env = |name: &str| (name == "PORT").then(|| "9000".to_owned());
        let default = "0.0.0.0:8000";
        for (text, want) in [
            ("", Some(default)),
            ("[server]\nhost = \"localhost\"\nport = \"${PORT}\"\n", Some("127.0.0.1:9000")),
            (
                "[server]\nhost = \"::\"\nworkers = 0\nwat = 1\n[[backends]]\nurl = \"${UNSET}\"\n",
                Some("[::]:8000"),
            ),
            ("[[server.tls]]\ncert = \"missing.pem\"\n", Some(default)),
            ("[server]\nport = 70000\n", None),
            ("[server]\nhost = \"zap.example\"\n", None),
            ("[server\n", None),
        ] {
            let found = of_text(text, "f", &env);
            let address = found.as_ref().ok().map(|listen| listen.address.to_string());
            assert_eq!(address.as_deref(), want, "{text}: {found:?}");
            assert!(found.is_err() || found.is_ok_and(|listen| listen.is_tls == text.contains("tls")));
        }
    }
}

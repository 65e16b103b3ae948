//! `[admin]`: the listener for operators.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::common::{Context, host};
use crate::config::keys::read_key;
use crate::config::range::{Number, Range};
use crate::config::tls::{ReadTls, server_tls};
use crate::config::toml_reader::Section;
use crate::config::{Secret, ServerTls};

const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const PORT: Number<u16> = Range::new(0, u16::MAX).or(9000);

/// The token and the certificates of the admin listener. A reload replaces both.
#[derive(Clone, Debug, Default)]
pub(crate) struct AdminAccess {
    /// The token that a request must carry; `None`: no request needs one.
    pub token: Option<Secret>,
    /// `[[admin.tls]]`: TLS of the admin listener; `None`: plain HTTP.
    pub tls: Option<ServerTls>,
}

/// `[admin]` as the file has it.
#[derive(Default)]
pub(super) struct ReadAdmin {
    /// The address of the admin listener; `None`: there is none.
    pub(super) address: Option<SocketAddr>,
    pub(super) access: AdminAccess,
    /// Whether the text itself contains the token.
    pub(super) inline_token: bool,
}

/// Reads `[admin]`. `clients`: the address of the listener for clients.
pub(super) fn admin(root: &mut Section<'_, '_>, ctx: &Context<'_>, clients: SocketAddr) -> ReadAdmin {
    let read = root.optional_section("admin", |t| {
        let line = t.line_of("port").unwrap_or(t.line());
        let (host, port) = (host(t).unwrap_or(HOST), t.number("port", PORT));
        let is_shared = host == clients.ip() || host.is_unspecified() || clients.ip().is_unspecified();
        if port != 0 && port == clients.port() && is_shared {
            let what = format!("is {port}, as `server.port`; must be another port, such as {}", PORT.default);
            t.fault(line, "port", &what);
        }
        let token = read_key(t, "token", ctx);
        let ReadTls { tls, .. } = server_tls(t, ctx);
        let access = AdminAccess { token: token.key, tls };
        ReadAdmin { address: Some(SocketAddr::new(host, port)), access, inline_token: token.is_inline }
    });
    read.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    fn of(text: &str) -> Result<Config, String> {
        Config::of(&format!("{text}\n[[backends]]\nname = \"a\"\nurl = \"http://a\"\nweight = 1\n"))
    }

    #[test]
    fn without_a_section_there_is_no_admin_listener_and_with_one_it_is_on_loopback() {
        assert_eq!(of("").unwrap().server.admin, None);
        for (text, address) in [
            ("[admin]", "127.0.0.1:9000"),
            ("[admin]\nhost = \"localhost\"\nport = 0", "127.0.0.1:0"),
            ("[admin]\nhost = \"::\"\nport = 1", "[::]:1"),
        ] {
            assert_eq!(of(text).unwrap().server.admin, address.parse().ok(), "{text}");
        }
        let token = of("[admin]\ntoken = \"zt-1\"").unwrap().admin.token;
        assert_eq!(token.unwrap().expose(), "zt-1");
    }

    #[test]
    fn faults_name_the_section_and_no_token() {
        for (text, want) in [
            ("[admin]\nport = 70000", "`admin.port`"),
            ("[admin]\nhost = \"a:1\"", "`admin.host`"),
            ("[admin]\ntoken = \"zt 1\"", "`admin.token` contains a space"),
            ("[admin]\ntoken = \"$TOKEN\"", "`admin.token` begins with `$`"),
            ("[admin]\ntls = 1", "`admin.tls` is an integer; must be an array of tables, `[[admin.tls]]`"),
            ("[[admin.tls]]\ncert = \"a\"", "`admin.tls[0].key`"),
            ("[server]\nport = 9000\n[admin]", "`admin.port` is 9000, as `server.port`"),
            (
                "[server]\nport = 8000\nhost = \"10.0.0.1\"\n[admin]\nport = 8000\nhost = \"0.0.0.0\"",
                "as `server.port`",
            ),
        ] {
            let faults = of(text).unwrap_err();
            assert!(faults.contains(want) && !faults.contains("zt 1"), "{text}: {faults}");
        }
        assert!(of("[server]\nport = 0\n[admin]\nport = 0").is_ok());
        assert!(of("[server]\nport = 9000\nhost = \"10.0.0.1\"\n[admin]").is_ok());
    }
}

//! The value of `NO_PROXY`: the backends that no proxy of the environment is for.

use std::net::IpAddr;

use ipnet::IpNet;

/// Whether `list`, the value of `NO_PROXY`, exempts a backend: `*` exempts all; else each part is a name that also
/// stands for all names below it, an address or a network, with or without a port.
pub(super) fn is_exempt(list: &str, host: &str, port: u16) -> bool {
    list.trim() == "*"
        || list.split([',', ' ', '\t']).filter(|part| !part.is_empty()).any(|part| exempts(part, host, port))
}

fn exempts(part: &str, host: &str, port: u16) -> bool {
    if let Ok(address) = host.parse::<IpAddr>() {
        return exempts_address(part, address, port);
    }
    let (part, only) = host_and_port(part);
    let part = part.strip_suffix('.').unwrap_or(part);
    let part = part.strip_prefix('.').unwrap_or(part).to_ascii_lowercase();
    let host = host.strip_suffix('.').unwrap_or(host);
    let is_below =
        |part: &str| host.strip_suffix(part).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    !part.is_empty() && is_below(&part) && only.is_none_or(|only| only == port)
}

fn exempts_address(part: &str, address: IpAddr, port: u16) -> bool {
    let bare = |text: &str| text.trim_start_matches('[').trim_end_matches(']').to_owned();
    let is_same = |text: &str| bare(text).parse::<IpAddr>().is_ok_and(|exempt| exempt == address);
    if let Ok(network) = bare(part).parse::<IpNet>() {
        return network.contains(&address);
    }
    if is_same(part) {
        return true;
    }
    let (part, only) = host_and_port(part);
    only == Some(port) && is_same(part)
}

/// Splits off the port, if there is one.
fn host_and_port(part: &str) -> (&str, Option<u16>) {
    match part.rsplit_once(':').map(|(host, port)| (host, port.parse())) {
        Some((host, Ok(port))) => (host, Some(port)),
        _ => (part, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_proxy_exempts_names_addresses_and_networks() {
        for (list, host, want) in [
            ("*", "a.test", true),
            (" * ", "10.0.0.1", true),
            ("*,x", "a.test", false),
            ("a.test", "a.test", true),
            ("A.Test.", "a.test", true),
            (".a.test", "a.test", true),
            ("a.test", "b.a.test", true),
            ("a.test", "ba.test", false),
            ("b.a.test", "a.test", false),
            ("x, a.test", "a.test", true),
            ("x a.test", "a.test", true),
            (",, ,", "a.test", false),
            (".", "a.test", false),
            ("a.test:443", "a.test", true),
            ("a.test:80", "a.test", false),
            ("test", "a.test.", true),
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/8", "11.1.2.3", false),
            ("10.1.2.3", "10.1.2.3", true),
            ("10.1.2.3:443", "10.1.2.3", true),
            ("10.1.2.3:80", "10.1.2.3", false),
            ("2.3", "10.1.2.3", false),
            ("2001:db8::/32", "2001:db8::7", true),
            ("[2001:db8::7]", "2001:db8::7", true),
            ("[2001:db8::7]:443", "2001:db8::7", true),
            ("2001:db8::7", "2001:db8::8", false),
            ("10.0.0.0/8", "a.test", false),
        ] {
            assert_eq!(is_exempt(list, host, 443), want, "{list:?} {host}");
        }
    }
}

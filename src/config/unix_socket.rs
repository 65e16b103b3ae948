//! `server.unix` and `server.unix_mode`: the unix socket for clients.

use std::path::PathBuf;

use crate::config::common::Context;
use crate::config::toml_reader::Section;

/// Longest path of a unix socket on Linux, in bytes.
const MAX_PATH: usize = 107;

/// The mode without `server.unix_mode`: the user and the group.
const MODE: u32 = 0o660;

/// A unix socket for clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixSocket {
    /// Its file, resolved; at most 107 bytes.
    pub path: PathBuf,
    /// The mode of its file, at most 0o777.
    pub mode: u32,
}

/// Reads `unix` and `unix_mode` of `[server]`.
pub(super) fn unix_socket(t: &mut Section<'_, '_>, ctx: &Context<'_>) -> Option<UnixSocket> {
    let mode = t.text("unix_mode").map(|text| {
        let mode = Some(&text.value).filter(|digits| digits.len() == 3 || digits.len() == 4);
        let mode = mode.and_then(|digits| u32::from_str_radix(digits, 8).ok()).filter(|mode| *mode <= 0o777);
        if mode.is_none() {
            t.invalid(&text, "must be three octal digits, such as \"660\"");
        }
        (text, mode)
    });
    let Some(text) = t.text("unix") else {
        if let Some((text, _)) = mode {
            t.fault_of(&text, "is set without `unix`; both must be set, or none");
        }
        return None;
    };
    let path = ctx.base.join(&text.value);
    if text.value.is_empty() || path.as_os_str().len() > MAX_PATH {
        let what = format!("has a path of {} bytes; must have 1 to {MAX_PATH}", path.as_os_str().len());
        t.fault_of(
            &text,
            if text.value.is_empty() { "is empty; must be the path of a socket" } else { &what },
        );
        return None;
    }
    Some(UnixSocket { path, mode: mode.map_or(Some(MODE), |(_, mode)| mode)? })
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn a_socket_has_a_short_path_and_an_octal_mode() {
        let of = |server: &str| {
            let backend = "[[backends]]\nname = \"a\"\nurl = \"http://a\"\nweight = 1\n";
            Config::of(&format!("[server]\n{server}\n{backend}"))
        };
        assert_eq!(of("").unwrap().server.unix, None);
        for (text, mode) in [("", 0o660), ("unix_mode = \"600\"", 0o600), ("unix_mode = \"0777\"", 0o777)] {
            let socket = of(&format!("unix = \"/run/zap.sock\"\n{text}")).unwrap().server.unix.unwrap();
            assert_eq!((socket.path.to_str(), socket.mode), (Some("/run/zap.sock"), mode));
        }
        let long = "x".repeat(108);
        for (text, want) in [
            ("unix = \"\"", "is empty; must be the path of a socket"),
            (&format!("unix = \"/{long}\""), "has a path of 109 bytes; must have 1 to 107"),
            ("unix_mode = \"660\"", "is set without `unix`; both must be set, or none"),
            ("unix = \"a\"\nunix_mode = \"rw\"", "must be three octal digits, such as \"660\""),
            ("unix = \"a\"\nunix_mode = \"1777\"", "must be three octal digits, such as \"660\""),
        ] {
            let fault = of(text).unwrap_err();
            assert!(fault.contains(want), "{text}: {fault}");
        }
    }
}

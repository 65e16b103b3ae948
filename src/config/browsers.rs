//! Reads `server.cors_origins` and `server.allowed_hosts`, which limit requests from web pages.

use crate::config::toml_reader::Section;
use crate::http1::origin::{HostName, Hosts, Origins, parse_origin};

/// Reads `cors_origins`.
pub(super) fn cors_origins(t: &mut Section<'_, '_>) -> Origins {
    let (mut listed, mut is_any) = (Vec::new(), false);
    for text in t.texts("cors_origins").unwrap_or_default() {
        if text.value == "*" {
            is_any = true;
            continue;
        }
        match parse_origin(&text.value) {
            Ok(origin) => listed.push(origin),
            Err(why) => {
                t.invalid(&text, &format!("must be `*` or an origin such as `https://app.example`, {why}"));
            }
        }
    }
    match (is_any, listed.is_empty()) {
        (true, _) => Origins::Any,
        (false, true) => Origins::None,
        (false, false) => Origins::Listed(listed),
    }
}

/// Reads `allowed_hosts`.
pub(super) fn allowed_hosts(t: &mut Section<'_, '_>) -> Hosts {
    let allowed =
        "must be a host such as `zap.example`, `zap.example:8000` or `[::1]`, without scheme and path";
    Hosts(t.parsed_texts("allowed_hosts", allowed, HostName::parse))
}

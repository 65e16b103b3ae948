//! Reads the keys of a backend that set, pass on or drop headers.

use http::header::ACCEPT;
use http::{HeaderName, HeaderValue};

use crate::config::toml_reader::Section;
use crate::http1::header_rules::{HeaderRules, NamePattern, is_reserved};

/// Reads the header that carries the key without a scheme, in place of `Authorization: Bearer`. `Authorization` is
/// allowed: some gateways expect the key there without a scheme.
pub(super) fn auth_header(t: &mut Section<'_, '_>, has_key: bool) -> Option<HeaderName> {
    let text = t.text("auth_header")?;
    let name = HeaderName::from_bytes(text.value.as_bytes()).ok();
    let name = name.filter(is_settable);
    if name.is_none() {
        t.invalid(&text, "must be a header that Zap does not set itself, such as `api-key`");
    }
    if !has_key {
        t.fault_of(&text, "is set without `api_key`; must be set with `api_key` or not at all");
    }
    name
}

/// Reads the headers to send in addition to Zap's own. They replace the client's headers of the same name.
pub(super) fn extra_headers(
    t: &mut Section<'_, '_>,
    key_header: Option<&HeaderName>,
) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
    for (name, value) in t.pairs("extra_headers").unwrap_or_default() {
        let name = HeaderName::from_bytes(name.value.as_bytes()).ok();
        let name = name.filter(is_settable);
        if name.is_some() && name.as_ref() == key_header {
            t.fault_of(&value, "is the header of `api_key`; must be only one of the two");
        }
        if name.is_none() {
            let what =
                "cannot be added; must be a header that Zap does not set itself and that is not hop-by-hop";
            t.fault_of(&value, what);
        }
        if name.as_ref().is_some_and(|name| headers.iter().any(|(other, _)| other == name)) {
            let what = "repeats a header; must be different names, and case does not count";
            t.fault_of(&value, what);
        }
        match (name, HeaderValue::from_str(&value.value)) {
            (Some(name), Ok(mut text)) => {
                text.set_sensitive(true);
                headers.push((name, text));
            }
            (_, Err(_)) => {
                let what = "has a value with a control character; must be visible ASCII and spaces";
                t.fault_of(&value, what);
            }
            (None, Ok(_)) => {}
        }
    }
    headers
}

/// Whether the operator may set a header: it is not one of the connection, and Zap does not set it itself.
fn is_settable(name: &HeaderName) -> bool {
    *name != ACCEPT && !is_reserved(name.as_str())
}

/// Reads `forward_headers` and `drop_headers`.
pub(super) fn header_rules(t: &mut Section<'_, '_>) -> HeaderRules {
    const ALLOWED: &str = "must be the name of a header, with or without a `*` at its end, and not a credential, \
                           a cookie, a hop-by-hop header or a header that Zap sets itself";
    let mut patterns = |key| t.parsed_texts(key, ALLOWED, NamePattern::parse);
    HeaderRules { forward: patterns("forward_headers"), drop: patterns("drop_headers") }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn both_lists_are_read_and_default_to_nothing() {
        let config = Config::of_backend(
            "forward_headers = [\"X-Title\", \"x-codex-*\"]\ndrop_headers = [\"x-stainless-*\"]",
        );
        let rules = config.unwrap().backends[0].header_rules.clone();
        assert!(rules.forwards("x-title") && rules.forwards("x-codex-a") && rules.drops("x-stainless-os"));
        assert_eq!(Config::of_backend("").unwrap().backends[0].header_rules, Default::default());
    }

    #[test]
    fn a_credential_in_a_list_is_a_fault_with_its_line() {
        const ALLOWED: &str = "must be the name of a header, with or without a `*` at its end, and not a credential, \
                               a cookie, a hop-by-hop header or a header that Zap sets itself";
        const ARRAY: &str = "is a string; must be an array of strings, such as `[\"a\", \"b\"]`";
        for key in ["forward_headers", "drop_headers"] {
            for name in ["Cookie", "x-api-key", "te"] {
                let fault = Config::of_backend(&format!("{key} = [\n\"x-title\",\n\"{name}\"]")).unwrap_err();
                assert_eq!(fault, format!("test:6: `backends[0].{key}[1]` is \"{name}\"; {ALLOWED}"));
            }
            let fault = Config::of_backend(&format!("{key} = [\"sk-CANARY:\"]")).unwrap_err();
            assert_eq!(fault, format!("test:4: `backends[0].{key}[0]` is not valid; {ALLOWED}"));
            let fault = Config::of_backend(&format!("{key} = \"x-title\"")).unwrap_err();
            assert_eq!(fault, format!("test:4: `backends[0].{key}` {ARRAY}"));
        }
    }

    #[test]
    fn the_operator_sets_no_header_of_the_connection_and_none_that_zap_sets() {
        for name in [
            "Accept",
            "Accept-Encoding",
            "Connection",
            "Content-Encoding",
            "Content-Length",
            "Content-Type",
            "Expect",
            "Host",
            "HTTP2-Settings",
            "Keep-Alive",
            "Proxy-Authenticate",
            "Proxy-Authorization",
            "Proxy-Connection",
            "TE",
            "Trailer",
            "Transfer-Encoding",
            "Upgrade",
            "X-Request-Id",
        ] {
            let fault =
                Config::of_backend(&format!("extra_headers = {{ {name} = \"sk-CANARY\" }}")).unwrap_err();
            let what = "must be a header that Zap does not set itself and that is not hop-by-hop";
            assert_eq!(fault, format!("test:4: `backends[0].extra_headers.{name}` cannot be added; {what}"));
            let fault =
                Config::of_backend(&format!("auth_header = \"{name}\"\napi_key = \"k\"")).unwrap_err();
            let what = "must be a header that Zap does not set itself, such as `api-key`";
            assert_eq!(fault, format!("test:4: `backends[0].auth_header` is \"{name}\"; {what}"));
        }
    }
}

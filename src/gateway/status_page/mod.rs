//! The status page: `/status` as one HTML file for a person. It needs nothing from elsewhere and no JavaScript.
//!
//! The server renders all rows. The script asks for the page each second and takes over what differs, so that there is
//! one place that writes and escapes.

mod backends;

mod clients;

mod failures;

mod summary;

mod words;

use std::sync::LazyLock;

use bytes::Bytes;
use data_encoding::BASE64;
use http::header::{
    ACCEPT, CACHE_CONTROL, CONTENT_SECURITY_POLICY, HeaderMap, HeaderValue, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use ring::digest::{SHA256, digest};
use serde_json::Value;

use crate::gateway::ClientResponse;
use crate::gateway::status_page::words::Words;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// The policy of the page: its own style, its own script, and requests to where it came from. `data:` is its empty
/// icon.
static POLICY: LazyLock<Option<HeaderValue>> = LazyLock::new(|| {
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        BASE64.encode(digest(&SHA256, STYLE.as_bytes()).as_ref()),
        BASE64.encode(digest(&SHA256, SCRIPT.as_bytes()).as_ref()),
    );
    HeaderValue::from_str(&policy).ok()
});

/// Whether a request asks for HTML, as a browser does that opens a page. `*/*` is no wish for it.
pub(crate) fn is_wanted(headers: &HeaderMap) -> bool {
    let ranges = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    ranges.flat_map(|value| value.split(',')).any(|range| {
        let mut parts = range.split(';').map(str::trim);
        let is_html = parts.next().is_some_and(|name| name.eq_ignore_ascii_case("text/html"));
        let refuses = |part: &str| {
            let (name, value) = part.split_once('=').unwrap_or_default();
            name.trim().eq_ignore_ascii_case("q") && value.trim().parse() == Ok(0.0)
        };
        is_html && !parts.any(refuses)
    })
}

/// Adds the headers that keep a browser to what the page needs.
pub(crate) fn guarded(mut response: ClientResponse) -> ClientResponse {
    let headers = response.headers_mut();
    headers.extend(POLICY.clone().map(|policy| (CONTENT_SECURITY_POLICY, policy)));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Renders the page of what `/status` says.
pub(crate) fn render(status: &Value) -> Bytes {
    let words = Words::of(status);
    let (title, summary) = summary::render(status, &words);
    let mut page = String::with_capacity(1 << 16);
    for part in [
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>",
        &title,
        "</title>\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<link rel=\"icon\" href=\"data:,\">\n<style>",
        STYLE,
        "</style>\n</head>\n<body>\n<div id=\"stale\" role=\"alert\" hidden></div>\n<main>\n",
        &summary,
        &backends::render(status, &words),
        &clients::render(status),
        &failures::render(status, &words),
        "</main>\n<footer><p class=\"soft\">Times are in UTC. The same as JSON: <code>curl</code> this address. More: \
         <a href=\"metrics\">metrics</a>, <a href=\"usage\">usage by day</a>, <code>zap help operations</code>.</p>\
         <noscript><p>Without JavaScript this page does not renew itself: load it again.</p></noscript></footer>\n<script>",
        SCRIPT,
        "</script>\n</body>\n</html>\n",
    ] {
        page.push_str(part);
    }
    page.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_names_html_gets_the_page() {
        for (accept, want) in [
            ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", true),
            ("application/json, Text/HTML;q=0.5", true),
            ("text/html", true),
            ("text/html;level=1; q=0", false),
            ("text/html;q=0.0", false),
            ("*/*", false),
            ("text/*", false),
            ("application/json", false),
            ("text/html+x", false),
            ("", false),
        ] {
            let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(accept))]);
            assert_eq!(is_wanted(&headers), want, "{accept}");
        }
        assert!(!is_wanted(&HeaderMap::new()));
    }

    #[test]
    fn nothing_of_the_script_or_the_style_ends_them_early() {
        assert!(!SCRIPT.contains("</") && !SCRIPT.contains("<!--") && !STYLE.contains("</"));
    }
}

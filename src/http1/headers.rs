//! The headers that pass through Zap in both directions, the client's credential, address and request id, and the
//! values of the headers that Zap writes.
//!
//! The headers for a backend are a new map, built from a short list of allowed names. The headers for a client are the
//! upstream's map without those that belong to the connection (RFC 9110, section 7.6.1) and those that tell browsers
//! about the provider's own site. This module never handles a backend's key.

use std::net::{IpAddr, SocketAddr};

use bytes::Bytes;
use data_encoding::BASE64;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap,
    HeaderName, HeaderValue, UPGRADE, USER_AGENT,
};
use smallvec::SmallVec;

use crate::http1::header_rules::HeaderRules;
use crate::time::{MILLI, Nanos};

/// `x-request-id`
pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// `x-upstream-request-id`
pub(crate) const X_UPSTREAM_REQUEST_ID: HeaderName = HeaderName::from_static("x-upstream-request-id");

/// The facts about a response that Zap needs from its headers.
#[derive(Debug, Default)]
pub(crate) struct ResponseFacts {
    /// The response has a request id of the provider, valid or not.
    pub has_id: bool,
    /// The body is an event stream (`text/event-stream`), whether or not the client asked for one.
    pub is_events: bool,
    /// The body is JSON, or its type is not told.
    pub is_json: bool,
    /// The body has a content coding.
    pub is_encoded: bool,
    /// The response has `Content-Length`.
    pub has_length: bool,
}

impl ResponseFacts {
    /// Notes the facts in one header. Returns `true` if the header must be dropped: it belongs to the connection
    /// (RFC 9110, section 7.6.1), or it tells browsers about the provider's own site.
    fn note_or_drop(&mut self, name: &HeaderName, value: &HeaderValue) -> bool {
        match name.as_str() {
            "alt-svc" | "connection" | "keep-alive" | "proxy-authenticate" | "proxy-connection"
            | "set-cookie" | "te" | "trailer" | "transfer-encoding" | "upgrade" => return true,
            "clear-site-data"
            | "expect-ct"
            | "nel"
            | "public-key-pins"
            | "public-key-pins-report-only"
            | "report-to"
            | "strict-transport-security" => return true,
            "content-encoding" => self.is_encoded |= encodes(value),
            "content-length" => self.has_length = true,
            "content-type" => (self.is_events, self.is_json) = (is_events(value), is_json(value)),
            "request-id" | "x-request-id" => self.has_id = true,
            other => return other.starts_with("access-control-"),
        }
        false
    }
}

fn is_events(content_type: &HeaderValue) -> bool {
    let name = b"text/event-stream";
    content_type.as_bytes().get(..name.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(name))
}

/// Whether a content type is that of JSON: `application/json`, or a type that ends in `+json` (RFC 6839).
fn is_json(content_type: &HeaderValue) -> bool {
    let kind = content_type.as_bytes();
    if kind == b"application/json" {
        return true;
    }
    let kind = kind.split(|b| *b == b';').next().unwrap_or(kind).trim_ascii_end();
    let ends_with =
        |end: &[u8]| kind.len().checked_sub(end.len()).is_some_and(|at| kind[at..].eq_ignore_ascii_case(end));
    ends_with(b"/json") || ends_with(b"+json")
}

/// The headers of a client that pass to a backend beside the standard list.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Passing {
    /// `Authorization`, and the account headers that belong to it.
    pub authorization: bool,
    /// Further names, in lower case.
    pub more: &'static [&'static str],
    /// The `Content-Type`.
    pub content_type: BodyType,
    /// What becomes of the client's trace.
    pub trace: TracePassing,
}

/// What becomes of `traceparent` and `tracestate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum TracePassing {
    /// Both pass as they are.
    #[default]
    Both,
    /// Zap sends a `traceparent` of its own in the client's trace: `tracestate` passes.
    State,
    /// Zap sends a `traceparent` of a trace of its own: neither passes.
    Neither,
}

/// The `Content-Type` of a request to a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum BodyType {
    /// That of the client.
    Clients,
    /// JSON. The client's own type may be wrong: `curl -d` says that it is a form.
    #[default]
    Json,
    /// None: the request has no body.
    Nothing,
}

/// Calls `put` for each header that a backend gets: the allowed ones of the client's headers, and defaults.
///
/// `rules` allow further headers and take away others. Headers that `Connection` nominates are never forwarded, not
/// even allowed ones.
///
/// Returns the `traceparent` of the client, if there is one.
pub(crate) fn to_backend<'c>(
    client: &'c HeaderMap,
    passing: Passing,
    rules: &HeaderRules,
    mut put: impl FnMut(&HeaderName, &HeaderValue),
) -> Option<&'c HeaderValue> {
    let nominates = client.contains_key(CONNECTION);
    let is_nominated = |name: &HeaderName| {
        nominates
            && client
                .get_all(CONNECTION)
                .iter()
                .any(|v| v.as_bytes().split(|b| *b == b',').any(|t| eq_name(t.trim_ascii(), name)))
    };
    let (mut has_accept, mut has_user_agent, has_rules) = (false, false, !rules.is_empty());
    let mut traceparent = None;
    for (name, value) in client {
        let mut is_allowed = match name.as_str() {
            "accept" | "idempotency-key" | "user-agent" => true,
            "traceparent" => {
                traceparent = Some(value);
                if passing.trace != TracePassing::Both {
                    continue;
                }
                true
            }
            "tracestate" if passing.trace == TracePassing::Neither => continue,
            "tracestate" => true,
            "authorization" | "openai-organization" | "openai-project" => passing.authorization,
            other => other.starts_with("x-stainless-") || passing.more.contains(&other),
        };
        if has_rules {
            is_allowed = (is_allowed || rules.forwards(name.as_str())) && !rules.drops(name.as_str());
        }
        if is_allowed && !is_nominated(name) {
            has_accept |= *name == ACCEPT;
            has_user_agent |= *name == USER_AGENT;
            put(name, value);
        }
    }
    if !has_accept {
        put(&ACCEPT, &HeaderValue::from_static("*/*"));
    }
    if !has_user_agent {
        put(&USER_AGENT, &HeaderValue::from_static("zap"));
    }
    match passing.content_type {
        BodyType::Clients => client.get(CONTENT_TYPE).into_iter().for_each(|own| put(&CONTENT_TYPE, own)),
        BodyType::Json => put(&CONTENT_TYPE, &HeaderValue::from_static("application/json")),
        BodyType::Nothing => {}
    }
    put(&ACCEPT_ENCODING, &HeaderValue::from_static("identity"));
    traceparent
}

/// Drops the headers of a response that must not be forwarded to the client, and returns the facts that Zap needs.
pub(crate) fn to_client(upstream: &mut HeaderMap) -> ResponseFacts {
    let mut about = ResponseFacts { is_json: true, ..ResponseFacts::default() };
    // A single pass over the headers is cheaper than a look-up of each name that could be there.
    let removed =
        upstream.iter().filter(|(name, value)| about.note_or_drop(name, value)).map(|(name, _)| name.clone());
    let removed: SmallVec<[HeaderName; 4]> = removed.collect();
    if !removed.is_empty() {
        remove(upstream, removed);
    }
    about
}

/// Returns the provider's id for the request: `x-request-id`, else `request-id`, if it is 1 to 128 visible ASCII
/// characters.
pub(crate) fn upstream_request_id(headers: &HeaderMap) -> Option<HeaderValue> {
    headers.get(X_REQUEST_ID).or_else(|| headers.get("request-id")).filter(|id| is_id(id)).cloned()
}

/// Removes the headers in `removed`, and those that `Connection` nominates, except `content-length` and `content-type`.
fn remove(upstream: &mut HeaderMap, mut removed: SmallVec<[HeaderName; 4]>) {
    let nominated = upstream.get_all(CONNECTION).iter().flat_map(|v| v.as_bytes().split(|b| *b == b','));
    removed.extend(
        nominated
            .filter_map(|t| HeaderName::from_bytes(t.trim_ascii()).ok())
            .filter(|name| name != "content-length" && name != "content-type"),
    );
    for name in &removed {
        upstream.remove(name);
    }
}

/// Whether a request asks for a WebSocket (RFC 6455, section 4.1), provided that it is a GET. Codex tries a WebSocket
/// first.
pub(crate) fn wants_websocket(headers: &HeaderMap) -> bool {
    let is_named = |value: &HeaderValue| {
        let mut names = value.as_bytes().split(|b| *b == b',');
        names.any(|name| name.trim_ascii().eq_ignore_ascii_case(b"websocket"))
    };
    headers.get_all(UPGRADE).iter().any(is_named)
}

/// Whether the body of a message has a content coding.
pub(crate) fn is_encoded(headers: &HeaderMap) -> bool {
    headers.get_all(CONTENT_ENCODING).iter().any(encodes)
}

/// Whether a `Content-Encoding` names a real coding. `identity` (RFC 9110, section 8.4.1), `none`, which some servers
/// send instead, and an empty value are not codings.
fn encodes(value: &HeaderValue) -> bool {
    let is_identity = |coding: &[u8]| {
        let coding = coding.trim_ascii();
        coding.is_empty() || coding.eq_ignore_ascii_case(b"identity") || coding.eq_ignore_ascii_case(b"none")
    };
    !value.as_bytes().split(|b| *b == b',').all(is_identity)
}

fn eq_name(token: &[u8], name: &HeaderName) -> bool {
    token.eq_ignore_ascii_case(name.as_str().as_bytes())
}

/// Headers that may carry a client's key, besides `Authorization`.
const KEY_HEADERS: [&str; 3] = ["api-key", "x-api-key", "x-goog-api-key"];

/// Whether a header with a credential is repeated. Zap and a backend could then use different ones. Credentials in
/// different headers are allowed.
pub(crate) fn repeats_credential(headers: &HeaderMap) -> bool {
    // Fast path: most requests repeat no header.
    let is_repeated = |name: &str| headers.get_all(name).iter().nth(1).is_some();
    headers.len() > headers.keys_len()
        && (is_repeated(AUTHORIZATION.as_str()) || KEY_HEADERS.iter().any(|name| is_repeated(name)))
}

/// Returns the credential by which a request is counted: the bearer token, else the first of the API-key headers.
/// `None` if there is none, or if it is empty.
pub(crate) fn credential(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(AUTHORIZATION).and_then(|v| bearer_token(v.as_bytes()));
    bearer
        .or_else(|| KEY_HEADERS.iter().find_map(|n| headers.get(*n)).map(HeaderValue::as_bytes))
        .map(<[u8]>::trim_ascii)
        .filter(|key| !key.is_empty())
}

/// Returns the password of `Authorization: Basic` (RFC 7617); `None` if there is none, or if it is empty.
pub(crate) fn basic_password(headers: &HeaderMap) -> Option<Vec<u8>> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.as_bytes().split_at_checked(6)?;
    let is_basic = scheme.eq_ignore_ascii_case(b"basic ");
    let pair = BASE64.decode(token.trim_ascii()).ok().filter(|_| is_basic)?;
    let colon = pair.iter().position(|byte| *byte == b':')?;
    Some(pair[colon + 1..].to_vec()).filter(|password| !password.is_empty())
}

fn bearer_token(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
}

/// Returns the address of the client: the peer, or, if the peer is a `trusted` proxy, the last address in
/// `x-forwarded-for` that is not trusted. An IPv6 address is reduced to its /64, the prefix that one household or
/// host usually gets.
pub(crate) fn client_address(headers: &HeaderMap, peer: IpAddr, trusted: impl Fn(&IpAddr) -> bool) -> IpAddr {
    let mut address = peer.to_canonical();
    let lines: Vec<&HeaderValue> = headers.get_all("x-forwarded-for").iter().collect();
    let hops = lines.iter().rev().flat_map(|line| line.as_bytes().rsplit(|b| *b == b','));
    for hop in hops {
        if !trusted(&address) {
            break;
        }
        // A hop that is not an address ends the chain: the entries before it cannot be trusted.
        let Some(next) = hop_address(hop) else { break };
        address = next.to_canonical();
    }
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() >> 64 << 64).into()),
    }
}

/// Parses one hop in `x-forwarded-for`. Proxies write an address bare, with a port (`9.9.9.1:80`), in brackets
/// (`[2001:db8::1]:443`), or quoted, as in `Forwarded` (RFC 7239). The port is dropped: it differs for each connection.
fn hop_address(hop: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(hop).ok()?.trim_ascii();
    let text = text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(text);
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    match text.strip_prefix('[').and_then(|t| t.strip_suffix(']')) {
        Some(v6) => v6.parse().ok().map(IpAddr::V6),
        None => text.parse().ok().map(|address: SocketAddr| address.ip()),
    }
}

/// Returns the client's request id if it is 1 to 128 visible ASCII characters.
pub(crate) fn request_id(headers: &HeaderMap) -> Option<&HeaderValue> {
    headers.get(X_REQUEST_ID).filter(|id| is_id(id))
}

fn is_id(id: &HeaderValue) -> bool {
    (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
}

/// Creates a request id: `random` as 32 hexadecimal digits.
pub(crate) fn new_request_id(random: u128) -> HeaderValue {
    let mut text = [0; 32];
    for (i, digit) in text.iter_mut().enumerate() {
        *digit = b"0123456789abcdef"[(random >> (4 * i) & 15) as usize];
    }
    // Clones share this one allocation.
    HeaderValue::from_maybe_shared(Bytes::from_owner(text)).unwrap_or(HeaderValue::from_static("0"))
}

/// Writes a number as a header value. The most common values need no allocation.
pub(crate) fn number(n: impl Into<u64>) -> HeaderValue {
    const COMMON: [&str; 4] = ["0", "1", "2", "3"];
    let n = n.into();
    match usize::try_from(n).ok().and_then(|n| COMMON.get(n)) {
        Some(text) => HeaderValue::from_static(text),
        None => HeaderValue::from_str(itoa::Buffer::new().format(n)).unwrap_or(HeaderValue::from_static("0")),
    }
}

/// Writes a time as OpenAI does, rounded up to the millisecond: `2.5s`.
pub(crate) fn reset(time: Nanos) -> HeaderValue {
    let millis = time.div_ceil(MILLI);
    if millis == 0 {
        return HeaderValue::from_static("0s");
    }
    let mut text = SmallVec::<[u8; 32]>::new();
    text.extend_from_slice(itoa::Buffer::new().format(millis / 1000).as_bytes());
    let part = millis % 1000;
    let digits = [part / 100, part / 10 % 10, part % 10].map(|digit| b'0' + digit as u8);
    if let Some(last) = digits.iter().rposition(|digit| *digit != b'0') {
        text.push(b'.');
        text.extend_from_slice(&digits[..=last]);
    }
    text.push(b's');
    HeaderValue::from_bytes(&text).unwrap_or(HeaderValue::from_static("0s"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn a_backend_gets_only_the_allowed_headers() {
        let client = map(&[
            ("authorization", "Bearer client"),
            ("cookie", "a=b"),
            ("x-api-key", "client"),
            ("api-key", "client"),
            ("x-goog-api-key", "client"),
            ("proxy-authorization", "x"),
            ("x-forwarded-for", "1.2.3.4"),
            ("connection", "keep-alive, TraceState"),
            ("te", "trailers"),
            ("accept-encoding", "gzip, br"),
            ("openai-organization", "org"),
            ("openai-project", "proj"),
            ("x-stainless-lang", "python"),
            ("openai-beta", "assistants=v2"),
            ("idempotency-key", "i"),
            ("traceparent", "00-1"),
            ("tracestate", "nominated"),
            ("user-agent", "OpenAI/Python"),
            ("content-type", "application/x-www-form-urlencoded"),
            ("x-other", "no"),
        ]);
        let mut to = HeaderMap::new();
        let (passing, rules) =
            (Passing { more: &["openai-beta"], ..Passing::default() }, HeaderRules::default());
        to_backend(&client, passing, &rules, |name, value| {
            to.append(name, value.clone());
        });
        let want = map(&[
            ("x-stainless-lang", "python"),
            ("openai-beta", "assistants=v2"),
            ("idempotency-key", "i"),
            ("traceparent", "00-1"),
            ("user-agent", "OpenAI/Python"),
            ("accept", "*/*"),
            ("content-type", "application/json"),
            ("accept-encoding", "identity"),
        ]);
        assert_eq!(to, want);
        let mut forwarded = HeaderMap::new();
        let passing = Passing { authorization: true, ..Passing::default() };
        to_backend(&client, passing, &rules, |name, value| {
            forwarded.append(name, value.clone());
        });
        assert_eq!(forwarded["authorization"], "Bearer client");
        assert_eq!(forwarded["openai-organization"], "org");
        assert!(!forwarded.contains_key("x-api-key") && !forwarded.contains_key("cookie"));
    }

    #[test]
    fn connection_may_nominate_the_credential() {
        let client = map(&[("authorization", "Bearer client"), ("connection", "Authorization")]);
        let mut to = HeaderMap::new();
        let passing = Passing { authorization: true, ..Passing::default() };
        to_backend(&client, passing, &HeaderRules::default(), |name, value| {
            to.append(name, value.clone());
        });
        assert!(!to.contains_key("authorization"));
    }

    #[test]
    fn a_client_gets_the_upstreams_headers_without_those_of_the_connection() {
        let mut upstream = map(&[
            ("content-type", "text/event-stream"),
            ("content-length", "3"),
            ("connection", "close, x-hop, content-length"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("trailer", "x"),
            ("set-cookie", "a"),
            ("set-cookie", "b"),
            ("alt-svc", "h3"),
            ("access-control-allow-origin", "*"),
            ("strict-transport-security", "max-age=9"),
            ("openai-processing-ms", "5"),
        ]);
        to_client(&mut upstream);
        let want = map(&[
            ("content-type", "text/event-stream"),
            ("content-length", "3"),
            ("openai-processing-ms", "5"),
        ]);
        assert_eq!(upstream, want);
    }

    #[test]
    fn the_bearer_token_comes_before_the_other_keys() {
        for (pairs, want) in [
            (&[("authorization", "Bearer a"), ("x-api-key", "b")][..], Some(&b"a"[..])),
            (&[("authorization", "bearer  a ")], Some(b"a")),
            (&[("authorization", "Basic a"), ("x-api-key", "b")], Some(b"b")),
            (&[("api-key", "c"), ("x-api-key", "b")], Some(b"c")),
            (&[("x-goog-api-key", "g")], Some(b"g")),
            (&[("authorization", "Bearer ")], None),
            (&[], None),
        ] {
            assert_eq!(credential(&map(pairs)), want, "{pairs:?}");
        }
    }

    #[test]
    fn repeated_credentials_are_found() {
        for name in ["authorization", "api-key", "x-api-key", "x-goog-api-key"] {
            assert!(!repeats_credential(&map(&[(name, "a"), ("x-a", "1"), ("x-a", "2")])), "{name}");
            assert!(repeats_credential(&map(&[(name, "a"), ("x-a", "1"), (name, "a")])), "{name}");
        }
        assert!(!repeats_credential(&map(&[("authorization", "a"), ("api-key", "a"), ("x-api-key", "a")])));
    }

    #[test]
    fn only_addresses_from_trusted_proxies_are_used() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let trusted = |a: &IpAddr| [address("10.0.0.1"), address("10.0.0.2")].contains(a);
        for (peer, forwarded, want) in [
            ("9.9.9.9", &["1.1.1.1"][..], "9.9.9.9"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["1.1.1.1"], "1.1.1.1"),
            ("10.0.0.1", &["6.6.6.6, 1.1.1.1 , 10.0.0.2"], "1.1.1.1"),
            ("10.0.0.1", &["6.6.6.6", "1.1.1.1, 10.0.0.2"], "1.1.1.1"),
            ("10.0.0.1", &["10.0.0.2"], "10.0.0.2"),
            ("10.0.0.1", &["6.6.6.6, unknown"], "10.0.0.1"),
            ("10.0.0.1", &["6.6.6.6,"], "10.0.0.1"),
            ("::ffff:10.0.0.1", &["::ffff:1.1.1.1"], "1.1.1.1"),
            ("10.0.0.1", &["9.9.9.1:1111"], "9.9.9.1"),
            ("10.0.0.1", &["6.6.6.6:1, 9.9.9.1:1111 , 10.0.0.2:80"], "9.9.9.1"),
            ("10.0.0.1", &["[2001:db8::1]:443"], "2001:db8::"),
            ("10.0.0.1", &["[2001:db8::1]"], "2001:db8::"),
            ("10.0.0.1", &["[::ffff:1.1.1.1]:5"], "1.1.1.1"),
            ("10.0.0.1", &["\"[2001:db8::1]:443\", \"10.0.0.2\""], "2001:db8::"),
            ("10.0.0.1", &["\" 9.9.9.1:1111\""], "10.0.0.1"),
            ("10.0.0.1", &["\"9.9.9.1"], "10.0.0.1"),
            ("10.0.0.1", &["9.9.9.1:"], "10.0.0.1"),
            ("10.0.0.1", &["9.9.9.1:x"], "10.0.0.1"),
            ("10.0.0.1", &["9.9.9.1:65536"], "10.0.0.1"),
            ("10.0.0.1", &["[9.9.9.1]"], "10.0.0.1"),
            ("10.0.0.1", &["[2001:db8::1"], "10.0.0.1"),
            ("10.0.0.1", &["[2001:db8::1]443"], "10.0.0.1"),
            ("10.0.0.1", &["_hidden:80"], "10.0.0.1"),
            ("2001:db8:1:2:3:4:5:6", &[], "2001:db8:1:2::"),
        ] {
            let mut headers = HeaderMap::new();
            for line in forwarded {
                headers.append("x-forwarded-for", HeaderValue::from_static(line));
            }
            assert_eq!(
                client_address(&headers, address(peer), trusted),
                address(want),
                "{peer} {forwarded:?}"
            );
        }
    }

    #[test]
    fn only_a_valid_request_id_is_kept() {
        assert_eq!(request_id(&map(&[("x-request-id", "abc-1")])).unwrap(), "abc-1");
        for bad in ["", "a b", "\u{7f}"] {
            let mut headers = HeaderMap::new();
            if let Ok(value) = HeaderValue::from_str(bad) {
                headers.insert(X_REQUEST_ID, value);
            }
            assert_eq!(request_id(&headers), None, "{bad:?}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(X_REQUEST_ID, HeaderValue::from_str(&"x".repeat(129)).unwrap());
        assert_eq!(request_id(&headers), None);
        let id = |lines: &[(&'static str, &'static str)]| {
            let mut headers = map(lines);
            assert!(to_client(&mut headers).has_id);
            upstream_request_id(&headers)
        };
        assert_eq!(id(&[("request-id", "b"), ("x-request-id", "a")]).unwrap(), "a");
        assert_eq!(id(&[("request-id", "b")]).unwrap(), "b");
        assert_eq!(id(&[("request-id", "b c")]), None);
        assert_eq!(new_request_id(0x1f), "f1000000000000000000000000000000");
    }

    #[test]
    fn writes_a_reset_as_openai_does() {
        for (time, want) in [
            (0, "0s"),
            (1, "0.001s"),
            (2_500 * MILLI, "2.5s"),
            (1_050 * MILLI, "1.05s"),
            (120 * MILLI, "0.12s"),
            (60_000 * MILLI, "60s"),
        ] {
            assert_eq!(reset(time), want);
        }
    }
}

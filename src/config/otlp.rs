//! Reads `[otlp]`, and the variables of OpenTelemetry where the file says nothing.
//!
//! The variables are those of the OpenTelemetry Protocol Exporter and of the general SDK configuration.

use http::{HeaderName, HeaderValue};

use crate::config::money::amount;
use crate::config::range::Range;
use crate::config::text::quoted;
use crate::config::toml_reader::Section;
use crate::config::url::BaseUrl;
use crate::http1::header_rules::is_reserved;
use crate::http1::percent::percent_decoded;

/// All traces, in millionths.
const ALL: u32 = 1_000_000;

/// The path of the traces, below the base URL of the collector.
const TRACES: &str = "/v1/traces";

/// The protocol of OTLP that Zap speaks.
const PROTOCOL: &str = "http/protobuf";

const SERVICE_NAME: &str = "service.name";

/// Most attributes of the resource, and headers.
const MAX_PAIRS: usize = 64;

/// `[otlp]`: where traces go, and how many.
#[derive(Clone, Debug, PartialEq)]
pub struct Otlp {
    /// The URL that takes traces, with its whole path.
    pub url: BaseUrl,
    /// Headers of each request to it; the values are marked sensitive.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The share of the traces that begin here and are recorded, in millionths: 0 to 1000000.
    pub sample_millionths: u32,
    /// The attributes of the resource; `service.name` is one of them.
    pub resource: Vec<(String, String)>,
}

/// `[otlp]` as the file and the environment have it.
pub(super) struct ReadOtlp {
    /// `None`: no traces.
    pub(super) otlp: Option<Otlp>,
    /// Whether the text itself contains a value of a header.
    pub(super) inline_key: bool,
}

/// Reads the section. The file beats the environment, key by key.
pub(super) fn otlp(t: &mut Section<'_, '_>) -> ReadOtlp {
    let [has_endpoint, has_headers] = ["endpoint", "headers"].map(|key| t.line_of(key).is_some());
    let of_file = file_endpoint(t);
    let url = if has_endpoint { of_file } else { env_endpoint(t) };
    let (mut headers, inline_key) = file_headers(t);
    if !has_headers && url.is_some() {
        headers = env_headers(t);
    }
    let ratio = amount(t, "sample_ratio", Range::new(0, u64::from(ALL)));
    let sample_millionths = ratio.and_then(|ratio| u32::try_from(ratio).ok()).unwrap_or(ALL);
    let otlp = url.map(|url| Otlp { url, headers, sample_millionths, resource: resource(t) });
    ReadOtlp { otlp, inline_key }
}

/// Reads `endpoint`: the base of the collector.
fn file_endpoint(t: &mut Section<'_, '_>) -> Option<BaseUrl> {
    let text = t.text("endpoint")?;
    match collector(&text.value, true) {
        Ok(url) => Some(url),
        Err(what) => {
            let found = match text.shown().filter(|_| !text.is_variable()) {
                Some(shown) => format!("is {shown}, which {what}"),
                None => what.to_owned(),
            };
            t.fault_of(&text, &found);
            None
        }
    }
}

/// The URL for traces of a collector. `is_base`: the path for traces is still to be added.
fn collector(text: &str, is_base: bool) -> Result<BaseUrl, &'static str> {
    if text.contains('?') {
        return Err("has a query; must have only a scheme, a host, a port and a path");
    }
    if text.contains('@') {
        return Err("has a user or a password; must have none, a credential belongs in `otlp.headers`");
    }
    let mut url = BaseUrl::parse(text)?;
    if is_base && !url.path.ends_with(TRACES) {
        url.path.push_str(TRACES);
    }
    Ok(url)
}

/// The value of a variable; an empty one counts as unset.
fn variable(t: &Section<'_, '_>, name: &str) -> Option<String> {
    (t.env)(name).filter(|value| !value.trim().is_empty())
}

/// Records a fault of a variable: `what` follows its name. `key`: the key that beats it.
fn variable_fault(t: &Section<'_, '_>, key: &str, name: &str, what: &str) {
    t.fault(t.line(), key, &format!("is not set, and the environment variable `{name}` {what}"));
}

fn env_endpoint(t: &Section<'_, '_>) -> Option<BaseUrl> {
    const SOURCES: [(&str, bool); 2] =
        [("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", false), ("OTEL_EXPORTER_OTLP_ENDPOINT", true)];
    if is_disabled(t) {
        return None;
    }
    let set = |(name, is_base)| Some((name, is_base, variable(t, name)?));
    let (name, is_base, value) = SOURCES.into_iter().find_map(set)?;
    for name in ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"] {
        let Some(protocol) = variable(t, name) else { continue };
        if protocol.trim() != PROTOCOL {
            let what = format!(
                "{}; must be {PROTOCOL:?}, the only protocol that Zap speaks: set it, or `otlp.endpoint`, or \
                 `OTEL_SDK_DISABLED=true` for no traces",
                found(&protocol)
            );
            variable_fault(t, "endpoint", name, &what);
            return None;
        }
        break;
    }
    match collector(value.trim(), is_base) {
        Ok(url) => Some(url),
        Err(what) => {
            let found = quoted(&value).map_or(String::new(), |shown| format!("is {shown}, which "));
            variable_fault(t, "endpoint", name, &format!("{found}{what}"));
            None
        }
    }
}

/// The first half of a message about an invalid value of a variable.
fn found(value: &str) -> String {
    quoted(value).map_or("is not valid".to_owned(), |shown| format!("is {shown}"))
}

/// Whether the environment switches traces off that it would switch on.
fn is_disabled(t: &Section<'_, '_>) -> bool {
    const NAME: &str = "OTEL_SDK_DISABLED";
    let Some(value) = variable(t, NAME) else { return false };
    let is = |word| value.trim().eq_ignore_ascii_case(word);
    if !is("true") && !is("false") {
        variable_fault(t, "endpoint", NAME, &format!("{}; must be \"true\" or \"false\"", found(&value)));
    }
    !is("false")
}

const REPEATED: &str = "repeats a header; must be different names, and case does not count";

/// Reads `headers`. Returns them, and whether the text itself contains a value.
fn file_headers(t: &mut Section<'_, '_>) -> (Vec<(HeaderName, HeaderValue)>, bool) {
    let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
    let mut is_inline = false;
    for (name, value) in t.pairs("headers").unwrap_or_default() {
        is_inline |= !value.is_variable();
        match header(&name.value, &value.value) {
            Err(what) => t.fault_of(&value, what),
            Ok((name, _)) if headers.iter().any(|(other, _)| *other == name) => {
                t.fault_of(&value, REPEATED);
            }
            Ok(header) => headers.push(header),
        }
    }
    (headers, is_inline)
}

fn env_headers(t: &Section<'_, '_>) -> Vec<(HeaderName, HeaderValue)> {
    const SOURCES: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"];
    let set = |name| Some((name, variable(t, name)?));
    let Some((source, value)) = SOURCES.into_iter().find_map(set) else { return Vec::new() };
    let headers = pairs(&value).and_then(|pairs| {
        let headers: Result<Vec<_>, _> = pairs.iter().map(|(name, value)| header(name, value)).collect();
        let headers = headers.map_err(str::to_owned)?;
        let repeats = |at: usize| headers[..at].iter().any(|(name, _)| *name == headers[at].0);
        match (0..headers.len()).any(repeats) {
            true => Err(REPEATED.to_owned()),
            false => Ok(headers),
        }
    });
    headers.unwrap_or_else(|what| {
        variable_fault(t, "headers", source, &what);
        Vec::new()
    })
}

/// A header of the requests to the collector.
fn header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), &'static str> {
    const BAD_NAME: &str = "has a header that cannot be set; must be the name of a header that Zap does not set itself, \
                            such as `authorization`";
    const BAD_VALUE: &str = "has a value that cannot be sent; must be visible ASCII and spaces";
    let name = HeaderName::from_bytes(name.as_bytes()).ok().filter(|name| !is_reserved(name.as_str()));
    let name = name.ok_or(BAD_NAME)?;
    let is_plain = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
    let mut value = HeaderValue::from_str(value).ok().filter(|v| v.as_bytes().iter().all(|b| is_plain(*b)));
    value.iter_mut().for_each(|value| value.set_sensitive(true));
    Ok((name, value.ok_or(BAD_VALUE)?))
}

/// The attributes of the resource.
fn resource(t: &Section<'_, '_>) -> Vec<(String, String)> {
    const ATTRIBUTES: &str = "OTEL_RESOURCE_ATTRIBUTES";
    let attributes = variable(t, ATTRIBUTES).map_or(Ok(Vec::new()), |value| pairs(&value));
    let mut attributes = attributes.unwrap_or_else(|what| {
        // No key of the file beats it.
        t.sink().fault(t.line(), format!("the environment variable `{ATTRIBUTES}` {what}"));
        Vec::new()
    });
    if let Some(name) = variable(t, "OTEL_SERVICE_NAME") {
        attributes.retain(|(key, _)| key != SERVICE_NAME);
        attributes.push((SERVICE_NAME.to_owned(), name));
    }
    let mut default = |key: &str, value: &str| {
        if attributes.iter().all(|(known, _)| known != key) {
            attributes.push((key.to_owned(), value.to_owned()));
        }
    };
    default(SERVICE_NAME, "zap");
    default("service.version", env!("CARGO_PKG_VERSION"));
    attributes
}

/// Reads `name=value,name=value`, where the values are percent-encoded (W3C Baggage).
///
/// # Errors
/// Returns a message that contains none of the values.
fn pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    const ALLOWED: &str = "must be `name=value`, separated by commas, with `%2C` for a comma in a value";
    let mut pairs: Vec<(String, String)> = Vec::new();
    for (index, pair) in text.split(',').map(str::trim).enumerate().filter(|(_, pair)| !pair.is_empty()) {
        let malformed = || format!("is malformed at item {}; {ALLOWED}", index + 1);
        let (name, value) = pair.split_once('=').ok_or_else(malformed)?;
        let decoded = |text: &str| String::from_utf8(percent_decoded(text.trim())?).ok();
        let (name, value) = (decoded(name), decoded(value));
        let (Some(name), Some(value)) = (name.filter(|name| !name.is_empty()), value) else {
            return Err(malformed());
        };
        pairs.retain(|(known, _)| *known != name);
        pairs.push((name, value));
    }
    match pairs.len() {
        ..=MAX_PAIRS => Ok(pairs),
        n => Err(format!("has {n} items; must have at most {MAX_PAIRS}")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    const BACKEND: &str = "[[backends]]\nurl = \"http://a\"\nweight = 1\n";

    fn read(text: &str, env: &[(&str, &str)]) -> Result<Option<Otlp>, String> {
        let env = |name: &str| env.iter().find(|(known, _)| *known == name).map(|(_, v)| (*v).to_owned());
        let config = Config::parse(&format!("{text}\n{BACKEND}"), "f", Path::new(""), &env);
        config.map(|config| config.otlp.map(|otlp| Otlp::clone(&otlp))).map_err(|faults| faults.to_string())
    }

    fn url(otlp: &Otlp) -> String {
        let scheme = if otlp.url.https { "https" } else { "http" };
        format!("{scheme}://{}{}", otlp.url.authority, otlp.url.path)
    }

    #[test]
    fn without_an_endpoint_there_are_no_traces() {
        for text in ["", "[otlp]", "[otlp]\nsample_ratio = 0.5\nheaders = { a = \"b\" }"] {
            assert_eq!(
                read(text, &[("OTEL_SERVICE_NAME", "x"), ("OTEL_EXPORTER_OTLP_HEADERS", "?")]),
                Ok(None)
            );
        }
    }

    #[test]
    fn the_file_beats_the_environment_key_by_key() {
        let base = ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://env:1/x/");
        let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://traces:2");
        let off = ("OTEL_SDK_DISABLED", "TRUE");
        let file = "[otlp]\nendpoint = \"http://file:4318\"";
        for (text, env, want) in [
            (file, &[base, traces, off][..], Some("http://file:4318/v1/traces")),
            ("[otlp]\nendpoint = \"http://f/v1/traces\"", &[], Some("http://f/v1/traces")),
            ("[otlp]\nendpoint = \"https://f:443/otlp/\"", &[], Some("https://f/otlp/v1/traces")),
            ("", &[base], Some("https://env:1/x/v1/traces")),
            // The variable for traces is the whole URL.
            ("", &[base, traces], Some("http://traces:2")),
            ("", &[base, off], None),
            ("", &[base, ("OTEL_SDK_DISABLED", "false")], Some("https://env:1/x/v1/traces")),
            (
                "",
                &[base, ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")],
                Some("https://env:1/x/v1/traces"),
            ),
        ] {
            assert_eq!(read(text, env).unwrap().as_ref().map(url).as_deref(), want, "{text} {env:?}");
        }
        let headers = |text: &str, env: &[(&str, &str)]| {
            let headers = read(text, env).unwrap().unwrap().headers;
            assert!(headers.iter().all(|(_, value)| value.is_sensitive()));
            headers
                .iter()
                .map(|(k, v)| format!("{k}: {}", v.to_str().unwrap()))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let general = ("OTEL_EXPORTER_OTLP_HEADERS", "Api-Key = a%20b%2Cc , x-tenant=1,");
        let special = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x=2");
        assert_eq!(headers(file, &[general]), "api-key: a b,c, x-tenant: 1");
        assert_eq!(headers(file, &[general, special]), "x: 2");
        assert_eq!(headers(&format!("{file}\nheaders = {{ Y = \"3\" }}"), &[general, special]), "y: 3");
    }

    #[test]
    fn the_ratio_and_the_resource_have_defaults() {
        let file = "[otlp]\nendpoint = \"http://a\"\n";
        for (text, want) in [("", ALL), ("sample_ratio = 0", 0), ("sample_ratio = 0.25", 250_000)] {
            let otlp = read(&format!("{file}{text}"), &[]).unwrap().unwrap();
            assert_eq!(otlp.sample_millionths, want);
        }
        let version = env!("CARGO_PKG_VERSION");
        for (env, want) in [
            (&[][..], format!("service.name=zap service.version={version}")),
            (
                &[("OTEL_RESOURCE_ATTRIBUTES", "service.name=a,k=%C3%A9")],
                format!("service.name=a k=\u{e9} service.version={version}"),
            ),
            (
                &[
                    ("OTEL_RESOURCE_ATTRIBUTES", "service.name=a,service.version=2"),
                    ("OTEL_SERVICE_NAME", "b"),
                ],
                "service.version=2 service.name=b".to_owned(),
            ),
        ] {
            let resource = read(file, env).unwrap().unwrap().resource;
            let text: Vec<_> = resource.iter().map(|(key, value)| format!("{key}={value}")).collect();
            assert_eq!(text.join(" "), want);
        }
    }

    #[test]
    fn faults_name_the_place_and_what_is_allowed_and_no_secret() {
        let set = "[otlp]\nendpoint = \"http://a\"\n";
        for (text, env, want) in [
            (
                "[otlp]\nendpoint = \"collector:4318\"".to_owned(),
                &[][..],
                "f:2: `otlp.endpoint` is \"collector:4318\", which has no valid scheme; must begin with `http://` or `https://`",
            ),
            (
                "[otlp]\nendpoint = \"http://u:sk-CANARY@a\"".to_owned(),
                &[],
                "f:2: `otlp.endpoint` has a user or a password; must have none, a credential belongs in `otlp.headers`",
            ),
            (
                "[otlp]\nendpoint = \"http://a?sk-CANARY\"".to_owned(),
                &[],
                "f:2: `otlp.endpoint` has a query; must have only a scheme, a host, a port and a path",
            ),
            (
                "[otlp]\nendpont = 1".to_owned(),
                &[],
                "f:2: unknown key `otlp.endpont`; did you mean `endpoint`?",
            ),
            (
                format!("{set}sample_ratio = 1.5"),
                &[],
                "f:3: `otlp.sample_ratio` is 1.5; must be from 0 to 1, with at most six decimals",
            ),
            (
                format!("{set}headers = {{ Host = \"sk-CANARY\" }}"),
                &[],
                "f:3: `otlp.headers.Host` has a header that cannot be set; must be the name of a header that Zap does \
                 not set itself, such as `authorization`",
            ),
            (
                format!("{set}headers = {{ a = \"sk-CANARY\\n\" }}"),
                &[],
                "f:3: `otlp.headers.a` has a value that cannot be sent; must be visible ASCII and spaces",
            ),
            (
                format!("{set}headers = {{ a = \"1\", A = \"2\" }}"),
                &[],
                "f:3: `otlp.headers.A` repeats a header; must be different names, and case does not count",
            ),
            (
                String::new(),
                &[("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318")],
                "f:1: `otlp.endpoint` is not set, and the environment variable `OTEL_EXPORTER_OTLP_ENDPOINT` is \
                 \"collector:4318\", which has no valid scheme; must begin with `http://` or `https://`",
            ),
            (
                String::new(),
                &[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
                "f:1: `otlp.endpoint` is not set, and the environment variable `OTEL_EXPORTER_OTLP_PROTOCOL` is \
                 \"grpc\"; must be \"http/protobuf\", the only protocol that Zap speaks: set it, or `otlp.endpoint`, \
                 or `OTEL_SDK_DISABLED=true` for no traces",
            ),
            (
                String::new(),
                &[("OTEL_SDK_DISABLED", "yes")],
                "f:1: `otlp.endpoint` is not set, and the environment variable `OTEL_SDK_DISABLED` is \"yes\"; must be \
                 \"true\" or \"false\"",
            ),
            (
                set.to_owned(),
                &[("OTEL_EXPORTER_OTLP_HEADERS", "a=1,sk-CANARY")],
                "f:1: `otlp.headers` is not set, and the environment variable `OTEL_EXPORTER_OTLP_HEADERS` is malformed \
                 at item 2; must be `name=value`, separated by commas, with `%2C` for a comma in a value",
            ),
            (
                set.to_owned(),
                &[("OTEL_EXPORTER_OTLP_HEADERS", "a=sk-CANARY%0A")],
                "f:1: `otlp.headers` is not set, and the environment variable `OTEL_EXPORTER_OTLP_HEADERS` has a value \
                 that cannot be sent; must be visible ASCII and spaces",
            ),
            (
                set.to_owned(),
                &[("OTEL_RESOURCE_ATTRIBUTES", "a=%zz")],
                "f:1: the environment variable `OTEL_RESOURCE_ATTRIBUTES` is malformed at item 1; must be `name=value`, \
                 separated by commas, with `%2C` for a comma in a value",
            ),
        ] {
            assert_eq!(read(&text, env), Err(want.to_owned()), "{text}");
        }
    }
}

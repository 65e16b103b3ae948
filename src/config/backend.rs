//! `[[backends]]`: every key by name, with its default and its range.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use http::{HeaderName, HeaderValue};

use crate::config::expand::expand;
use crate::config::models::{model, rules};
use crate::config::raw::{IN_FLIGHT, REQUESTS_PER_MINUTE, Surroundings};
use crate::config::toml_reader::{Number, Range, Section, Text};
use crate::config::url::is_path;
use crate::config::{Backend, BaseUrl, Secret};
use crate::json::members::same_but_for_case;

pub(super) const WEIGHT: Range<u32> = Range::new(0, 1000);
pub(super) const PRIORITY: Number<u32> = Range::new(0, 1000).or(0);
/// `health_path` where none is given.
pub(crate) const HEALTH_PATH: &str = "/health";
const CHAT_PATH: &str = "/v1/chat/completions";
/// Bytes of the longest backend name.
const MAX_NAME: usize = 64;
/// Bytes of the largest key file.
const MAX_KEY_FILE: usize = 16 << 10;
/// Members that are never dropped.
const KEPT: [&str; 3] = ["messages", "model", "stream"];
/// Headers to a backend that Zap sets itself, and those that speak of one connection or of a proxy on it.
const NOT_FOR_OPERATORS: [&str; 16] = [
    "accept",
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-request-id",
];

/// A backend whose name is not settled yet.
struct Unnamed {
    name: Option<Text>,
    backend: Backend,
    inline_key: bool,
}

/// The backends, and whether one has its key in the text.
pub(super) fn backends(root: &mut Section<'_, '_>, around: &Surroundings<'_>) -> (Vec<Backend>, bool) {
    let sink = root.sink();
    let line = root.line_of("backends");
    let faults = sink.count();
    let read = root.sections("backends", |t| backend(t, around));
    if read.as_ref().is_none_or(Vec::is_empty) && sink.count() == faults {
        let what = "no backend; at least one `[[backends]]` with `url` and `weight` is needed";
        sink.fault(line.unwrap_or(root.line()), what);
    }
    let read: Vec<Unnamed> = read.into_iter().flatten().flatten().collect();
    let inline_key = read.iter().any(|unnamed| unnamed.inline_key);

    let names = read.iter().filter_map(|unnamed| unnamed.name.as_ref());
    let mut lines: HashMap<&str, usize> = HashMap::new();
    for name in names {
        if let Some(first) = lines.insert(&name.value, name.line) {
            let what = format!(
                "`backends.name` at line {} is that of line {first} again; \
                 each backend needs a name of its own",
                name.line
            );
            sink.fault(name.line, what);
        }
    }
    let mut taken: HashSet<String> = lines.into_keys().map(str::to_owned).collect();
    let backends = read
        .into_iter()
        .map(|Unnamed { name, backend, .. }| {
            let name = match name {
                Some(name) => name.value,
                None => free_name(&backend.url.host, &mut taken),
            };
            Backend { name, ..backend }
        })
        .collect();
    (backends, inline_key)
}

/// `host` as a name that nobody has yet, and takes it.
fn free_name(host: &str, taken: &mut HashSet<String>) -> String {
    let host: String = host.chars().map(|c| if is_name_char(c) { c } else { '-' }).collect();
    let cut = |reserved: usize| host.chars().take(MAX_NAME - reserved).collect::<String>();
    let mut name = cut(0);
    let mut count = 1;
    while !taken.insert(name.clone()) {
        count += 1;
        let suffix = format!("-{count}");
        name = cut(suffix.len()) + &suffix;
    }
    name
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

/// A label; `None` is a noted fault, or none is given.
pub(super) fn name(t: &mut Section<'_, '_>) -> Option<Text> {
    let name = t.text("name")?;
    let valid = (1..=MAX_NAME).contains(&name.value.len()) && name.value.chars().all(is_name_char);
    if !valid {
        let what = format!("is no name; allowed: 1 to {MAX_NAME} of `A-Za-z0-9._-`");
        t.fault(name.line, "name", &what);
    }
    valid.then_some(name)
}

/// One backend; `None` has noted faults.
fn backend(t: &mut Section<'_, '_>, around: &Surroundings<'_>) -> Option<Unnamed> {
    let name = name(t);
    let url = t.required_text("url").and_then(|url| base_url(t, url, around));
    let weight = t.required("weight", WEIGHT);
    let health_path = path(t, "health_path", HEALTH_PATH);
    let (api_key, inline_key) = secret(t, "api_key", around);
    let auth_header = auth_header(t, inline_key.is_some());
    let key_header = inline_key.is_some().then(|| auth_header.clone().unwrap_or(http::header::AUTHORIZATION));
    let extra_headers = extra_headers(t, key_header.as_ref(), around);
    let drop_fields = drop_fields(t);
    let models = rules(t);
    let default_model = model(t, "default_model");
    let chat_path = path(t, "chat_path", CHAT_PATH);
    let priority = t.number("priority", PRIORITY);
    let ca_file = ca_file(t, around);
    let max_in_flight = t.optional("max_in_flight", IN_FLIGHT);
    let requests_per_minute = t.optional("requests_per_minute", REQUESTS_PER_MINUTE);
    let forward_line = t.line_of("forward_authorization");
    let forward_authorization = t.boolean("forward_authorization", false);
    if forward_authorization && inline_key.is_some() {
        let what = "is true beside an `api_key`; allowed: one of the two";
        t.fault(forward_line.unwrap_or(t.line()), "forward_authorization", what);
    }
    Some(Unnamed {
        name,
        inline_key: inline_key.unwrap_or(false),
        backend: Backend {
            name: String::new(),
            url: url?,
            weight: weight?,
            health_path,
            api_key,
            auth_header,
            extra_headers,
            drop_fields,
            models,
            default_model,
            chat_path,
            priority,
            ca_file,
            max_in_flight,
            requests_per_minute,
            forward_authorization,
        },
    })
}

fn base_url(t: &Section<'_, '_>, url: Text, around: &Surroundings<'_>) -> Option<BaseUrl> {
    let expanded = expanded(t, "url", &url, around)?;
    BaseUrl::parse(&expanded).map_err(|what| t.fault(url.line, "url", what)).ok()
}

fn path(t: &mut Section<'_, '_>, key: &'static str, default: &str) -> String {
    let Some(Text { value, line }) = t.text(key) else {
        return default.to_owned();
    };
    let (path, query) = value.split_once('?').unwrap_or((&value, "q"));
    let is_query = !query.is_empty() && query.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#');
    if !is_path(path) || !is_query {
        let what = "is no path; allowed: `/` and visible ASCII without `#`, and a query behind `?`";
        t.fault(line, key, what);
    }
    value
}

/// The header that carries the key, bare, in place of `Authorization: Bearer`. It may be `Authorization` too: some
/// gateways expect the key there without a scheme.
fn auth_header(t: &mut Section<'_, '_>, has_key: bool) -> Option<HeaderName> {
    let Text { value, line } = t.text("auth_header")?;
    let name = HeaderName::from_bytes(value.as_bytes()).ok();
    let name = name.filter(|name| !NOT_FOR_OPERATORS.contains(&name.as_str()));
    if name.is_none() {
        let what = "is no header that may carry a key; allowed: a header name such as `api-key` \
                    that Zap does not set itself";
        t.fault(line, "auth_header", what);
    }
    if !has_key {
        t.fault(line, "auth_header", "stands without an `api_key`; set both or neither");
    }
    name
}

/// Headers that this provider wants beside Zap's own, in place of the client's of the same name.
fn extra_headers(
    t: &mut Section<'_, '_>,
    key_header: Option<&HeaderName>,
    around: &Surroundings<'_>,
) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
    for (name, value) in t.pairs("extra_headers").unwrap_or_default() {
        let name = HeaderName::from_bytes(name.value.as_bytes()).ok();
        let name = name.filter(|n| !NOT_FOR_OPERATORS.contains(&n.as_str()) && Some(n) != key_header);
        if name.is_none() {
            let what = "holds what is no header that may be added; allowed: header names except those that \
                        Zap sets itself and those of one connection";
            t.fault(value.line, "extra_headers", what);
        }
        if name.as_ref().is_some_and(|name| headers.iter().any(|(other, _)| other == name)) {
            let what = "holds a header twice; header names that differ in case alone are the same";
            t.fault(value.line, "extra_headers", what);
        }
        let Some(expanded) = expanded(t, "extra_headers", &value, around) else { continue };
        match (name, HeaderValue::from_str(&expanded)) {
            (Some(name), Ok(mut text)) => {
                text.set_sensitive(true);
                headers.push((name, text));
            }
            (_, Err(_)) => {
                let what = "holds a value with a control character; allowed: visible ASCII and spaces";
                t.fault(value.line, "extra_headers", what);
            }
            (None, Ok(_)) => {}
        }
    }
    headers
}

/// Top-level members that this provider refuses.
fn drop_fields(t: &mut Section<'_, '_>) -> Vec<Box<str>> {
    // In another case Zap refuses them, since some providers take them for the same.
    let is_kept = |name: &str| KEPT.iter().any(|kept| same_but_for_case(kept.as_bytes(), name.as_bytes()));
    let mut fields: Vec<Box<str>> = Vec::new();
    for Text { value, line } in t.texts("drop_fields").unwrap_or_default() {
        if !(1..=MAX_NAME).contains(&value.len()) || is_kept(&value) {
            let what = format!(
                "holds what cannot be dropped; allowed: 1 to {MAX_NAME} bytes, not `{}`, whatever their case",
                KEPT.join("`, `")
            );
            t.fault(line, "drop_fields", &what);
        } else if !fields.iter().any(|field| **field == *value) {
            fields.push(value.into());
        }
    }
    fields
}

/// A key, and, if one is given at all, whether it is in the text itself.
pub(super) fn secret(
    t: &mut Section<'_, '_>,
    name: &'static str,
    around: &Surroundings<'_>,
) -> (Option<Secret>, Option<bool>) {
    let line = t.line_of(name).unwrap_or(t.line());
    let (key, inline) = match t.text_or_section(name, |t| key_file(t, around)) {
        None => return (None, None),
        // A key that comes whole from the environment does not stand in the file.
        Some(Err(text)) => {
            let from_outside =
                text.value.starts_with("${") && text.value.find('}') == Some(text.value.len() - 1);
            (expanded(t, name, &text, around), !from_outside)
        }
        Some(Ok(key)) => (key, false),
    };
    let secret = key.and_then(|key| Secret::new(&key).map_err(|what| t.fault(line, name, what)).ok());
    (secret, Some(inline))
}

/// The content of `{ file = "path" }`, its last newline dropped.
fn key_file(t: &mut Section<'_, '_>, around: &Surroundings<'_>) -> Option<String> {
    let Text { value, line } = t.required_text("file")?;
    let read = open_regular(&around.base.join(value)).and_then(|file| {
        let mut key = String::new();
        file.take(MAX_KEY_FILE as u64 + 1).read_to_string(&mut key)?;
        Ok(key)
    });
    match read {
        Ok(key) if key.len() > MAX_KEY_FILE => {
            let what = format!("is too large; allowed: up to {MAX_KEY_FILE} bytes");
            t.fault(line, "file", &what);
            None
        }
        Ok(mut key) => {
            if key.ends_with('\n') {
                key.pop();
                if key.ends_with('\r') {
                    key.pop();
                }
            }
            Some(key)
        }
        Err(error) => {
            t.fault(line, "file", &unreadable(&error));
            None
        }
    }
}

fn ca_file(t: &mut Section<'_, '_>, around: &Surroundings<'_>) -> Option<PathBuf> {
    let Text { value, line } = t.text("ca_file")?;
    let path = around.base.join(value);
    match open_regular(&path) {
        Ok(_) => Some(path),
        Err(error) => {
            t.fault(line, "ca_file", &unreadable(&error));
            None
        }
    }
}

/// Opens a file, but nothing whose opening or reading could block for ever.
fn open_regular(path: &Path) -> io::Result<File> {
    if !path.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    File::open(path)
}

/// The kind alone: a path could be a key in the wrong place.
fn unreadable(error: &io::Error) -> String {
    let kind = match error.kind() {
        io::ErrorKind::InvalidData => "not text".to_owned(),
        io::ErrorKind::InvalidInput => "not a regular file".to_owned(),
        kind => kind.to_string(),
    };
    format!(
        "cannot be read ({kind}); a readable file is needed, \
         relative to the configuration's directory"
    )
}

fn expanded(t: &Section<'_, '_>, key: &str, text: &Text, around: &Surroundings<'_>) -> Option<String> {
    expand(&text.value, around.env)
        .map_err(|faults| {
            for what in faults {
                t.fault(text.line, key, &what);
            }
        })
        .ok()
}

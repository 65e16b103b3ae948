//! `[[client_keys]]`: the clients that may send requests.

use std::collections::HashMap;

use ring::digest::{SHA256, digest};

use crate::config::ClientKey;
use crate::config::common::{Context, REQUESTS_PER_MINUTE, name, secret};
use crate::config::models::pattern;
use crate::config::toml_reader::{Section, Text};

/// The name of requests without a client key.
pub(crate) const ANONYMOUS: &str = "anonymous";

/// Reads the client keys. Returns them, and whether the text itself contains a key.
pub(super) fn clients(root: &mut Section<'_, '_>, ctx: &Context<'_>) -> (Vec<ClientKey>, bool) {
    let read = root.sections("client_keys", |t| client(t, ctx));
    let read: Vec<(ClientKey, usize, bool)> = read.into_iter().flatten().flatten().collect();
    let (mut names, mut digests) = (HashMap::new(), HashMap::new());
    for (client, line, _) in &read {
        if let Some(first) = names.insert(client.name.as_str(), line) {
            let what = "each entry must have its own name";
            root.sink().fault(*line, format!("`client_keys.name` repeats the name at line {first}; {what}"));
        }
        if let Some(first) = digests.insert(client.digest, line) {
            let what = "each entry must have its own key";
            root.sink().fault(*line, format!("`client_keys` repeats the key at line {first}; {what}"));
        }
    }
    let inline = read.iter().any(|(_, _, inline)| *inline);
    (read.into_iter().map(|(client, ..)| client).collect(), inline)
}

/// Reads one client key. Returns the client, the line of its table, and whether the text itself contains the key.
/// Returns `None` if a required entry is missing or not valid: then a fault is recorded.
fn client(t: &mut Section<'_, '_>, ctx: &Context<'_>) -> Option<(ClientKey, usize, bool)> {
    let line = t.line();
    if t.line_of("name").is_none() {
        t.fault(line, "name", "is missing; a string is required");
    }
    let name_line = t.line_of("name");
    let name = name(t);
    if name.as_ref().is_some_and(|name| name.value == ANONYMOUS) {
        let what = "is \"anonymous\", the name of requests without a key; must be another name";
        t.fault(name_line.unwrap_or(line), "name", what);
    }
    let hash_line = t.line_of("sha256");
    let (key, inline) = secret(t, "key", ctx);
    let hash = t.text("sha256").and_then(|Text { value, line }| {
        let hash = parse_hex(&value);
        if hash.is_none() {
            t.fault(line, "sha256", "is not a SHA-256; must be 64 hexadecimal digits");
        }
        hash
    });
    match (inline, hash_line) {
        (None, None) => t.fault(line, "key", "is missing; either `key` or `sha256` is required"),
        (Some(_), Some(line)) => {
            t.fault(line, "sha256", "is set and `key` is set; must be only one of the two");
        }
        _ => {}
    }
    let requests_per_minute = t.optional("requests_per_minute", REQUESTS_PER_MINUTE);
    let models = t.texts("models").map(|texts| texts.iter().filter_map(|text| pattern(t, text)).collect());
    let key_digest = key.and_then(|key| digest(&SHA256, key.expose().as_bytes()).as_ref().try_into().ok());
    let digest = key_digest.or(hash)?;
    let client = ClientKey { name: name?.value, digest, requests_per_minute, models };
    Some((client, line, inline == Some(true)))
}

fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let digit = |b: u8| Some((b as char).to_digit(16)? as u8);
    let mut out = [0; 32];
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != out.len() || !rest.is_empty() {
        return None;
    }
    for (byte, [high, low]) in out.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(out)
}

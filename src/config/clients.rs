//! `[[client_keys]]`: the clients that may send requests.

use std::collections::HashMap;
use std::fmt;

use ring::digest::{SHA256, digest};

use crate::config::Budget;
use crate::config::common::{Context, IN_FLIGHT, PRIORITY, REQUESTS_PER_MINUTE, TOKENS_PER_MINUTE, name};
use crate::config::keys::read_key;
use crate::config::models::pattern;
use crate::config::money::budget;
use crate::config::toml_reader::Section;
use crate::policy::pattern::Pattern;

/// The name of requests without a client key.
pub(crate) const ANONYMOUS: &str = "anonymous";

/// One `[[client_keys]]` entry.
#[derive(Clone, PartialEq)]
pub struct ClientKey {
    /// Unique label, 1 to 64 of `A-Za-z0-9._-`.
    pub name: String,
    /// SHA-256 of the key; the key itself is not kept. `None`: only `certificate` identifies the client.
    pub digest: Option<[u8; 32]>,
    /// The common name of the client's certificate. Never set if the listener does not ask for certificates.
    pub certificate: Option<String>,
    /// Overrides `rate_limit.requests_per_minute`.
    pub requests_per_minute: Option<u32>,
    /// Overrides `rate_limit.tokens_per_minute`: tokens in any 60 s, at least 1.
    pub tokens_per_minute: Option<u64>,
    /// Most requests of this client at once, at least 1.
    pub max_in_flight: Option<usize>,
    /// Waiting requests of clients with a lower value come first.
    pub priority: u32,
    /// Most that this client may spend; every model that it may name has a price.
    pub budget: Option<Budget>,
    /// The models that the client may name; `None`: all.
    pub models: Option<Vec<Pattern>>,
}

impl fmt::Debug for ClientKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientKey").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A client key and its place in the file.
struct ReadClient {
    client: ClientKey,
    /// Its table, as messages write it.
    place: String,
    /// The line of its table.
    line: usize,
    budget_line: usize,
    inline_key: bool,
}

/// Longest common name of a certificate, in bytes.
const MAX_COMMON_NAME: usize = 256;

/// All client keys.
pub(super) struct ReadClients {
    pub(super) clients: Vec<ClientKey>,
    /// The line of `budget`, by index of the client.
    pub(super) budget_lines: Vec<usize>,
    /// Whether the text itself contains a key.
    pub(super) inline_key: bool,
}

/// Reads the client keys. `has_client_ca`: the listener asks clients for certificates.
pub(super) fn clients(root: &mut Section<'_, '_>, ctx: &Context<'_>, has_client_ca: bool) -> ReadClients {
    let read = root.sections("client_keys", |t| client(t, ctx, has_client_ca));
    let read: Vec<ReadClient> = read.into_iter().flatten().flatten().collect();
    let (mut names, mut digests, mut certificates) = (HashMap::new(), HashMap::new(), HashMap::new());
    for ReadClient { client, place, line, .. } in &read {
        if let Some(first) = names.insert(client.name.as_str(), line) {
            let what = "each client key must have its own name";
            root.sink().fault(*line, format!("`{place}.name` repeats the name at line {first}; {what}"));
        }
        if let Some(first) = client.digest.and_then(|digest| digests.insert(digest, line)) {
            let what = "each client must have its own key";
            root.sink().fault(*line, format!("`{place}.key` repeats the key at line {first}; {what}"));
        }
        if let Some(first) = client.certificate.as_ref().and_then(|name| certificates.insert(name, line)) {
            let what = "each client must have its own certificate";
            let text = format!("`{place}.certificate` repeats the name at line {first}; {what}");
            root.sink().fault(*line, text);
        }
    }
    let inline_key = read.iter().any(|read| read.inline_key);
    let (clients, budget_lines) = read.into_iter().map(|read| (read.client, read.budget_line)).unzip();
    ReadClients { clients, budget_lines, inline_key }
}

/// Reads one client key. Returns `None` if a required entry is missing or not valid: then a fault is recorded.
fn client(t: &mut Section<'_, '_>, ctx: &Context<'_>, has_client_ca: bool) -> Option<ReadClient> {
    let line = t.line();
    if t.line_of("name").is_none() {
        t.missing("name", "a string");
    }
    let name = name(t);
    if let Some(name) = name.as_ref().filter(|name| name.value == ANONYMOUS) {
        t.fault_of(name, "is \"anonymous\", the name of requests without a key; must be another name");
    }
    let hash_line = t.line_of("sha256");
    let key = read_key(t, "key", ctx);
    let hash = t.text("sha256").and_then(|text| {
        let hash = parse_hex(&text.value);
        if hash.is_none() {
            let what = "is not a SHA-256; must be 64 hexadecimal digits: `printf %s KEY | sha256sum`";
            t.fault_of(&text, what);
        }
        hash
    });
    let has_certificate = t.line_of("certificate").is_some();
    let certificate = certificate(t, has_client_ca);
    match (key.is_set, hash_line) {
        (false, None) if has_certificate => {}
        (false, None) => t.missing("key", "`key`, `sha256` or `certificate`"),
        (true, Some(line)) => {
            t.fault(line, "sha256", "is set and `key` is set; must be only one of the two");
        }
        _ => {}
    }
    let requests_per_minute = t.limit("requests_per_minute", REQUESTS_PER_MINUTE);
    let tokens_per_minute = t.limit("tokens_per_minute", TOKENS_PER_MINUTE);
    let max_in_flight = t.limit("max_in_flight", IN_FLIGHT);
    let priority = t.number("priority", PRIORITY);
    let budget_line = t.line_of("budget").unwrap_or(line);
    let budget = budget(t);
    let models = t.texts("models").map(|texts| texts.iter().filter_map(|text| pattern(t, text)).collect());
    let key_digest =
        key.key.and_then(|key| digest(&SHA256, key.expose().as_bytes()).as_ref().try_into().ok());
    let digest = key_digest.or(hash);
    if digest.is_none() && certificate.is_none() {
        return None;
    }
    let client = ClientKey {
        name: name?.value,
        digest,
        certificate,
        requests_per_minute,
        tokens_per_minute,
        max_in_flight,
        priority,
        budget,
        models,
    };
    Some(ReadClient { client, place: t.place().to_owned(), line, budget_line, inline_key: key.is_inline })
}

/// Reads `certificate`: the common name of the client's certificate.
fn certificate(t: &mut Section<'_, '_>, has_client_ca: bool) -> Option<String> {
    let name = t.text("certificate")?;
    if !has_client_ca {
        let what = "is set, but no client is asked for a certificate; must be set with `client_ca` in \
                    `[[server.tls]]`, or not at all";
        t.fault_of(&name, what);
    }
    let is_valid =
        (1..=MAX_COMMON_NAME).contains(&name.value.len()) && !name.value.contains(char::is_control);
    if !is_valid {
        let allowed = format!(
            "must be the common name of the subject of a certificate: 1 to {MAX_COMMON_NAME} bytes without control \
             characters"
        );
        t.invalid(&name, &allowed);
    }
    is_valid.then_some(name.value)
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

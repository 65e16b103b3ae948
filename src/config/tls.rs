//! `[[server.tls]]` and `[[admin.tls]]`: the certificates of a listener, and the authorities of its clients.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};

use crate::config::certificate::CertificateFacts;
use crate::config::common::Context;
use crate::config::identity::{Identity, certificates, identity};
use crate::config::toml_reader::Section;

/// TLS of a listener. Equality compares the contents of the files.
#[derive(Clone)]
pub struct ServerTls {
    /// The entries, in the order of the file: at least one.
    pub entries: Vec<TlsEntry>,
    /// The settings for rustls. They hold the keys of session tickets.
    pub(crate) rustls: Arc<ServerConfig>,
}

/// One certificate of a listener: an entry of `[[server.tls]]` or `[[admin.tls]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct TlsEntry {
    identity: Identity,
    /// Its names and its validity.
    pub facts: CertificateFacts,
    /// The authorities that sign the certificates of clients. Either all entries have some, or none has.
    authorities: Vec<CertificateDer<'static>>,
}

impl PartialEq for ServerTls {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").field("entries", &self.entries).finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Whether each client must show a certificate.
    pub fn verifies_clients(&self) -> bool {
        self.entries.iter().any(|entry| !entry.authorities.is_empty())
    }
}

/// When the certificates of `listeners` end, by their names: the first name of each certificate, and seconds since
/// 1970. Of two certificates with one name, the one that ends first.
pub(crate) fn ends<'t>(listeners: impl Iterator<Item = &'t ServerTls>) -> Vec<(&'t str, i64)> {
    let mut ends: Vec<(&str, i64)> = Vec::new();
    for TlsEntry { facts, .. } in listeners.flat_map(|tls| &tls.entries) {
        let name = facts.names.first().map_or("", String::as_str);
        match ends.iter_mut().find(|(known, _)| *known == name) {
            Some((_, end)) => *end = facts.ends.min(*end),
            None => ends.push((name, facts.ends)),
        }
    }
    ends
}

/// TLS as the file has it.
#[derive(Default)]
pub(super) struct ReadTls {
    /// `None` if it is not set or not valid: then a fault is recorded.
    pub(super) tls: Option<ServerTls>,
    /// Whether an entry has `client_ca`, valid or not.
    pub(super) has_client_ca: bool,
}

/// Reads the `tls` of a listener.
pub(super) fn server_tls(t: &mut Section<'_, '_>, ctx: &Context<'_>) -> ReadTls {
    let faults = t.sink().count();
    let mut client_ca = Vec::new();
    let read = t.sections("tls", |t| {
        client_ca.push(t.line_of("client_ca").is_some());
        (t.line(), entry(t, ctx))
    });
    let read = read.unwrap_or_default();
    let has_client_ca = client_ca.contains(&true);
    if let (Some(with), Some(without)) =
        (client_ca.iter().position(|has| *has), client_ca.iter().position(|has| !*has))
    {
        let line = read.get(without).map_or(t.line(), |(line, _)| *line);
        let other = t.place_of("tls");
        let what = format!("is missing, and `{other}[{with}]` has it; all entries must have it, or none");
        t.fault(line, &format!("tls[{without}].client_ca"), &what);
    }
    let line = read.first().map_or(t.line(), |(line, _)| *line);
    let entries: Vec<TlsEntry> = read.into_iter().filter_map(|(_, entry)| entry).collect();
    if t.sink().count() > faults || entries.is_empty() {
        return ReadTls { tls: None, has_client_ca };
    }
    let tls = match settings(&entries) {
        Ok(settings) => Some(ServerTls { entries, rustls: Arc::new(settings) }),
        Err(error) => {
            t.fault(
                line,
                "tls",
                &format!("cannot be used ({error}); must be certificates that rustls accepts"),
            );
            None
        }
    };
    ReadTls { tls, has_client_ca }
}

fn entry(t: &mut Section<'_, '_>, ctx: &Context<'_>) -> Option<TlsEntry> {
    let (cert, key) = (t.required_text("cert"), t.required_text("key"));
    let authorities = t.text("client_ca").map(|path| {
        let allowed = "must be a PEM file of the authorities that sign the certificates of clients";
        let found = certificates(t, &path, ctx, allowed)?;
        let mut store = RootCertStore::empty();
        if found.iter().any(|certificate| store.add(certificate.clone()).is_err()) {
            t.fault_of(&path, &format!("has an invalid certificate; {allowed}"));
            return None;
        }
        Some(found)
    });
    let (cert, key) = (cert?, key?);
    let identity = identity(t, &cert, &key, ctx)?;
    let Some(facts) = identity.chain.first().and_then(CertificateFacts::of) else {
        t.fault_of(&cert, "has an invalid certificate; must be a PEM file of a certificate and its issuers");
        return None;
    };
    let authorities = match authorities {
        Some(authorities) => authorities?,
        None => Vec::new(),
    };
    Some(TlsEntry { identity, facts, authorities })
}

/// The settings for rustls. A client may show a certificate of the authorities of any entry, since the client chooses
/// the entry by the name that it sends.
fn settings(entries: &[TlsEntry]) -> Result<ServerConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for authority in entries.iter().flat_map(|entry| &entry.authorities) {
        roots.add(authority.clone()).map_err(|e| e.to_string())?;
    }
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    let builder = match roots.is_empty() {
        true => builder.with_no_client_auth(),
        false => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|e| e.to_string())?)
        }
    };
    let mut settings = builder.with_cert_resolver(Arc::new(ByName::new(entries).map_err(|e| e.to_string())?));
    settings.alpn_protocols = vec![b"http/1.1".to_vec()];
    // A session is resumed at every worker, and none is kept in memory.
    settings.ticketer = rustls::crypto::ring::Ticketer::new().map_err(|e| e.to_string())?;
    Ok(settings)
}

/// Chooses the certificate by the name that the client sends.
#[derive(Debug)]
struct ByName {
    /// Without a name, and for an unknown one.
    first: Arc<CertifiedKey>,
    /// By the names of the certificates.
    named: HashMap<String, Arc<CertifiedKey>>,
}

impl ByName {
    fn new(entries: &[TlsEntry]) -> Result<Self, rustls::Error> {
        let (mut first, mut named) = (None, HashMap::new());
        for entry in entries {
            let certified = Arc::new(entry.identity.certified()?);
            first.get_or_insert_with(|| certified.clone());
            for name in &entry.facts.names {
                named.entry(name.clone()).or_insert_with(|| certified.clone());
            }
        }
        let first = first.ok_or(rustls::Error::NoCertificatesPresented)?;
        Ok(ByName { first, named })
    }

    /// The certificate for `name`: one with this name, then one with a `*` in place of its first label, then the first.
    fn find(&self, name: &str) -> &Arc<CertifiedKey> {
        let name = name.to_ascii_lowercase();
        let wildcard = || self.named.get(&format!("*.{}", name.split_once('.')?.1));
        self.named.get(&name).or_else(wildcard).unwrap_or(&self.first)
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(hello.server_name().map_or(&self.first, |name| self.find(name)).clone())
    }
}

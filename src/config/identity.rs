//! Reads certificates with their keys, Zap's client certificate for a backend, and the name that the backend's
//! certificate must have.

use std::fmt;
use std::io;
use std::io::Read as _;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;

use crate::config::common::Context;
use crate::config::file::{open_regular, unreadable};
use crate::config::text::Text;
use crate::config::toml_reader::Section;
use crate::config::url::BaseUrl;

/// Largest PEM file, in bytes.
const MAX_PEM_FILE: usize = 1 << 20;

/// A certificate of Zap and its key. Equality compares the contents of the files, so a reload detects a renewed
/// certificate.
#[derive(Clone, PartialEq)]
pub struct Identity {
    /// The certificate, then the certificates of its issuers.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key of the first certificate.
    pub key: Arc<PrivateKeyDer<'static>>,
}

impl Identity {
    /// The pair as rustls uses it.
    ///
    /// # Errors
    /// The certificate is not valid, the key cannot be used, or it is that of another certificate.
    pub(super) fn certified(&self) -> Result<CertifiedKey, rustls::Error> {
        let provider = rustls::crypto::ring::default_provider();
        CertifiedKey::from_der(self.chain.clone(), self.key.clone_key(), &provider)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Reads `client_cert` and `client_key`, and checks that the key is that of the certificate.
pub(super) fn client_identity(
    t: &mut Section<'_, '_>,
    url: Option<&BaseUrl>,
    ctx: &Context<'_>,
) -> Option<Identity> {
    let (cert, key) = match (t.text("client_cert"), t.text("client_key")) {
        (Some(cert), Some(key)) => (cert, key),
        (Some(cert), None) => return alone(t, &cert, "client_key"),
        (None, Some(key)) => return alone(t, &key, "client_cert"),
        (None, None) => return None,
    };
    only_with_tls(t, &cert, url);
    identity(t, &cert, &key, ctx)
}

/// Reads the files `cert` and `key`, and checks that the key is that of the certificate. Returns `None` if a fault is
/// recorded.
pub(super) fn identity(t: &Section<'_, '_>, cert: &Text, key: &Text, ctx: &Context<'_>) -> Option<Identity> {
    let chain = certificates(t, cert, ctx, "must be a PEM file of a certificate and its issuers");
    let private = pem(t, key, ctx).and_then(|pem| {
        let found = PrivateKeyDer::from_pem_slice(&pem).ok();
        if found.is_none() {
            let what = "has no private key; must be a PEM file of a private key without a password";
            t.fault_of(key, what);
        }
        found
    });
    let (chain, private) = (chain?, private?);
    let identity = Identity { chain, key: Arc::new(private) };
    match identity.certified() {
        Ok(_) => return Some(identity),
        Err(rustls::Error::InvalidCertificate(_)) => {
            t.fault_of(cert, "has an invalid certificate; must be a PEM file of a certificate");
        }
        Err(rustls::Error::InconsistentKeys(_)) => {
            let name = cert.place.rsplit('.').next().unwrap_or(&cert.place);
            t.fault_of(key, &format!("is the key of another certificate; must be that of `{name}`"));
        }
        Err(_) => {
            let what = "has a private key that cannot be used; must be ECDSA, Ed25519 or RSA";
            t.fault_of(key, what);
        }
    }
    None
}

/// Reads the certificates of a PEM file. Returns `None` if there is none: then a fault is recorded, and `allowed` says
/// what the file must be.
pub(super) fn certificates(
    t: &Section<'_, '_>,
    path: &Text,
    ctx: &Context<'_>,
    allowed: &str,
) -> Option<Vec<CertificateDer<'static>>> {
    let pem = pem(t, path, ctx)?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem).flatten().collect();
    if found.is_empty() {
        t.fault_of(path, &format!("has no certificate; {allowed}"));
    }
    Some(found).filter(|found| !found.is_empty())
}

/// Records that one of two keys that belong together is missing.
fn alone(t: &Section<'_, '_>, text: &Text, other: &str) -> Option<Identity> {
    t.fault_of(text, &format!("is set without `{other}`; both must be set, or none"));
    None
}

fn only_with_tls(t: &Section<'_, '_>, text: &Text, url: Option<&BaseUrl>) {
    if url.is_some_and(|url| !url.https) {
        t.fault_of(text, "is set, but `url` has no TLS; must be set with `https://` or not at all");
    }
}

fn pem(t: &Section<'_, '_>, path: &Text, ctx: &Context<'_>) -> Option<Vec<u8>> {
    let read = open_regular(&ctx.file(path)).and_then(|file| {
        let mut pem = Vec::new();
        file.take(MAX_PEM_FILE as u64 + 1).read_to_end(&mut pem)?;
        if pem.len() > MAX_PEM_FILE { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(pem) }
    });
    read.map_err(|error| t.fault_of(path, &unreadable(&error))).ok()
}

/// Reads `server_name`: the name in the certificate of the backend, in place of the host of `url`.
pub(super) fn server_name(t: &mut Section<'_, '_>, url: Option<&BaseUrl>) -> Option<ServerName<'static>> {
    let text = t.text("server_name")?;
    only_with_tls(t, &text, url);
    let name = ServerName::try_from(text.value.clone()).ok();
    if name.is_none() {
        t.invalid(&text, "must be a host name, or an IP address without brackets");
    }
    name
}

#[cfg(test)]
mod tests {
    use crate::config::tests::Folder;

    /// A certificate and its key in PEM.
    fn pair() -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let made = rcgen::CertificateParams::new(vec!["zap".to_owned()]).unwrap().self_signed(&key).unwrap();
        (made.pem(), key.serialize_pem())
    }

    #[test]
    fn the_content_of_the_files_counts() {
        let ((cert, key), (other_cert, other_key)) = (pair(), pair());
        let folder = Folder::with(&[("cert", &cert), ("key", &key)]);
        let read = || folder.read("https://a", "client_cert = \"cert\"\nclient_key = \"key\"").unwrap();
        let (before, same) = (read(), read());
        assert_eq!(before.backends[0], same.backends[0]);
        assert!(!format!("{before:?}").contains("BEGIN"));
        folder.write("cert", &format!("{other_cert}{cert}"));
        folder.write("key", &other_key);
        let after = read();
        assert_ne!(before.backends[0], after.backends[0]);
        assert_eq!(after.backends[0].client_identity.as_ref().unwrap().chain.len(), 2);
        folder.write("both", &format!("{key}{cert}"));
        assert!(folder.read("https://a", "client_cert = \"both\"\nclient_key = \"both\"").is_ok());
    }

    #[test]
    fn bad_files_are_faults_that_show_no_content() {
        let ((cert, key), (_, other)) = (pair(), pair());
        let broken = "-----BEGIN CERTIFICATE-----\nQ0FOQVJZ\n-----END CERTIFICATE-----\n";
        let folder = Folder::with(&[
            ("cert", &cert),
            ("key", &key),
            ("other", &other),
            ("text", "CANARY"),
            ("broken", broken),
        ]);
        let unreadable = "cannot be read (no such file); must be a readable file, relative to the directory of the configuration";
        for (cert, key, want) in [
            ("none", "key", format!("4: `backends[0].client_cert` {unreadable}")),
            ("cert", "none", format!("5: `backends[0].client_key` {unreadable}")),
            ("text", "key", "4: `backends[0].client_cert` has no certificate; must be a PEM file of a certificate and its issuers".into()),
            ("key", "key", "4: `backends[0].client_cert` has no certificate; must be a PEM file of a certificate and its issuers".into()),
            ("broken", "key", "4: `backends[0].client_cert` has an invalid certificate; must be a PEM file of a certificate".into()),
            ("cert", "cert", "5: `backends[0].client_key` has no private key; must be a PEM file of a private key without a password".into()),
            ("cert", "other", "5: `backends[0].client_key` is the key of another certificate; must be that of `client_cert`".into()),
        ] {
            let fault = folder.read("https://a", &format!("client_cert = \"{cert}\"\nclient_key = \"{key}\"")).unwrap_err();
            assert_eq!(fault, format!("test:{want}"));
        }
        for (url, more, want) in [
            (
                "https://a",
                "client_key = \"key\"",
                "`backends[0].client_key` is set without `client_cert`; both must be set, or none",
            ),
            (
                "http://a",
                "client_cert = \"cert\"\nclient_key = \"key\"",
                "`backends[0].client_cert` is set, but `url` has no TLS; must be set with `https://` or not at all",
            ),
            (
                "https://a",
                "server_name = \"a b\"",
                "`backends[0].server_name` is \"a b\"; must be a host name, or an IP address without brackets",
            ),
        ] {
            assert_eq!(folder.read(url, more).unwrap_err(), format!("test:4: {want}"));
        }
    }

    #[test]
    fn a_server_name_is_a_host_or_an_address() {
        let folder = Folder::with(&[]);
        for name in ["api.example.com", "10.0.0.1", "::1"] {
            let config = folder.read("https://a", &format!("server_name = \"{name}\"")).unwrap();
            assert_eq!(config.backends[0].server_name.as_ref().unwrap().to_str(), name);
        }
    }
}

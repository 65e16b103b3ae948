//! A certificate authority, its certificates in files, and clients that speak TLS.

use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// The TLS side of a client's connection.
pub(crate) type TlsWire = StreamOwned<ClientConnection, TcpStream>;

/// An authority with a folder for its certificates; dropping it deletes the folder.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
}

/// A certificate and its key.
pub(crate) struct Pair {
    certificate: CertificateDer<'static>,
    key: KeyPair,
    pem: String,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = named(name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder =
            std::env::temp_dir().join(format!("zap-ca-{}-{:x}", std::process::id(), fastrand::u64(..)));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("ca"), issuer.pem()).unwrap();
        Authority { issuer, folder }
    }

    /// A certificate with this common name for these names, which ends with `year`.
    pub(crate) fn pair(&self, common_name: &str, names: &[&str], year: i32) -> Pair {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = named(common_name);
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let made = params.signed_by(&key, &self.issuer).unwrap();
        Pair { certificate: made.der().clone(), key, pem: made.pem() }
    }

    /// Writes a pair for `name` that ends with `year` to the files `name` and `name.key`.
    pub(crate) fn write(&self, name: &str, year: i32) {
        let pair = self.pair("", &[name], year);
        std::fs::write(self.folder.join(name), pair.pem).unwrap();
        std::fs::write(self.folder.join(format!("{name}.key")), pair.key.serialize_pem()).unwrap();
    }

    /// The path of a file.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A `[[server.tls]]` entry with the files of `name`. `client_ca`: whether clients must show a certificate.
    pub(crate) fn entry(&self, name: &str, client_ca: bool) -> String {
        let path = |name: &str| self.file(name).display().to_string();
        let (cert, key) = (path(name), path(&format!("{name}.key")));
        let ca = if client_ca { format!("client_ca = \"{}\"\n", path("ca")) } else { String::new() };
        format!("[[server.tls]]\ncert = \"{cert}\"\nkey = \"{key}\"\n{ca}")
    }

    /// A client that trusts this authority, calls Zap `name` and shows `pair`.
    pub(crate) fn client(&self, name: &str, pair: Option<&Pair>) -> TlsClient {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match pair {
            None => builder.with_no_client_auth(),
            Some(pair) => {
                let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.key.serialize_der()));
                builder.with_client_auth_cert(vec![pair.certificate.clone()], key).unwrap()
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        TlsClient { config: Arc::new(config), name: ServerName::try_from(name.to_owned()).unwrap() }
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut named = DistinguishedName::new();
    if !name.is_empty() {
        named.push(DnType::CommonName, name);
    }
    named
}

/// How clients speak TLS.
#[derive(Clone)]
pub(crate) struct TlsClient {
    pub config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl TlsClient {
    /// Begins TLS on a connection.
    pub(crate) fn wire(&self, tcp: TcpStream) -> TlsWire {
        StreamOwned::new(ClientConnection::new(self.config.clone(), self.name.clone()).unwrap(), tcp)
    }
}

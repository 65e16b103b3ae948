//! TLS to backends.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use crate::support::tls_server::server_with;
use crate::support::{CHAT, File, Provider, Zap};

/// Starts a TLS server for `name` with a self-signed certificate; returns its address and a PEM file of it.
fn server(name: &str) -> (SocketAddr, PathBuf) {
    server_with(rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap())
}

/// A `[[backends]]` entry for such a server.
pub(crate) fn backend(address: SocketAddr, more: &str) -> String {
    format!(
        "[[backends]]\nname = \"tls\"\nurl = \"https://localhost:{}\"\nweight = 1\n{more}\n",
        address.port()
    )
}

const QUICK: &str = "[retry]\nbase_delay_ms = 1\nmax_delay_ms = 1\n[health]\nfailure_threshold = 1000\n";

#[test]
fn a_certificate_from_ca_file_is_trusted_and_connections_are_reused() {
    let (address, pem) = server("localhost");
    let zap = Zap::with(QUICK, &[backend(address, &format!("ca_file = \"{}\"", pem.display()))]);
    let mut client = zap.client();
    for _ in 0..5 {
        let answer = client.chat("", CHAT);
        assert_eq!((answer.status, answer.text()), (200, "secret"));
    }
    std::fs::remove_file(pem).unwrap();
}

#[test]
fn an_untrusted_certificate_is_a_tls_error_and_never_plain_text() {
    let (self_signed, pem) = server("localhost");
    let (wrong_name, wrong_pem) = server("other.test");
    let plain = Provider::named("plain");
    let trusting = |pem: &PathBuf| format!("ca_file = \"{}\"", pem.display());
    for (what, text) in [
        ("unknown issuer", backend(self_signed, "")),
        ("wrong name", backend(wrong_name, &trusting(&wrong_pem))),
        ("no TLS", backend(plain.address, &trusting(&pem))),
    ] {
        let zap = Zap::with(QUICK, std::slice::from_ref(&text));
        let answer = zap.chat(CHAT);
        assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_tls_error"), "{what}");
        let b = Provider::named("b");
        let zap = Zap::with(QUICK, &[text, b.backend("b", "")]);
        (0..2).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b", "{what}"));
    }
    assert_eq!(plain.count(), 0);
    [pem, wrong_pem].iter().for_each(|p| std::fs::remove_file(p).unwrap());
}

/// A certificate with its key, both in PEM, for a client.
fn client_pair(name: &str) -> (rcgen::Certificate, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let made = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap().self_signed(&key).unwrap();
    (made, key.serialize_pem())
}

/// Starts a TLS server for localhost that serves only clients with one of these certificates. It answers with the
/// number of the certificate. Returns its address and a PEM file of its own certificate.
fn asking_server(clients: &[&rcgen::Certificate]) -> (SocketAddr, PathBuf) {
    let own = rcgen::KeyPair::generate().unwrap();
    let made =
        rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&own).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    let known: Vec<_> = clients.iter().map(|client| client.der().clone()).collect();
    known.iter().for_each(|client| roots.add(client.clone()).unwrap());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(
            vec![made.der().clone()],
            rustls::pki_types::PrivatePkcs8KeyDer::from(own.serialize_der()).into(),
        )
        .unwrap();
    let (config, listener) = (Arc::new(config), TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    let pem = std::env::temp_dir().join(format!("zap-mtls-{}-{}.pem", std::process::id(), address.port()));
    std::fs::write(&pem, made.pem()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (config, known) = (config.clone(), known.clone());
            std::thread::spawn(move || {
                let connection = rustls::ServerConnection::new(config).unwrap();
                let mut tls = rustls::StreamOwned::new(connection, stream.unwrap());
                let mut buf = [0; 4096];
                while matches!(tls.read(&mut buf), Ok(n) if n > 0) {
                    let shown = tls.conn.peer_certificates().unwrap()[0].clone();
                    let number = known.iter().position(|client| *client == shown).unwrap();
                    write!(tls, "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n{number}").unwrap();
                }
            });
        }
    });
    (address, pem)
}

#[test]
fn a_client_certificate_is_shown_and_a_reload_takes_new_content() {
    let ((first, first_key), (second, second_key)) = (client_pair("one"), client_pair("two"));
    let (address, pem) = asking_server(&[&first, &second]);
    let file = |name: &str| std::env::temp_dir().join(format!("zap-mtls-{name}-{}", address.port()));
    let (cert, key) = (file("cert"), file("key"));
    let write = |made: &rcgen::Certificate, text: &str| {
        std::fs::write(&cert, made.pem()).unwrap();
        std::fs::write(&key, text).unwrap();
    };
    write(&first, &first_key);
    let trusting = format!("ca_file = \"{}\"", pem.display());
    let shown =
        format!("{trusting}\nclient_cert = \"{}\"\nclient_key = \"{}\"", cert.display(), key.display());
    let config = File::new();
    let zap = Zap::with_file(&config, QUICK, &[backend(address, &shown)]);
    assert_eq!(zap.chat(CHAT).text(), "0");
    write(&second, &second_key);
    assert_eq!(zap.chat(CHAT).text(), "0", "not reloaded yet");
    assert!(zap.reload());
    assert_eq!(zap.chat(CHAT).text(), "1", "the connections with the old certificate are not used");
    write(&first, &second_key);
    assert!(!zap.reload(), "the key is that of another certificate");
    assert_eq!(zap.chat(CHAT).text(), "1");
    let without = Zap::with(QUICK, &[backend(address, &trusting)]);
    assert_eq!(without.chat(CHAT).status, 502);
    [pem, cert, key].iter().for_each(|p| std::fs::remove_file(p).unwrap());
}

#[test]
fn server_name_is_what_the_certificate_must_have() {
    let (address, pem) = server("inner.test");
    let with = |name: &str| {
        let more = format!("ca_file = \"{}\"\nserver_name = \"{name}\"", pem.display());
        Zap::with(QUICK, &[backend(address, &more)]).chat(CHAT)
    };
    assert_eq!(with("inner.test").text(), "secret");
    let refused = with("localhost");
    assert_eq!((refused.status, refused.code().as_str()), (502, "upstream_tls_error"));
    std::fs::remove_file(pem).unwrap();
}

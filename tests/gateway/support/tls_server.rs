//! A TLS server with a self-signed certificate. The tests of the program use this file too.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// Starts a TLS server with this certificate; returns its address and a PEM file of the certificate.
pub(crate) fn server_with(params: rcgen::CertificateParams) -> (SocketAddr, PathBuf) {
    let own = rcgen::KeyPair::generate().unwrap();
    let made = params.self_signed(&own).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(own.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.der().clone()], key)
        .unwrap();
    let (config, listener) = (Arc::new(config), TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    let pem = std::env::temp_dir().join(format!("zap-test-{}-{}.pem", std::process::id(), address.port()));
    std::fs::write(&pem, made.pem()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let config = config.clone();
            std::thread::spawn(move || {
                let mut tls = StreamOwned::new(ServerConnection::new(config).unwrap(), stream.unwrap());
                let mut buf = [0; 4096];
                while matches!(tls.read(&mut buf), Ok(n) if n > 0) {
                    tls.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecret").unwrap();
                }
            });
        }
    });
    (address, pem)
}

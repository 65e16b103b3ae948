//! TLS to backends.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::support::tls_server::server_with;
use crate::support::{CHAT, Provider, Zap};

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

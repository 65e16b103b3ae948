//! `[[server.tls]]`, and the certificates of clients.

use std::sync::Arc;

use rcgen::{CertificateParams, KeyPair};

use crate::config::tests::{BACKEND, Folder};
use crate::config::{Config, certificate_ends};

/// A certificate for `names` that is valid from `begin` to `end`, years, and its key, in PEM.
fn pair(names: &[&str], begin: i32, end: i32) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.not_before = rcgen::date_time_ymd(begin, 1, 1);
    params.not_after = rcgen::date_time_ymd(end, 1, 1);
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

fn folder() -> Folder {
    let ((a, a_key), (b, b_key)) = (pair(&["a.test"], 2020, 2090), pair(&["b.test"], 2020, 2090));
    let ((old, old_key), (new, new_key)) = (pair(&["a.test"], 2020, 2021), pair(&["c.test"], 2089, 2090));
    let files = [
        ("a", &a),
        ("a.key", &a_key),
        ("b", &b),
        ("b.key", &b_key),
        ("old", &old),
        ("old.key", &old_key),
        ("new", &new),
        ("new.key", &new_key),
    ];
    let folder = Folder::with(&files.map(|(name, text)| (name, text.as_str())));
    folder.write("text", "CANARY");
    folder.write("broken", "-----BEGIN CERTIFICATE-----\nQ0FOQVJZ\n-----END CERTIFICATE-----\n");
    folder
}

fn entry(name: &str, more: &str) -> String {
    format!("[[server.tls]]\ncert = \"{name}\"\nkey = \"{name}.key\"\n{more}\n")
}

#[test]
fn faults_of_certificates_say_what_is_wrong() {
    let folder = folder();
    let unreadable = "cannot be read (no such file); must be a readable file, relative to the directory of the configuration";
    let lists = "must be a PEM file of a certificate and its issuers";
    let authorities = "must be a PEM file of the authorities that sign the certificates of clients";
    let tls = |cert: &str, key: &str, more: &str| {
        format!("[[server.tls]]\ncert = \"{cert}\"\nkey = \"{key}\"\n{more}")
    };
    for (text, expected) in [
        (tls("none", "a.key", ""), format!("2: `server.tls[0].cert` {unreadable}")),
        (tls("a", "none", ""), format!("3: `server.tls[0].key` {unreadable}")),
        (tls("text", "a.key", ""), format!("2: `server.tls[0].cert` has no certificate; {lists}")),
        (tls("a.key", "a.key", ""), format!("2: `server.tls[0].cert` has no certificate; {lists}")),
        (
            tls("broken", "a.key", ""),
            "2: `server.tls[0].cert` has an invalid certificate; must be a PEM file of a certificate".into(),
        ),
        (
            tls("a", "a", ""),
            "3: `server.tls[0].key` has no private key; must be a PEM file of a private key without a password"
                .into(),
        ),
        (
            tls("a", "b.key", ""),
            "3: `server.tls[0].key` is the key of another certificate; must be that of `cert`".into(),
        ),
        (
            tls("a", "a.key", "sni = \"a\"\n"),
            "4: unknown key `server.tls[0].sni`; the names are those of the certificate".into(),
        ),
        (
            "[[server.tls]]\ncert = \"a\"\n".into(),
            "1: `server.tls[0].key` is missing; a string is required".into(),
        ),
        (
            tls("a", "a.key", "client_ca = \"a.key\"\n"),
            format!("4: `server.tls[0].client_ca` has no certificate; {authorities}"),
        ),
        (
            tls("a", "a.key", "client_ca = \"broken\"\n"),
            format!("4: `server.tls[0].client_ca` has an invalid certificate; {authorities}"),
        ),
        (
            format!("{}{}", entry("a", "client_ca = \"b\""), entry("b", "")),
            "5: `server.tls[1].client_ca` is missing, and `server.tls[0]` has it; all entries must have it, or none"
                .into(),
        ),
    ] {
        let fault = folder.parse(&format!("{text}\n{BACKEND}")).unwrap_err();
        assert_eq!(fault, format!("test:{expected}"), "{text}");
    }
}

#[test]
fn certificates_that_are_not_valid_now_get_a_warning() {
    let folder = folder();
    let text = format!("{}{}{}{BACKEND}", entry("a", ""), entry("old", ""), entry("new", ""));
    let config = folder.parse(&text).unwrap();
    assert_eq!(
        config.warnings,
        [
            "the certificate of `server.tls[1].cert`, which clients will refuse, expired on \
             Fri, 01 Jan 2021 00:00:00 GMT; renew it",
            "the certificate of `server.tls[2].cert`, which clients will refuse, is not valid before \
             Sat, 01 Jan 2089 00:00:00 GMT; check the clock of this machine",
        ]
    );
    let tls = config.tls.unwrap();
    assert_eq!(
        certificate_ends(std::iter::once(&tls)),
        [("a.test", 1_609_459_200), ("c.test", 3_786_912_000)],
        "the earlier of two ends"
    );
    assert!(!tls.verifies_clients());
}

#[test]
fn the_content_of_the_files_decides_whether_tls_has_changed() {
    let folder = folder();
    let text = format!("{}{BACKEND}", entry("a", ""));
    let tls = || folder.parse(&text).unwrap().tls;
    let before = tls();
    assert_eq!(before, tls());
    assert!(!Arc::ptr_eq(&before.as_ref().unwrap().rustls, &tls().unwrap().rustls));
    let (cert, key) = pair(&["a.test"], 2020, 2091);
    folder.write("a", &cert);
    folder.write("a.key", &key);
    assert_ne!(before, tls());
    assert!(!format!("{before:?}").contains("PRIVATE"));
    assert_eq!(Config::of(BACKEND).unwrap().tls, None);
}

#[test]
fn a_client_is_identified_by_a_key_or_a_certificate() {
    let folder = folder();
    let tls = entry("a", "client_ca = \"b\"");
    let client = |more: &str| format!("[[client_keys]]\nname = \"c{}\"\n{more}\n", more.len());
    let read = |text: &str| folder.parse(&format!("{BACKEND}{text}"));
    let config = read(&format!("{tls}{}", client("certificate = \"batch jobs\""))).unwrap();
    assert_eq!(config.clients[0].certificate.as_deref(), Some("batch jobs"));
    assert_eq!(config.clients[0].digest, None);
    let both = read(&format!("{tls}{}", client("certificate = \"a\"\nkey = \"k\""))).unwrap();
    assert!(both.clients[0].certificate.is_some() && both.clients[0].digest.is_some());
    for (text, expected) in [
        (
            client("certificate = \"a\""),
            "6: `client_keys[0].certificate` is set, but no client is asked for a certificate; must be set with \
             `client_ca` in `[[server.tls]]`, or not at all",
        ),
        (
            format!("{tls}{}", client("certificate = \"\"")),
            "10: `client_keys[0].certificate` is \"\"; must be the common name of the subject of a certificate: 1 to \
             256 bytes without control characters",
        ),
        (
            format!("{tls}{}{}", client("certificate = \"a\""), client("key = \"k\"\ncertificate = \"a\"")),
            "11: `client_keys[1].certificate` repeats the name at line 8; each client must have its own certificate",
        ),
        (
            format!("{tls}{}", client("")),
            "8: `client_keys[0].key` is missing; `key`, `sha256` or `certificate` is required",
        ),
    ] {
        assert_eq!(read(&text).unwrap_err(), format!("test:{expected}"), "{text}");
    }
}

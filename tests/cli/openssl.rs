//! TLS of the listener beside another implementation: `openssl s_client` with certificates that `openssl` has made.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{File, OK, Running, config, provider, run, stderr};

/// A folder that is deleted on drop.
pub(super) struct Folder(pub(super) PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Folder {
    pub(super) fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("zap-openssl-{:x}", fastrand::u64(..)));
        std::fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    /// Runs `openssl` in the folder with this input. Returns whether it succeeded, and all that it wrote.
    fn openssl(&self, args: &str, input: &str) -> (bool, String) {
        let mut command = Command::new("openssl");
        command.args(args.split(' ')).current_dir(&self.0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("openssl is not installed");
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_owned();
        let writer = std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    /// Makes a certificate that signs itself.
    pub(super) fn make(&self, name: &str, kind: &str) {
        let (is_made, text) = self.openssl(
            &format!(
                "req -x509 {kind} -nodes -days 30 -subj /CN={name} -addext basicConstraints=critical,CA:FALSE \
                 -addext subjectAltName=DNS:{name} -keyout {name}.key -out {name}.pem"
            ),
            "",
        );
        assert!(is_made, "{text}");
    }
}

#[test]
fn openssl_gets_the_right_certificate_and_an_answer() {
    let folder = Folder::new();
    folder.make("rsa.test", "-newkey rsa:2048");
    folder.make("ec.test", "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1");
    folder.make("client", "-newkey ed25519");
    let entry = |name: &str| {
        let path = folder.0.join(name).display().to_string();
        let ca = folder.0.join("client.pem").display().to_string();
        format!("[[server.tls]]\ncert = \"{path}.pem\"\nkey = \"{path}.key\"\nclient_ca = \"{ca}\"\n")
    };
    let text = format!("{}{}", entry("rsa.test"), entry("ec.test"));
    let zap = Running::with(&config(provider(OK, Duration::ZERO), &text));
    let get = "GET /health HTTP/1.1\r\nhost: zap\r\nconnection: close\r\n\r\n";
    let ask = |name: &str, more: &str| {
        let args = format!(
            "s_client -connect {} -servername {name} -CAfile {name}.pem -verify_return_error -alpn h2,http/1.1 \
             -ign_eof{more}",
            zap.address
        );
        folder.openssl(&args, get)
    };
    let client = " -cert client.pem -key client.key";
    for (name, version, sent) in [
        ("rsa.test", "TLSv1.3", " -tls1_3"),
        ("rsa.test", "TLSv1.2", " -tls1_2"),
        ("ec.test", "TLSv1.3", ""),
        ("ec.test", "TLSv1.2", " -tls1_2"),
    ] {
        let (is_done, text) = ask(name, &format!("{sent}{client}"));
        assert!(is_done && text.contains("HTTP/1.1 200 OK"), "{name} {sent}: {text}");
        for part in [version, "ALPN protocol: http/1.1", "Verify return code: 0 (ok)"] {
            assert!(text.contains(part), "{name} {sent}: no {part} in {text}");
        }
    }
    for (what, more) in [
        ("no certificate", String::new()),
        ("a foreign certificate", " -cert ec.test.pem -key ec.test.key".to_owned()),
        ("an old version", format!("{client} -tls1_1 -cipher DEFAULT@SECLEVEL=0")),
    ] {
        let (_, text) = ask("ec.test", &more);
        assert!(!text.contains("200 OK"), "{what}: {text}");
    }
    zap.line("the TLS handshake with 127.0.0.1 failed");
}

#[test]
fn a_health_check_asks_with_tls_and_checks_no_certificate() {
    let folder = Folder::new();
    folder.make("zap.test", "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1");
    let path = folder.0.join("zap.test").display().to_string();
    let entry = format!("[[server.tls]]\ncert = \"{path}.pem\"\nkey = \"{path}.key\"\n");
    let zap = Running::with(&config(provider(OK, Duration::ZERO), &entry));
    let port = zap.address.port();
    let file = File::new("healthcheck-tls", &format!("[server]\nport = {port}\n{entry}"));
    for args in [["--config", file.path()], ["--url", &format!("https://localhost:{port}/health")]] {
        let output = run(&["healthcheck", args[0], args[1]]);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
    }
    let plain = run(&["healthcheck", "--url", &format!("http://127.0.0.1:{port}/health")]);
    assert_eq!(plain.status.code(), Some(1));
    assert!(stderr(&plain).contains("HTTP 400"), "{}", stderr(&plain));
}

#[test]
fn a_health_check_of_a_zap_that_wants_certificates_ends_with_the_handshake_and_is_not_logged() {
    let folder = Folder::new();
    folder.make("zap.test", "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1");
    let path = folder.0.join("zap.test").display().to_string();
    let entry =
        format!("[[server.tls]]\ncert = \"{path}.pem\"\nkey = \"{path}.key\"\nclient_ca = \"{path}.pem\"\n");
    let zap = Running::with(&config(provider(OK, Duration::ZERO), &entry));
    let file = File::new("healthcheck-mtls", &format!("[server]\nport = {}\n{entry}", zap.address.port()));
    for _ in 0..3 {
        let output = run(&["healthcheck", "--config", file.path()]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("TLS works; no request was sent"), "{text}");
    }
    // The worker takes the connections in turn, so it has met those above when this one fails.
    let (_, text) = folder.openssl(
        &format!(
            "s_client -connect {} -cert zap.test.pem -key zap.test.key -tls1_1 -cipher DEFAULT@SECLEVEL=0",
            zap.address
        ),
        "",
    );
    let line = zap.line("the TLS handshake with 127.0.0.1 failed");
    assert!(!line.contains("certificate") && !line.contains("more failed"), "{line} {text}");
}

//! TLS of the listener.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustls::{HandshakeKind, ProtocolVersion};
use zap::internals::Order;

use crate::support::provider::{After, Gate, chunk, end_chunks, reply, start_events};
use crate::support::tls_client::{Authority, TlsClient};
use crate::support::{CHAT, Client, File, Provider, STREAM, Zap, eventually, within};

/// Starts Zap with one certificate for `a.test`, and a client for it.
fn started(authority: &Authority, backends: &[String]) -> Zap {
    authority.write("a.test", 2090);
    let mut zap = Zap::with(&authority.entry("a.test", false), backends);
    zap.tls = Some(authority.client("a.test", None));
    zap
}

/// Whether a client gets through the handshake and gets an answer.
fn is_served(zap: &Zap, tls: &TlsClient) -> bool {
    let mut client = Client::connect(zap.address).over_tls(tls);
    let wire = client.tls();
    let sent = wire.write_all(b"GET /health HTTP/1.1\r\nhost: zap\r\n\r\n").and_then(|()| wire.flush());
    sent.is_ok() && matches!(wire.read(&mut [0; 4096]), Ok(n) if n > 0)
}

#[test]
fn requests_and_streams_are_served_over_tls() {
    let authority = Authority::new("ca");
    let a = Provider::start(|seen, stream| {
        if seen.body == STREAM.as_bytes() {
            start_events(stream);
            for _ in 0..3 {
                chunk(stream, "data: one\n\n");
            }
            chunk(stream, "data: [DONE]\n\n");
            end_chunks(stream);
        } else {
            reply(stream, 200, "", &seen.body);
        }
        After::Keep
    });
    let zap = started(&authority, &[a.backend("a", "")]);
    let mut client = zap.client();
    let long = format!("{{\"messages\":[{{\"role\":\"user\",\"content\":\"{}\"}}]}}", "x".repeat(3 << 20));
    for _ in 0..3 {
        assert_eq!(client.chat("", CHAT).text(), CHAT);
        assert_eq!(client.chat("", &long).text(), long, "more than the buffers of TLS hold");
        let events = client.chat("", STREAM);
        assert_eq!(events.text(), format!("{}data: [DONE]\n\n", "data: one\n\n".repeat(3)));
        assert!(events.whole);
    }
    let wire = client.tls();
    assert_eq!(wire.conn.alpn_protocol(), Some(&b"http/1.1"[..]));
    assert_eq!(wire.conn.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(wire.conn.handshake_kind(), Some(HandshakeKind::Full));
    // Two requests at once.
    let get = "GET /health HTTP/1.1\r\nhost: zap\r\n\r\n";
    client.send(get.repeat(2));
    assert_eq!((client.response().status, client.response().status), (200, 200));
    let mut next = zap.client();
    assert_eq!(next.chat("", CHAT).text(), CHAT);
    assert_eq!(next.tls().conn.handshake_kind(), Some(HandshakeKind::Resumed));
    next.send("GET /health HTTP/1.1\r\nhost: zap\r\nconnection: close\r\n\r\n");
    assert_eq!(next.response().status, 200);
    assert_eq!(next.tls().read(&mut [0; 1]).unwrap(), 0, "the end is a close_notify");
}

#[test]
fn the_certificate_is_chosen_by_the_name_that_the_client_sends() {
    let authority = Authority::new("ca");
    ["a.test", "b.test", "*.c.test"].iter().for_each(|name| authority.write(name, 2090));
    let entries = ["a.test", "b.test", "*.c.test"].map(|name| authority.entry(name, false)).concat();
    let mut zap = Zap::with(&entries, &[Provider::named("a").backend("a", "")]);
    for (name, is_ok) in [
        ("a.test", true),
        ("b.test", true),
        ("B.Test", true),
        ("x.c.test", true),
        ("c.test", false),
        ("x.x.c.test", false),
        ("other.test", false),
    ] {
        assert_eq!(is_served(&zap, &authority.client(name, None)), is_ok, "{name}");
    }
    zap.tls = Some(authority.client("a.test", None));
    for name in ["a.test", "b.test", "*.c.test"] {
        let series = format!("zap_tls_certificate_expiry_timestamp_seconds{{name=\"{name}\"}}");
        assert_eq!(zap.metric(&series), 3_786_912_000.0);
    }
    // A client without a name, which an address has not, gets the first certificate.
    let mut without = authority.client("127.0.0.1", None);
    assert!(!is_served(&zap, &without));
    authority.write("127.0.0.1", 2090);
    let entries = [authority.entry("127.0.0.1", false), authority.entry("a.test", false)].concat();
    let zap = Zap::with(&entries, &[Provider::named("a").backend("a", "")]);
    without = authority.client("127.0.0.1", None);
    assert!(is_served(&zap, &without));
}

#[test]
fn clients_without_a_certificate_of_the_authority_are_refused() {
    let (authority, other) = (Authority::new("ca"), Authority::new("other"));
    authority.write("a.test", 2090);
    let a = Provider::named("a");
    let mut zap = Zap::with_log(&authority.entry("a.test", true), &[a.backend("a", "")]);
    let (good, foreign, old) = (
        authority.pair("good", &["client"], 2090),
        other.pair("good", &["client"], 2090),
        authority.pair("good", &["client"], 2001),
    );
    for (pair, is_ok) in [(None, false), (Some(&foreign), false), (Some(&old), false), (Some(&good), true)] {
        assert_eq!(is_served(&zap, &authority.client("a.test", pair)), is_ok);
    }
    eventually("the failed handshakes are logged", || zap.log().contains("\"event\":\"tls\""));
    zap.tls = Some(authority.client("a.test", Some(&good)));
    assert_eq!(zap.chat(CHAT).text(), "a", "any client of the authority is served without client keys");
}

#[test]
fn a_client_is_identified_by_its_certificate() {
    let authority = Authority::new("ca");
    authority.write("a.test", 2090);
    let clients = "[[client_keys]]\nname = \"batch\"\ncertificate = \"batch jobs\"\n\
        [[client_keys]]\nname = \"web\"\nkey = \"k-web\"\ncertificate = \"web\"\n\
        [[client_keys]]\nname = \"key\"\nkey = \"k-key\"\n";
    let settings = format!("{}{clients}", authority.entry("a.test", true));
    let a = Provider::named("a");
    let mut zap = Zap::with(&settings, &[a.backend("a", "")]);
    let key = |key: &str| format!("authorization: Bearer {key}\r\n");
    let counts = |zap: &Zap| {
        ["batch", "web", "key"]
            .map(|name| zap.metric(&format!("zap_client_requests_total{{client=\"{name}\"}}")))
    };
    for (certificate, header, expected) in [
        ("batch jobs", String::new(), Some(0)),
        ("batch jobs", key("dummy"), Some(0)),
        ("batch jobs", key("k-key"), Some(2)),
        ("web", String::new(), Some(1)),
        ("web", key("k-web"), Some(1)),
        ("nobody", String::new(), None),
        ("nobody", key("k-web"), Some(1)),
        ("batch", String::new(), None),
    ] {
        let pair = authority.pair(certificate, &["client"], 2090);
        zap.tls = Some(authority.client("a.test", Some(&pair)));
        let before = counts(&zap);
        let answer = zap.client().chat(&header, CHAT);
        let mut after = before;
        match expected {
            Some(client) => {
                assert_eq!((answer.status, answer.text()), (200, "a"), "{certificate} {header}");
                after[client] += 1.0;
            }
            None => {
                assert_eq!((answer.status, answer.code().as_str()), (401, "invalid_api_key"), "{certificate}")
            }
        }
        eventually("the request is counted", || counts(&zap) == after);
    }
}

/// When the certificate ends that a new client sees, as the metric has it.
fn end(zap: &Zap) -> f64 {
    zap.metric("zap_tls_certificate_expiry_timestamp_seconds{name=\"a.test\"}")
}

#[test]
fn a_reload_takes_a_new_certificate_and_loses_no_request() {
    let authority = Authority::new("ca");
    let a = Provider::named("a");
    let (file, backends) = (File::new(), [a.backend("a", "")]);
    authority.write("a.test", 2090);
    let settings = authority.entry("a.test", false);
    let mut zap = Zap::with_file(&file, &settings, &backends);
    zap.tls = Some(authority.client("a.test", None));
    let (is_done, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for keeps in [true, false] {
            let (zap, is_done, served) = (&zap, &is_done, &served);
            scope.spawn(move || {
                let mut client = zap.client();
                while !is_done.load(Ordering::Relaxed) {
                    if !keeps {
                        client = zap.client();
                    }
                    assert_eq!(client.chat("", CHAT).text(), "a");
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let shown = |zap: &Zap| {
            let mut client = Client::connect(zap.address).over_tls(&authority.client("a.test", None));
            assert_eq!(client.get("/health").status, 200);
            client.tls().conn.peer_certificates().unwrap()[0].clone().into_owned()
        };
        let mut before = shown(&zap);
        for year in 2080..2085 {
            let count = served.load(Ordering::Relaxed);
            authority.write("a.test", year);
            assert_eq!(shown(&zap), before, "not reloaded yet");
            assert!(zap.reload());
            assert_ne!(std::mem::replace(&mut before, shown(&zap)), before);
            eventually("requests go on", || served.load(Ordering::Relaxed) > count + 20);
        }
        assert_eq!(end(&zap), 3_597_523_200.0);
        // A key of another certificate, half a file, none: the last good pair stays.
        let (key, cert) = (authority.file("a.test.key"), authority.file("a.test"));
        let good = std::fs::read(&key).unwrap();
        authority.write("b.test", 2090);
        std::fs::copy(authority.file("b.test.key"), &key).unwrap();
        assert!(!zap.reload());
        std::fs::write(&key, &good[..good.len() / 2]).unwrap();
        assert!(!zap.reload());
        std::fs::write(&key, good).unwrap();
        let pem = std::fs::read(&cert).unwrap();
        std::fs::remove_file(&cert).unwrap();
        assert!(!zap.reload());
        assert_eq!(shown(&zap), before);
        std::fs::write(&cert, pem).unwrap();
        assert!(zap.reload());
        assert_eq!((shown(&zap), end(&zap)), (before, 3_597_523_200.0));
        is_done.store(true, Ordering::Relaxed);
    });
    // Without TLS in the file, the next connection is plain.
    file.write("", &backends);
    zap.order(Order::Reload);
    zap.tls = None;
    let get = |zap: &Zap| {
        let mut client = Client::connect(zap.address);
        client.send("GET /health HTTP/1.1\r\nhost: zap\r\n\r\n");
        client.response().status
    };
    eventually("TLS is off", || get(&zap) == 200);
}

#[test]
fn a_session_is_resumed_after_a_reload_that_changes_nothing() {
    let authority = Authority::new("ca");
    let (file, backends) = (File::new(), [Provider::named("a").backend("a", "")]);
    authority.write("a.test", 2090);
    let settings = authority.entry("a.test", false);
    let mut zap = Zap::with_file(&file, &settings, &backends);
    let kind = |zap: &Zap| {
        let mut client = zap.client();
        assert_eq!(client.get("/health").status, 200);
        client.tls().conn.handshake_kind()
    };
    zap.tls = Some(authority.client("a.test", None));
    assert_eq!(kind(&zap), Some(HandshakeKind::Full));
    assert!(zap.reload());
    assert_eq!(kind(&zap), Some(HandshakeKind::Resumed));
    authority.write("a.test", 2089);
    zap.order(Order::Reload);
    eventually("the old tickets are void", || kind(&zap) == Some(HandshakeKind::Full));
}

#[test]
fn plain_http_gets_a_400_that_says_so() {
    let authority = Authority::new("ca");
    let a = Provider::named("a");
    let zap = started(&authority, &[a.backend("a", "")]);
    let mut plain = Client::connect(zap.address);
    plain.post("/chat", "", CHAT.repeat(1000));
    let answer = plain.response();
    assert_eq!((answer.status, answer.code().as_str()), (400, "bad_request"));
    assert!(answer.text().contains("begin the URL with https://"), "{}", answer.text());
    assert_eq!(answer.header("connection"), Some("close"));
    assert_eq!(plain.rest(), (Vec::new(), true));
    assert_eq!(a.count(), 0);
    // Neither HTTP nor TLS.
    let mut other = Client::connect(zap.address);
    other.send([0; 8]);
    assert!(other.rest().0.is_empty());
}

#[test]
fn a_slow_handshake_is_cut_and_counts_as_a_connection() {
    let authority = Authority::new("ca");
    authority.write("a.test", 2090);
    let settings = format!("[server]\nmax_connections = 4\n{}", authority.entry("a.test", false));
    let mut zap = Zap::with(&settings, &[Provider::named("a").backend("a", "")]);
    zap.tls = Some(authority.client("a.test", None));
    let began = Instant::now();
    let slow: Vec<TcpStream> = (0..4)
        .map(|i| {
            let mut tcp = TcpStream::connect(zap.address).unwrap();
            // Half of them send the beginning of a handshake.
            tcp.write_all(&[22, 3, 1, 2, 0, 1][..(i % 2) * 6]).unwrap();
            tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            tcp
        })
        .collect();
    assert_eq!(zap.client().get("/health").status, 200, "health checks have a reserve");
    let is_served = || zap.client().get("/v1/models").status == 200;
    within(Duration::from_secs(20), "the handshakes are cut", is_served);
    let took = began.elapsed();
    assert!((Duration::from_secs(9)..Duration::from_secs(13)).contains(&took), "{took:?}");
    for mut tcp in slow {
        assert!(!matches!(tcp.read(&mut [0; 16]), Ok(n) if n > 0), "it is closed");
    }
}

#[test]
fn a_drain_finishes_tls_connections() {
    let authority = Authority::new("ca");
    let gate = Gate::default();
    let held = gate.clone();
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        held.pass();
        chunk(stream, "data: [DONE]\n\n");
        end_chunks(stream);
        After::Keep
    });
    let zap = started(&authority, &[a.backend("a", "")]);
    let mut stream = zap.client();
    stream.post("/chat", "", STREAM);
    stream.head();
    assert_eq!(stream.chunk().unwrap(), b"data: one\n\n");
    let mut idle = zap.client();
    assert_eq!(idle.get("/ready").status, 200);
    zap.order(Order::Drain);
    eventually("/ready is a 503", || zap.client().get("/ready").status == 503);
    assert_eq!(zap.chat(CHAT).code(), "draining");
    gate.open(1);
    assert_eq!(stream.chunk().unwrap(), b"data: [DONE]\n\n");
    assert_eq!(stream.chunk().unwrap(), b"");
    assert_eq!(stream.tls().read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(idle.tls().read(&mut [0; 1]).unwrap(), 0, "the end is a close_notify");
    assert!(zap.join(), "no request was cut");
}

#[test]
fn a_slow_reader_over_tls_gets_all_and_a_client_that_leaves_is_seen() {
    let authority = Authority::new("ca");
    let events = 2000;
    let a = Provider::start(move |seen, stream| {
        start_events(stream);
        let text = "x".repeat(4000);
        for _ in 0..if seen.body == STREAM.as_bytes() { events } else { 1_000_000 } {
            let event = format!("data: {text}\n\n");
            if write!(stream, "{:x}\r\n{event}\r\n", event.len()).is_err() {
                return After::Close;
            }
        }
        chunk(stream, "data: [DONE]\n\n");
        end_chunks(stream);
        After::Keep
    });
    let zap = started(&authority, &[a.backend("a", "")]);
    let tls = zap.tls.clone().unwrap();
    let mut slow = Client::with_small_window(zap.address).over_tls(&tls);
    slow.post("/chat", "", STREAM);
    let mut answer = slow.head();
    std::thread::sleep(Duration::from_millis(100));
    slow.body(&mut answer);
    assert!(answer.whole);
    assert_eq!(answer.body.len(), events * 4008 + 14);
    let mut leaver = Client::with_small_window(zap.address).over_tls(&tls);
    leaver.post("/chat", "", format!("{STREAM} "));
    leaver.head();
    drop(leaver);
    zap.wait_until_idle();
}

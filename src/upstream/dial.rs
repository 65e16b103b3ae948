//! Opens TCP connections to a host that may have several addresses, after RFC 8305 ("Happy Eyeballs").
//!
//! Connections start with the host's addresses in turn. If an address fails, the next one is tried at once. If an
//! address does not respond, the next one is tried in parallel, and the first established connection is used.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use http::Uri;
use rustix::io::Errno;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::sleep;

use crate::upstream::resolver::Resolver;

/// How long to wait for an address before the next one is tried in parallel (RFC 8305, section 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Idle time after which TCP probes the peer. Further probes follow at half this interval.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Number of unanswered probes after which the connection is closed.
const KEEPALIVE_RETRIES: u32 = 3;

/// How long sent data may stay unacknowledged.
const USER_TIMEOUT: Duration = Duration::from_secs(20);

/// Opens TCP connections to one host.
#[derive(Clone)]
pub(crate) struct Dialer {
    resolver: Resolver,
    /// Number of connections started. It selects the address that the next connection starts with.
    turn: Arc<AtomicUsize>,
}

/// No connection to any address of the host could be opened.
#[derive(Debug)]
pub(crate) struct DialError {
    /// Whether this machine had no free file, port or memory for one of the addresses, so that it was not tried.
    pub exhausted: bool,
    /// The last failure; if `exhausted`, the last failure of this machine.
    pub error: io::Error,
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no TCP connection: {}", self.error)
    }
}

impl std::error::Error for DialError {}

impl DialError {
    /// Creates the error for a failure at address `to`, or of the look-up if `to` is `None`.
    fn new(error: io::Error, to: Option<SocketAddr>) -> Self {
        DialError { exhausted: is_local(&error, to), error }
    }

    /// Combines this failure with a `later` one. An address that could not be tried may work, so the host is to blame
    /// only if each of its addresses failed.
    fn then(self, later: DialError) -> DialError {
        if self.exhausted && !later.exhausted { self } else { later }
    }
}

/// Whether an error was caused by a lack of resources on this machine, not by the peer.
fn is_local(error: &io::Error, to: Option<SocketAddr>) -> bool {
    let Some(code) = error.raw_os_error().map(Errno::from_raw_os_error) else { return false };
    match code {
        Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM => true,
        Errno::ADDRNOTAVAIL => to.is_some_and(has_source),
        _ => false,
    }
}

/// Whether this machine has a source address for `to`. If so, EADDRNOTAVAIL means that all ports are in use; if not
/// (`::1` without IPv6), that `to` is unreachable. Sends no packet.
fn has_source(to: SocketAddr) -> bool {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let found = UdpSocket::bind((any, 0)).and_then(|socket| socket.connect(to));
    // If this machine lacks resources for the check too, do not blame the peer.
    found.map_or_else(|error| is_local(&error, None), |()| true)
}

impl Dialer {
    /// Creates a dialer that looks up names with `resolver`.
    pub(crate) fn new(resolver: Resolver) -> Self {
        Dialer { resolver, turn: Arc::default() }
    }

    /// Creates a dialer to the same host that rotates independently. If two kinds of connections alternated in one
    /// rotation over two addresses, each kind would always get the same address.
    pub(crate) fn with_own_rotation(&self) -> Self {
        Dialer::new(self.resolver.clone())
    }

    /// Opens a connection to the host and the port of a URL.
    pub(crate) fn dial_to(
        &self,
        to: &Uri,
    ) -> impl Future<Output = Result<TcpStream, DialError>> + Send + use<> {
        let port = to.port_u16().unwrap_or(if to.scheme_str() == Some("https") { 443 } else { 80 });
        self.clone().dial(to.host().unwrap_or_default().to_owned(), port)
    }

    /// Opens a connection to `host`: a name or an IP address, with or without brackets.
    async fn dial(self, host: String, port: u16) -> Result<TcpStream, DialError> {
        let literal = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        let mut found = match literal {
            Ok(address) => return open(SocketAddr::new(address, port)).await,
            Err(_) => {
                let found = self.resolver.resolve(host).await;
                found.map_err(|failed| DialError::new(failed.into(), None))?
            }
        };
        found.iter_mut().for_each(|address| address.set_port(port));
        race(in_turn(&found, self.turn.fetch_add(1, Ordering::Relaxed))).await
    }
}

/// The addresses without duplicates, rotated by `turn`, with alternating families (RFC 8305, section 4).
fn in_turn(found: &[SocketAddr], turn: usize) -> Vec<SocketAddr> {
    let mut addresses = Vec::with_capacity(found.len());
    for address in found {
        if !addresses.contains(address) {
            addresses.push(*address);
        }
    }
    let by = turn.checked_rem(addresses.len()).unwrap_or(0);
    addresses.rotate_left(by);
    let leads_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (mut first, mut second): (Vec<SocketAddr>, Vec<SocketAddr>) =
        addresses.drain(..).partition(|address| address.is_ipv6() == leads_v6);
    let (mut first, mut second) = (first.drain(..), second.drain(..));
    loop {
        let pair = [first.next(), second.next()];
        if pair == [None, None] {
            return addresses;
        }
        addresses.extend(pair.into_iter().flatten());
    }
}

type Attempt = Pin<Box<dyn Future<Output = Result<TcpStream, DialError>> + Send>>;

/// Tries the addresses in order and returns the first established connection.
async fn race(addresses: Vec<SocketAddr>) -> Result<TcpStream, DialError> {
    let mut attempts: Vec<Attempt> = Vec::new();
    let mut failure: Option<DialError> = None;
    let mut failed = |later: DialError| {
        failure = Some(match failure.take() {
            Some(earlier) => earlier.then(later),
            None => later,
        });
    };
    let mut untried = addresses.into_iter();
    while let Some(address) = untried.next() {
        attempts.push(Box::pin(open(address)));
        tokio::select! {
            biased;
            ended = first_to_end(&mut attempts) => match ended {
                Ok(stream) => return Ok(stream),
                Err(error) => failed(error),
            },
            () = sleep(ATTEMPT_DELAY), if untried.len() > 0 => {}
        }
    }
    while !attempts.is_empty() {
        match first_to_end(&mut attempts).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failed(error),
        }
    }
    let nowhere = || io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    Err(failure.unwrap_or_else(|| DialError::new(nowhere(), None)))
}

/// Returns the result of the first attempt that ends, and removes that attempt.
async fn first_to_end(attempts: &mut Vec<Attempt>) -> Result<TcpStream, DialError> {
    poll_fn(|cx| {
        for i in 0..attempts.len() {
            if let Poll::Ready(result) = attempts[i].as_mut().poll(cx) {
                drop(attempts.swap_remove(i));
                return Poll::Ready(result);
            }
        }
        Poll::Pending
    })
    .await
}

async fn open(to: SocketAddr) -> Result<TcpStream, DialError> {
    connect(to).await.map_err(|error| DialError::new(error, Some(to)))
}

async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_nodelay(true)?;
    // Detect a vanished peer: keepalive probes cover an idle connection, the user timeout unacknowledged data.
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 2).with_retries(KEEPALIVE_RETRIES);
    SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    SockRef::from(&socket).set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket.connect(to).await
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Instant;

    use socket2::{Domain, Socket, Type};

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    /// Creates a dialer whose resolver finds these addresses.
    fn dialer(addresses: &'static [&'static str]) -> Dialer {
        let found = || addresses.iter().map(|a| SocketAddr::new(a.parse().unwrap(), 0)).collect();
        Dialer::new(Resolver::new(Arc::new(move |_| Ok(found()))))
    }

    /// A listener on 127.0.0.1 with a full backlog, so that handshakes get no reply.
    fn blackhole() -> (u16, impl Sized) {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        socket.listen(1).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok();
        let held: Vec<_> = (0..8).map_while(|_| connect()).collect();
        assert!(held.len() < 8, "the backlog never filled");
        (address.port(), (socket, held))
    }

    #[test]
    fn a_silent_address_delays_every_other_connection_by_a_quarter_of_a_second() {
        let (port, _held) = blackhole();
        let _alive = TcpListener::bind(("127.0.0.2", port)).unwrap();
        let dialer = dialer(&["127.0.0.1", "127.0.0.2"]);
        let mut waits = Vec::new();
        runtime().block_on(async {
            for _ in 0..4 {
                let since = Instant::now();
                let stream = dialer.clone().dial("a.test".into(), port).await.unwrap();
                assert_eq!(stream.peer_addr().unwrap().ip().to_string(), "127.0.0.2");
                waits.push(since.elapsed());
            }
        });
        for pair in waits.chunks(2) {
            assert!(pair[0] >= ATTEMPT_DELAY && pair[0] < ATTEMPT_DELAY * 4, "{waits:?}");
            assert!(pair[1] < ATTEMPT_DELAY, "{waits:?}");
        }
    }

    #[test]
    fn a_refusing_address_causes_no_delay_and_the_last_failure_is_kept() {
        let alive = TcpListener::bind("127.0.0.2:0").unwrap();
        let port = alive.local_addr().unwrap().port();
        let (dialer, dead) = (dialer(&["127.0.0.1", "127.0.0.2"]), dialer(&["127.0.0.1", "127.0.0.3"]));
        runtime().block_on(async {
            let since = Instant::now();
            for _ in 0..2 {
                assert!(dialer.clone().dial("a.test".into(), port).await.is_ok());
            }
            let failure = dead.dial("a.test".into(), port).await.unwrap_err();
            assert!(since.elapsed() < ATTEMPT_DELAY);
            assert!(!failure.exhausted);
            assert_eq!(failure.error.kind(), io::ErrorKind::ConnectionRefused);
        });
    }

    #[test]
    fn literal_addresses_are_not_looked_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let dialer = Dialer::new(Resolver::new(Arc::new(|name| panic!("{name} was looked up"))));
        let opened = runtime().block_on(dialer.dial("127.0.0.1".into(), port));
        assert_eq!(opened.unwrap().peer_addr().unwrap().port(), port);
    }

    #[test]
    fn addresses_rotate_and_families_alternate() {
        let parse = |text: &str| -> Vec<SocketAddr> {
            text.split(' ')
                .filter(|t| !t.is_empty())
                .map(|t| SocketAddr::new(t.parse().unwrap(), 1))
                .collect()
        };
        for (found, turn, want) in [
            ("", 3, ""),
            ("1.1.1.1", 7, "1.1.1.1"),
            ("1.1.1.1 1.1.1.2 1.1.1.1", 3, "1.1.1.2 1.1.1.1"),
            ("::1 ::2 1.1.1.1 1.1.1.2", 0, "::1 1.1.1.1 ::2 1.1.1.2"),
            ("::1 ::2 1.1.1.1 1.1.1.2", 1, "::2 1.1.1.1 ::1 1.1.1.2"),
            ("::1 ::2 1.1.1.1 1.1.1.2", 2, "1.1.1.1 ::1 1.1.1.2 ::2"),
            ("::1 ::2 ::3 1.1.1.1", 3, "1.1.1.1 ::1 ::2 ::3"),
        ] {
            assert_eq!(in_turn(&parse(found), turn), parse(want), "{found}, turn {turn}");
        }
    }

    #[test]
    fn a_lack_of_local_resources_is_not_the_peers_fault() {
        // A socket may not send to the broadcast address, so that there is no source address for it.
        let [here, nowhere] = ["127.0.0.1:9", "255.255.255.255:9"].map(|to| Some(to.parse().unwrap()));
        for (code, to, local) in [
            (Errno::MFILE, here, true),
            (Errno::NOBUFS, nowhere, true),
            (Errno::MFILE, None, true),
            (Errno::ADDRNOTAVAIL, here, true),
            (Errno::ADDRNOTAVAIL, nowhere, false),
            (Errno::ADDRNOTAVAIL, None, false),
            (Errno::CONNREFUSED, here, false),
            (Errno::NETUNREACH, nowhere, false),
        ] {
            let error = io::Error::from_raw_os_error(code.raw_os_error());
            assert_eq!(DialError::new(error, to).exhausted, local, "{code:?} {to:?}");
        }
    }

    #[test]
    fn a_missing_address_family_is_not_a_lack_of_ports() {
        // What the kernel says of `::1` without IPv6, at an address that has no source on any machine.
        let failure = |code: Errno, to: &str| {
            DialError::new(io::Error::from_raw_os_error(code.raw_os_error()), Some(to.parse().unwrap()))
        };
        let missing = || failure(Errno::ADDRNOTAVAIL, "255.255.255.255:9");
        let refused = || failure(Errno::CONNREFUSED, "127.0.0.1:9");
        for both in [missing().then(refused()), refused().then(missing())] {
            assert!(!both.exhausted, "{both}");
        }
    }

    #[test]
    fn the_host_is_not_to_blame_if_an_address_could_not_be_tried() {
        let failure = |errno: Errno| DialError::new(io::Error::from_raw_os_error(errno.raw_os_error()), None);
        let pairs = [
            (Errno::MFILE, Errno::CONNREFUSED, Errno::MFILE),
            (Errno::CONNREFUSED, Errno::MFILE, Errno::MFILE),
            (Errno::CONNREFUSED, Errno::HOSTUNREACH, Errno::HOSTUNREACH),
        ];
        for (earlier, later, want) in pairs {
            let both = failure(earlier).then(failure(later));
            assert_eq!(both.error.raw_os_error(), Some(want.raw_os_error()));
            assert_eq!(both.exhausted, want == Errno::MFILE);
        }
    }
}

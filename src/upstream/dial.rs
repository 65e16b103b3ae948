//! Opens TCP connections to a host that may have several addresses, after RFC 8305 ("Happy Eyeballs").
//!
//! Each connection begins at the next of the host's addresses in turn. Where an address fails, the next is tried at once;
//! where it does not answer, the next is tried beside it, and the first connection that stands is used.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::sleep;
use tower_service::Service;

use crate::upstream::resolver::Resolver;

/// How long an address may not answer before the next one is tried beside it (RFC 8305, section 5).
const HEAD_START: Duration = Duration::from_millis(250);

/// Silence after which a peer is probed; then again every half of it.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Probes without an answer after which a connection is given up.
const KEEPALIVE_RETRIES: u32 = 3;

/// How long a peer may leave data unacknowledged.
const USER_TIMEOUT: Duration = Duration::from_secs(20);

/// Opens TCP connections to one host.
#[derive(Clone)]
pub(crate) struct Dialer {
    resolver: Resolver,
    /// Connections begun: the next one begins at this of the host's addresses.
    turn: Arc<AtomicUsize>,
}

/// No address of the host could be connected to.
#[derive(Debug)]
pub(crate) struct DialError {
    /// This machine had no file, port or memory left for one of the addresses, so that the host was not asked there.
    pub exhausted: bool,
    /// The last failure; where this machine was exhausted, of that kind.
    pub error: io::Error,
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no TCP connection: {}", self.error)
    }
}

impl std::error::Error for DialError {}

impl DialError {
    /// A failure at the address `to`, or of the look-up.
    fn new(error: io::Error, to: Option<SocketAddr>) -> Self {
        DialError { exhausted: is_ours(&error, to), error }
    }

    /// This failure and, after it, `later`. An address that could not be asked may be alive: the host is to blame only
    /// where all of its addresses failed by themselves.
    fn then(self, later: DialError) -> DialError {
        if self.exhausted && !later.exhausted { self } else { later }
    }
}

/// Whether this machine lacked something, and the peer had no part in it.
fn is_ours(error: &io::Error, to: Option<SocketAddr>) -> bool {
    let Some(code) = error.raw_os_error().map(Errno::from_raw_os_error) else { return false };
    match code {
        Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM => true,
        Errno::ADDRNOTAVAIL => to.is_some_and(has_source),
        _ => false,
    }
}

/// Whether this machine has an address to reach `to` from. Where it has, EADDRNOTAVAIL says that all ports are in use;
/// where it has none (`::1` without IPv6), that `to` cannot be reached. Sends nothing.
fn has_source(to: SocketAddr) -> bool {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let found = UdpSocket::bind((any, 0)).and_then(|socket| socket.connect(to));
    // Where even that lacks something of this machine, nothing is known against the peer.
    found.map_or_else(|error| is_ours(&error, None), |()| true)
}

impl Dialer {
    /// Looks names up by `resolver`.
    pub(crate) fn new(resolver: Resolver) -> Self {
        Dialer { resolver, turn: Arc::default() }
    }

    /// The same host, with turns of its own: two kinds of connections that shared the turns could each always get the same
    /// of two addresses.
    pub(crate) fn with_own_turns(&self) -> Self {
        Dialer::new(self.resolver.clone())
    }

    /// Opens a connection to `host`, a name or an address, which may stand in brackets.
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

impl Service<Uri> for Dialer {
    type Response = TokioIo<TcpStream>;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, DialError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let port = to.port_u16().unwrap_or(if to.scheme_str() == Some("https") { 443 } else { 80 });
        let dialing = self.clone().dial(to.host().unwrap_or_default().to_owned(), port);
        Box::pin(async move { dialing.await.map(TokioIo::new) })
    }
}

/// The addresses, each once, from the one whose `turn` it is; families alternate (RFC 8305, section 4).
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

/// The first connection that stands.
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
            () = sleep(HEAD_START), if untried.len() > 0 => {}
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

/// The result of the first of these attempts that ends, which leaves them.
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
    // A peer that vanishes is noticed: by probes while the connection is silent, by the time limit while data is under way.
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

    /// A dialer to a name with these addresses.
    fn dialer(addresses: &'static [&'static str]) -> Dialer {
        let found = || addresses.iter().map(|a| SocketAddr::new(a.parse().unwrap(), 0)).collect();
        Dialer::new(Resolver::new(Arc::new(move |_| Ok(found()))))
    }

    /// A listener on 127.0.0.1 that accepts nothing and whose backlog is full: its handshakes stay unanswered.
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
    fn an_address_that_swallows_handshakes_costs_a_quarter_of_a_second_every_other_time() {
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
            assert!(pair[0] >= HEAD_START && pair[0] < HEAD_START * 4, "{waits:?}");
            assert!(pair[1] < HEAD_START, "{waits:?}");
        }
    }

    #[test]
    fn an_address_that_refuses_costs_nothing_and_the_last_failure_is_kept() {
        let alive = TcpListener::bind("127.0.0.2:0").unwrap();
        let port = alive.local_addr().unwrap().port();
        let (dialer, dead) = (dialer(&["127.0.0.1", "127.0.0.2"]), dialer(&["127.0.0.1", "127.0.0.3"]));
        runtime().block_on(async {
            let since = Instant::now();
            for _ in 0..2 {
                assert!(dialer.clone().dial("a.test".into(), port).await.is_ok());
            }
            let failure = dead.dial("a.test".into(), port).await.unwrap_err();
            assert!(since.elapsed() < HEAD_START);
            assert!(!failure.exhausted);
            assert_eq!(failure.error.kind(), io::ErrorKind::ConnectionRefused);
        });
    }

    #[test]
    fn literal_addresses_are_not_looked_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let dialer = Dialer::new(Resolver::new(Arc::new(|name| panic!("{name} is no name"))));
        let opened = runtime().block_on(dialer.dial("127.0.0.1".into(), port));
        assert_eq!(opened.unwrap().peer_addr().unwrap().port(), port);
    }

    #[test]
    fn addresses_take_turns_and_families_alternate() {
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
    fn what_this_machine_lacks_is_no_fault_of_the_peer() {
        // Nothing may be sent to the broadcast address, so that there is no source for it.
        let [here, nowhere] = ["127.0.0.1:9", "255.255.255.255:9"].map(|to| Some(to.parse().unwrap()));
        for (code, to, ours) in [
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
            assert_eq!(DialError::new(error, to).exhausted, ours, "{code:?} {to:?}");
        }
    }

    #[test]
    fn a_family_that_this_machine_does_not_have_is_no_lack_of_ports() {
        let dialer = dialer(&["::1", "127.0.0.1"]);
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        runtime().block_on(async {
            for _ in 0..2 {
                let failure = dialer.clone().dial("localhost.test".into(), port).await.unwrap_err();
                assert!(!failure.exhausted, "{failure}");
            }
        });
    }

    #[test]
    fn an_address_that_could_not_be_asked_leaves_the_host_without_blame() {
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

//! A provider that writes the bytes of its script and records the requests that it receives.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::TIMEOUT;

/// A request as a provider received it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub line: String,
    /// Names in lower case, in the order received.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// What a provider does with the connection after a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    Close,
    Keep,
    /// Closes it with a reset, without a FIN before that.
    Reset,
}

type Script = dyn Fn(&Seen, &mut TcpStream) -> After + Send + Sync;

struct Inner {
    script: Box<Script>,
    seen: Mutex<Vec<Seen>>,
    probes: Mutex<Vec<Seen>>,
    health: AtomicU16,
    /// The body of the response to each probe.
    list: Mutex<&'static str>,
    connections: AtomicUsize,
    stopped: AtomicBool,
}

/// A running provider; stopped when dropped.
pub(crate) struct Provider {
    inner: Arc<Inner>,
    pub address: SocketAddr,
}

impl Provider {
    /// Starts a provider that runs `script` for each chat and responds to probes with 200.
    pub(crate) fn start(script: impl Fn(&Seen, &mut TcpStream) -> After + Send + Sync + 'static) -> Self {
        Self::start_on(TcpListener::bind("127.0.0.1:0").unwrap(), script)
    }

    pub(crate) fn start_on(
        listener: TcpListener,
        script: impl Fn(&Seen, &mut TcpStream) -> After + Send + Sync + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let inner = Arc::new(Inner {
            script: Box::new(script),
            seen: Mutex::default(),
            probes: Mutex::default(),
            health: AtomicU16::new(200),
            list: Mutex::new("{}"),
            connections: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        });
        let theirs = inner.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if theirs.stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (inner, stream) = (theirs.clone(), stream.unwrap());
                std::thread::spawn(move || serve(&inner, stream));
            }
        });
        Provider { inner, address }
    }

    /// Starts a provider that responds to every chat with this status, these header lines and this body.
    pub(crate) fn fixed(status: u16, headers: &'static str, body: &'static str) -> Self {
        Self::start(move |_, stream| {
            reply(stream, status, headers, body.as_bytes());
            After::Keep
        })
    }

    /// Starts a provider that responds to every chat with 200 and the body `name`.
    pub(crate) fn named(name: &'static str) -> Self {
        Self::fixed(200, "content-type: application/json\r\n", name)
    }

    /// Starts a provider that responds to every request with 200 and its body.
    pub(crate) fn echo() -> Self {
        Self::start(|seen, stream| {
            reply(stream, 200, "", &seen.body);
            After::Keep
        })
    }

    /// Starts a provider that holds each request until `gate` is opened for it, and then [echoes](Self::echo) it.
    pub(crate) fn gated(gate: &Gate) -> Self {
        let gate = gate.clone();
        Self::start(move |seen, stream| {
            gate.pass();
            reply(stream, 200, "", &seen.body);
            After::Keep
        })
    }

    /// An address without a listener: connects are refused.
    pub(crate) fn closed_port() -> SocketAddr {
        let (address, socket) = Provider::bound_port();
        // Until the process ends, so that no other test gets the port.
        std::mem::forget(socket);
        address
    }

    /// A port that refuses connections until the socket listens.
    pub(crate) fn bound_port() -> (SocketAddr, socket2::Socket) {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        (address, socket)
    }

    /// Sets the status of all further responses to probes.
    pub(crate) fn set_health(&self, status: u16) {
        self.inner.health.store(status, Ordering::SeqCst);
    }

    /// Sets the body of all further responses to probes: the list of models, for those that ask for it.
    pub(crate) fn set_list(&self, list: &'static str) {
        *self.inner.list.lock().unwrap() = list;
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.inner.seen.lock().unwrap().clone()
    }

    pub(crate) fn count(&self) -> usize {
        self.inner.seen.lock().unwrap().len()
    }

    pub(crate) fn probes(&self) -> Vec<Seen> {
        self.inner.probes.lock().unwrap().clone()
    }

    /// The number of open connections.
    pub(crate) fn connections(&self) -> usize {
        self.inner.connections.load(Ordering::SeqCst)
    }

    /// A `[[backends]]` entry for this provider.
    pub(crate) fn backend(&self, name: &str, more: &str) -> String {
        backend(self.address, name, more)
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.inner.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

/// A `[[backends]]` entry with the further lines `more`. The weight is 1, unless `more` sets it.
pub(crate) fn backend(address: SocketAddr, name: &str, more: &str) -> String {
    let weight = if more.contains("weight") { "" } else { "weight = 1\n" };
    format!("[[backends]]\nname = \"{name}\"\nurl = \"http://{address}\"\n{weight}{more}\n")
}

fn serve(inner: &Inner, mut stream: TcpStream) {
    inner.connections.fetch_add(1, Ordering::SeqCst);
    stream.set_nodelay(true).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some(request) = read_request(&mut reader) {
        if request.line.starts_with("GET") && !request.line.contains("/responses/") {
            inner.probes.lock().unwrap().push(request);
            let status = inner.health.load(Ordering::SeqCst);
            let list = *inner.list.lock().unwrap();
            reply(&mut stream, status, "", list.as_bytes());
            continue;
        }
        inner.seen.lock().unwrap().push(request.clone());
        match (inner.script)(&request, &mut stream) {
            After::Keep => {}
            After::Close => break,
            After::Reset => {
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                inner.connections.fetch_sub(1, Ordering::SeqCst);
                return;
            }
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Both);
    inner.connections.fetch_sub(1, Ordering::SeqCst);
}

fn read_request(reader: &mut impl BufRead) -> Option<Seen> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        lines.push(line);
    }
    let headers: Vec<(String, String)> = lines[1..]
        .iter()
        .filter_map(|l| l.split_once(':'))
        .map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned()))
        .collect();
    let mut seen = Seen { line: lines.swap_remove(0), headers, body: Vec::new() };
    let length = seen.header("content-length").map_or(0, |v| v.parse().unwrap());
    seen.body.resize(length, 0);
    reader.read_exact(&mut seen.body).ok()?;
    Some(seen)
}

/// Writes a complete response.
pub(crate) fn reply(stream: &mut TcpStream, status: u16, headers: &str, body: &[u8]) {
    let mut out =
        format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n{headers}\r\n", body.len()).into_bytes();
    out.extend_from_slice(body);
    let _ = stream.write_all(&out);
}

/// Writes the head of a chunked event stream.
pub(crate) fn start_events(stream: &mut TcpStream) {
    let _ = stream.write_all(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
    );
}

/// Writes one chunk; returns `false` if Zap has closed the connection.
pub(crate) fn chunk(stream: &mut TcpStream, data: &str) -> bool {
    stream.write_all(format!("{:x}\r\n{data}\r\n", data.len()).as_bytes()).is_ok()
}

/// Writes the last chunk of a chunked body.
pub(crate) fn end_chunks(stream: &mut TcpStream) {
    let _ = stream.write_all(b"0\r\n\r\n");
}

/// Waits until Zap closes the connection; returns `false` if it stays open for [`TIMEOUT`].
pub(crate) fn wait_closed(stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let closed = matches!((&*stream).read(&mut [0; 1]), Ok(0) | Err(_));
    let _ = stream.set_read_timeout(None);
    closed
}

/// An address whose handshakes stay unanswered: a listener that accepts nothing and whose backlog is full. The
/// second value keeps it so and must be held.
pub(crate) fn blackhole() -> (SocketAddr, impl Sized) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(1).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok();
    let held: Vec<_> = (0..8).map_while(|_| connect()).collect();
    assert!(held.len() < 8, "the backlog is not full");
    (address, (socket, held))
}

/// Holds scripts until the test lets them continue.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<(Mutex<(usize, usize)>, Condvar)>);

impl Gate {
    /// Waits until the gate is opened for this caller, for 60 s at most.
    pub(crate) fn pass(&self) {
        let (lock, bell) = &*self.0;
        let mut state = lock.lock().unwrap();
        state.1 += 1;
        bell.notify_all();
        let (mut state, _) = bell.wait_timeout_while(state, Duration::from_secs(60), |s| s.0 == 0).unwrap();
        state.0 = state.0.saturating_sub(1);
        state.1 -= 1;
    }

    /// Lets `n` callers of [`pass`](Self::pass) continue, now or when they come.
    pub(crate) fn open(&self, n: usize) {
        self.0.0.lock().unwrap().0 += n;
        self.0.1.notify_all();
    }

    /// The number of callers that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.0.0.lock().unwrap().1
    }
}

//! A blocking HTTP client with control of every byte.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use socket2::{Domain, Socket, Type};

use super::TIMEOUT;
use super::tls_client::{TlsClient, TlsWire};

/// One connection to Zap.
pub(crate) struct Client {
    stream: Wire,
    /// Bytes received but not yet parsed.
    ahead: Vec<u8>,
}

enum Wire {
    Plain(TcpStream),
    Tls(Box<TlsWire>),
}

impl Wire {
    fn tcp(&self) -> &TcpStream {
        match self {
            Wire::Plain(tcp) => tcp,
            Wire::Tls(tls) => &tls.sock,
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Wire::Plain(tcp) => tcp.write_all(bytes),
            Wire::Tls(tls) => tls.write_all(bytes).and_then(|()| tls.flush()),
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Wire::Plain(tcp) => tcp.read(buf),
            Wire::Tls(tls) => tls.read(buf),
        }
    }
}

/// A response, as far as it was received.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub status: u16,
    /// Names in lower case, in the order received.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Whether the body ended as its framing requires.
    pub whole: bool,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The `error.code` of the JSON body; empty if it has none.
    pub(crate) fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        Self::of(stream)
    }

    fn of(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Client { stream: Wire::Plain(stream), ahead: Vec::new() }
    }

    /// Makes a TLS connection of it. The handshake comes with the first bytes.
    pub(crate) fn over_tls(self, tls: &TlsClient) -> Self {
        let Wire::Plain(tcp) = self.stream else { panic!("it is TLS already") };
        Client { stream: Wire::Tls(Box::new(tls.wire(tcp))), ahead: Vec::new() }
    }

    /// The TLS side of the connection.
    pub(crate) fn tls(&mut self) -> &mut TlsWire {
        let Wire::Tls(tls) = &mut self.stream else { panic!("it is plain TCP") };
        tls
    }

    /// Connects with a receive buffer of a few kilobytes.
    pub(crate) fn with_small_window(address: SocketAddr) -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.connect(&address.into()).unwrap();
        Self::of(TcpStream::from(socket))
    }

    /// A second handle for writing.
    pub(crate) fn writer(&self) -> TcpStream {
        self.stream.tcp().try_clone().unwrap()
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// Sends bytes that Zap may refuse to read; returns whether the write succeeded.
    pub(crate) fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).is_ok()
    }

    /// Sends a POST of `body` to `path` with these additional header lines.
    pub(crate) fn post(&mut self, path: &str, headers: &str, body: impl AsRef<[u8]>) {
        let body = body.as_ref();
        let head =
            format!("POST {path} HTTP/1.1\r\nhost: zap\r\ncontent-length: {}\r\n{headers}\r\n", body.len());
        self.send([head.as_bytes(), body].concat());
    }

    /// Posts a chat and reads the response.
    pub(crate) fn chat(&mut self, headers: &str, body: impl AsRef<[u8]>) -> Response {
        self.post("/chat", headers, body);
        self.response()
    }

    /// Sends a GET of `path` and reads the response.
    pub(crate) fn get(&mut self, path: &str) -> Response {
        self.send(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n"));
        self.response()
    }

    /// Reads one response; panics if the connection ends before a complete head.
    pub(crate) fn response(&mut self) -> Response {
        let mut response = self.head();
        self.body(&mut response);
        response
    }

    /// Reads the head of a response.
    pub(crate) fn head(&mut self) -> Response {
        let end = loop {
            if let Some(at) = self.ahead.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            assert!(
                self.fill(),
                "connection closed before a complete head: {:?}",
                String::from_utf8_lossy(&self.ahead)
            );
        };
        let head = String::from_utf8(self.ahead.drain(..end).collect()).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines
            .filter_map(|l| l.split_once(':'))
            .map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned()))
            .collect();
        Response { status, headers, body: Vec::new(), whole: false }
    }

    /// Reads the rest of a response.
    pub(crate) fn body(&mut self, response: &mut Response) {
        if response.header("transfer-encoding") == Some("chunked") {
            while let Some(piece) = self.chunk() {
                if piece.is_empty() {
                    response.whole = true;
                    return;
                }
                response.body.extend_from_slice(&piece);
            }
            return;
        }
        let length = response.header("content-length").map(|v| v.parse::<usize>().unwrap());
        let length = if response.status == 204 || response.status == 304 { Some(0) } else { length };
        while self.ahead.len() < length.unwrap_or(usize::MAX) && self.fill() {}
        let n = self.ahead.len().min(length.unwrap_or(usize::MAX));
        response.body.extend(self.ahead.drain(..n));
        response.whole = length.is_none_or(|l| l == n);
    }

    /// Reads one chunk of a chunked body; empty at its end, `None` if the connection ends early.
    pub(crate) fn chunk(&mut self) -> Option<Vec<u8>> {
        let line = loop {
            match self.ahead.windows(2).position(|w| w == b"\r\n") {
                Some(at) => break at,
                None if self.fill() => {}
                None => return None,
            }
        };
        let size = usize::from_str_radix(std::str::from_utf8(&self.ahead[..line]).unwrap(), 16).unwrap();
        while self.ahead.len() < line + 2 + size + 2 {
            if !self.fill() {
                return None;
            }
        }
        let piece = self.ahead[line + 2..line + 2 + size].to_vec();
        self.ahead.drain(..line + 2 + size + 2);
        Some(piece)
    }

    /// Reads up to the end of the connection; the flag is `false` if the connection ends with a reset.
    pub(crate) fn rest(&mut self) -> (Vec<u8>, bool) {
        let mut buf = [0; 4096];
        loop {
            match self.stream.read(&mut buf) {
                Ok(0) => return (std::mem::take(&mut self.ahead), true),
                Ok(n) => self.ahead.extend_from_slice(&buf[..n]),
                Err(e) if e.kind() == ErrorKind::ConnectionReset => {
                    return (std::mem::take(&mut self.ahead), false);
                }
                Err(e) => panic!("the connection did not end: {e}"),
            }
        }
    }

    /// Waits for up to `limit` until Zap closes the connection; panics if bytes arrive.
    pub(crate) fn close_within(&mut self, limit: std::time::Duration) {
        self.stream.tcp().set_read_timeout(Some(limit)).unwrap();
        assert!(!self.fill(), "unexpected bytes arrived");
    }

    /// Closes the connection with a reset.
    pub(crate) fn reset(self) {
        socket2::SockRef::from(self.stream.tcp()).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }

    /// Shuts down the write side (sends FIN).
    pub(crate) fn half_close(&self) {
        self.stream.tcp().shutdown(Shutdown::Write).unwrap();
    }

    /// Whether no bytes have arrived and the connection is still open.
    pub(crate) fn is_quiet(&mut self) -> bool {
        self.stream.tcp().set_nonblocking(true).unwrap();
        let quiet =
            matches!(self.stream.tcp().peek(&mut [0; 1]), Err(e) if e.kind() == ErrorKind::WouldBlock);
        self.stream.tcp().set_nonblocking(false).unwrap();
        quiet && self.ahead.is_empty()
    }

    fn fill(&mut self) -> bool {
        let mut buf = [0; 16384];
        match self.stream.read(&mut buf) {
            Ok(0) => false,
            Ok(n) => {
                self.ahead.extend_from_slice(&buf[..n]);
                true
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("no bytes arrived in time")
            }
            Err(_) => false,
        }
    }
}

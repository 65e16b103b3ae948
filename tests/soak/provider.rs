//! Providers that do what a request's `user` says: `plain`, `wait` (no response), or `stream:N:MS` (N events, MS ms
//! apart). A given share of their requests may fail.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// A provider in its own process; killed when dropped.
pub(crate) struct Process {
    child: Child,
    pub port: u16,
}

impl Process {
    /// Starts a provider on `port` (0 for any free one). `fail` percent of its requests are picked to fail: a stream
    /// may be cut, and half of the time the request fails before its response begins.
    pub(crate) fn start(port: u16, fail: u64) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["provider", "--port", &port.to_string(), "--fail", &fail.to_string()]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        Process { child, port: line.trim().parse().unwrap() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Prints the port, then serves in this process until the future is dropped.
pub(crate) async fn run(port: u16, fail: u64) {
    let listener = listen(port);
    println!("{}", listener.local_addr().unwrap().port());
    serve(listener, fail, Arc::default()).await;
}

pub(crate) fn listen(port: u16) -> TcpListener {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).unwrap();
    socket.listen(8192).unwrap();
    socket.set_nonblocking(true).unwrap();
    TcpListener::from_std(socket.into()).unwrap()
}

/// Notifications of a provider: `disconnected` for each client that disconnects during a request, `received` for each
/// request.
#[derive(Default)]
pub(crate) struct Events {
    pub disconnected: Notify,
    pub received: Notify,
}

pub(crate) async fn serve(listener: TcpListener, fail: u64, events: Arc<Events>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let events = events.clone();
        tokio::spawn(async move { connection(stream, fail, &events).await });
    }
}

async fn connection(mut stream: TcpStream, fail: u64, events: &Events) {
    stream.set_nodelay(true).unwrap();
    let mut buf = Vec::new();
    while let Some(user) = request(&mut stream, &mut buf).await {
        let failing = fastrand::u64(..100) < fail && user != "health";
        if user != "health" {
            events.received.notify_one();
        }
        if !answer(&mut stream, &user, failing, events).await {
            return;
        }
    }
}

/// Reads one request; returns its `user`, or `health` for a GET.
async fn request(stream: &mut TcpStream, buf: &mut Vec<u8>) -> Option<String> {
    loop {
        if let Some(end) = memchr::memmem::find(buf, b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&buf[..end]).to_lowercase();
            let length = head.split("content-length: ").nth(1).and_then(|t| t.lines().next()?.parse().ok());
            let whole = end + 4 + length.unwrap_or(0usize);
            if buf.len() >= whole {
                let body = String::from_utf8_lossy(&buf[end + 4..whole]).into_owned();
                let health = head.starts_with("get");
                buf.drain(..whole);
                let user = body.split("\"user\":\"").nth(1).and_then(|t| t.split('"').next());
                return Some(if health { "health" } else { user.unwrap_or("plain") }.to_owned());
            }
        }
        if stream.read_buf(buf).await.ok()? == 0 {
            return None;
        }
    }
}

/// Sends the response; returns `false` if the connection must be closed.
async fn answer(stream: &mut TcpStream, user: &str, failing: bool, events: &Events) -> bool {
    if failing && fastrand::bool() {
        return match fastrand::u8(..3) {
            0 => false,
            1 => plain(stream, "500 X", "", "{\"error\":\"random failure\"}").await,
            _ => plain(stream, "429 X", "retry-after-ms: 20\r\n", "{}").await,
        };
    }
    if user == "wait" {
        wait_closed(stream).await;
        events.disconnected.notify_one();
        return false;
    }
    let Some(stream_of) = user.strip_prefix("stream:") else {
        return plain(stream, "200 OK", "", "{\"choices\":[{\"message\":{\"content\":\"hi\"}}]}").await;
    };
    let (count, pause) = stream_of.split_once(':').unwrap();
    let count: u32 = count.parse().unwrap();
    let pause = Duration::from_millis(pause.parse().unwrap());
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    if stream.write_all(head.as_bytes()).await.is_err() {
        return false;
    }
    for i in 0..count {
        if failing && i > count / 2 {
            return false;
        }
        if stream.write_all(b"18\r\ndata: {\"content\":\"hi\"}\n\n\r\n").await.is_err() {
            events.disconnected.notify_one();
            return false;
        }
        let paused = tokio::time::timeout(pause, wait_closed(stream)).await;
        if paused.is_ok() {
            events.disconnected.notify_one();
            return false;
        }
    }
    stream.write_all(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n").await.is_ok()
}

async fn plain(stream: &mut TcpStream, status: &str, headers: &str, body: &str) -> bool {
    let text = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len());
    stream.write_all(text.as_bytes()).await.is_ok()
}

/// Waits until Zap closes the connection.
async fn wait_closed(stream: &mut TcpStream) {
    let mut one = [0; 1];
    while matches!(stream.peek(&mut one).await, Ok(n) if n > 0) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

//! Providers that do what a request's `user` says: `plain`, `key` (the end of the key that came), `large` (30 MB),
//! `flood` (a stream without an end), `wait` (no response), `stream:N:MS` (N events, MS ms apart), or `talk:N:MS`, the
//! same in the shape of the endpoint, with a pause before the content. A given share of their requests may fail.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use crate::lies::{Ask, End, Lie};

/// The message of an error event that a provider sends amid a stream.
pub(crate) const GIVES_UP: &str = "the provider gives up";

/// A provider in its own process; killed when dropped.
pub(crate) struct Process {
    child: Child,
    pub port: u16,
}

impl Process {
    /// Starts a provider on `port` (0 for any free one). `fail` percent of its requests are picked to fail: a stream
    /// may break amid its content, and half of the time the request fails before the content.
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
    while let Some(request) = read_request(&mut stream, &mut buf).await {
        let failing = fastrand::u64(..100) < fail && !request.is_check;
        if !request.is_check {
            events.received.notify_one();
        }
        if !answer(&mut stream, &request, failing, events).await {
            return;
        }
    }
}

/// A request as a provider gets it.
pub(crate) struct Request {
    pub ask: Ask,
    /// The value of `x-request-id`.
    pub id: String,
    /// The end of the key, behind its last dash.
    pub key: String,
    /// Whether this is a health check.
    pub is_check: bool,
    pub body: String,
}

impl Request {
    /// What the provider has to do.
    fn user(&self) -> &str {
        let user = self.body.split("\"user\":\"").nth(1).and_then(|t| t.split('"').next());
        user.unwrap_or("plain")
    }
}

pub(crate) async fn read_request(stream: &mut TcpStream, buf: &mut Vec<u8>) -> Option<Request> {
    loop {
        if let Some(end) = memchr::memmem::find(buf, b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&buf[..end]).to_lowercase();
            let length = head.split("content-length: ").nth(1).and_then(|t| t.lines().next()?.parse().ok());
            let whole = end + 4 + length.unwrap_or(0usize);
            if buf.len() >= whole {
                let body = String::from_utf8_lossy(&buf[end + 4..whole]).into_owned();
                buf.drain(..whole);
                let ask = Ask::of(head.split(' ').nth(1)?, body.as_bytes());
                let id = head.split("x-request-id: ").nth(1).and_then(|t| t.lines().next());
                let id = id.unwrap_or_default().to_owned();
                let key = head.split("authorization: bearer ").nth(1).and_then(|t| t.lines().next());
                let key = key.and_then(|key| key.rsplit('-').next()).unwrap_or_default().to_owned();
                return Some(Request { ask, id, key, is_check: head.starts_with("get"), body });
            }
        }
        if stream.read_buf(buf).await.ok()? == 0 {
            return None;
        }
    }
}

/// Sends the response; returns `false` if the connection must be closed.
async fn answer(stream: &mut TcpStream, request: &Request, failing: bool, events: &Events) -> bool {
    let user = request.user();
    if failing && fastrand::bool() {
        let lies = request.ask.lies().count();
        return match fastrand::usize(..lies + 1) {
            0 => plain(stream, "429 X", "retry-after-ms: 20\r\n", "{}").await,
            n => tell(stream, request.ask.lies().nth(n - 1).unwrap()).await,
        };
    }
    if let Some(script) = user.strip_prefix("talk:") {
        return talk(stream, request.ask, script).await;
    }
    if user == "wait" {
        wait_closed(stream).await;
        events.disconnected.notify_one();
        return false;
    }
    if user == "key" {
        let body = format!("{{\"choices\":[{{\"message\":{{\"content\":\"{}\"}}}}]}}", request.key);
        return plain(stream, "200 OK", "", &body).await;
    }
    if matches!(user, "large" | "flood") {
        return pour(stream, user == "flood").await;
    }
    let Some(stream_of) = user.strip_prefix("stream:") else {
        return plain(stream, "200 OK", "", "{\"choices\":[{\"message\":{\"content\":\"hi\"}}]}").await;
    };
    let (count, pause) = script(stream_of);
    if stream.write_all(STREAM_HEAD).await.is_err() {
        return false;
    }
    for i in 0..count {
        if failing && i > count / 2 {
            return break_off(stream).await;
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

const STREAM_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// The number of events and the pause of `N:MS`.
fn script(text: &str) -> (u32, Duration) {
    let (count, pause) = text.split_once(':').unwrap();
    (count.parse().unwrap(), Duration::from_millis(pause.parse().unwrap()))
}

/// Breaks a stream amid its content: a cut, a cut within an event, or an error event and a clean end.
async fn break_off(stream: &mut TcpStream) -> bool {
    let error = format!("data: {{\"error\":{{\"message\":\"{GIVES_UP}\"}}}}\n\n");
    match fastrand::u8(..3) {
        0 => false,
        1 => {
            chunk(stream, "data: {\"content\":\"h").await;
            false
        }
        _ => chunk(stream, &error).await && stream.write_all(b"0\r\n\r\n").await.is_ok(),
    }
}

async fn chunk(stream: &mut TcpStream, data: &str) -> bool {
    stream.write_all(format!("{:x}\r\n{data}\r\n", data.len()).as_bytes()).await.is_ok()
}

/// Sends a lie; returns `false` if the connection must be closed.
pub(crate) async fn tell(stream: &mut TcpStream, lie: &Lie) -> bool {
    let is_sent = stream.write_all(&lie.bytes()).await.is_ok();
    match lie.end {
        End::Keep => return is_sent,
        End::Close => {}
        End::Reset => socket2::SockRef::from(&*stream).set_linger(Some(Duration::ZERO)).unwrap(),
        End::Stall => wait_closed(stream).await,
    }
    false
}

/// Sends a stream in the shape of the endpoint, with a pause before the content and behind each event of it.
async fn talk(stream: &mut TcpStream, ask: Ask, text: &str) -> bool {
    let ((count, pause), (before, content, behind)) = (script(text), ask.parts());
    if stream.write_all(STREAM_HEAD).await.is_err() || !chunk(stream, &before).await {
        return false;
    }
    for i in 0..=count {
        if tokio::time::timeout(pause, wait_closed(stream)).await.is_ok()
            || i < count && !chunk(stream, content).await
        {
            return false;
        }
    }
    chunk(stream, &behind).await && stream.write_all(b"0\r\n\r\n").await.is_ok()
}

/// Sends an answer of 30 MB, or a stream that does not end, as fast as it is read.
async fn pour(stream: &mut TcpStream, is_stream: bool) -> bool {
    const LENGTH: usize = 30_000_000;
    let (head, piece) = match is_stream {
        true => {
            let event = format!("data: {{\"content\":\"{}\"}}\n\n", "x".repeat(1000));
            (STREAM_HEAD.to_vec(), format!("{:x}\r\n{event}\r\n", event.len()).repeat(16))
        }
        false => {
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {LENGTH}\r\n\r\n"
            );
            ((head + "{").into(), " ".repeat(16 * 1024))
        }
    };
    let mut is_sent = stream.write_all(&head).await.is_ok();
    let mut left = LENGTH - 1;
    while is_sent && left > 0 {
        let n = if is_stream { piece.len() } else { piece.len().min(left) };
        is_sent = stream.write_all(&piece.as_bytes()[..n]).await.is_ok();
        left -= if is_stream { 0 } else { n };
    }
    is_sent
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

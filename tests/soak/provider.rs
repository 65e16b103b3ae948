//! Providers that do what a request's `user` says: `plain`, `wait` (never answers), or `stream:N:MS`, so many events so
//! far apart. Some of their answers fail, if they are told to.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// A provider in a process of its own, killed when dropped.
pub struct Process {
    child: Child,
    pub port: u16,
}

impl Process {
    /// Starts it on `port` (0: any); `fail` of a hundred answers fail.
    pub fn start(port: u16, fail: u64) -> Self {
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

/// Serves in this process until it is dropped; prints its port first.
pub async fn run(port: u16, fail: u64) {
    let listener = listen(port);
    println!("{}", listener.local_addr().unwrap().port());
    serve(listener, fail, Arc::default()).await;
}

pub fn listen(port: u16) -> TcpListener {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).unwrap();
    socket.listen(8192).unwrap();
    socket.set_nonblocking(true).unwrap();
    TcpListener::from_std(socket.into()).unwrap()
}

/// Rung for every connection with a request that breaks off, and for every request that comes.
#[derive(Default)]
pub struct News {
    pub broken: Notify,
    pub came: Notify,
}

pub async fn serve(listener: TcpListener, fail: u64, news: Arc<News>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let news = news.clone();
        tokio::spawn(async move { connection(stream, fail, &news).await });
    }
}

async fn connection(mut stream: TcpStream, fail: u64, news: &News) {
    stream.set_nodelay(true).unwrap();
    let mut buf = Vec::new();
    while let Some(user) = request(&mut stream, &mut buf).await {
        let failing = fastrand::u64(..100) < fail && user != "health";
        if user != "health" {
            news.came.notify_one();
        }
        if !answer(&mut stream, &user, failing, news).await {
            return;
        }
    }
}

/// Reads one request; returns what its `user` says.
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

/// Answers; `false`: the connection is over.
async fn answer(stream: &mut TcpStream, user: &str, failing: bool, news: &News) -> bool {
    if failing && fastrand::bool() {
        return match fastrand::u8(..3) {
            0 => false,
            1 => plain(stream, "500 X", "", "{\"error\":\"now and then\"}").await,
            _ => plain(stream, "429 X", "retry-after-ms: 20\r\n", "{}").await,
        };
    }
    if user == "wait" {
        wait_for_end(stream).await;
        news.broken.notify_one();
        return false;
    }
    let Some(stream_of) = user.strip_prefix("stream:") else {
        return plain(stream, "200 OK", "", "{\"choices\":[{\"message\":{\"content\":\"hi\"}}]}").await;
    };
    let (events, pause) = stream_of.split_once(':').unwrap();
    let events: u32 = events.parse().unwrap();
    let pause = Duration::from_millis(pause.parse().unwrap());
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    if stream.write_all(head.as_bytes()).await.is_err() {
        return false;
    }
    for i in 0..events {
        if failing && i > events / 2 {
            return false;
        }
        if stream.write_all(b"18\r\ndata: {\"content\":\"hi\"}\n\n\r\n").await.is_err() {
            news.broken.notify_one();
            return false;
        }
        let paused = tokio::time::timeout(pause, wait_for_end(stream)).await;
        if paused.is_ok() {
            news.broken.notify_one();
            return false;
        }
    }
    stream.write_all(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n").await.is_ok()
}

async fn plain(stream: &mut TcpStream, status: &str, headers: &str, body: &str) -> bool {
    let text = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len());
    stream.write_all(text.as_bytes()).await.is_ok()
}

/// Ready when the other side has gone.
async fn wait_for_end(stream: &mut TcpStream) {
    let mut one = [0; 1];
    while matches!(stream.peek(&mut one).await, Ok(n) if n > 0) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

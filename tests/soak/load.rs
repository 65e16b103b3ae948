//! HTTP clients that check their responses.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::lies::Ask;
use crate::provider::GIVES_UP;

/// The time limit of a chat.
const TIMEOUT: Duration = Duration::from_secs(600);

/// A client that reuses its connection while it can.
pub(crate) struct Client {
    address: SocketAddr,
    tls: Option<Tls>,
    stream: Option<Stream>,
    buf: Vec<u8>,
}

/// How a client speaks TLS, and how it calls the server.
pub(crate) type Tls = (Arc<ClientConfig>, ServerName<'static>);

/// A connection.
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

trait Bytes: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Bytes for T {}

impl Stream {
    fn bytes(&mut self) -> &mut dyn Bytes {
        match self {
            Stream::Plain(tcp) => tcp,
            Stream::Tls(tls) => tls,
        }
    }

    fn tcp(&self) -> &TcpStream {
        match self {
            Stream::Plain(tcp) => tcp,
            Stream::Tls(tls) => tls.get_ref().0,
        }
    }
}

/// A response, as far as it was received.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
    /// Whether the body ended as its framing requires.
    pub whole: bool,
}

impl Answer {
    pub(crate) fn is_good(&self) -> bool {
        self.status == 200 && self.whole
    }

    /// Whether this is a complete stream that ends with `[DONE]`.
    pub(crate) fn is_done(&self) -> bool {
        self.is_good() && self.body.ends_with(b"data: [DONE]\n\n")
    }

    /// Whether this is a stream that Zap has cut with an error event: because its provider failed, or because Zap
    /// stops.
    pub(crate) fn is_cut_with_error(&self) -> bool {
        let has = |code: &[u8]| memchr::memmem::find(&self.body, code).is_some();
        !self.whole && (has(b"\"stream_interrupted\"") || has(b"\"draining\""))
    }

    /// Whether the provider has ended this stream with an error of its own, to which Zap adds nothing.
    pub(crate) fn is_given_up(&self) -> bool {
        self.is_good() && self.body.ends_with(format!("{GIVES_UP}\"}}}}\n\n").as_bytes())
    }

    pub(crate) fn text(&self) -> String {
        let from = self.body.len().saturating_sub(200);
        format!("{} whole={} {}", self.status, self.whole, String::from_utf8_lossy(&self.body[from..]))
    }
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Client { address, tls: None, stream: None, buf: Vec::new() }
    }

    /// A client that speaks TLS.
    pub(crate) fn with_tls(address: SocketAddr, tls: Tls) -> Self {
        Client { tls: Some(tls), ..Client::new(address) }
    }

    /// The certificate that the server has shown on the connection that is open.
    pub(crate) fn certificate(&self) -> Option<Vec<u8>> {
        let Some(Stream::Tls(tls)) = &self.stream else { return None };
        Some(tls.get_ref().1.peer_certificates()?.first()?.to_vec())
    }

    /// Sends a chat; its `user` is the script of the provider.
    pub(crate) async fn start(&mut self, user: &str) -> std::io::Result<()> {
        let stream = user.starts_with("stream") || user == "flood";
        let body = format!(
            "{{\"stream\":{stream},\"user\":\"{user}\",\"messages\":[{{\"role\":\"user\",\"content\":\"hello\"}}]}}"
        );
        let length = body.len();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: zap\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        self.write(&request).await
    }

    /// Waits until something of the answer is here; reads nothing.
    pub(crate) async fn has_answer(&self) {
        self.stream.as_ref().unwrap().tcp().readable().await.unwrap();
    }

    async fn write(&mut self, request: &str) -> std::io::Result<()> {
        if self.stream.is_none() {
            let tcp = TcpStream::connect(self.address).await?;
            tcp.set_nodelay(true)?;
            self.stream = Some(match &self.tls {
                None => Stream::Plain(tcp),
                Some((config, name)) => {
                    let connector = TlsConnector::from(config.clone());
                    Stream::Tls(Box::new(connector.connect(name.clone(), tcp).await?))
                }
            });
            self.buf.clear();
        }
        let bytes = self.stream.as_mut().unwrap().bytes();
        bytes.write_all(request.as_bytes()).await?;
        bytes.flush().await
    }

    /// Sends `text` unchanged and reads the response.
    pub(crate) async fn raw(&mut self, text: &str) -> Result<Answer, String> {
        self.write(text).await.map_err(|e| e.to_string())?;
        self.answer().await
    }

    /// Gets a path and returns the body, whatever the status.
    pub(crate) async fn get(&mut self, path: &str) -> Result<String, String> {
        let answer = self.raw(&format!("GET {path} HTTP/1.1\r\nhost: zap\r\n\r\n")).await?;
        String::from_utf8(answer.body).map_err(|e| e.to_string())
    }

    /// Sends a chat and reads the response.
    pub(crate) async fn chat(&mut self, user: &str) -> Result<Answer, String> {
        self.start(user).await.map_err(|e| e.to_string())?;
        match tokio::time::timeout(TIMEOUT, self.answer()).await {
            Ok(answer) => answer,
            Err(_) => Err("no response in time".into()),
        }
    }

    /// Sends a request for `model` with the members `more`, each with a comma in front, and reads the response.
    pub(crate) async fn ask(&mut self, ask: Ask, model: &str, more: &str) -> Result<Answer, String> {
        let body = ask.body(model);
        let body = format!("{}{more}}}", &body[..body.len() - 1]);
        let (path, length) = (ask.path(), body.len());
        let text = format!("POST {path} HTTP/1.1\r\nhost: zap\r\ncontent-length: {length}\r\n\r\n{body}");
        match tokio::time::timeout(TIMEOUT, self.raw(&text)).await {
            Ok(answer) => answer,
            Err(_) => Err("no response in time".into()),
        }
    }

    /// Disconnects, with a FIN or a reset.
    pub(crate) fn disconnect(&mut self, reset: bool) {
        if let Some(stream) = self.stream.take()
            && reset
        {
            let _ = socket2::SockRef::from(stream.tcp()).set_linger(Some(Duration::ZERO));
        }
    }

    /// Reads one response.
    pub(crate) async fn answer(&mut self) -> Result<Answer, String> {
        let mut answer = Answer::default();
        let result = self.read(&mut answer).await;
        let close = result.as_ref().is_ok_and(|close| *close);
        if !answer.whole || close {
            self.stream = None;
        }
        match result {
            Err(e) if answer.status == 0 => Err(e),
            _ => Ok(answer),
        }
    }

    /// Reads a response as far as it arrives; returns whether the connection closes after it.
    async fn read(&mut self, answer: &mut Answer) -> Result<bool, String> {
        let end = loop {
            if let Some(end) = memchr::memmem::find(&self.buf, b"\r\n\r\n") {
                break end + 4;
            }
            self.fill().await?;
        };
        let head = String::from_utf8_lossy(&self.buf[..end]).to_lowercase();
        self.buf.drain(..end);
        answer.status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or("no status")?;
        let close = head.contains("\r\nconnection: close");
        let value = |name: &str| head.split(name).nth(1).and_then(|t| t.lines().next()).map(str::to_owned);
        if let Some(length) = value("\r\ncontent-length: ") {
            let length: usize = length.parse().map_err(|_| "bad length")?;
            while self.buf.len() < length {
                self.fill().await?;
            }
            answer.body.extend(self.buf.drain(..length));
            answer.whole = true;
            return Ok(close);
        }
        loop {
            let line = loop {
                match memchr::memmem::find(&self.buf, b"\r\n") {
                    Some(line) => break line,
                    None => self.fill().await?,
                }
            };
            let size =
                std::str::from_utf8(&self.buf[..line]).ok().and_then(|t| usize::from_str_radix(t, 16).ok());
            let size = size.ok_or("bad chunk")?;
            while self.buf.len() < line + 2 + size + 2 {
                self.fill().await?;
            }
            answer.body.extend_from_slice(&self.buf[line + 2..line + 2 + size]);
            self.buf.drain(..line + 2 + size + 2);
            if size == 0 {
                answer.whole = true;
                return Ok(close);
            }
        }
    }

    async fn fill(&mut self) -> Result<(), String> {
        let stream = self.stream.as_mut().ok_or("closed")?;
        match stream.bytes().read_buf(&mut self.buf).await {
            Ok(0) => Err("closed early".into()),
            Ok(_) => Ok(()),
            Err(e) => Err(e.to_string()),
        }
    }
}

/// Gets a path on a new connection and returns the body.
pub(crate) async fn get(address: SocketAddr, path: &str) -> String {
    Client::new(address).get(path).await.unwrap()
}

/// The `share` quantile (0 to 1) of the values; sorts them.
pub(crate) fn percentile(values: &mut [Duration], share: f64) -> Duration {
    values.sort_unstable();
    let last = values.len().saturating_sub(1);
    values.get(((last as f64) * share).ceil() as usize).copied().unwrap_or_default()
}

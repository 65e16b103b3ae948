//! A balancer in front of several Zaps, as a cloud's or an ingress is: it keeps connections to each, asks `/ready`, and
//! takes a Zap out that does not say 200. It retries nothing, so that whatever Zap loses, a client loses.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use memchr::memmem;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};

use crate::load::Client;

/// Time from one look at `/ready` to the next.
const LOOK: Duration = Duration::from_millis(200);

/// A Zap that does not answer in this time is not ready.
const PATIENCE: Duration = Duration::from_secs(2);

/// A Zap behind the balancer.
struct Target {
    address: SocketAddr,
    is_ready: Cell<bool>,
    idle: RefCell<Vec<TcpStream>>,
}

impl Target {
    fn new(address: SocketAddr) -> Rc<Self> {
        let target = Rc::new(Target { address, is_ready: Cell::new(false), idle: RefCell::default() });
        let looked_at = Rc::downgrade(&target);
        spawn_local(async move {
            while let Some(target) = looked_at.upgrade() {
                let get = "GET /ready HTTP/1.1\r\nhost: zap\r\nconnection: close\r\n\r\n";
                let answer = timeout(PATIENCE, async { Client::new(target.address).raw(get).await }).await;
                let is_ready = matches!(answer, Ok(Ok(answer)) if answer.status == 200);
                target.is_ready.set(is_ready);
                if !is_ready {
                    target.idle.borrow_mut().clear();
                }
                drop(target);
                sleep(LOOK).await;
            }
        });
        target
    }

    async fn connection(&self) -> io::Result<TcpStream> {
        let idle = self.idle.borrow_mut().pop();
        match idle {
            Some(connection) => Ok(connection),
            None => {
                let connection = TcpStream::connect(self.address).await?;
                connection.set_nodelay(true)?;
                Ok(connection)
            }
        }
    }
}

/// The balancer. Its tasks run on the `LocalSet` in which it was started.
pub(crate) struct Balancer {
    pub address: SocketAddr,
    targets: RefCell<Vec<Rc<Target>>>,
    turn: Cell<usize>,
    /// What clients have lost, by what the balancer saw of it.
    pub losses: RefCell<Vec<String>>,
    /// Requests that were passed on.
    pub passed: Cell<u64>,
}

impl Balancer {
    pub(crate) fn start(listener: TcpListener, targets: &[SocketAddr]) -> Rc<Self> {
        let address = listener.local_addr().unwrap();
        let targets = RefCell::new(targets.iter().copied().map(Target::new).collect());
        let (turn, losses, passed) = (Cell::default(), RefCell::default(), Cell::default());
        let balancer = Rc::new(Balancer { address, targets, turn, losses, passed });
        let serving = balancer.clone();
        spawn_local(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                client.set_nodelay(true).unwrap();
                spawn_local(serving.clone().serve(client));
            }
        });
        balancer
    }

    /// Whether the Zap at this place takes requests.
    pub(crate) fn is_ready(&self, at: usize) -> bool {
        self.targets.borrow()[at].is_ready.get()
    }

    /// Puts another Zap at this place.
    pub(crate) fn replace(&self, at: usize, address: SocketAddr) {
        self.targets.borrow_mut()[at] = Target::new(address);
    }

    /// The next Zap in turn that is ready.
    fn next(&self) -> Option<Rc<Target>> {
        let targets = self.targets.borrow();
        self.turn.set(self.turn.get() + 1);
        let in_turn = (0..targets.len()).map(|i| &targets[(self.turn.get() + i) % targets.len()]);
        in_turn.into_iter().find(|target| target.is_ready.get()).cloned()
    }

    /// Serves a client until its connection, or a Zap's, breaks.
    async fn serve(self: Rc<Self>, mut client: TcpStream) {
        let mut buf = Vec::new();
        while let Some(request) = request(&mut client, &mut buf).await {
            self.passed.set(self.passed.get() + 1);
            let result = match self.next() {
                Some(target) => pass(&target, &request, &mut client).await,
                None => Err("no Zap is ready".to_owned()),
            };
            if let Err(why) = result {
                self.losses.borrow_mut().push(why);
                return;
            }
        }
    }
}

/// Reads a request with a body of `content-length`; `None` if the client has closed.
async fn request(client: &mut TcpStream, buf: &mut Vec<u8>) -> Option<Vec<u8>> {
    loop {
        if let Some(end) = memmem::find(buf, b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&buf[..end]).to_lowercase();
            let whole = end + 4 + length(&head).unwrap_or(0);
            if buf.len() >= whole {
                return Some(buf.drain(..whole).collect());
            }
        }
        if client.read_buf(buf).await.ok()? == 0 {
            return None;
        }
    }
}

fn length(head: &str) -> Option<usize> {
    head.split("\r\ncontent-length: ").nth(1)?.lines().next()?.parse().ok()
}

/// Passes a request on, and its response back as it comes. A connection is kept unless the response forbids it.
async fn pass(target: &Target, request: &[u8], client: &mut TcpStream) -> Result<(), String> {
    let at = format!("{}, {}", target.address, if target.is_ready.get() { "ready" } else { "not ready" });
    let at = at.as_str();
    let text = |what: &'static str| move |e: io::Error| format!("{at}: {what}: {e}");
    let mut zap = Reader { from: target.connection().await.map_err(text("connect"))?, buf: Vec::new() };
    zap.from.write_all(request).await.map_err(text("send"))?;
    let head = zap.until(b"\r\n\r\n").await.map_err(text("before the response"))?;
    let lower = String::from_utf8_lossy(&head).to_lowercase();
    let closes = lower.contains("\r\nconnection: close\r\n");
    // It belongs to the connection with Zap, and the client's lives on.
    let begin = lower.find("\r\nconnection: close\r\n").unwrap_or(head.len());
    let rest = &head[(begin + "\r\nconnection: close".len()).min(head.len())..];
    let mut send = async |bytes: &[u8]| client.write_all(bytes).await.map_err(text("to the client"));
    send(&head[..begin]).await?;
    send(rest).await?;
    match length(&lower) {
        Some(length) => send(&zap.exactly(length).await.map_err(text("within a response"))?).await?,
        None => loop {
            let line = zap.until(b"\r\n").await.map_err(text("within a stream"))?;
            let size = std::str::from_utf8(&line).ok();
            let size = size.and_then(|size| usize::from_str_radix(size.trim(), 16).ok());
            let size =
                size.ok_or_else(|| format!("{at}: {:?} is no size", String::from_utf8_lossy(&line)))?;
            let data = zap.exactly(size + 2).await.map_err(text("within a stream"))?;
            send(&[line, data].concat()).await?;
            if size == 0 {
                break;
            }
        },
    }
    if !closes && target.is_ready.get() {
        target.idle.borrow_mut().push(zap.from);
    }
    Ok(())
}

/// Reads a response.
struct Reader {
    from: TcpStream,
    buf: Vec<u8>,
}

impl Reader {
    /// All up to `mark` and with it.
    async fn until(&mut self, mark: &[u8]) -> io::Result<Vec<u8>> {
        loop {
            if let Some(at) = memmem::find(&self.buf, mark) {
                return Ok(self.buf.drain(..at + mark.len()).collect());
            }
            self.fill().await?;
        }
    }

    async fn exactly(&mut self, size: usize) -> io::Result<Vec<u8>> {
        while self.buf.len() < size {
            self.fill().await?;
        }
        Ok(self.buf.drain(..size).collect())
    }

    async fn fill(&mut self) -> io::Result<()> {
        match self.from.read_buf(&mut self.buf).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

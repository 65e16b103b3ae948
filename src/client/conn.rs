//! A client connection: the socket, the timeouts, the state of the reader and the progress of the response.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{Interest, ReadBuf};

use crate::client::connection_limit::ConnectionPermit;
use crate::client::deadline::{Deadline, Deadlines, SWEEP_INTERVAL, time_to_begin};
use crate::client::peer::Peer;
use crate::client::progress::Progress;
use crate::client::reader::{Reader, Socket};
use crate::client::stream::{ClientStream, has_data};
use crate::clock;
use crate::time::{Nanos, SECOND};

/// How long the input of a connection is dropped at its end, so that the client can read the response before a reset
/// reaches it.
pub(super) const LINGER: Nanos = 2 * SECOND;

/// Settings of all connections.
#[derive(Debug)]
pub(crate) struct Settings {
    /// The worker's deadlines.
    pub deadlines: Rc<Deadlines>,
    /// How long a connection may be idle.
    pub keep_alive: Nanos,
}

/// A client connection. hyper's I/O handle, the request and the response share it.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(super) socket: Socket,
    peer: Peer,
    /// The common name of the certificate that the client has shown.
    common_name: Option<Box<str>>,
    /// The deadline of the current phase.
    pub deadline: Rc<Deadline>,
    deadlines: Rc<Deadlines>,
    keep_alive: Nanos,
    /// Held while the connection is open; `None` if there is no limit.
    permit: RefCell<Option<ConnectionPermit>>,
    /// Whether the permit is of the reserve.
    is_reserve: Cell<bool>,
    reader: Reader,
    /// The response of the current exchange.
    pub(super) response: Progress,
}

impl Conn {
    /// Wraps a new connection. `common_name`: that of the certificate that the client has shown.
    pub(super) fn new(
        (stream, peer, permit): (ClientStream, Peer, Option<ConnectionPermit>),
        common_name: Option<Box<str>>,
        settings: &Settings,
    ) -> Rc<Self> {
        let deadlines = settings.deadlines.clone();
        let is_reserve = permit.as_ref().is_some_and(ConnectionPermit::is_reserve);
        Rc::new(Conn {
            socket: RefCell::new(stream),
            deadline: deadlines.add(deadlines.coarse_now() + time_to_begin(is_reserve)),
            permit: RefCell::new(permit),
            is_reserve: Cell::new(is_reserve),
            peer,
            common_name,
            deadlines,
            keep_alive: settings.keep_alive,
            reader: Reader::new(),
            response: Progress::default(),
        })
    }

    /// The client.
    pub(crate) fn peer(&self) -> Peer {
        self.peer
    }

    /// The common name of the certificate that the client has shown; it is verified.
    pub(crate) fn common_name(&self) -> Option<&str> {
        self.common_name.as_deref()
    }

    /// The reason to refuse the head that hyper has just read; `None` if it is valid.
    pub(crate) fn refusal(&self) -> Option<&'static str> {
        self.reader.refusal()
    }

    /// Whether the head has `Origin` or `Sec-Fetch-Site`, which browsers send about the page that made the request.
    pub(crate) fn has_page_headers(&self) -> bool {
        self.reader.has_page_headers()
    }

    /// Whether the connection is of the reserve, since all regular ones are taken.
    pub(crate) fn is_reserve(&self) -> bool {
        self.is_reserve.get()
    }

    /// Waits until the connection is a regular one. Returns `false` if too many others wait.
    pub(crate) async fn leave_reserve(&self) -> bool {
        let waiting = self.permit.borrow().as_ref().map(ConnectionPermit::regular);
        let Some(waiting) = waiting else { return true };
        let permit = waiting.await;
        let is_regular = permit.is_some();
        if is_regular {
            self.permit.replace(permit);
            self.is_reserve.set(false);
        }
        is_regular
    }

    /// Whether the connection must close after the response: the beginning of the next request is unknown, or the
    /// connection is of the reserve.
    pub(crate) fn must_close(&self) -> bool {
        self.reader.is_in_body() || self.is_reserve()
    }

    /// Whether hyper has a chunked body as a whole.
    pub(crate) fn has_whole_chunked_body(&self) -> bool {
        self.reader.has_whole_chunked_body()
    }

    /// Whether the client has closed its side, or the socket has failed.
    pub(crate) fn has_ended(&self) -> bool {
        self.reader.has_ended()
    }

    /// Whether the client may have sent bytes that were not read.
    pub(crate) fn has_unread(&self) -> bool {
        self.reader.has_unread()
    }

    /// The time of the last sweep of the deadlines.
    pub(crate) fn coarse_now(&self) -> Nanos {
        self.deadlines.coarse_now()
    }

    /// Begins the response. Within every `idle_timeout`, Zap must receive from the backend or send to the client.
    pub(crate) fn begin_response(&self, idle_timeout: Nanos) {
        self.response.begin(idle_timeout);
        self.progress();
    }

    /// Records progress of the response: restarts the idle timeout.
    pub(crate) fn progress(&self) {
        match self.response.idle_timeout() {
            0 => {}
            // The coarse time is up to one sweep interval old.
            timeout => self.deadline.set(self.coarse_now() + clock::nanos(SWEEP_INTERVAL) + timeout),
        }
    }

    /// Records the result of a write to the socket.
    pub(super) fn wrote(&self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(result, Poll::Ready(Ok(n)) if n > 0) {
            self.progress();
        }
        result
    }

    /// Records that hyper's write buffer is empty.
    pub(super) fn flushed(&self) {
        if self.response.flushed() {
            self.deadline.wake();
        }
    }

    /// Ends the exchange: hyper has the whole response, and the next head may be read.
    pub(crate) fn end_exchange(&self) {
        self.response.end();
        self.deadline.nudge_at(0);
        self.deadline.set(self.coarse_now() + self.keep_alive);
        if self.reader.end_exchange() {
            // The next request is already buffered, so the socket will not wake hyper.
            self.deadline.wake();
        }
    }

    /// Makes the close send a reset, so that a response without framing cannot look complete.
    pub(crate) fn reset_on_close(&self) {
        self.socket.borrow_mut().reset_on_close();
    }

    /// Whether the client has disconnected while its request is served. hyper does not read then. Bytes received
    /// meanwhile are buffered. If no more may be buffered, each sweep checks again.
    pub(crate) fn is_disconnected(&self, cx: &mut Context<'_>) -> bool {
        if self.reader.is_done() {
            if self.reader.read_ahead(&self.socket, cx) {
                // The next request has begun. Wake hyper, so that the request is not lost if hyper does not read by
                // itself.
                self.deadline.wake();
            }
            if self.reader.has_ended() {
                return true;
            }
        }
        let is_blocked = self.reader.is_blocked();
        self.deadline.set_wake_on_sweep(is_blocked);
        if !is_blocked {
            return false;
        }
        let socket = self.socket.borrow();
        let ready = pin!(socket.tcp().ready(Interest::READABLE));
        matches!(ready.poll(cx), Poll::Ready(Ok(ready)) if ready.is_read_closed())
    }

    /// Is ready when the socket has something to read.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.borrow().poll_readable(cx)
    }

    /// Whether the socket has data, even if the runtime does not know yet that it is readable.
    pub(crate) fn has_data(&self) -> bool {
        has_data(self.socket.borrow().tcp())
    }

    /// Reads and drops what the client still sends, until it closes its side or has sent more than `max_bytes`.
    pub(crate) async fn discard(&self, max_bytes: usize) {
        let mut left = max_bytes;
        poll_fn(|cx| {
            let mut scratch = [0; 4096];
            loop {
                let mut buf = ReadBuf::new(&mut scratch);
                match ready!(self.reader.poll_socket(&self.socket, cx, &mut buf)) {
                    Ok(n) if n > 0 && left >= n => left -= n,
                    _ => return Poll::Ready(()),
                }
            }
        })
        .await;
    }

    /// Reads for hyper.
    pub(super) fn poll_read(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let head_begins = || self.deadline.set(self.coarse_now() + time_to_begin(self.is_reserve()));
        self.reader.poll_read(&self.socket, cx, buf, head_begins)
    }
}

//! What of the client's bytes hyper gets: complete heads, one message at a time.
//!
//! A head is held back until it is complete and has passed [`crate::http1::head`]. An invalid head is replaced by a
//! request that the gateway refuses. Bytes after the current message are kept back, so that they cannot hide that the
//! client has disconnected, and so that hyper and Zap never differ in where a message ends.

use std::cell::{Cell, RefCell};
use std::io;
use std::mem::MaybeUninit;
use std::task::{Context, Poll, ready};

use tokio::io::ReadBuf;

use crate::client::stream::ClientStream;
use crate::http1::chunked::ChunkedMessage;
use crate::http1::head::{Framing, RequestHead, inspect, is_worth_parsing};

/// Largest head that is held back. A larger one goes to hyper, which refuses it.
const MAX_HEAD: usize = 64 * 1024;

/// Most bytes kept back after a message. Of a client that sends more before its response, no more is read.
const MAX_AHEAD: usize = 64 * 1024;

/// What hyper reads in place of an invalid head.
const REFUSED: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";

/// The socket of a connection.
pub(super) type Socket = RefCell<ClientStream>;

/// The read side of a connection.
#[derive(Debug)]
pub(super) struct Reader {
    position: Cell<ReadPosition>,
    /// Bytes received but not given to hyper: of an incomplete head, or after the current message.
    ahead: RefCell<Vec<u8>>,
    /// Length of an incomplete head when it was last parsed.
    parsed: Cell<usize>,
    /// Why the current head is refused.
    refused: Cell<Option<&'static str>>,
    /// Whether the current exchange has ended, so that the next head may be read.
    next: Cell<bool>,
    /// Whether the client has closed its side.
    eof: Cell<bool>,
    /// Whether the current head has `Origin` or `Sec-Fetch-Site`.
    has_page_headers: Cell<bool>,
    /// The current message, if its body is chunked. Not a part of `position`, which is looked at with every piece of a
    /// response.
    chunked: Cell<Option<ChunkedMessage>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadPosition {
    /// In a message with a chunked body, or behind the byte that breaks the coding: hyper gets the end of the stream
    /// there.
    Chunked,
    /// After the message. Further bytes are kept back.
    Done,
    /// In a head; `ahead` holds its beginning.
    Head,
    /// In a body with this number of bytes still to come.
    Length(u64),
    /// After an invalid head: hyper reads no more.
    Refused,
    /// In a head that is too large: hyper gets all that comes, and refuses it.
    TooLarge,
}

impl Reader {
    /// The reader of a new connection.
    pub(super) fn new() -> Self {
        Reader {
            position: Cell::new(ReadPosition::Head),
            ahead: RefCell::default(),
            parsed: Cell::new(0),
            refused: Cell::new(None),
            next: Cell::new(false),
            eof: Cell::new(false),
            has_page_headers: Cell::new(false),
            chunked: Cell::new(None),
        }
    }

    /// Why the head that hyper has just read must be refused, if it must.
    pub(super) fn refusal(&self) -> Option<&'static str> {
        self.refused.get()
    }

    /// Whether the current head has `Origin` or `Sec-Fetch-Site`.
    pub(super) fn has_page_headers(&self) -> bool {
        self.has_page_headers.get()
    }

    /// Whether the beginning of the next request is unknown, since the current message is incomplete or broken.
    pub(super) fn is_in_body(&self) -> bool {
        matches!(
            self.position.get(),
            ReadPosition::Chunked | ReadPosition::Length(_) | ReadPosition::TooLarge
        )
    }

    /// Whether hyper has a chunked body as a whole.
    pub(super) fn has_whole_chunked_body(&self) -> bool {
        self.is_done() && self.chunked.get().is_some()
    }

    /// Whether the client has closed its side, or the socket has failed.
    pub(super) fn has_ended(&self) -> bool {
        self.eof.get()
    }

    /// Whether the client may have sent bytes that were not read.
    pub(super) fn has_unread(&self) -> bool {
        let between = matches!(self.position.get(), ReadPosition::Done | ReadPosition::Head);
        !(self.eof.get() || between && self.ahead.borrow().is_empty())
    }

    /// Allows the next head. Returns whether bytes of it are here already.
    pub(super) fn end_exchange(&self) -> bool {
        self.next.set(true);
        !self.ahead.borrow().is_empty()
    }

    /// Reads once from the socket. Returns the number of bytes.
    pub(super) fn poll_socket(
        &self,
        socket: &Socket,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<usize>> {
        let before = buf.filled().len();
        let read = ready!(socket.borrow_mut().poll_read(cx, buf));
        let n = buf.filled().len() - before;
        self.eof.set(read.is_err() || n == 0 && buf.remaining() > 0);
        read?;
        Poll::Ready(Ok(n))
    }

    /// Keeps back what has come after the current message. Returns whether bytes of the next request have come.
    pub(super) fn read_ahead(&self, socket: &Socket, cx: &mut Context<'_>) -> bool {
        let mut scratch = [MaybeUninit::uninit(); 4096];
        let mut ahead = self.ahead.borrow_mut();
        let mut has_next = false;
        while ahead.len() < MAX_AHEAD {
            let mut buf = ReadBuf::uninit(&mut scratch);
            if !matches!(self.poll_socket(socket, cx, &mut buf), Poll::Ready(Ok(n)) if n > 0) {
                break;
            }
            ahead.extend_from_slice(buf.filled());
            has_next |= self.next.get();
        }
        has_next
    }

    /// Whether a disconnect can be seen by [`read_ahead`](Self::read_ahead), which reads after the message.
    pub(super) fn is_done(&self) -> bool {
        self.position.get() == ReadPosition::Done
    }

    /// Whether nothing more can be read until the response: as much is kept back as allowed.
    pub(super) fn is_blocked(&self) -> bool {
        self.is_done() && self.ahead.borrow().len() >= MAX_AHEAD
    }

    /// Reads for hyper. `head_begins` is called when the first bytes of a head are here.
    pub(super) fn poll_read(
        &self,
        socket: &Socket,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        head_begins: impl Fn(),
    ) -> Poll<io::Result<()>> {
        loop {
            if self.position.get() == ReadPosition::Done && self.next.get() {
                self.position.set(ReadPosition::Head);
                if !self.ahead.borrow().is_empty() {
                    head_begins();
                }
            }
            let start = buf.filled().len();
            match self.position.get() {
                ReadPosition::Refused => return Poll::Pending,
                ReadPosition::Head => {
                    if self.give_head(buf) {
                        return Poll::Ready(Ok(()));
                    }
                    let n = ready!(self.poll_socket(socket, cx, buf))?;
                    if n == 0 {
                        return Poll::Ready(Ok(()));
                    }
                    let mut ahead = self.ahead.borrow_mut();
                    if ahead.is_empty() {
                        head_begins();
                        // Usually the whole head is here and stays where it was read to.
                        match inspect(&buf.filled()[start..]) {
                            Ok(Some(head)) => {
                                let rest = self.begin(head, &buf.filled()[start..]);
                                ahead.extend_from_slice(&buf.filled()[start + rest..]);
                                buf.set_filled(start + rest);
                                return Poll::Ready(Ok(()));
                            }
                            Ok(None) => self.parsed.set(n),
                            // `give_head` refuses it.
                            Err(_) => {}
                        }
                    }
                    ahead.extend_from_slice(&buf.filled()[start..]);
                    buf.set_filled(start);
                }
                ReadPosition::Length(left) => {
                    let left_here = usize::try_from(left).unwrap_or(usize::MAX);
                    if !self.ahead.borrow().is_empty() {
                        self.took(left, self.give(buf, left_here));
                        return Poll::Ready(Ok(()));
                    }
                    let n = ready!(self.poll_socket(socket, cx, buf))?;
                    let wanted = n.min(left_here);
                    self.ahead.borrow_mut().extend_from_slice(&buf.filled()[start + wanted..]);
                    buf.set_filled(start + wanted);
                    self.took(left, wanted);
                    return Poll::Ready(Ok(()));
                }
                ReadPosition::Chunked => {
                    if self.chunked.get().is_none_or(ChunkedMessage::is_broken) {
                        // The end of the stream, within a body: hyper fails the body.
                        return Poll::Ready(Ok(()));
                    }
                    let mut ahead = self.ahead.borrow_mut();
                    if !ahead.is_empty() {
                        let most = ahead.len().min(buf.remaining());
                        let n = self.took_chunked(&ahead[..most]);
                        drop(ahead);
                        self.give(buf, n);
                        if n > 0 || most == 0 {
                            return Poll::Ready(Ok(()));
                        }
                        continue;
                    }
                    if ready!(self.poll_socket(socket, cx, buf))? == 0 {
                        return Poll::Ready(Ok(()));
                    }
                    let n = self.took_chunked(&buf.filled()[start..]);
                    ahead.extend_from_slice(&buf.filled()[start + n..]);
                    buf.set_filled(start + n);
                    if n > 0 {
                        return Poll::Ready(Ok(()));
                    }
                }
                ReadPosition::TooLarge => {
                    if !self.ahead.borrow().is_empty() {
                        self.give(buf, usize::MAX);
                        return Poll::Ready(Ok(()));
                    }
                    return self.poll_socket(socket, cx, buf).map_ok(drop);
                }
                // What comes now is not for hyper: `read_ahead` keeps it back.
                ReadPosition::Done => return Poll::Pending,
            }
        }
    }

    /// Gives hyper a head that was held back, if it is complete, invalid or too large.
    fn give_head(&self, buf: &mut ReadBuf<'_>) -> bool {
        let ahead = self.ahead.borrow();
        let length = ahead.len();
        if length == 0 || length < MAX_HEAD && !is_worth_parsing(&ahead, self.parsed.get()) {
            return false;
        }
        let head = inspect(&ahead);
        drop(ahead);
        self.parsed.set(if head == Ok(None) { length } else { 0 });
        match head {
            Ok(None) if length < MAX_HEAD => return false,
            Ok(None) => {
                self.position.set(ReadPosition::TooLarge);
                self.next.set(false);
                self.give(buf, usize::MAX);
            }
            Ok(Some(head)) => {
                let n = self.begin(head, &self.ahead.borrow());
                if n > buf.remaining() {
                    // hyper's buffer is smaller than head and body: the body comes with the next read.
                    match head.framing {
                        Framing::Chunked => {
                            self.chunked.set(Some(ChunkedMessage::new(head.len)));
                            self.took_chunked(&self.ahead.borrow()[..buf.remaining()]);
                        }
                        Framing::Length(length) => self.took(length + head.len as u64, buf.remaining()),
                    }
                }
                self.give(buf, n);
            }
            Err(fault) => {
                self.refused.set(Some(fault.0));
                self.position.set(ReadPosition::Refused);
                self.next.set(false);
                self.ahead.borrow_mut().clear();
                buf.put_slice(&REFUSED[..REFUSED.len().min(buf.remaining())]);
            }
        }
        true
    }

    /// Gives hyper at most `most` bytes that were kept back. Returns their number.
    fn give(&self, buf: &mut ReadBuf<'_>, most: usize) -> usize {
        let mut ahead = self.ahead.borrow_mut();
        let n = ahead.len().min(buf.remaining()).min(most);
        buf.put_slice(&ahead[..n]);
        ahead.drain(..n);
        n
    }

    /// Begins a message with a valid head. Returns how many of the bytes `available`, head included, belong to it.
    fn begin(&self, head: RequestHead, available: &[u8]) -> usize {
        self.next.set(false);
        self.has_page_headers.set(head.has_page_headers);
        match head.framing {
            Framing::Chunked => {
                self.chunked.set(Some(ChunkedMessage::new(head.len)));
                self.took_chunked(available)
            }
            Framing::Length(length) => {
                self.chunked.set(None);
                let body = length.min((available.len() - head.len) as u64);
                self.took(length, body as usize);
                head.len + body as usize
            }
        }
    }

    /// Records that hyper gets those of the next `bytes` that belong to the chunked message. Returns their number.
    fn took_chunked(&self, bytes: &[u8]) -> usize {
        let Some(mut message) = self.chunked.get() else { return 0 };
        let n = message.take(bytes);
        self.chunked.set(Some(message));
        self.position.set(if message.is_done() { ReadPosition::Done } else { ReadPosition::Chunked });
        n
    }

    /// Records that hyper got `n` of the `left` bytes of a body.
    fn took(&self, left: u64, n: usize) {
        let left = left - n as u64;
        self.position.set(if left == 0 { ReadPosition::Done } else { ReadPosition::Length(left) });
    }
}

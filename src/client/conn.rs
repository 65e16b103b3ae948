//! A client's socket as hyper gets to see it: whole heads, one message at a time, and the news that it left.
//!
//! Three things happen between the socket and hyper. A head is held back until it is whole and has passed
//! [`crate::http1::head`]; a bad one is replaced by a request that the gateway refuses. Bytes behind the
//! message that is being served are put aside, so that they cannot hide that the client has gone. And a
//! write that was flushed is noticed, so that an answer can be cut exactly behind it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::TcpStream;

use crate::client::deadline::{Deadline, Deadlines, GRAIN};
use crate::clock;
use crate::http1::head::{Framing, inspect, is_worth_parsing};
use crate::time::{Nanos, SECOND};

/// A head must be complete this long after the connection or its first byte.
const HEAD_TIME: Nanos = 10 * SECOND;

/// Largest head that is held back; a larger one goes to hyper, which refuses it.
const MAX_HEAD: usize = 64 * 1024;

/// Bytes put aside behind a message; a client that sends more before its answer is not read on.
const MAX_AHEAD: usize = 64 * 1024;

/// Bytes of an answer that wait for a client before no more are read for it; a frame may come on top.
const MAX_UNFLUSHED: usize = 8 * 1024;

/// What hyper reads in place of a head that is refused.
const REFUSED: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";

/// A client connection, shared by its socket, its request and its answer.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(super) stream: RefCell<TcpStream>,
    peer: IpAddr,
    /// Its time limit.
    pub deadline: Rc<Deadline>,
    deadlines: Rc<Deadlines>,
    keep_alive: Nanos,
    reading: Cell<Reading>,
    /// Bytes received but not given to hyper: of an incomplete head, or behind the message being served.
    aside: RefCell<Vec<u8>>,
    /// Bytes of an incomplete head that were there when it was last read through.
    looked_at: Cell<usize>,
    /// What to tell the client whose head was refused.
    refused: Cell<Option<&'static str>>,
    /// The answer under way has been handed over.
    turn_over: Cell<bool>,
    /// How long the answer under way may make no progress; 0 while there is none.
    patience: Cell<Nanos>,
    /// The client has sent all it will.
    eof: Cell<bool>,
    /// Everything that hyper wrote has gone to the socket.
    pub(super) flushed: Cell<bool>,
    /// Someone waits for `flushed`.
    pub(super) wants_flush: Cell<bool>,
    /// Bytes of the answer that hyper was given since it last had nothing left to write.
    pub(super) unflushed: Cell<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// A chunked body, whose end only hyper knows: the connection closes behind it.
    Chunked,
    /// Behind the message; what comes is put aside.
    Done,
    /// A head, of which `aside` holds the beginning.
    Head,
    /// So many bytes of a body are still to come.
    Length(u64),
    /// Given up: hyper sees nothing more.
    Refused,
}

impl Conn {
    /// A fresh connection. `keep_alive`: how long it may be idle.
    pub(crate) fn new(
        stream: TcpStream,
        peer: IpAddr,
        deadlines: Rc<Deadlines>,
        keep_alive: Nanos,
    ) -> Rc<Self> {
        Rc::new(Conn {
            stream: RefCell::new(stream),
            peer,
            deadline: deadlines.add(deadlines.coarse_now() + HEAD_TIME),
            deadlines,
            keep_alive,
            reading: Cell::new(Reading::Head),
            aside: RefCell::default(),
            looked_at: Cell::new(0),
            refused: Cell::new(None),
            turn_over: Cell::new(false),
            patience: Cell::new(0),
            eof: Cell::new(false),
            flushed: Cell::new(true),
            wants_flush: Cell::new(false),
            unflushed: Cell::new(0),
        })
    }

    /// Where it comes from.
    pub(crate) fn peer(&self) -> IpAddr {
        self.peer
    }

    /// Why the head that hyper has just read must be refused, if it must.
    pub(crate) fn refusal(&self) -> Option<&'static str> {
        self.refused.get()
    }

    /// Whether nobody knows where the next request begins, since this one's body is chunked or not all here: the connection
    /// must close behind the answer.
    pub(crate) fn must_close(&self) -> bool {
        matches!(self.reading.get(), Reading::Chunked | Reading::Length(_))
    }

    /// Whether the client has ended its side, in whatever way.
    pub(crate) fn has_ended(&self) -> bool {
        self.eof.get()
    }

    /// Whether the client may still be sending what nobody will read.
    pub(crate) fn is_unread(&self) -> bool {
        let at_rest = matches!(self.reading.get(), Reading::Done | Reading::Head);
        !(self.eof.get() || at_rest && self.aside.borrow().is_empty())
    }

    /// Coarse time: of the last sweep.
    pub(crate) fn coarse_now(&self) -> Nanos {
        self.deadlines.coarse_now()
    }

    /// Says that an answer begins, which must make progress, on either side, every `patience`.
    pub(crate) fn begin_answer(&self, patience: Nanos) {
        self.patience.set(patience);
        self.progress();
    }

    /// Whether an answer is under way.
    pub(crate) fn is_answering(&self) -> bool {
        self.patience.get() > 0
    }

    /// Says that the answer under way has made progress.
    pub(crate) fn progress(&self) {
        match self.patience.get() {
            0 => {}
            // The time of the last sweep is up to a grain behind.
            patience => self.deadline.set(self.coarse_now() + clock::nanos(GRAIN) + patience),
        }
    }

    pub(super) fn wrote(&self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(result, Poll::Ready(Ok(n)) if n > 0) {
            self.progress();
        }
        result
    }

    /// Says that an answer has been handed over whole: the next head may come.
    pub(crate) fn end_turn(&self) {
        self.turn_over.set(true);
        self.patience.set(0);
        self.deadline.set(self.coarse_now() + self.keep_alive);
        if !self.aside.borrow().is_empty() {
            // The next request is here already: nothing on the socket will wake hyper for it.
            self.deadline.wake();
        }
    }

    /// Ready once everything written so far has gone to the socket. The connection's task is woken for it.
    pub(crate) fn poll_flushed(&self) -> Poll<()> {
        if self.flushed.get() {
            return Poll::Ready(());
        }
        self.wants_flush.set(true);
        Poll::Pending
    }

    /// Says that hyper is given `n` bytes more of an answer.
    pub(crate) fn hand_over(&self, n: usize) {
        self.unflushed.set(self.unflushed.get() + n);
    }

    /// Whether the client is so far behind that nothing more is to be read for it. Its task is woken when it is not.
    pub(crate) fn is_behind(&self) -> bool {
        let behind = self.unflushed.get() >= MAX_UNFLUSHED;
        if behind {
            self.wants_flush.set(true);
        }
        behind
    }

    /// Says that a write is coming whose flush will be asked for.
    pub(crate) fn expect_flush(&self) {
        self.flushed.set(false);
    }

    /// Makes the close that follows a reset, so that an answer without framing cannot look whole.
    pub(crate) fn reset_on_close(&self) {
        let stream = self.stream.borrow();
        // A socket that refuses the option is closed the ordinary way.
        let _ = socket2::SockRef::from(&*stream).set_linger(Some(std::time::Duration::ZERO));
    }

    /// Whether the client has gone while its request is served: hyper does not look then. What it sends meanwhile is put
    /// aside. Where that may not go on, behind a chunked body and behind as many bytes as are put aside, every sweep looks
    /// anew.
    pub(crate) fn has_left(&self, cx: &mut Context<'_>) -> bool {
        let is_deaf = match self.reading.get() {
            Reading::Chunked => self.poll_readable(cx).is_ready(),
            Reading::Done => {
                self.read_ahead(cx);
                if self.eof.get() {
                    return true;
                }
                self.aside.borrow().len() >= MAX_AHEAD
            }
            Reading::Head | Reading::Length(_) | Reading::Refused => false,
        };
        self.deadline.set_attentive(is_deaf);
        if !is_deaf {
            return false;
        }
        let stream = self.stream.borrow();
        let ready = pin!(stream.ready(Interest::READABLE));
        matches!(ready.poll(cx), Poll::Ready(Ok(ready)) if ready.is_read_closed())
    }

    /// Puts aside what has come behind the message.
    fn read_ahead(&self, cx: &mut Context<'_>) {
        let mut scratch = [MaybeUninit::uninit(); 4096];
        let mut aside = self.aside.borrow_mut();
        while aside.len() < MAX_AHEAD {
            let mut buf = ReadBuf::uninit(&mut scratch);
            if !matches!(self.poll_socket(cx, &mut buf), Poll::Ready(Ok(n)) if n > 0) {
                return;
            }
            aside.extend_from_slice(buf.filled());
            if self.turn_over.get() {
                // It is the next request. hyper 1.12 looks by itself before this; should it not, it is not to be lost.
                self.deadline.wake();
            }
        }
    }

    /// Ready once the socket has something to read.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.borrow().poll_read_ready(cx)
    }

    /// Reads and drops what the client still sends, until it ends or has sent more than `most` bytes.
    pub(crate) async fn discard(&self, most: usize) {
        let mut left = most;
        poll_fn(|cx| {
            let mut scratch = [0; 4096];
            loop {
                let mut buf = ReadBuf::new(&mut scratch);
                match ready!(self.poll_socket(cx, &mut buf)) {
                    Ok(n) if n > 0 && left >= n => left -= n,
                    _ => return Poll::Ready(()),
                }
            }
        })
        .await;
    }

    fn poll_socket(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<usize>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut *self.stream.borrow_mut()).poll_read(cx, buf));
        let n = buf.filled().len() - before;
        self.eof.set(read.is_err() || n == 0 && buf.remaining() > 0);
        read?;
        Poll::Ready(Ok(n))
    }

    pub(super) fn poll_read(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.reading.get() == Reading::Done && self.turn_over.get() {
                self.reading.set(Reading::Head);
                if !self.aside.borrow().is_empty() {
                    self.deadline.set(self.coarse_now() + HEAD_TIME);
                }
            }
            let start = buf.filled().len();
            match self.reading.get() {
                Reading::Refused => return Poll::Pending,
                Reading::Head => {
                    if self.give_head(buf) {
                        return Poll::Ready(Ok(()));
                    }
                    let n = ready!(self.poll_socket(cx, buf))?;
                    if n == 0 {
                        return Poll::Ready(Ok(()));
                    }
                    let mut aside = self.aside.borrow_mut();
                    if aside.is_empty() {
                        self.deadline.set(self.coarse_now() + HEAD_TIME);
                        // Usually the whole head is here and stays where it was read to.
                        match inspect(&buf.filled()[start..]) {
                            Ok(Some(head)) => {
                                let rest = self.begin(head.len, head.framing, n);
                                aside.extend_from_slice(&buf.filled()[start + rest..]);
                                buf.set_filled(start + rest);
                                return Poll::Ready(Ok(()));
                            }
                            Ok(None) => self.looked_at.set(n),
                            // Told below.
                            Err(_) => {}
                        }
                    }
                    aside.extend_from_slice(&buf.filled()[start..]);
                    buf.set_filled(start);
                }
                Reading::Length(left) => {
                    let mut aside = self.aside.borrow_mut();
                    if !aside.is_empty() {
                        let n =
                            aside.len().min(buf.remaining()).min(usize::try_from(left).unwrap_or(usize::MAX));
                        buf.put_slice(&aside[..n]);
                        aside.drain(..n);
                        self.consumed(left, n);
                        return Poll::Ready(Ok(()));
                    }
                    let n = ready!(self.poll_socket(cx, buf))?;
                    let wanted = n.min(usize::try_from(left).unwrap_or(usize::MAX));
                    aside.extend_from_slice(&buf.filled()[start + wanted..]);
                    buf.set_filled(start + wanted);
                    self.consumed(left, wanted);
                    return Poll::Ready(Ok(()));
                }
                Reading::Chunked => {
                    let mut aside = self.aside.borrow_mut();
                    if !aside.is_empty() {
                        let n = aside.len().min(buf.remaining());
                        buf.put_slice(&aside[..n]);
                        aside.drain(..n);
                        return Poll::Ready(Ok(()));
                    }
                    return self.poll_socket(cx, buf).map_ok(drop);
                }
                // What comes now is not hyper's: `has_left` puts it aside.
                Reading::Done => return Poll::Pending,
            }
        }
    }

    /// Gives hyper what is aside if that is a whole head, or is not to become one.
    fn give_head(&self, buf: &mut ReadBuf<'_>) -> bool {
        let mut aside = self.aside.borrow_mut();
        if aside.is_empty() || aside.len() < MAX_HEAD && !is_worth_parsing(&aside, self.looked_at.get()) {
            return false;
        }
        let looked_at = aside.len();
        let head = inspect(&aside);
        self.looked_at.set(if head == Ok(None) { looked_at } else { 0 });
        match head {
            Ok(None) if looked_at < MAX_HEAD => false,
            Ok(None) => {
                self.reading.set(Reading::Chunked);
                self.turn_over.set(false);
                self.give_aside(buf, &mut aside, usize::MAX)
            }
            Ok(Some(head)) => {
                let available = aside.len();
                let n = self.begin(head.len, head.framing, available);
                if n > buf.remaining() {
                    // hyper's buffer is smaller than head and body: the body comes with the next read.
                    self.reading.set(match head.framing {
                        Framing::Chunked => Reading::Chunked,
                        Framing::Length(length) => Reading::Length(length + head.len as u64),
                    });
                    let room = buf.remaining();
                    if let Reading::Length(left) = self.reading.get() {
                        self.consumed(left, room);
                    }
                    return self.give_aside(buf, &mut aside, room);
                }
                self.give_aside(buf, &mut aside, n)
            }
            Err(fault) => {
                self.refused.set(Some(fault.0));
                self.reading.set(Reading::Refused);
                self.turn_over.set(false);
                aside.clear();
                buf.put_slice(&REFUSED[..REFUSED.len().min(buf.remaining())]);
                true
            }
        }
    }

    fn give_aside(&self, buf: &mut ReadBuf<'_>, aside: &mut Vec<u8>, most: usize) -> bool {
        let n = aside.len().min(buf.remaining()).min(most);
        buf.put_slice(&aside[..n]);
        aside.drain(..n);
        true
    }

    /// A head of `len` bytes was accepted, of `available` received: returns how many are of this message.
    fn begin(&self, len: usize, framing: Framing, available: usize) -> usize {
        self.turn_over.set(false);
        match framing {
            Framing::Chunked => {
                self.reading.set(Reading::Chunked);
                available
            }
            Framing::Length(length) => {
                let body = length.min((available - len) as u64);
                self.consumed(length, body as usize);
                len + body as usize
            }
        }
    }

    fn consumed(&self, left: u64, n: usize) {
        let left = left - n as u64;
        self.reading.set(if left == 0 { Reading::Done } else { Reading::Length(left) });
    }
}

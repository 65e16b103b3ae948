//! One exchange on a client connection, as the gateway sees it: a request, its deadline, and its response.

use std::net::IpAddr;
use std::rc::Rc;
use std::task::Poll;

use crate::client::conn::Conn;
use crate::client::deadline::Elapsed;
use crate::time::Nanos;

/// The current exchange of a connection. Cloning is cheap.
#[derive(Clone, Debug)]
pub(crate) struct Exchange(Rc<Conn>);

impl Exchange {
    /// The current exchange of `conn`.
    pub(super) fn new(conn: Rc<Conn>) -> Self {
        Exchange(conn)
    }

    pub(super) fn conn(&self) -> &Rc<Conn> {
        &self.0
    }

    /// The address of the client.
    pub(crate) fn peer(&self) -> IpAddr {
        self.0.peer()
    }

    /// Why the head of the request must be refused, if it must.
    pub(crate) fn refusal(&self) -> Option<&'static str> {
        self.0.refusal()
    }

    /// The time of the last sweep of the deadlines.
    pub(crate) fn coarse_now(&self) -> Nanos {
        self.0.coarse_now()
    }

    /// Runs `work` until `at`.
    ///
    /// # Errors
    /// Returns [`Elapsed`] if that time has passed; `work` is dropped then.
    pub(crate) async fn limit<F: Future>(&self, at: Nanos, work: F) -> Result<F::Output, Elapsed> {
        self.0.deadline.limit(at, work).await
    }

    /// Sets the deadline of a phase that ends by itself.
    pub(crate) fn set_deadline(&self, at: Nanos) {
        self.0.deadline.set(at);
    }

    /// Whether the deadline has passed; returns true once.
    pub(crate) fn take_timeout(&self) -> bool {
        self.0.deadline.take_expired()
    }

    /// Begins the response. It must make progress, on either side, every `patience`.
    pub(crate) fn begin_response(&self, patience: Nanos) {
        self.0.begin_response(patience);
    }

    /// Records progress of the response.
    pub(crate) fn progress(&self) {
        self.0.progress();
    }

    /// Records that `n` more bytes of the response are handed over.
    pub(crate) fn hand_over(&self, n: usize) {
        self.0.response.hand_over(n);
    }

    /// Whether so much waits for the client that no more must be read for it. If so, its task is woken when that has
    /// changed.
    pub(crate) fn is_behind(&self) -> bool {
        self.0.response.is_behind()
    }

    /// Announces a write that [`poll_flushed`](Self::poll_flushed) will wait for.
    pub(crate) fn expect_write(&self) {
        self.0.response.expect_write();
    }

    /// Is ready when all that was written has reached the socket. The connection's task is woken for it.
    pub(crate) fn poll_flushed(&self) -> Poll<()> {
        self.0.response.poll_flushed()
    }

    /// Makes the close send a reset, so that a response without framing cannot look complete.
    pub(crate) fn reset_on_close(&self) {
        self.0.reset_on_close();
    }

    /// Whether the connection must close after the response, since the beginning of the next request is unknown.
    pub(crate) fn must_close(&self) -> bool {
        self.0.must_close()
    }

    /// Whether the client has closed its side, or the socket has failed.
    pub(crate) fn has_ended(&self) -> bool {
        self.0.has_ended()
    }
}

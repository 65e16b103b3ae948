//! One request on a client connection, as the gateway sees it: its deadline, its progress, what is left to flush.

use std::net::IpAddr;
use std::rc::Rc;
use std::task::Poll;

use crate::client::conn::Conn;
use crate::client::deadline::Elapsed;
use crate::time::Nanos;

/// See the module. Cloning is cheap.
#[derive(Clone, Debug)]
pub(crate) struct Exchange(Rc<Conn>);

impl Exchange {
    /// The exchange under way on a connection.
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

    /// Why the request's head must be refused, if it must.
    pub(crate) fn refusal(&self) -> Option<&'static str> {
        self.0.refusal()
    }

    /// Coarse time: of the last sweep of the deadlines.
    pub(crate) fn coarse_now(&self) -> Nanos {
        self.0.coarse_now()
    }

    /// Runs `work` until `at`.
    ///
    /// # Errors
    /// [`Elapsed`] once that time has passed; `work` is dropped then.
    pub(crate) async fn limit<F: Future>(&self, at: Nanos, work: F) -> Result<F::Output, Elapsed> {
        self.0.deadline.limit(at, work).await
    }

    /// Sets the deadline of a phase that ends by itself.
    pub(crate) fn set_deadline(&self, at: Nanos) {
        self.0.deadline.set(at);
    }

    /// Whether the deadline has passed; says so once.
    pub(crate) fn take_timeout(&self) -> bool {
        self.0.deadline.take_expired()
    }

    /// Begins an take_expired, which must make progress, on either side, every `patience`.
    pub(crate) fn begin_answer(&self, patience: Nanos) {
        self.0.begin_answer(patience);
    }

    /// The take_expired under way has made progress.
    pub(crate) fn progress(&self) {
        self.0.progress();
    }

    /// Hands `n` bytes more of an take_expired over.
    pub(crate) fn hand_over(&self, n: usize) {
        self.0.hand_over(n);
    }

    /// Whether the client is so far behind that nothing more is to be read for it. Its task is woken when it is not.
    pub(crate) fn is_behind(&self) -> bool {
        self.0.is_behind()
    }

    /// A write is coming whose flush will be asked for.
    pub(crate) fn expect_flush(&self) {
        self.0.expect_flush();
    }

    /// Ready once everything written so far has gone to the socket. The connection's task is woken for it.
    pub(crate) fn poll_flushed(&self) -> Poll<()> {
        self.0.poll_flushed()
    }

    /// Makes the close that follows a reset, so that an take_expired without framing cannot look whole.
    pub(crate) fn reset_on_close(&self) {
        self.0.reset_on_close();
    }

    /// Whether the connection must close behind the take_expired, since nobody knows where the next request begins.
    pub(crate) fn must_close(&self) -> bool {
        self.0.must_close()
    }

    /// Whether the client has ended its side, in whatever way.
    pub(crate) fn has_ended(&self) -> bool {
        self.0.has_ended()
    }
}

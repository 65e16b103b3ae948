//! One exchange on a client connection, as the gateway sees it: a request, its deadline, and its response.

use std::net::IpAddr;
use std::rc::Rc;
use std::task::Poll;

use crate::client::conn::Conn;
use crate::client::deadline::{Elapsed, time_to_begin};
use crate::client::peer::Listener;
use crate::time::{Nanos, SECOND};

/// How long a request on a connection of the reserve waits until a regular connection ends.
const RESERVE_PATIENCE: Nanos = 5 * SECOND;

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
        self.0.peer().address
    }

    /// The listener that accepted the client.
    pub(crate) fn listener(&self) -> Listener {
        self.0.peer().listener
    }

    /// The common name of the certificate that the client has shown; it is verified.
    pub(crate) fn common_name(&self) -> Option<&str> {
        self.0.common_name()
    }

    /// The reason to refuse the head of the request; `None` if it is valid.
    pub(crate) fn refusal(&self) -> Option<&'static str> {
        self.0.refusal()
    }

    /// The time of the last sweep, the periodic check of all deadlines.
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

    /// Sets the deadline without a future: the owner of the phase calls [`take_timeout`](Self::take_timeout).
    pub(crate) fn set_deadline(&self, at: Nanos) {
        self.0.deadline.set(at);
    }

    /// Whether the deadline has passed. Clears the flag.
    pub(crate) fn take_timeout(&self) -> bool {
        self.0.deadline.take_expired()
    }

    /// Has the task polled once at `at`, whatever the deadline is; 0: not at all. The time is exact to a sweep.
    pub(crate) fn nudge_at(&self, at: Nanos) {
        self.0.deadline.nudge_at(at);
    }

    /// Whether the time of the nudge has passed. Clears the flag.
    pub(crate) fn take_nudge(&self) -> bool {
        self.0.deadline.take_nudge()
    }

    /// Begins the response. Within every `idle_timeout`, Zap must receive from the backend or send to the client.
    pub(crate) fn begin_response(&self, idle_timeout: Nanos) {
        self.0.begin_response(idle_timeout);
    }

    /// Records progress of the response.
    pub(crate) fn progress(&self) {
        self.0.progress();
    }

    /// Records that `n` more bytes of the response are given to hyper.
    pub(crate) fn hand_over(&self, n: usize) {
        self.0.response.hand_over(n);
    }

    /// Whether the client reads too slowly, so that Zap must stop reading from the backend. If so, the connection's
    /// task is woken when hyper's write buffer is empty.
    pub(crate) fn is_behind(&self) -> bool {
        self.0.response.is_behind()
    }

    /// Announces a write that [`poll_flushed`](Self::poll_flushed) will wait for.
    pub(crate) fn expect_write(&self) {
        self.0.response.expect_write();
    }

    /// Ready when all written bytes have reached the socket. The connection's task is then woken.
    pub(crate) fn poll_flushed(&self) -> Poll<()> {
        self.0.response.poll_flushed()
    }

    /// Makes the close send a reset, so that a response without framing cannot look complete.
    pub(crate) fn reset_on_close(&self) {
        self.0.reset_on_close();
    }

    /// Whether the head has `Origin` or `Sec-Fetch-Site`, which browsers send about the page that made the request.
    pub(crate) fn has_page_headers(&self) -> bool {
        self.0.has_page_headers()
    }

    /// Whether the connection is of the reserve, since all regular ones are taken.
    pub(crate) fn is_reserve(&self) -> bool {
        self.0.is_reserve()
    }

    /// Waits for a regular permit, for a while. Returns whether the connection has one now.
    pub(crate) async fn leave_reserve(&self) -> bool {
        let is_regular =
            self.limit(self.coarse_now() + RESERVE_PATIENCE, self.0.leave_reserve()).await.unwrap_or(false);
        self.set_deadline(self.coarse_now() + time_to_begin(false));
        is_regular
    }

    /// Whether the connection must close after the response.
    pub(crate) fn must_close(&self) -> bool {
        self.0.must_close()
    }

    /// Whether the client has closed its side, or the socket has failed.
    pub(crate) fn has_ended(&self) -> bool {
        self.0.has_ended()
    }
}

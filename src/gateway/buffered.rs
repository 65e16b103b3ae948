//! The memory that requests take: their bodies, and the beginnings of responses that are held back. At the bound, Zap
//! stops reading bodies, and then refuses the newest; and it holds back no more of a response.

use std::cell::RefCell;
use std::rc::Rc;

use crate::client::exchange::Exchange;
use crate::clock;
use crate::gateway::Gateway;
use crate::gateway::refusal::GatewayError;
use crate::policy::byte_budget::WorkerBytes;
use crate::time::{Nanos, SECOND};

/// How long a body waits for room before the newest is refused.
const PATIENCE: Nanos = 5 * SECOND;

/// Time between two refusals: the bytes that a refused body gives back may be enough for the others.
const NEXT: Nanos = SECOND;

/// The bytes that the requests of a worker hold.
pub(super) type Buffered = RefCell<WorkerBytes>;

/// The bytes that a request holds. Dropping it gives them back.
pub(crate) struct MemoryHold {
    gateway: Rc<Gateway>,
    held: u64,
}

/// A body that waits for room.
struct Waiter<'a> {
    gateway: &'a Gateway,
    number: u64,
}

impl MemoryHold {
    /// A hold on no bytes.
    pub(super) fn new(gateway: Rc<Gateway>) -> Self {
        MemoryHold { gateway, held: 0 }
    }

    /// A hold on `length` bytes that are in memory already, even if they are not left.
    pub(super) fn of(gateway: &Rc<Gateway>, length: usize) -> Self {
        let mut hold = MemoryHold::new(gateway.clone());
        gateway.shared().buffers.force(&mut gateway.buffered.borrow_mut(), length as u64);
        hold.count(length as u64);
        hold
    }

    /// Takes `n` more bytes. Waits while they are not left; the body is not read meanwhile. Returns how long it waited.
    ///
    /// # Errors
    /// [`GatewayError::MemoryFull`] if there is no room for long, and this is the newest body that waits.
    pub(super) async fn grow(&mut self, n: u64, exchange: &Exchange) -> Result<Nanos, GatewayError> {
        if self.try_grow(n) {
            return Ok(0);
        }
        let since = clock::now();
        self.wait(n, exchange, since + PATIENCE).await?;
        Ok(clock::now() - since)
    }

    #[cold]
    async fn wait(&mut self, n: u64, exchange: &Exchange, mut until: Nanos) -> Result<(), GatewayError> {
        let gateway = self.gateway.clone();
        let shared = gateway.shared();
        let waiter = Waiter { number: shared.buffers.join(), gateway: &gateway };
        loop {
            let freed = shared.buffer_freed.notified();
            if self.try_grow(n) {
                return Ok(());
            }
            if exchange.limit(until, freed).await.is_err() {
                let now = clock::now();
                if gateway.is_cut() || shared.buffers.refuse(waiter.number, now, NEXT) {
                    return Err(GatewayError::MemoryFull);
                }
                until = now + NEXT;
            }
        }
    }

    /// Takes what is missing to `n` bytes. Returns `false` if that is not left.
    pub(super) fn reach(&mut self, n: u64) -> bool {
        n <= self.held || self.try_grow(n - self.held)
    }

    fn try_grow(&mut self, n: u64) -> bool {
        let is_taken = self.gateway.shared().buffers.take(&mut self.gateway.buffered.borrow_mut(), n);
        if is_taken {
            self.count(n);
        }
        is_taken
    }

    fn count(&mut self, n: u64) {
        self.held += n;
        self.gateway.recorder().lane().buffered.add(n);
    }
}

impl Drop for MemoryHold {
    fn drop(&mut self) {
        if self.held == 0 {
            return;
        }
        let shared = self.gateway.shared();
        self.gateway.recorder().lane().buffered.sub(self.held);
        if shared.buffers.give(&mut self.gateway.buffered.borrow_mut(), self.held) {
            shared.buffer_freed.notify_waiters();
        }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.gateway.shared().buffers.leave(self.number);
    }
}

//! How many client connections may be open, and the reserve for health checks when all are taken.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections beyond `server.max_connections`, so that health checks get an answer.
pub(crate) const RESERVE: usize = 16;

/// The connections that may be open.
#[derive(Debug)]
pub(crate) struct Seats {
    regular: Arc<Semaphore>,
    reserve: Arc<Semaphore>,
}

/// The place of one connection. Dropping it lets the next one in.
#[derive(Debug)]
pub(crate) struct Seat {
    is_reserve: bool,
    _permit: OwnedSemaphorePermit,
}

impl Seat {
    /// Whether the connection is beyond `server.max_connections`: only health checks are served there.
    pub(crate) fn is_reserve(&self) -> bool {
        self.is_reserve
    }
}

impl Seats {
    /// Places for `max` connections, and the reserve.
    pub(crate) fn new(max: usize) -> Self {
        Seats { regular: Arc::new(Semaphore::new(max)), reserve: Arc::new(Semaphore::new(RESERVE)) }
    }

    /// Waits for a place: of the reserve only while all others are taken. Dropping the future takes none.
    pub(crate) async fn free(&self) -> Option<Seat> {
        let (permit, is_reserve) = tokio::select! {
            biased;
            permit = self.regular.clone().acquire_owned() => (permit, false),
            permit = self.reserve.clone().acquire_owned() => (permit, true),
        };
        Some(Seat { is_reserve, _permit: permit.ok()? })
    }

    /// Returns a regular place if one has become free in place of one of the reserve, else `seat`.
    pub(crate) fn upgrade(&self, seat: Seat) -> Seat {
        match seat.is_reserve.then(|| self.regular.clone().try_acquire_owned()) {
            Some(Ok(permit)) => Seat { is_reserve: false, _permit: permit },
            _ => seat,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_used_only_while_all_other_places_are_taken() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let seats = Seats::new(2);
            let (first, second) = (seats.free().await.unwrap(), seats.free().await.unwrap());
            assert!(!first.is_reserve() && !second.is_reserve());
            let third = seats.free().await.unwrap();
            assert!(third.is_reserve() && seats.upgrade(third).is_reserve());
            let mut beyond = Vec::new();
            for _ in 0..RESERVE {
                beyond.push(seats.free().await.unwrap());
            }
            let mut next = Box::pin(seats.free());
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(next.as_mut().poll(&mut cx).is_pending(), "the reserve is taken too");
            drop(next);
            drop(first);
            let upgraded = seats.upgrade(beyond.pop().unwrap());
            assert!(!upgraded.is_reserve());
            assert!(seats.free().await.unwrap().is_reserve(), "its place in the reserve is free again");
            drop(second);
            assert!(!seats.free().await.unwrap().is_reserve());
        });
    }
}

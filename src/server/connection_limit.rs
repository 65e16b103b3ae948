//! How many client connections may be open, and the reserve for health checks when all are taken.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections beyond `server.max_connections`, so that health checks get an answer.
pub(crate) const RESERVE: usize = 16;

/// How many connections may be open.
#[derive(Debug)]
pub(crate) struct ConnectionLimit {
    regular: Arc<Semaphore>,
    reserve: Arc<Semaphore>,
}

/// Lets one connection be open. Dropping it lets the next one in.
#[derive(Debug)]
pub(crate) struct ConnectionPermit {
    is_reserve: bool,
    _permit: OwnedSemaphorePermit,
}

impl ConnectionPermit {
    /// Whether the connection is beyond `server.max_connections`: only health checks are served there.
    pub(crate) fn is_reserve(&self) -> bool {
        self.is_reserve
    }
}

impl ConnectionLimit {
    /// A limit of `max` connections, and `reserve` more.
    pub(crate) fn new(max: usize, reserve: usize) -> Self {
        ConnectionLimit { regular: Arc::new(Semaphore::new(max)), reserve: Arc::new(Semaphore::new(reserve)) }
    }

    /// Waits for a permit: of the reserve only while all others are taken. Dropping the future takes none.
    pub(crate) async fn permit(&self) -> Option<ConnectionPermit> {
        let (permit, is_reserve) = tokio::select! {
            biased;
            permit = self.regular.clone().acquire_owned() => (permit, false),
            permit = self.reserve.clone().acquire_owned() => (permit, true),
        };
        Some(ConnectionPermit { is_reserve, _permit: permit.ok()? })
    }

    /// Returns a regular permit if one has become free in place of one of the reserve, else `permit`.
    pub(crate) fn upgrade(&self, permit: ConnectionPermit) -> ConnectionPermit {
        match permit.is_reserve.then(|| self.regular.clone().try_acquire_owned()) {
            Some(Ok(regular)) => ConnectionPermit { is_reserve: false, _permit: regular },
            _ => permit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_used_only_while_all_other_permits_are_taken() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let limit = ConnectionLimit::new(2, RESERVE);
            let (first, second) = (limit.permit().await.unwrap(), limit.permit().await.unwrap());
            assert!(!first.is_reserve() && !second.is_reserve());
            let third = limit.permit().await.unwrap();
            assert!(third.is_reserve() && limit.upgrade(third).is_reserve());
            let mut beyond = Vec::new();
            for _ in 0..RESERVE {
                beyond.push(limit.permit().await.unwrap());
            }
            let mut next = Box::pin(limit.permit());
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(next.as_mut().poll(&mut cx).is_pending(), "the reserve is taken too");
            drop(next);
            drop(first);
            let upgraded = limit.upgrade(beyond.pop().unwrap());
            assert!(!upgraded.is_reserve());
            assert!(limit.permit().await.unwrap().is_reserve(), "its permit of the reserve is free again");
            drop(second);
            assert!(!limit.permit().await.unwrap().is_reserve());
        });
    }
}

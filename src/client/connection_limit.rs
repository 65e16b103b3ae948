//! How many client connections may be open, and the reserve for health checks when all are taken.
//!
//! A request on a connection of the reserve that is no health check waits until a regular connection ends. Half of the
//! reserve may wait so; the other half stays free for health checks.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections beyond `server.max_connections`, so that health checks get an answer.
pub(crate) const RESERVE: usize = 16;

/// How many connections may be open.
#[derive(Debug)]
pub(crate) struct ConnectionLimit(Arc<Semaphores>);

#[derive(Debug)]
struct Semaphores {
    regular: Arc<Semaphore>,
    reserve: Arc<Semaphore>,
    /// Requests that may wait on connections of the reserve.
    waiting: Semaphore,
}

/// Lets one connection be open. Dropping it lets the next one in.
#[derive(Debug)]
pub(crate) struct ConnectionPermit {
    semaphores: Arc<Semaphores>,
    is_reserve: bool,
    _permit: OwnedSemaphorePermit,
}

impl ConnectionPermit {
    /// Whether the connection is beyond `server.max_connections`.
    pub(crate) fn is_reserve(&self) -> bool {
        self.is_reserve
    }

    /// Waits for a regular permit in place of this one. The future does not borrow the permit. `None` if too many
    /// others wait.
    pub(crate) fn regular(&self) -> impl Future<Output = Option<ConnectionPermit>> + use<> {
        let semaphores = self.semaphores.clone();
        async move {
            let waiting = semaphores.waiting.try_acquire().ok()?;
            let permit = semaphores.regular.clone().acquire_owned().await.ok()?;
            drop(waiting);
            Some(ConnectionPermit { semaphores, is_reserve: false, _permit: permit })
        }
    }
}

impl ConnectionLimit {
    /// A limit of `max` connections, and `reserve` more.
    pub(crate) fn new(max: usize, reserve: usize) -> Self {
        let (regular, reserved) = (Arc::new(Semaphore::new(max)), Arc::new(Semaphore::new(reserve)));
        ConnectionLimit(Arc::new(Semaphores {
            regular,
            reserve: reserved,
            waiting: Semaphore::new(reserve / 2),
        }))
    }

    /// Waits for a permit: of the reserve only while all others are taken. Dropping the future takes none.
    pub(crate) async fn permit(&self) -> Option<ConnectionPermit> {
        let semaphores = &self.0;
        let (permit, is_reserve) = tokio::select! {
            biased;
            permit = semaphores.regular.clone().acquire_owned() => (permit, false),
            permit = semaphores.reserve.clone().acquire_owned() => (permit, true),
        };
        Some(ConnectionPermit { semaphores: semaphores.clone(), is_reserve, _permit: permit.ok()? })
    }

    /// Returns a regular permit if one has become free in place of one of the reserve, else `permit`.
    pub(crate) fn upgrade(&self, permit: ConnectionPermit) -> ConnectionPermit {
        match permit.is_reserve.then(|| self.0.regular.clone().try_acquire_owned()) {
            Some(Ok(regular)) => ConnectionPermit { is_reserve: false, _permit: regular, ..permit },
            _ => permit,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn within<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
    }

    #[test]
    fn the_reserve_is_used_only_while_all_other_permits_are_taken() {
        within(async {
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
            let mut cx = Context::from_waker(Waker::noop());
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

    #[test]
    fn half_of_the_reserve_may_wait_for_a_regular_permit() {
        within(async {
            let limit = ConnectionLimit::new(1, 4);
            let first = limit.permit().await.unwrap();
            let reserve =
                [limit.permit().await.unwrap(), limit.permit().await.unwrap(), limit.permit().await.unwrap()];
            let mut cx = Context::from_waker(Waker::noop());
            let (mut a, mut b) = (pin!(reserve[0].regular()), Box::pin(reserve[1].regular()));
            assert!(a.as_mut().poll(&mut cx).is_pending() && b.as_mut().poll(&mut cx).is_pending());
            assert!(reserve[2].regular().await.is_none(), "two wait already");
            drop(b);
            let mut c = pin!(reserve[2].regular());
            assert!(c.as_mut().poll(&mut cx).is_pending(), "one that left makes room");
            drop(first);
            let regular = a.await.unwrap();
            assert!(!regular.is_reserve());
            assert!(c.as_mut().poll(&mut cx).is_pending());
            drop(regular);
            assert!(!c.await.unwrap().is_reserve());
        });
    }
}

//! A worker's idle upstream connections.
//!
//! A connection is used by one request at a time and comes back only after an exchange that ended exactly. The
//! youngest idle one is taken first, so that the surplus of a burst grows old and goes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use super::Upstream;
use super::link::{Http1, Link};
use crate::policy::{Nanos, SECOND};
use crate::telemetry::histogram::Counter;

/// How long a connection may wait for its next request.
const MAX_IDLE: Nanos = 30 * SECOND;

/// How long a connection may live: a name that resolves to something new is followed within this.
const MAX_AGE: Nanos = 300 * SECOND;

/// Idle connections kept for one backend.
const MAX_PER_BACKEND: usize = 1024;

/// Idle connections by backend.
#[derive(Default)]
pub struct Pool {
    idle: RefCell<HashMap<u64, Vec<Lease>, BuildHasherDefault<Spread>>>,
}

/// A hash of ids that Zap hands out itself: nobody can choose them, so it need not resist anybody.
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u64(u64::from(*b)));
    }

    fn write_u64(&mut self, n: u64) {
        // Fibonacci hashing (Knuth, TAOCP 6.4).
        self.0 = (self.0 ^ n).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A connection, in use or idle; dropping it closes it.
pub struct Lease {
    /// The connection itself.
    pub link: Box<Http1>,
    count: Count,
    born: Nanos,
    parked: Nanos,
}

/// Its place in `zap_upstream_connections`.
struct Count {
    upstream: Arc<Upstream>,
    worker: usize,
    idle: bool,
}

impl Count {
    fn new(upstream: Arc<Upstream>, worker: usize) -> Self {
        upstream.lanes[worker].active.add(1);
        Count { upstream, worker, idle: false }
    }

    fn set_idle(&mut self, idle: bool) {
        self.counter().sub(1);
        self.idle = idle;
        self.counter().add(1);
    }

    fn counter(&self) -> &Counter {
        let lane = &self.upstream.lanes[self.worker];
        if self.idle { &lane.idle } else { &lane.active }
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.counter().sub(1);
    }
}

impl Lease {
    /// A fresh connection, in use from now on.
    pub fn new(link: Http1, upstream: Arc<Upstream>, worker: usize, now: Nanos) -> Self {
        Lease { link: Box::new(link), count: Count::new(upstream, worker), born: now, parked: now }
    }

    fn is_fresh(&self, now: Nanos) -> bool {
        self.parked + MAX_IDLE > now && self.born + MAX_AGE > now
    }
}

impl Pool {
    /// An idle connection to `upstream` that its peer still holds open.
    pub fn take(&self, upstream: &Upstream, now: Nanos) -> Option<Lease> {
        let mut idle = self.idle.borrow_mut();
        let parked = idle.get_mut(&upstream.live.id)?;
        while let Some(mut lease) = parked.pop() {
            if lease.is_fresh(now) && lease.link.is_open() {
                lease.count.set_idle(false);
                return Some(lease);
            }
        }
        None
    }

    /// Takes a connection back, if it can serve again.
    pub fn park(&self, mut lease: Lease, now: Nanos) {
        lease.parked = now;
        if !lease.is_fresh(now) || !lease.link.is_reusable() {
            return;
        }
        lease.count.set_idle(true);
        let mut idle = self.idle.borrow_mut();
        let parked = idle.entry(lease.count.upstream.live.id).or_default();
        if parked.len() < MAX_PER_BACKEND {
            parked.push(lease);
        }
    }

    /// Closes what is too old, was closed by its peer, or leads to a backend that is none of `fleet` any more.
    pub fn sweep(&self, now: Nanos, fleet: &[Arc<Upstream>]) {
        self.idle.borrow_mut().retain(|id, parked| {
            parked.retain_mut(|lease| lease.is_fresh(now) && lease.link.is_open());
            !parked.is_empty() && fleet.iter().any(|b| b.live.id == *id)
        });
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::config::Config;
    use crate::upstream::connect::Roots;

    #[test]
    fn a_connection_serves_while_it_is_young_and_its_backend_known() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let text = format!("[[backends]]\nurl = \"{url}\"\nweight = 1\n");
        let config = Config::parse(&text, "test", Path::new(""), &|_| None).unwrap();
        let roots = Roots::load(&config.backends);
        let upstream = Arc::new(Upstream::new(config.backends[0].clone(), 1, &roots, 1, None).unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let pool = Pool::default();
        let fresh = |born| {
            let link = runtime.block_on(async {
                let io = upstream.connector().connect(Duration::from_secs(5)).await.unwrap();
                Http1::new(io)
            });
            Lease::new(link, upstream.clone(), 0, born)
        };
        let idle = || upstream.lanes[0].idle.get();
        let _inside = runtime.enter();
        pool.park(fresh(0), 0);
        assert!(pool.take(&upstream, MAX_IDLE).is_none(), "it waited too long");
        // Busy all the time, it is replaced all the same, so that a name that moves is followed.
        let mut lease = fresh(0);
        let mut now = 0;
        while now + MAX_IDLE / 2 < MAX_AGE {
            pool.park(lease, now);
            now += MAX_IDLE / 2;
            lease = pool.take(&upstream, now).expect("it is young");
        }
        pool.park(lease, MAX_AGE);
        assert!(pool.take(&upstream, MAX_AGE).is_none(), "it is too old");
        pool.park(fresh(MAX_AGE), MAX_AGE);
        pool.sweep(MAX_AGE, std::slice::from_ref(&upstream));
        assert_eq!(idle(), 1);
        pool.sweep(MAX_AGE, &[]);
        assert_eq!(idle(), 0, "its backend is gone");
    }
}

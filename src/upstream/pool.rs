//! A worker's idle upstream connections.
//!
//! A connection is used by one request at a time and comes back only after an exchange that ended exactly. The
//! youngest idle one is taken first, so that the surplus of a burst grows old and goes. All backends share one bound, since
//! they share the files of the process: beyond it the oldest idle connection closes, whichever backend it leads to.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;
use std::sync::Arc;

use crate::counter::Counter;
use crate::time::{Nanos, SECOND};
use crate::upstream::Upstream;
use crate::upstream::link::{Http1, Link};

/// How long a connection may wait for its next request.
const MAX_IDLE: Nanos = 30 * SECOND;

/// How long a connection may live: a name that resolves to something new is followed within this.
const MAX_AGE: Nanos = 300 * SECOND;

/// Idle connections kept for one backend.
const MAX_PER_BACKEND: usize = 1024;

/// Idle connections by backend, the oldest first.
pub(crate) struct Pool {
    idle: RefCell<HashMap<u64, VecDeque<Lease>, BuildHasherDefault<Spread>>>,
    worker: usize,
    /// Connections of the worker, in use or idle.
    open: Rc<Cell<usize>>,
    /// Most of them while idle ones can make room.
    most: usize,
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
pub(crate) struct Lease {
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
    open: Rc<Cell<usize>>,
    idle: bool,
}

impl Count {
    fn new(upstream: Arc<Upstream>, pool: &Pool) -> Self {
        upstream.lanes[pool.worker].active.add(1);
        pool.open.update(|n| n + 1);
        Count { upstream, worker: pool.worker, open: pool.open.clone(), idle: false }
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
        self.open.update(|n| n - 1);
    }
}

impl Lease {
    fn is_fresh(&self, now: Nanos) -> bool {
        self.parked + MAX_IDLE > now && self.born + MAX_AGE > now
    }
}

impl Pool {
    /// The pool of worker number `worker`, which keeps idle connections while it has no more than `most` in all.
    pub(crate) fn new(worker: usize, most: usize) -> Self {
        Pool { idle: RefCell::default(), worker, open: Rc::default(), most }
    }

    /// A fresh connection to `upstream`, in use from now on.
    pub(crate) fn lease(&self, link: Http1, upstream: Arc<Upstream>, now: Nanos) -> Lease {
        Lease { link: Box::new(link), count: Count::new(upstream, self), born: now, parked: now }
    }

    /// Closes idle connections, the oldest first, until a fresh one fits.
    pub(crate) fn make_room(&self) {
        while self.open.get() >= self.most && self.close_oldest() {}
    }

    /// Closes the oldest idle connection, whichever backend it leads to; `false` where none is idle.
    pub(crate) fn close_oldest(&self) -> bool {
        let mut idle = self.idle.borrow_mut();
        let oldest = idle.values_mut().filter(|parked| !parked.is_empty());
        let oldest = oldest.min_by_key(|parked| parked.front().map(|lease| lease.parked));
        oldest.and_then(VecDeque::pop_front).is_some()
    }

    /// Closes the older half of the idle connections.
    pub(crate) fn close_half(&self) {
        let idle: usize = self.idle.borrow().values().map(VecDeque::len).sum();
        for _ in 0..idle.div_ceil(2) {
            self.close_oldest();
        }
    }

    /// An idle connection to `upstream` that its peer still holds open.
    pub(crate) fn take(&self, upstream: &Upstream, now: Nanos) -> Option<Lease> {
        let mut idle = self.idle.borrow_mut();
        let parked = idle.get_mut(&upstream.state.id)?;
        while let Some(mut lease) = parked.pop_back() {
            if lease.is_fresh(now) && lease.link.is_open() {
                lease.count.set_idle(false);
                return Some(lease);
            }
        }
        None
    }

    /// Takes a connection back, if it can serve again.
    pub(crate) fn park(&self, mut lease: Lease, now: Nanos) {
        lease.parked = now;
        if !lease.is_fresh(now) || !lease.link.is_reusable() {
            return;
        }
        lease.count.set_idle(true);
        let mut idle = self.idle.borrow_mut();
        let parked = idle.entry(lease.count.upstream.state.id).or_default();
        if parked.len() < MAX_PER_BACKEND {
            parked.push_back(lease);
        }
        drop(idle);
        if self.open.get() > self.most {
            self.close_oldest();
        }
    }

    /// Closes what is too old, was closed by its peer, or leads to a backend that is none of `fleet` any more.
    pub(crate) fn sweep(&self, now: Nanos, fleet: &[Arc<Upstream>]) {
        self.idle.borrow_mut().retain(|id, parked| {
            parked.retain_mut(|lease| lease.is_fresh(now) && lease.link.is_open());
            !parked.is_empty() && fleet.iter().any(|b| b.state.id == *id)
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

    /// A backend of a name that nobody else has, and what listens there.
    fn upstream() -> (std::net::TcpListener, Arc<Upstream>) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let text = format!("[[backends]]\nurl = \"{url}\"\nweight = 1\n");
        let config = Config::parse(&text, "test", Path::new(""), &|_| None).unwrap();
        let roots = Roots::load(&config.backends);
        let upstream = Upstream::new(config.backends[0].clone(), 1, &roots, 1, None).unwrap();
        (listener, Arc::new(upstream))
    }

    async fn connect(upstream: &Upstream) -> Http1 {
        Http1::new(upstream.connector().connect(Duration::from_secs(5)).await.unwrap())
    }

    #[test]
    fn beyond_its_share_a_worker_closes_the_oldest_idle_connection_of_any_backend() {
        let ((_at_a, a), (_at_b, b)) = (upstream(), upstream());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let pool = Pool::new(0, 3);
        let fresh = |upstream: &Arc<Upstream>, now| {
            pool.lease(runtime.block_on(connect(upstream)), upstream.clone(), now)
        };
        let idle = || [&a, &b].map(|upstream| upstream.lanes[0].idle.get());
        let all: Vec<_> = [(&a, 1), (&b, 2), (&b, 3), (&a, 4)].map(|(to, at)| (fresh(to, at), at)).into();
        let _inside = runtime.enter();
        for (lease, now) in all {
            pool.park(lease, now);
        }
        assert_eq!((idle(), pool.open.get()), ([1, 2], 3), "the first was one too many");
        pool.make_room();
        assert_eq!(idle(), [1, 1], "a fresh one fits");
        let used = pool.take(&b, 5).unwrap();
        pool.make_room();
        assert_eq!((idle(), pool.open.get()), ([1, 0], 2));
        pool.park(used, 6);
        pool.close_half();
        assert_eq!(idle(), [0, 1], "the older half");
        assert!(pool.close_oldest() && !pool.close_oldest());
        assert_eq!(pool.open.get(), 0);
    }

    #[test]
    fn a_connection_serves_while_it_is_young_and_its_backend_known() {
        let (_listener, upstream) = upstream();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let pool = Pool::new(0, usize::MAX);
        let fresh = |born| pool.lease(runtime.block_on(connect(&upstream)), upstream.clone(), born);
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

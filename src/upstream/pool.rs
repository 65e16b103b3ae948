//! A worker's idle upstream connections.
//!
//! A connection serves one request at a time. It returns to the pool only if the exchange ended cleanly. The most
//! recently used connection is taken first, so that surplus connections of a burst expire. All backends share one
//! limit, since they share the process's open files. Above the limit, the oldest idle connection of any backend is
//! closed.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use std::sync::Arc;

use crate::counter::Counter;
use crate::time::{Nanos, SECOND};
use crate::upstream::Upstream;
use crate::upstream::link::{Http1, Link};

/// How long a connection may be idle.
const MAX_IDLE: Nanos = 30 * SECOND;

/// Maximum age of a connection that is reused. This bounds the time until a changed DNS record takes effect.
const MAX_AGE: Nanos = 300 * SECOND;

/// Maximum number of idle connections to one backend.
const MAX_PER_BACKEND: usize = 1024;

/// The idle connections of a worker.
pub(crate) struct Pool {
    /// Idle connections by backend id, the oldest first.
    idle: RefCell<HashMap<u64, VecDeque<Lease>, BuildHasherDefault<IdHasher>>>,
    worker: usize,
    /// Number of the worker's connections, in use or idle.
    open: Rc<Cell<usize>>,
    /// Limit of `open`. Above the limit, idle connections are closed.
    max_open: usize,
}

/// A hasher for backend ids. Clients cannot choose the ids, so the hash need not resist attacks.
#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
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

/// A connection, in use or idle. Dropping the lease closes the connection. Boxed, since it is moved often.
pub(crate) struct Lease(Box<Connection>);

/// A connection and what the pool knows of it.
pub(crate) struct Connection {
    /// The connection.
    pub link: Http1,
    gauge: ConnectionGauge,
    opened_at: Nanos,
    parked_at: Nanos,
}

/// Counts one connection in `zap_upstream_connections`.
struct ConnectionGauge {
    upstream: Arc<Upstream>,
    worker: usize,
    open: Rc<Cell<usize>>,
    idle: bool,
}

impl ConnectionGauge {
    fn new(upstream: Arc<Upstream>, pool: &Pool) -> Self {
        upstream.lanes[pool.worker].active.add(1);
        pool.open.update(|n| n + 1);
        ConnectionGauge { upstream, worker: pool.worker, open: pool.open.clone(), idle: false }
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

impl Drop for ConnectionGauge {
    fn drop(&mut self) {
        self.counter().sub(1);
        self.open.update(|n| n - 1);
    }
}

impl Deref for Lease {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.0
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Connection {
        &mut self.0
    }
}

impl Connection {
    fn is_fresh(&self, now: Nanos) -> bool {
        self.parked_at + MAX_IDLE > now && self.opened_at + MAX_AGE > now
    }
}

impl Pool {
    /// Creates the pool of worker number `worker`. Above `max_open` connections in total, idle ones are closed.
    pub(crate) fn new(worker: usize, max_open: usize) -> Self {
        Pool { idle: RefCell::default(), worker, open: Rc::default(), max_open }
    }

    /// Creates the lease of a new connection to `upstream`. The connection counts as in use.
    pub(crate) fn lease(&self, link: Http1, upstream: Arc<Upstream>, now: Nanos) -> Lease {
        let gauge = ConnectionGauge::new(upstream, self);
        Lease(Box::new(Connection { link, gauge, opened_at: now, parked_at: now }))
    }

    /// Closes idle connections, the oldest first, until a new connection is within the limit.
    pub(crate) fn make_room(&self) {
        while self.open.get() >= self.max_open && self.close_oldest() {}
    }

    /// Closes the oldest idle connection of any backend. Returns `false` if there is none.
    pub(crate) fn close_oldest(&self) -> bool {
        let mut idle = self.idle.borrow_mut();
        let oldest = idle.values_mut().filter(|parked| !parked.is_empty());
        let oldest = oldest.min_by_key(|parked| parked.front().map(|lease| lease.parked_at));
        oldest.and_then(VecDeque::pop_front).is_some()
    }

    /// Closes the older half of the idle connections.
    pub(crate) fn close_half(&self) {
        let idle: usize = self.idle.borrow().values().map(VecDeque::len).sum();
        for _ in 0..idle.div_ceil(2) {
            self.close_oldest();
        }
    }

    /// Takes an idle connection to `upstream` that the peer has not closed.
    pub(crate) fn take(&self, upstream: &Upstream, now: Nanos) -> Option<Lease> {
        let mut idle = self.idle.borrow_mut();
        let parked = idle.get_mut(&upstream.state.id)?;
        while let Some(mut lease) = parked.pop_back() {
            if lease.is_fresh(now) && lease.link.is_open() {
                lease.gauge.set_idle(false);
                return Some(lease);
            }
        }
        None
    }

    /// Returns a connection to the pool, or closes it if it cannot be reused.
    pub(crate) fn park(&self, mut lease: Lease, now: Nanos) {
        lease.parked_at = now;
        if !lease.is_fresh(now) || !lease.link.is_reusable() {
            return;
        }
        lease.gauge.set_idle(true);
        let mut idle = self.idle.borrow_mut();
        let parked = idle.entry(lease.gauge.upstream.state.id).or_default();
        if parked.len() < MAX_PER_BACKEND {
            parked.push_back(lease);
        }
        drop(idle);
        if self.open.get() > self.max_open {
            self.close_oldest();
        }
    }

    /// Closes idle connections that are too old, that the peer has closed, or whose backend is not in `fleet`.
    pub(crate) fn sweep(&self, now: Nanos, fleet: &[Arc<Upstream>]) {
        self.idle.borrow_mut().retain(|id, parked| {
            parked.retain_mut(|lease| lease.is_fresh(now) && lease.link.is_open());
            !parked.is_empty() && fleet.iter().any(|b| b.state.id == *id)
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Config;
    use crate::upstream::connect::Roots;

    /// A listener and the backend with its address.
    fn upstream() -> (std::net::TcpListener, Arc<Upstream>) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let text = format!("[[backends]]\nurl = \"{url}\"\nweight = 1\n");
        let config = Config::of(&text).unwrap();
        let roots = Roots::load(&config.backends);
        let upstream = Upstream::new(
            config.backends[0].clone(),
            1,
            &roots,
            crate::upstream::fleet::backend_share(&config),
            None,
        )
        .unwrap();
        (listener, Arc::new(upstream))
    }

    async fn connect(upstream: &Upstream) -> Http1 {
        Http1::new(upstream.connector().connect(Duration::from_secs(5)).await.unwrap())
    }

    #[test]
    fn above_the_limit_the_oldest_idle_connection_of_any_backend_is_closed() {
        let ((_at_a, a), (_at_b, b)) = (upstream(), upstream());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let pool = Pool::new(0, 3);
        let open_one = |upstream: &Arc<Upstream>, now| {
            pool.lease(runtime.block_on(connect(upstream)), upstream.clone(), now)
        };
        let idle = || [&a, &b].map(|upstream| upstream.lanes[0].idle.get());
        let all: Vec<_> = [(&a, 1), (&b, 2), (&b, 3), (&a, 4)].map(|(to, at)| (open_one(to, at), at)).into();
        let _inside = runtime.enter();
        for (lease, now) in all {
            pool.park(lease, now);
        }
        assert_eq!((idle(), pool.open.get()), ([1, 2], 3), "the oldest was closed");
        pool.make_room();
        assert_eq!(idle(), [1, 1], "there is room for a new one");
        let used = pool.take(&b, 5).unwrap();
        pool.make_room();
        assert_eq!((idle(), pool.open.get()), ([1, 0], 2));
        pool.park(used, 6);
        pool.close_half();
        assert_eq!(idle(), [0, 1], "the older half was closed");
        assert!(pool.close_oldest() && !pool.close_oldest());
        assert_eq!(pool.open.get(), 0);
    }

    #[test]
    fn connections_expire_by_idle_time_by_age_and_with_their_backend() {
        let (_listener, upstream) = upstream();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let pool = Pool::new(0, usize::MAX);
        let open_one =
            |opened_at| pool.lease(runtime.block_on(connect(&upstream)), upstream.clone(), opened_at);
        let idle = || upstream.lanes[0].idle.get();
        let _inside = runtime.enter();
        pool.park(open_one(0), 0);
        assert!(pool.take(&upstream, MAX_IDLE).is_none(), "idle for too long");
        // A connection in constant use expires too, so that a changed DNS record takes effect.
        let mut lease = open_one(0);
        let mut now = 0;
        while now + MAX_IDLE / 2 < MAX_AGE {
            pool.park(lease, now);
            now += MAX_IDLE / 2;
            lease = pool.take(&upstream, now).expect("not yet expired");
        }
        pool.park(lease, MAX_AGE);
        assert!(pool.take(&upstream, MAX_AGE).is_none(), "too old");
        pool.park(open_one(MAX_AGE), MAX_AGE);
        pool.sweep(MAX_AGE, std::slice::from_ref(&upstream));
        assert_eq!(idle(), 1);
        pool.sweep(MAX_AGE, &[]);
        assert_eq!(idle(), 0, "the backend is removed");
    }
}

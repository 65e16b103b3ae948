//! Name look-ups: a few at a time for a backend.
//!
//! A look-up blocks a thread, and one that hangs cannot be ended. With a thread for each, the requests for one backend
//! whose name does not resolve would take them all, and no other backend's name would be looked up any more.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use crate::clock;
use crate::time::Nanos;

/// Look-ups of one name at a time: one may hang for want of a lost packet, and the others not wait for it.
const AT_ONCE: usize = 4;

/// How a name is looked up; the port of what is found means nothing.
pub(crate) type LookUp = dyn Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// The addresses of a name, if it resolves.
pub(crate) type LookUpResult = Result<Vec<SocketAddr>, Failed>;

/// Resolves the name of one backend for all workers: who has to wait shares the next look-up that begins.
#[derive(Clone)]
pub(crate) struct Resolver {
    look_up: Arc<LookUp>,
    turn: Arc<Semaphore>,
    /// What the last look-up found, and when it began.
    last: Arc<Mutex<Option<(Nanos, LookUpResult)>>>,
}

/// A name that does not resolve: the system's error, if there was one, and the text.
#[derive(Clone, Debug)]
pub struct Failed {
    code: Option<i32>,
    text: String,
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Failed { code: error.raw_os_error(), text: error.to_string() }
    }
}

impl From<Failed> for io::Error {
    fn from(failed: Failed) -> Self {
        match failed.code {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::other(failed.text),
        }
    }
}

impl Resolver {
    /// Asks the system.
    pub(crate) fn system() -> Self {
        Resolver::new(Arc::new(|name| Ok((name, 0).to_socket_addrs()?.collect())))
    }

    /// Asks `look_up`.
    pub(crate) fn new(look_up: Arc<LookUp>) -> Self {
        Resolver { look_up, turn: Arc::new(Semaphore::new(AT_ONCE)), last: Arc::default() }
    }

    /// The addresses of `name` as they are now, or a moment later.
    ///
    /// # Errors
    /// It does not resolve.
    pub(crate) async fn resolve(self, name: String) -> LookUpResult {
        let asked = clock::now();
        let turn = self.turn.clone().acquire_owned().await.map_err(io::Error::other)?;
        if let Some((began, found)) = &*self.last.lock()
            && *began >= asked
        {
            return found.clone();
        }
        let (look_up, last) = (self.look_up.clone(), self.last.clone());
        let looking = spawn_blocking(move || {
            let began = clock::now();
            let found = look_up(&name).map_err(Failed::from);
            let mut last = last.lock();
            if last.as_ref().is_none_or(|(other, _)| *other < began) {
                *last = Some((began, found.clone()));
            }
            drop(last);
            // Whoever asked may be gone: the turn ends with the look-up.
            drop(turn);
            found
        });
        looking.await.map_err(io::Error::other)?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use tokio::task::JoinSet;

    use super::*;

    #[test]
    fn a_name_takes_few_threads_and_who_waits_shares_what_is_found() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (open, gate) = mpsc::channel::<io::Result<Vec<SocketAddr>>>();
        let (begun, looks) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (gate, theirs, done) = (Mutex::new(gate), begun.clone(), looks.clone());
        let resolver = Resolver::new(Arc::new(move |name| {
            assert_eq!(name, "a.test");
            theirs.fetch_add(1, Ordering::SeqCst);
            let found = gate.lock().recv().unwrap();
            done.fetch_add(1, Ordering::SeqCst);
            found
        }));
        runtime.block_on(async {
            let look = || resolver.clone().resolve("a.test".into());
            let first = tokio::spawn(look());
            let mut crowd: JoinSet<LookUpResult> = (0..50).map(|_| look()).collect();
            while begun.load(Ordering::SeqCst) < AT_ONCE {
                tokio::task::yield_now().await;
            }
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            assert_eq!(begun.load(Ordering::SeqCst), AT_ONCE, "the others wait without a thread");
            // Who gives up leaves the look-up where it is, and its turn with it.
            first.abort();
            assert!(first.await.unwrap_err().is_cancelled());
            let address: SocketAddr = "192.0.2.7:0".parse().unwrap();
            (0..51).for_each(|_| open.send(Ok(vec![address])).unwrap());
            while let Some(found) = crowd.join_next().await {
                assert_eq!(found.unwrap().unwrap(), [address]);
            }
            let all = looks.load(Ordering::SeqCst);
            assert!((AT_ONCE..=2 * AT_ONCE).contains(&all), "{all}: the others shared what a few found");
        });
        let failing = Resolver::new(Arc::new(|_| Err(io::Error::from_raw_os_error(24))));
        let failed: io::Error = runtime.block_on(failing.resolve("a.test".into())).unwrap_err().into();
        assert_eq!(failed.raw_os_error(), Some(24));
    }
}

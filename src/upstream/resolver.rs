//! Looks up host names, with a limited number of look-ups per backend.
//!
//! A look-up blocks a thread and cannot be cancelled. Without the limit, the requests for one backend whose look-ups
//! hang would occupy all threads, and no other name could be looked up.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use crate::clock;
use crate::time::Nanos;

/// Maximum number of parallel look-ups of one name. There are several, since one may hang after a lost packet.
const MAX_PARALLEL: usize = 4;

/// A function that looks up a name. The ports of the results have no meaning.
pub(crate) type LookUp = dyn Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// The addresses of a name, or why the look-up failed.
pub(crate) type LookUpResult = Result<Vec<SocketAddr>, LookUpError>;

/// Resolves the name of one backend for all workers. Callers that wait for a permit share the result of a look-up that
/// began after their call.
#[derive(Clone)]
pub(crate) struct Resolver {
    look_up: Arc<LookUp>,
    permits: Arc<Semaphore>,
    /// When the latest look-up began, and its result.
    last: Arc<Mutex<Option<(Nanos, LookUpResult)>>>,
}

/// Why a look-up failed: the system's error number, if any, and the message.
#[derive(Clone, Debug)]
pub struct LookUpError {
    code: Option<i32>,
    text: String,
}

impl From<io::Error> for LookUpError {
    fn from(error: io::Error) -> Self {
        LookUpError { code: error.raw_os_error(), text: error.to_string() }
    }
}

impl From<LookUpError> for io::Error {
    fn from(failed: LookUpError) -> Self {
        match failed.code {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::other(failed.text),
        }
    }
}

impl Resolver {
    /// Creates a resolver that uses the system's look-up.
    pub(crate) fn system() -> Self {
        Resolver::new(Arc::new(|name| Ok((name, 0).to_socket_addrs()?.collect())))
    }

    /// Creates a resolver that uses `look_up`.
    pub(crate) fn new(look_up: Arc<LookUp>) -> Self {
        Resolver { look_up, permits: Arc::new(Semaphore::new(MAX_PARALLEL)), last: Arc::default() }
    }

    /// Returns the addresses of `name`, from a look-up that began after this call.
    ///
    /// # Errors
    /// Returns an error if the look-up fails.
    pub(crate) async fn resolve(self, name: String) -> LookUpResult {
        let asked = clock::now();
        let permit = self.permits.clone().acquire_owned().await.map_err(io::Error::other)?;
        if let Some((began, found)) = &*self.last.lock()
            && *began >= asked
        {
            return found.clone();
        }
        let (look_up, last) = (self.look_up.clone(), self.last.clone());
        let task = spawn_blocking(move || {
            let began = clock::now();
            let found = look_up(&name).map_err(LookUpError::from);
            let mut last = last.lock();
            if last.as_ref().is_none_or(|(other, _)| *other < began) {
                *last = Some((began, found.clone()));
            }
            drop(last);
            // Hold the permit until the look-up ends, even if the caller was cancelled.
            drop(permit);
            found
        });
        task.await.map_err(io::Error::other)?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use tokio::task::JoinSet;

    use super::*;

    #[test]
    fn a_name_occupies_few_threads_and_waiting_callers_share_results() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (open, gate) = mpsc::channel::<io::Result<Vec<SocketAddr>>>();
        let (begun, finished) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (gate, started, done) = (Mutex::new(gate), begun.clone(), finished.clone());
        let resolver = Resolver::new(Arc::new(move |name| {
            assert_eq!(name, "a.test");
            started.fetch_add(1, Ordering::SeqCst);
            let found = gate.lock().recv().unwrap();
            done.fetch_add(1, Ordering::SeqCst);
            found
        }));
        runtime.block_on(async {
            let look = || resolver.clone().resolve("a.test".into());
            let first = tokio::spawn(look());
            let mut crowd: JoinSet<LookUpResult> = (0..50).map(|_| look()).collect();
            while begun.load(Ordering::SeqCst) < MAX_PARALLEL {
                tokio::task::yield_now().await;
            }
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            assert_eq!(begun.load(Ordering::SeqCst), MAX_PARALLEL, "the other calls wait without a thread");
            // A cancelled call does not stop its look-up, which keeps its permit.
            first.abort();
            assert!(first.await.unwrap_err().is_cancelled());
            let address: SocketAddr = "192.0.2.7:0".parse().unwrap();
            (0..51).for_each(|_| open.send(Ok(vec![address])).unwrap());
            while let Some(found) = crowd.join_next().await {
                assert_eq!(found.unwrap().unwrap(), [address]);
            }
            let all = finished.load(Ordering::SeqCst);
            assert!((MAX_PARALLEL..=2 * MAX_PARALLEL).contains(&all), "{all}: the other calls share results");
        });
        let failing = Resolver::new(Arc::new(|_| Err(io::Error::from_raw_os_error(24))));
        let failed: io::Error = runtime.block_on(failing.resolve("a.test".into())).unwrap_err().into();
        assert_eq!(failed.raw_os_error(), Some(24));
    }
}

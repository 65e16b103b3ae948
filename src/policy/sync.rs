//! The atomics, the lock and the bounded queue that the policies use: loom's in the tests of `races`, the real ones
//! elsewhere.

#[cfg(not(all(test, zap_loom)))]
pub(super) use real::*;

#[cfg(all(test, zap_loom))]
pub use modelled::*;

#[cfg(not(all(test, zap_loom)))]
mod real {
    pub(crate) use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};

    pub(crate) use crossbeam_queue::ArrayQueue;
    pub(crate) use parking_lot::Mutex;
}

#[cfg(all(test, zap_loom))]
mod modelled {
    use std::collections::VecDeque;

    pub use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};

    /// loom's mutex with the interface of parking_lot's.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Self {
            Mutex(loom::sync::Mutex::new(value))
        }

        pub fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
            self.0.lock().expect("no test panics with a lock held")
        }
    }

    /// A model of crossbeam's queue with the same guarantees: loom cannot look into the real one.
    #[derive(Debug)]
    pub struct ArrayQueue<T>(Mutex<VecDeque<T>>, usize);

    impl<T> ArrayQueue<T> {
        pub fn new(capacity: usize) -> Self {
            ArrayQueue(Mutex::new(VecDeque::new()), capacity)
        }

        pub fn push(&self, value: T) -> Result<(), T> {
            let mut queue = self.0.lock();
            if queue.len() == self.1 {
                return Err(value);
            }
            queue.push_back(value);
            Ok(())
        }

        pub fn pop(&self) -> Option<T> {
            self.0.lock().pop_front()
        }
    }
}

//! Fail points: a test makes one request panic, or run an action, at a named point of the code. Release builds contain
//! none of this.

/// Runs the action that a test has armed at `point` for the request with this `id`, if any.
#[cfg(not(debug_assertions))]
pub fn hit(_point: &'static str, _id: &http::HeaderValue) {}

#[cfg(debug_assertions)]
pub use armed::{arm, arm_panic, hit};

#[cfg(debug_assertions)]
mod armed {
    use http::HeaderValue;
    use parking_lot::Mutex;

    type Armed = (&'static str, HeaderValue, Box<dyn FnOnce() + Send>);

    static ARMED: Mutex<Vec<Armed>> = Mutex::new(Vec::new());

    /// Makes the request with this `id` panic at `point`, once.
    #[doc(hidden)]
    #[allow(clippy::panic, reason = "tests need a panic")]
    pub fn arm_panic(point: &'static str, id: HeaderValue) {
        arm(point, id, move || panic!("fail point {point}: panic armed by a test"));
    }

    /// Makes the request with this `id` run `action` at `point`, once.
    #[doc(hidden)]
    pub fn arm(point: &'static str, id: HeaderValue, action: impl FnOnce() + Send + 'static) {
        ARMED.lock().push((point, id, Box::new(action)));
    }

    /// Runs the action that a test has armed at `point` for the request with this `id`, if any.
    pub fn hit(point: &'static str, id: &HeaderValue) {
        let mut armed = ARMED.lock();
        if let Some(at) = armed.iter().position(|a| a.0 == point && a.1 == *id) {
            let (.., action) = armed.swap_remove(at);
            // The lock is released first: the action may panic or block.
            drop(armed);
            action();
        }
    }
}

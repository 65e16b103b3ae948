//! A bug put in by a test: one request breaks at one place, and nothing else may notice. Nothing of it is in a release.

/// Breaks here if a test wants the request of this `id` to break at this `place`.
#[cfg(not(debug_assertions))]
pub fn here(_place: &'static str, _id: &http::HeaderValue) {}

#[cfg(debug_assertions)]
pub use wanted::{here, want};

#[cfg(debug_assertions)]
mod wanted {
    use http::HeaderValue;
    use parking_lot::Mutex;

    static WANTED: Mutex<Vec<(&'static str, HeaderValue)>> = Mutex::new(Vec::new());

    /// Has the request of this `id` break at this `place`, once.
    #[doc(hidden)]
    pub fn want(place: &'static str, id: HeaderValue) {
        WANTED.lock().push((place, id));
    }

    /// See above.
    #[allow(clippy::panic, reason = "that is what it is for")]
    pub fn here(place: &'static str, id: &HeaderValue) {
        let mut wanted = WANTED.lock();
        if let Some(at) = wanted.iter().position(|w| w.0 == place && w.1 == *id) {
            wanted.swap_remove(at);
            drop(wanted);
            panic!("a bug at {place}, put in by a test");
        }
    }
}

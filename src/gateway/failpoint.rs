//! A bug put in by a test: one request breaks, or stops its worker, at one place. Nothing of it is in a release.

/// Breaks here if a test wants the request of this `id` to break at this `place`.
#[cfg(not(debug_assertions))]
pub fn here(_place: &'static str, _id: &http::HeaderValue) {}

#[cfg(debug_assertions)]
pub use wanted::{here, instead, want};

#[cfg(debug_assertions)]
mod wanted {
    use http::HeaderValue;
    use parking_lot::Mutex;

    type Wanted = (&'static str, HeaderValue, Box<dyn FnOnce() + Send>);

    static WANTED: Mutex<Vec<Wanted>> = Mutex::new(Vec::new());

    /// Has the request of this `id` break at this `place`, once.
    #[doc(hidden)]
    #[allow(clippy::panic, reason = "that is what it is for")]
    pub fn want(place: &'static str, id: HeaderValue) {
        instead(place, id, move || panic!("a bug at {place}, put in by a test"));
    }

    /// Has it do this.
    #[doc(hidden)]
    pub fn instead(place: &'static str, id: HeaderValue, act: impl FnOnce() + Send + 'static) {
        WANTED.lock().push((place, id, Box::new(act)));
    }

    /// See above.
    pub fn here(place: &'static str, id: &HeaderValue) {
        let mut wanted = WANTED.lock();
        if let Some(at) = wanted.iter().position(|w| w.0 == place && w.1 == *id) {
            let (.., act) = wanted.swap_remove(at);
            drop(wanted);
            act();
        }
    }
}

//! Time as a number of nanoseconds.

/// Monotonic time in nanoseconds since the process started.
pub type Nanos = u64;

/// A second in [`Nanos`].
pub const SECOND: Nanos = 1_000_000_000;

/// A millisecond in [`Nanos`].
pub(crate) const MILLI: Nanos = 1_000_000;

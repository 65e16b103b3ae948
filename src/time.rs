//! Times as numbers.

/// Monotonic time in nanoseconds since the process started.
pub type Nanos = u64;

/// One second in [`Nanos`].
pub const SECOND: Nanos = 1_000_000_000;

/// One millisecond in [`Nanos`].
pub(crate) const MILLI: Nanos = 1_000_000;

//! Numbers of the configuration: their ranges and defaults.

/// Allowed numbers, both ends included.
#[derive(Clone, Copy)]
pub(super) struct Range<T> {
    pub(super) min: T,
    pub(super) max: T,
}

/// An optional number with its default and range.
#[derive(Clone, Copy)]
pub(super) struct Number<T> {
    pub(super) default: T,
    pub(super) range: Range<T>,
}

impl<T> Range<T> {
    /// The range from `min` to `max`, both included.
    pub(super) const fn new(min: T, max: T) -> Self {
        Self { min, max }
    }

    /// A number in this range that is `default` if the key is not set.
    pub(super) const fn or(self, default: T) -> Number<T>
    where
        T: Copy,
    {
        Number { default, range: self }
    }
}

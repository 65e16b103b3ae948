//! How long a stream may be silent: the backend, and what the client hears.

use std::time::Duration;

use crate::time::{Nanos, SECOND};

/// The limits of time of a stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamClocks {
    /// When the head came: from then on the client hears nothing of its own.
    pub begun: Nanos,
    /// Longest silence of the backend once content has begun.
    pub idle: Nanos,
    /// When the content must have begun.
    pub content_by: Nanos,
    /// Longest silence that the client hears; 0: no limit.
    pub heartbeat: Nanos,
}

/// The silence of one stream.
#[derive(Debug)]
pub(super) struct Silence {
    clocks: StreamClocks,
    /// When the backend was heard last.
    heard: Nanos,
    /// When the pair was told last that it is heard.
    told: Nanos,
    has_content: bool,
}

impl Silence {
    /// Starts the clocks at `now`.
    pub(super) fn new(clocks: StreamClocks, now: Nanos) -> Self {
        Silence { clocks, heard: now, told: now, has_content: false }
    }

    /// When the client has to hear something for the first time, or the silence of the backend is over.
    pub(super) fn first(&self) -> Nanos {
        self.next(self.clocks.begun)
    }

    /// Whether it is time to tell the pair that it is heard, which costs a lock.
    pub(super) fn is_to_tell(&mut self, now: Nanos) -> bool {
        let is_due = now >= self.told + SECOND;
        if is_due {
            self.told = now;
        }
        is_due
    }

    /// Notes that the backend was heard at `now`. Returns whether that is later than before.
    pub(super) fn hear(&mut self, now: Nanos) -> bool {
        std::mem::replace(&mut self.heard, now) != now
    }

    /// Notes that content has begun: from then on the idle timeout counts.
    pub(super) fn content_began(&mut self) {
        self.has_content = true;
    }

    /// Whether the client is to hear something now and then.
    pub(super) fn has_heartbeat(&self) -> bool {
        self.clocks.heartbeat > 0
    }

    /// When the client has to hear something, or the silence of the backend is over.
    pub(super) fn next(&self, now: Nanos) -> Nanos {
        let ping = if self.has_heartbeat() { now.saturating_add(self.clocks.heartbeat) } else { Nanos::MAX };
        ping.min(self.end())
    }

    /// Returns how long the backend has been silent, if that is too long.
    pub(super) fn too_long(&self, now: Nanos) -> Option<Duration> {
        (now >= self.end()).then(|| self.lasted(now))
    }

    /// How long the backend has been silent.
    pub(super) fn lasted(&self, now: Nanos) -> Duration {
        Duration::from_nanos(now.saturating_sub(self.heard))
    }

    /// Until when the backend may send nothing.
    fn end(&self) -> Nanos {
        if self.has_content { self.heard.saturating_add(self.clocks.idle) } else { self.clocks.content_by }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn before_content_the_deadline_counts_and_then_the_idle_timeout() {
        let clocks =
            StreamClocks { begun: 0, idle: 10 * SECOND, content_by: 100 * SECOND, heartbeat: 30 * SECOND };
        let mut silence = Silence::new(clocks, SECOND);
        assert_eq!(
            (silence.first(), silence.next(SECOND), silence.next(80 * SECOND)),
            (30 * SECOND, 31 * SECOND, 100 * SECOND)
        );
        assert!(
            !silence.is_to_tell(SECOND) && silence.is_to_tell(2 * SECOND) && !silence.is_to_tell(2 * SECOND)
        );
        assert_eq!(silence.too_long(99 * SECOND), None);
        assert_eq!(silence.too_long(100 * SECOND), Some(Duration::from_secs(99)));
        assert!(silence.hear(50 * SECOND) && !silence.hear(50 * SECOND));
        silence.content_began();
        assert_eq!((silence.next(51 * SECOND), silence.too_long(59 * SECOND)), (60 * SECOND, None));
        assert_eq!(silence.too_long(61 * SECOND), Some(Duration::from_secs(11)));
        let never = Silence::new(StreamClocks { heartbeat: 0, ..clocks }, 0);
        assert_eq!(never.next(SECOND), 100 * SECOND);
    }
}

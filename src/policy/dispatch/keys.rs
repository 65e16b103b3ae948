//! Backends with several keys: a key that fails costs no try, and a backend that fails is not tried with another key.

use crate::policy::choose;
use crate::policy::choose::Fleet;
use crate::policy::dispatch::Dispatch;
use crate::policy::route::TargetId;

/// How many keys of backends may fail for one request without counting as tries.
const MAX_KEYS: u32 = 4;

impl Dispatch {
    /// Another key of the backend whose key has failed the last try. The try with it takes the place of the failed one:
    /// a backend has one try, whichever of its keys fail, up to [`MAX_KEYS`].
    pub(super) fn other_key(&mut self, fleet: &impl Fleet) -> Option<TargetId> {
        let failed = self.key_failed.take().filter(|_| self.other_keys < MAX_KEYS)?;
        let skip =
            |id: TargetId| id == failed || fleet.pool(id) != fleet.pool(failed) || self.is_known(id, fleet);
        let found = choose::pick(fleet, false, skip)?;
        self.other_keys += 1;
        (self.tries, self.is_charged) = (self.tries.saturating_sub(1), false);
        Some(found)
    }

    /// Whether the target, or its backend, was tried in this round.
    pub(super) fn is_known(&self, id: TargetId, fleet: &impl Fleet) -> bool {
        self.tried.contains(&id) || has_failed(&self.backend_failed, id, fleet)
    }
}

/// Whether the backend of a target, by any of its keys, is among those of the `failed` targets.
pub(super) fn has_failed(failed: &[TargetId], id: TargetId, fleet: &impl Fleet) -> bool {
    failed.iter().any(|failed| fleet.pool(*failed) == fleet.pool(id))
}

//! Chooses the target of a try: by round robin, least load or prefix hash, in panic mode, or in a given order.
//!
//! Pure decisions on the state of the targets of one request, as a [`Fleet`] reports it. The caller then takes a permit
//! for the chosen target. That may fail, since another request may take the last permit first.

use crate::policy::balance::{BackendId, Cursor, Schedule, Turns, load};
use crate::policy::breaker::Status;
use crate::policy::latency::Expected;
use crate::policy::route::TargetId;
use crate::policy::spend::Refused;
use crate::time::Nanos;

/// How a target is chosen among the eligible ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Of two targets, drawn by this random number, the one whose first content is expected earlier.
    LeastLatency(u64),
    /// The target with the fewest requests in flight relative to its weight.
    LeastLoaded,
    /// The target for this key, a hash of the conversation's prefix.
    PrefixHash(u64),
    /// The next target in turn.
    RoundRobin,
}

/// Why a target cannot take a request now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closed {
    /// The target cools down until this time.
    Cooling(Nanos),
    /// The backend has reached its `max_in_flight`.
    Full,
    /// The backend is ejected, or it refuses Zap's key.
    Out(Status),
    /// The backend's budget does not pay for this request.
    Budget(Refused),
    /// Another backend made what the request refers to.
    Elsewhere,
    /// The request may use more tokens than the backend's quota has.
    TooLarge,
    /// The quota has room for this request at this time.
    Quota(Nanos),
    /// The quota has no room for this request because of what other requests have reserved. Nothing says when that
    /// ends.
    Reserved,
}

impl Closed {
    /// The reason in a word, for `/status` and the log.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Closed::Cooling(_) => "cooling",
            Closed::Full => "full",
            Closed::Out(status) => status.name(),
            Closed::Budget(_) => "budget",
            Closed::Elsewhere => "elsewhere",
            Closed::TooLarge => "too_large",
            Closed::Quota(_) | Closed::Reserved => "quota",
        }
    }
}

/// The load of a target.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TargetLoad {
    /// Requests in flight at the target's backend.
    pub in_flight: usize,
    /// Recent failures, expressed as a number of requests in flight.
    pub penalty: f64,
    /// How long the backend has been up.
    pub up_for: Nanos,
}

/// A schedule of targets and its position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rotation<'a> {
    /// The schedule. Its members are [`TargetId`]s.
    pub schedule: &'a Schedule,
    /// The position, shared by all requests for the same route and endpoint.
    pub cursor: &'a Cursor,
}

impl<'a> Rotation<'a> {
    fn turns(self, advance: bool) -> Turns<'a> {
        Turns { cursor: self.cursor, advance }
    }

    /// Total weight of the members for which `counts` is true.
    fn weight(self, counts: impl Fn(TargetId) -> bool) -> u32 {
        self.schedule.members().iter().filter(|m| counts(m.0)).map(|m| m.1).sum()
    }

    /// The targets in the schedule.
    pub(crate) fn targets(self) -> impl Iterator<Item = TargetId> + 'a {
        self.schedule.members().iter().map(|(id, _)| *id)
    }
}

/// The targets of one request and their present state.
pub(crate) trait Fleet {
    /// How a target is chosen.
    fn strategy(&self) -> Choice;

    /// The rotation of the `n`-th tier: the targets of one priority that were up when the rotation was built.
    fn tier(&self, n: usize) -> Option<Rotation<'_>>;

    /// The rotation of all targets with a weight above 0, up or not.
    fn all(&self) -> Rotation<'_>;

    /// The rotation of all targets with the same backend, by any of its keys, and the same priority as `target`; `None`
    /// if `target` is the only one.
    fn siblings(&self, target: TargetId) -> Option<Rotation<'_>>;

    /// The backend of a target.
    fn backend(&self, target: TargetId) -> BackendId;

    /// The first of the backends that are one backend with several keys; the target's backend if it has one key.
    fn pool(&self, target: TargetId) -> BackendId;

    /// The weight of a target.
    fn weight(&self, target: TargetId) -> u32;

    /// The hash that identifies a target under [`Choice::PrefixHash`].
    fn identity(&self, target: TargetId) -> u64;

    /// The load of a target.
    fn load(&self, target: TargetId) -> TargetLoad;

    /// The time to first content that is expected of a target for this request; `None` if nothing is known.
    fn expected(&self, target: TargetId) -> Option<Expected>;

    /// Checks whether a target can take the request now.
    ///
    /// # Errors
    /// Returns the reason if the target cannot.
    fn check(&self, target: TargetId) -> Result<(), Closed>;

    /// Checks whether an ejected target can take the request in panic mode.
    ///
    /// # Errors
    /// Returns the reason if the target cannot; [`Closed::Out`] if the target is not ejected.
    fn check_ejected(&self, target: TargetId) -> Result<(), Closed>;

    /// When an ejected target may be tried; `None` if it is not ejected, or if nothing says when.
    fn trial(&self, target: TargetId) -> Option<Nanos>;

    /// Whether a target has been silent for long, so that others are preferred.
    fn is_suspect(&self, target: TargetId) -> bool;

    /// The [pool](Self::pool) whose permit the request has waited for and now holds.
    fn granted(&self) -> Option<BackendId>;

    /// Whether the request has begun to wait for busy targets.
    fn is_waiting(&self) -> bool;
}

/// Picks an available target that is not in `skip`, rather one that is not suspect. Only the first try of a request
/// advances the rotation.
pub(crate) fn pick(fleet: &impl Fleet, is_first: bool, skip: impl Fn(TargetId) -> bool) -> Option<TargetId> {
    let eligible = |id: TargetId| !skip(id) && fleet.check(id).is_ok();
    if let Some(pool) = fleet.granted() {
        let granted = |id: TargetId| fleet.pool(id) == pool && eligible(id);
        if let Some(id) = pick_by_tier(fleet, false, granted) {
            return Some(id);
        }
    }
    let preferred = |id: TargetId| eligible(id) && !fleet.is_suspect(id);
    pick_by_tier(fleet, is_first, preferred).or_else(|| pick_by_tier(fleet, is_first, eligible))
}

/// Picks from the first tier with an eligible target, then from all targets, since a target may have come up after the
/// tiers were built.
fn pick_by_tier(fleet: &impl Fleet, advance: bool, eligible: impl Fn(TargetId) -> bool) -> Option<TargetId> {
    let tiers = (0..).map_while(|n| fleet.tier(n));
    let found = tiers.filter_map(|tier| choose(fleet, tier, advance, &eligible)).next();
    found.or_else(|| choose(fleet, fleet.all(), advance, eligible))
}

/// The first available target of `order`.
pub(crate) fn in_order(fleet: &impl Fleet, order: impl IntoIterator<Item = TargetId>) -> Option<TargetId> {
    order.into_iter().find(|id| fleet.check(*id).is_ok())
}

/// Picks a target in panic mode, when no target is up: the ejected one with room and the lowest load that is not in
/// `skip`. Recent failures count as load.
pub(crate) fn in_panic(
    fleet: &impl Fleet,
    is_first: bool,
    skip: impl Fn(TargetId) -> bool,
) -> Option<TargetId> {
    let has_room = |id: TargetId| match fleet.check_ejected(id) {
        _ if skip(id) => false,
        Err(Closed::Full) => fleet.granted() == Some(fleet.pool(id)),
        result => result.is_ok(),
    };
    let all = fleet.all();
    all.schedule.least_loaded(all.turns(is_first), |id, weight| {
        let TargetLoad { in_flight, penalty, .. } = fleet.load(id);
        // The load is that of all keys of the backend.
        let weight = fleet.siblings(id).map_or(weight, |siblings| siblings.weight(has_room));
        has_room(id).then(|| load(in_flight, weight, penalty, 0))
    })
}

/// Chooses an eligible target of a tier by the strategy. Several targets may be models of one backend; such targets
/// share the backend's requests in flight in proportion to their weights.
fn choose(
    fleet: &impl Fleet,
    tier: Rotation<'_>,
    advance: bool,
    eligible: impl Fn(TargetId) -> bool,
) -> Option<TargetId> {
    match fleet.strategy() {
        Choice::PrefixHash(key) => tier.schedule.by_affinity(key, |id| {
            eligible(id).then(|| (fleet.identity(id), own_share(fleet, id, fleet.load(id).in_flight)))
        }),
        Choice::LeastLatency(random) => least_latency(fleet, tier, random, eligible),
        Choice::LeastLoaded => {
            let least = tier.schedule.least_loaded(tier.turns(advance), |id, weight| {
                let found = || {
                    let TargetLoad { in_flight, penalty, up_for } = fleet.load(id);
                    // A cooling model lowers the weight of its backend, so its share goes to all other targets.
                    let weight = fleet.siblings(id).map_or(weight, |siblings| siblings.weight(&eligible));
                    load(in_flight, weight, penalty, up_for)
                };
                eligible(id).then(found)
            })?;
            // As below, a rotation of the backend's own.
            among_siblings(fleet, least, true, eligible)
        }
        Choice::RoundRobin => {
            let id = tier.schedule.round_robin(tier.turns(advance), &eligible)?;
            // A retry does not advance the rotation; the models of the backend have a rotation of their own.
            if advance { Some(id) } else { among_siblings(fleet, id, true, eligible) }
        }
    }
}

/// One request in so many goes to the target whose time is known least lately.
const EXPLORES: u64 = 64;

/// Picks by expected time to first content, times (in flight + 1) / weight: the better of two eligible targets of a
/// tier, drawn at random (Mitzenmacher 2001). So requests that come at once do not all go to the one that looks best.
/// A target of which nothing is known gets one request at a time, so that its time becomes known; otherwise such
/// targets are compared by load alone. One request in [`EXPLORES`] goes to the target whose
/// time is the oldest, since a target that is never asked would keep a bad time for ever.
fn least_latency(
    fleet: &impl Fleet,
    tier: Rotation<'_>,
    random: u64,
    eligible: impl Fn(TargetId) -> bool,
) -> Option<TargetId> {
    let members = tier.schedule.members();
    let open = || members.iter().filter(|(id, _)| eligible(*id));
    if random.is_multiple_of(EXPLORES) {
        return open()
            .min_by_key(|(id, _)| fleet.expected(*id).map_or(0, |known| known.at))
            .map(|(id, _)| *id);
    }
    let count = open().count();
    // The lowest bits say whether to explore.
    let (first, rest) = ((random >> 8) as usize % count.max(1), (random >> 32) as usize);
    let second = (first + 1 + rest % count.saturating_sub(1).max(1)) % count.max(1);
    let load_of = |(id, weight): (TargetId, u32)| {
        let TargetLoad { in_flight, up_for, .. } = fleet.load(id);
        // As for the least load: the load is that of all models of the backend.
        let weight = fleet.siblings(id).map_or(weight, |siblings| siblings.weight(&eligible));
        load(in_flight, weight, 0.0, up_for)
    };
    let (a, b) = (*open().nth(first)?, *open().nth(second)?);
    let is_idle = |id: TargetId| fleet.load(id).in_flight == 0;
    let (cost_a, cost_b) = match (fleet.expected(a.0), fleet.expected(b.0)) {
        (Some(time_a), Some(time_b)) => (load_of(a) * time_a.nanos, load_of(b) * time_b.nanos),
        (None, Some(_)) if is_idle(a.0) => return Some(a.0),
        (Some(_), None) if is_idle(b.0) => return Some(b.0),
        _ => (load_of(a), load_of(b)),
    };
    Some(if cost_b < cost_a { b.0 } else { a.0 })
}

/// The next eligible target of the backend that `id` belongs to.
fn among_siblings(
    fleet: &impl Fleet,
    id: TargetId,
    advance: bool,
    eligible: impl Fn(TargetId) -> bool,
) -> Option<TargetId> {
    match fleet.siblings(id) {
        Some(siblings) => siblings.schedule.round_robin(siblings.turns(advance), eligible),
        None => Some(id),
    }
}

/// A target's share of its backend's requests in flight.
fn own_share(fleet: &impl Fleet, id: TargetId, in_flight: usize) -> usize {
    let Some(siblings) = fleet.siblings(id) else { return in_flight };
    let total_weight = u64::from(siblings.weight(|_| true).max(1));
    (in_flight as u64 * u64::from(fleet.weight(id)) / total_weight) as usize
}

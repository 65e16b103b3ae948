//! Which target gets a request: round robin, least loaded, prefix hash, in panic, or in a given order.
//!
//! Pure decisions over what a [`Fleet`] says of the targets of one request, at one moment. Taking a place at the chosen
//! target is the caller's step, and may fail where another request comes first.

use crate::policy::balance::{BackendId, Cursor, Schedule, Turns, load};
use crate::policy::breaker::Status;
use crate::policy::route::TargetId;
use crate::time::Nanos;

/// How a target is chosen among those that may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The target with the fewest requests in flight for its weight.
    LeastLoaded,
    /// The target that the conversation with this key belongs to.
    PrefixHash(u64),
    /// The next in turn.
    RoundRobin,
}

/// Why a target cannot take a request now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closed {
    /// It cools down until then.
    Cooling(Nanos),
    /// Its own `max_in_flight` is reached.
    Full,
    /// It is ejected, or its key is refused.
    Out(Status),
    /// Its quota opens for this request then.
    Quota(Nanos),
}

/// What a target has to do.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TargetLoad {
    /// Requests that its backend serves.
    pub in_flight: usize,
    /// Recent failures, in requests in flight.
    pub penalty: f64,
    /// How long its backend has been up.
    pub up_for: Nanos,
}

/// A schedule of targets and where its turns stand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rotation<'a> {
    /// Its members are [`TargetId`]s.
    pub schedule: &'a Schedule,
    /// Shared by all requests for the same route and endpoint.
    pub cursor: &'a Cursor,
}

impl<'a> Rotation<'a> {
    fn turns(self, advance: bool) -> Turns<'a> {
        Turns { cursor: self.cursor, advance }
    }

    /// What the members that count weigh together.
    fn weight(self, counts: impl Fn(TargetId) -> bool) -> u32 {
        self.schedule.members().iter().filter(|m| counts(m.0)).map(|m| m.1).sum()
    }

    /// The members.
    pub(crate) fn targets(self) -> impl Iterator<Item = TargetId> + 'a {
        self.schedule.members().iter().map(|(id, _)| *id)
    }
}

/// The targets of one request at one moment.
pub(crate) trait Fleet {
    /// How targets are chosen.
    fn strategy(&self) -> Choice;

    /// The rotation number `n` in the order of priority, of targets that were up when it was made.
    fn tier(&self, n: usize) -> Option<Rotation<'_>>;

    /// The rotation of all targets that have a weight, up or not.
    fn all(&self) -> Rotation<'_>;

    /// The rotation of all targets of this one's backend and priority, where there are several.
    fn mates(&self, target: TargetId) -> Option<Rotation<'_>>;

    /// Targets that were up when the rotations were made.
    fn up(&self) -> usize;

    /// The backend of a target.
    fn backend(&self, target: TargetId) -> BackendId;

    /// The weight of a target.
    fn weight(&self, target: TargetId) -> u32;

    /// What a target is known by under [`Choice::PrefixHash`].
    fn identity(&self, target: TargetId) -> u64;

    /// What a target has to do.
    fn load(&self, target: TargetId) -> TargetLoad;

    /// Whether a target may be asked.
    ///
    /// # Errors
    /// Why not.
    fn check(&self, target: TargetId) -> Result<(), Closed>;

    /// Whether a target that is ejected may be asked in panic.
    ///
    /// # Errors
    /// Why not; that it is no ejected one, as [`Closed::Out`].
    fn check_ejected(&self, target: TargetId) -> Result<(), Closed>;

    /// The backend at which the request holds a place that it waited for.
    fn granted(&self) -> Option<BackendId>;

    /// Whether the request waits for busy targets already.
    fn stands_in_line(&self) -> bool;
}

/// The target whose turn it is, of those that may be asked and have not been `passed`. Only a first try takes a turn.
pub(crate) fn pick(
    fleet: &impl Fleet,
    is_first: bool,
    passed: impl Fn(TargetId) -> bool,
) -> Option<TargetId> {
    let eligible = |id: TargetId| !passed(id) && fleet.check(id).is_ok();
    if let Some(backend) = fleet.granted() {
        let granted = |id: TargetId| fleet.backend(id) == backend && eligible(id);
        if let Some(id) = pick_by_tier(fleet, false, granted) {
            return Some(id);
        }
    }
    pick_by_tier(fleet, is_first, eligible)
}

/// In the first tier that has one; then of all, since the state may have changed after the tiers were made.
fn pick_by_tier(fleet: &impl Fleet, advance: bool, eligible: impl Fn(TargetId) -> bool) -> Option<TargetId> {
    let tiers = (0..).map_while(|n| fleet.tier(n));
    let found = tiers.filter_map(|tier| choose(fleet, tier, advance, &eligible)).next();
    found.or_else(|| choose(fleet, fleet.all(), advance, eligible))
}

/// The first of `order` that may be asked: the second round goes as the first went.
pub(crate) fn in_order(fleet: &impl Fleet, order: impl IntoIterator<Item = TargetId>) -> Option<TargetId> {
    order.into_iter().find(|id| fleet.check(*id).is_ok())
}

/// Where all are out: of those that have not been `passed` the one with room that failed least of late.
pub(crate) fn in_panic(
    fleet: &impl Fleet,
    is_first: bool,
    passed: impl Fn(TargetId) -> bool,
) -> Option<TargetId> {
    let has_room = |id: TargetId| match fleet.check_ejected(id) {
        _ if passed(id) => false,
        Err(Closed::Full) => fleet.granted() == Some(fleet.backend(id)),
        closed => closed.is_ok(),
    };
    let all = fleet.all();
    all.schedule.least_loaded(all.turns(is_first), |id, weight| {
        let TargetLoad { in_flight, penalty, .. } = fleet.load(id);
        has_room(id).then(|| load(in_flight, weight, penalty, 0))
    })
}

/// One of a tier's targets, by the strategy. Two of them may be models of one backend, which then share what it has in
/// flight, by their weights.
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
        Choice::LeastLoaded => {
            let least = tier.schedule.least_loaded(tier.turns(advance), |id, weight| {
                let found = || {
                    let TargetLoad { in_flight, penalty, up_for } = fleet.load(id);
                    // A model that cools leaves its share to all others, not to its mate.
                    let weight = fleet.mates(id).map_or(weight, |mates| mates.weight(&eligible));
                    load(in_flight, weight, penalty, up_for)
                };
                eligible(id).then(found)
            })?;
            among_mates(fleet, least, advance, eligible)
        }
        Choice::RoundRobin => {
            let id = tier.schedule.round_robin(tier.turns(advance), &eligible)?;
            // Where no turn is taken, the same one of a backend's models would come each time.
            if advance { Some(id) } else { among_mates(fleet, id, true, eligible) }
        }
    }
}

fn among_mates(
    fleet: &impl Fleet,
    id: TargetId,
    advance: bool,
    eligible: impl Fn(TargetId) -> bool,
) -> Option<TargetId> {
    match fleet.mates(id) {
        Some(mates) => mates.schedule.round_robin(mates.turns(advance), eligible),
        None => Some(id),
    }
}

/// A target's share of what its backend has in flight.
fn own_share(fleet: &impl Fleet, id: TargetId, in_flight: usize) -> usize {
    let Some(mates) = fleet.mates(id) else { return in_flight };
    let all = u64::from(mates.weight(|_| true).max(1));
    (in_flight as u64 * u64::from(fleet.weight(id)) / all) as usize
}

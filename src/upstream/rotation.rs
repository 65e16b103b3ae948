//! The schedules by which the targets of a route take turns, rebuilt when a backend changes its state.
//!
//! Routes whose targets differ only in the model share them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::policy::balance::{BackendId, Schedule};
use crate::policy::route::{Route, Target, TargetId};
use crate::time::Nanos;
use crate::upstream::Upstream;

/// Targets as far as turns go: routes that differ in models alone share one, and with it their schedules.
#[derive(Debug, PartialEq, Eq, Hash, Clone)]
pub(super) struct TargetSet(Vec<TargetSpec>);

#[derive(Debug, PartialEq, Eq, Hash, Clone, Copy)]
struct TargetSpec {
    backend: BackendId,
    /// 0: it takes nothing.
    weight: u32,
    priority: u32,
}

/// The schedules of a set; members are [`TargetId`]s. Each has a slot, the same in every rotation_set of the set, by which
/// its cursors are found: first the tiers, then `all`, then the mates.
#[derive(Debug)]
pub(super) struct RotationSet {
    /// By priority, lowest first: those that were up when this was made.
    pub(super) tiers: Vec<Arc<Schedule>>,
    /// Every target with a weight, up or not.
    pub(super) all: Arc<Schedule>,
    /// Those that were up.
    pub(super) up: usize,
    /// By target: the schedule of all targets of its backend in its tier, where it is not the only one, and its slot.
    pub(super) mates: Box<[Option<Mates>]>,
}

pub(super) type Mates = (Arc<Schedule>, usize);

impl TargetSet {
    pub(super) fn new(route: &Route, fits: impl Fn(&Target) -> bool) -> Self {
        let place = |t: &Target| TargetSpec {
            backend: t.backend,
            weight: if fits(t) { t.weight } else { 0 },
            priority: t.priority,
        };
        TargetSet(route.targets.iter().map(place).collect())
    }

    /// Those that take requests.
    fn weighted(&self) -> impl Iterator<Item = TargetId> {
        (0..self.0.len()).filter(|id| self.0[*id].weight > 0)
    }

    /// Priorities in use, lowest first.
    fn priorities(&self) -> BTreeSet<u32> {
        self.weighted().map(|id| self.0[id].priority).collect()
    }

    /// Targets of one backend and priority, where there are several.
    fn mates(&self) -> impl Iterator<Item = Vec<TargetId>> {
        let mut by_backend = BTreeMap::<_, Vec<TargetId>>::new();
        self.weighted()
            .for_each(|id| by_backend.entry((self.0[id].backend, self.0[id].priority)).or_default().push(id));
        by_backend.into_values().filter(|ids| ids.len() > 1)
    }

    /// Schedules of its rotations.
    pub(super) fn slots(&self) -> usize {
        self.priorities().len() + 1 + self.mates().count()
    }
}

impl RotationSet {
    /// `before`: the rotation_set that this one replaces; a schedule whose members are the same is not computed again.
    pub(super) fn new(
        set: &TargetSet,
        backends: &[Arc<Upstream>],
        now: Nanos,
        before: Option<&RotationSet>,
    ) -> Self {
        let is_up = |id: &TargetId| backends[set.0[*id].backend].state.breaker.is_up(now);
        let known: Vec<&Arc<Schedule>> =
            before.iter().flat_map(|rotation_set| rotation_set.schedules()).collect();
        let schedule = |ids: &[TargetId]| {
            let members = || ids.iter().map(|id| (*id, set.0[*id].weight));
            let same = known.iter().find(|s| s.members().iter().copied().eq(members()));
            same.map_or_else(|| Arc::new(Schedule::new(members())), |s| Arc::clone(s))
        };
        let mut up = 0;
        let tiers = set.priorities().into_iter().map(|priority| {
            let (mut listed, rest): (Vec<_>, Vec<_>) =
                set.weighted().filter(|id| set.0[*id].priority == priority).partition(is_up);
            up += listed.len();
            // Nobody up: the state may change before the next rebuild, so the whole tier stays listed.
            if listed.is_empty() {
                listed = rest;
            }
            schedule(&listed)
        });
        let tiers: Vec<_> = tiers.collect();
        let all = schedule(&set.weighted().collect::<Vec<_>>());
        let mut mates = vec![None; set.0.len()];
        for (ids, slot) in set.mates().zip(tiers.len() + 1..) {
            let schedule = schedule(&ids);
            ids.into_iter().for_each(|id| mates[id] = Some((schedule.clone(), slot)));
        }
        RotationSet { tiers, all, up, mates: mates.into() }
    }

    fn schedules(&self) -> impl Iterator<Item = &Arc<Schedule>> {
        let mates = self.mates.iter().flatten().map(|(schedule, _)| schedule);
        self.tiers.iter().chain([&self.all]).chain(mates)
    }
}

//! The schedules by which the targets of a route rotate. They are rebuilt when a backend changes its state.
//!
//! Routes whose targets differ only in the model share their schedules.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::policy::balance::{BackendId, Schedule};
use crate::policy::route::{Route, Target, TargetId};
use crate::time::Nanos;
use crate::upstream::Upstream;

/// The targets of a route without their models. Routes that differ only in models have equal sets, and share schedules.
#[derive(Debug, PartialEq, Eq, Hash, Clone)]
pub(super) struct TargetSet(Vec<TargetSpec>);

#[derive(Debug, PartialEq, Eq, Hash, Clone, Copy)]
struct TargetSpec {
    backend: BackendId,
    /// The first of the backends that are one backend with several keys.
    pool: BackendId,
    /// 0 if the target takes no requests.
    weight: u32,
    priority: u32,
}

/// The schedules of a set. Their members are [`TargetId`]s. Each schedule has an index, the same in every rebuild,
/// under which its cursors are found: first the tiers, then `all`, then the siblings.
#[derive(Debug)]
pub(super) struct RotationSet {
    /// For each priority, lowest first: the targets that were up at the last rebuild.
    pub(super) tiers: Vec<Arc<Schedule>>,
    /// Every target with a weight above 0, up or not.
    pub(super) all: Arc<Schedule>,
    /// For each target: the schedule of all targets with the same backend, by any of its keys, and the same priority,
    /// and its index; `None` if there is no other such target.
    pub(super) siblings: Box<[Option<Siblings>]>,
}

pub(super) type Siblings = (Arc<Schedule>, usize);

impl TargetSet {
    /// The targets of a route that `fits` holds for. `pool` returns the first of the backends that share their load
    /// with one.
    pub(super) fn new(
        route: &Route,
        fits: impl Fn(&Target) -> bool,
        pool: impl Fn(BackendId) -> BackendId,
    ) -> Self {
        let spec = |t: &Target| TargetSpec {
            backend: t.backend,
            pool: pool(t.backend),
            weight: if fits(t) { t.weight } else { 0 },
            priority: t.priority,
        };
        TargetSet(route.targets.iter().map(spec).collect())
    }

    /// The targets that take requests.
    fn weighted(&self) -> impl Iterator<Item = TargetId> {
        (0..self.0.len()).filter(|id| self.0[*id].weight > 0)
    }

    /// The priorities in use, lowest first.
    fn priorities(&self) -> BTreeSet<u32> {
        self.weighted().map(|id| self.0[id].priority).collect()
    }

    /// Groups of two or more targets with the same backend, by any of its keys, and the same priority.
    fn siblings(&self) -> impl Iterator<Item = Vec<TargetId>> {
        let mut by_backend = BTreeMap::<_, Vec<TargetId>>::new();
        self.weighted()
            .for_each(|id| by_backend.entry((self.0[id].pool, self.0[id].priority)).or_default().push(id));
        by_backend.into_values().filter(|ids| ids.len() > 1)
    }

    /// Number of schedules.
    pub(super) fn schedule_count(&self) -> usize {
        self.priorities().len() + 1 + self.siblings().count()
    }
}

impl RotationSet {
    /// Builds the schedules. A schedule of `before` whose members are the same is used again.
    pub(super) fn new(
        set: &TargetSet,
        backends: &[Arc<Upstream>],
        now: Nanos,
        before: Option<&RotationSet>,
    ) -> Self {
        let is_up = |id: &TargetId| backends[set.0[*id].backend].state.breaker.is_up(now);
        let known: Vec<&Arc<Schedule>> = before.iter().flat_map(|rotations| rotations.schedules()).collect();
        let schedule = |ids: &[TargetId]| {
            let members = || ids.iter().map(|id| (*id, set.0[*id].weight));
            let same = known.iter().find(|s| s.members().iter().copied().eq(members()));
            same.map_or_else(|| Arc::new(Schedule::new(members())), |s| Arc::clone(s))
        };
        let tiers = set.priorities().into_iter().map(|priority| {
            let (mut listed, rest): (Vec<_>, Vec<_>) =
                set.weighted().filter(|id| set.0[*id].priority == priority).partition(is_up);
            // No target is up. That may change before the next rebuild, so all targets of the tier stay listed.
            if listed.is_empty() {
                listed = rest;
            }
            schedule(&listed)
        });
        let tiers: Vec<_> = tiers.collect();
        let all = schedule(&set.weighted().collect::<Vec<_>>());
        let mut siblings = vec![None; set.0.len()];
        for (ids, index) in set.siblings().zip(tiers.len() + 1..) {
            let schedule = schedule(&ids);
            ids.into_iter().for_each(|id| siblings[id] = Some((schedule.clone(), index)));
        }
        RotationSet { tiers, all, siblings: siblings.into() }
    }

    fn schedules(&self) -> impl Iterator<Item = &Arc<Schedule>> {
        let siblings = self.siblings.iter().flatten().map(|(schedule, _)| schedule);
        self.tiers.iter().chain([&self.all]).chain(siblings)
    }
}

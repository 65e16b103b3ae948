//! Load balancing: smooth weighted round robin, least loaded, or affinity by a weighted rendezvous hash.
//!
//! A [`Schedule`] holds the order of nginx's smooth weighted round robin; it is computed once, when the fleet
//! changes. A [`Cursor`] holds the position in that order: one for each kind of traffic, shared by all threads. A
//! pick is one step of the cursor, and any full turn of picks gives every backend exactly its weight, across all
//! threads together. The caller says which backends are eligible.

use crate::policy::sync::{AtomicU64, Ordering};
use crate::time::{Nanos, SECOND};

/// A backend's index in its snapshot.
pub(crate) type BackendId = usize;

/// A full turn of the round robin: each member appears as often as its weight.
#[derive(Debug)]
pub struct Schedule {
    order: TurnOrder,
    /// Number of picks in one turn.
    length: u64,
    members: Box<[(BackendId, u32)]>,
}

/// The order of the picks in one turn.
#[derive(Debug)]
enum TurnOrder {
    /// nginx's smooth order, written down as indexes of members.
    Smooth(Box<[u16]>),
    /// The order of a turn that would take too long to write down: pick number `n` is the member that owns the point
    /// `n * stride % length`. `stride` has no divisor in common with the length, so a turn meets every point once;
    /// `stride` is near the golden ratio of the length, so consecutive picks lie far apart. `ends` holds the end of
    /// each member's range of points.
    Strided { ends: Box<[u64]>, stride: u64 },
}

/// Longest turn that is written down, in picks: 16 KiB. Hundreds of routes may each have schedules of their own.
const MAX_LENGTH: u64 = 8_192;

/// Most steps that computing the smooth order of one schedule may take: about a millisecond.
const MAX_STEPS: u64 = 1 << 20;

/// Most ineligible members that a pick skips before it chooses by weight instead.
const MAX_SKIPPED: u64 = 64;

/// The position in a [`Schedule`] for one kind of traffic. Only first tries move it.
#[derive(Debug, Default)]
pub struct Cursor(AtomicU64);

impl Cursor {
    /// Creates a cursor that starts `turns` picks into the schedule. Different starts keep many kinds of traffic,
    /// some of them with only a few requests, from sending all their first requests to the same member.
    pub fn starting_at(turns: u64) -> Self {
        Cursor(AtomicU64::new(turns))
    }

    /// Creates a cursor that continues at the position of `other`.
    pub fn resumed(other: &Cursor) -> Self {
        Cursor(AtomicU64::new(other.0.load(Ordering::Relaxed)))
    }
}

/// How a pick uses a cursor. A first try advances it; a retry only reads it, so that retries do not change the shares
/// of first tries.
#[derive(Clone, Copy, Debug)]
pub struct Turns<'a> {
    /// The current position.
    pub cursor: &'a Cursor,
    /// Whether a pick advances the cursor.
    pub advance: bool,
}

impl Schedule {
    /// Creates the schedule of `members` (backend, weight); a member of weight 0 is left out. Takes at most
    /// [`MAX_STEPS`] steps.
    pub fn new(members: impl IntoIterator<Item = (BackendId, u32)>) -> Self {
        let members: Box<[_]> = members.into_iter().filter(|(_, weight)| *weight > 0).collect();
        let divisor = members.iter().fold(0, |a, (_, b)| gcd(a, u64::from(*b))).max(1);
        let weights: Vec<u64> = members.iter().map(|(_, weight)| u64::from(*weight) / divisor).collect();
        let length = weights.iter().sum::<u64>();
        let is_short = length <= MAX_LENGTH && length * members.len() as u64 <= MAX_STEPS;
        let order = if is_short { smooth(&weights, length) } else { strided(&weights, length) };
        Schedule { order, length, members }
    }

    /// Returns the members and their weights.
    pub fn members(&self) -> &[(BackendId, u32)] {
        &self.members
    }

    /// Picks the next eligible backend in the order.
    ///
    /// A pick skips backends that are not eligible, so the others keep their proportions. The cursor does not move if
    /// no backend is eligible.
    pub fn round_robin(&self, turns: Turns<'_>, eligible: impl Fn(BackendId) -> bool) -> Option<BackendId> {
        let cursor = &turns.cursor.0;
        let mut at = cursor.load(Ordering::Relaxed);
        loop {
            let look = |skipped| {
                Some(self.turn(at.wrapping_add(skipped))).filter(|id| eligible(*id)).zip(Some(skipped))
            };
            let found = (0..self.length.min(MAX_SKIPPED)).find_map(look);
            let (id, skipped) = match found {
                Some(found) => found,
                None => (self.by_weight(at, &eligible)?, MAX_SKIPPED),
            };
            if !turns.advance {
                return Some(id);
            }
            let next = at.wrapping_add(skipped).wrapping_add(1);
            match cursor.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(id),
                Err(moved) => at = moved,
            }
        }
    }

    /// Picks the member with the lowest `load` (`None`: not eligible). Ties are broken in rotation.
    pub fn least_loaded(
        &self,
        turns: Turns<'_>,
        load: impl Fn(BackendId, u32) -> Option<f64>,
    ) -> Option<BackendId> {
        let n = self.members.len();
        let start = match n {
            0 | 1 => 0,
            _ if turns.advance => turns.cursor.0.fetch_add(1, Ordering::Relaxed) as usize % n,
            _ => turns.cursor.0.load(Ordering::Relaxed) as usize % n,
        };
        let (before, from) = self.members.split_at(start);
        let mut best: Option<(f64, BackendId)> = None;
        for (id, weight) in from.iter().chain(before) {
            if let Some(load) = load(*id, *weight)
                && best.is_none_or(|(lowest, _)| load < lowest)
            {
                best = Some((load, *id));
            }
        }
        best.map(|(_, id)| id)
    }

    /// Returns the backend of pick number `n`. The schedule must have members.
    fn turn(&self, n: u64) -> BackendId {
        let point = n % self.length;
        let member = match &self.order {
            TurnOrder::Smooth(turn) => usize::from(turn[point as usize]),
            TurnOrder::Strided { ends, stride } => {
                let point = match point.checked_mul(*stride) {
                    Some(product) => product % self.length,
                    None => (u128::from(point) * u128::from(*stride) % u128::from(self.length)) as u64,
                };
                ends.partition_point(|end| *end <= point)
            }
        };
        self.members[member].0
    }

    /// Picks among the eligible members by weight. Needed only when most of a long turn is not eligible, which is rare.
    fn by_weight(&self, n: u64, eligible: impl Fn(BackendId) -> bool) -> Option<BackendId> {
        let eligible = || self.members.iter().filter(|m| eligible(m.0));
        let total: u64 = eligible().map(|m| u64::from(m.1)).sum();
        let mut left = mix(n).checked_rem(total)?;
        eligible().find_map(|(id, weight)| {
            let hit = left < u64::from(*weight);
            left = left.saturating_sub(u64::from(*weight));
            hit.then_some(*id)
        })
    }

    /// Picks the member that a conversation with this `key` belongs to: the first in the order of the key's weighted
    /// rendezvous hash whose load stays within its [`bound`]. `view` returns a member's identity and its requests in
    /// flight, or `None` if it is not eligible.
    pub fn by_affinity(
        &self,
        key: u64,
        view: impl Fn(BackendId) -> Option<(u64, usize)>,
    ) -> Option<BackendId> {
        let eligible = || self.members.iter().filter_map(|(id, weight)| Some((*id, *weight, view(*id)?)));
        let sum =
            |(all, weights), (_, weight, (_, in_flight))| (all + in_flight, weights + u64::from(weight));
        let (all, weights) = eligible().fold((0, 0), sum);
        // Members within their bound come first, then the hash decides. Other requests may arrive between the two
        // passes over the members, so the bound can be exceeded by a few.
        let rank = |(id, weight, (identity, in_flight)): (BackendId, u32, (u64, usize))| {
            (in_flight < bound(all, weight, weights), rendezvous(key, identity, weight), id)
        };
        let best = eligible().map(rank).max_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)))?;
        Some(best.2)
    }
}

/// Computes nginx's smooth weighted round robin.
fn smooth(weights: &[u64], length: u64) -> TurnOrder {
    let mut credit = vec![0i64; weights.len()];
    let turn = (0..length).map(|_| {
        let mut best = 0;
        for (i, weight) in weights.iter().enumerate() {
            credit[i] += *weight as i64;
            if credit[i] > credit[best] {
                best = i;
            }
        }
        credit[best] -= length as i64;
        best as u16
    });
    TurnOrder::Smooth(turn.collect())
}

fn strided(weights: &[u64], length: u64) -> TurnOrder {
    let ends = weights.iter().scan(0, |end, weight| {
        *end += weight;
        Some(*end)
    });
    let golden = (length as f64 * 0.618_033_988_749_895) as u64;
    let stride = (golden.max(1)..).find(|stride| gcd(*stride, length) == 1).unwrap_or(1);
    TurnOrder::Strided { ends: ends.collect(), stride }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A member's score for a key; the member with the highest score gets the key. This is a weighted rendezvous hash
/// (Thaler and Ravishankar 1998; the weights by Schindelhauer and Schomaker 2005): when a member is added or removed,
/// only its own share of the keys moves.
pub(crate) fn rendezvous(key: u64, identity: u64, weight: u32) -> f64 {
    let hash = mix(key ^ mix(identity));
    // Uniform in (0, 1), without 0 and 1.
    let unit = ((hash >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    f64::from(weight) / -unit.ln()
}

/// SplitMix64's finalizer (Steele, Lea and Flood 2014).
pub(crate) fn mix(x: u64) -> u64 {
    let x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}

/// Most requests that a member of `weight` may have in flight: ceil(1.25 x (`all` + 1) x `weight` / `weights`). `all`
/// is the number in flight over all members, `weights` the sum of their weights (consistent hashing with bounded
/// loads, Mirrokni et al. 2016).
pub(crate) fn bound(all: usize, weight: u32, weights: u64) -> usize {
    let share = 5 * (all as u64 + 1) * u64::from(weight);
    share.div_ceil(4 * weights.max(1)) as usize
}

/// The load of a backend for [`Schedule::least_loaded`]: (in flight + 1 + penalty) divided by its weight. The weight
/// grows from a tenth to its full value in the first [`SLOW_START`] after the backend came back.
pub(crate) fn load(in_flight: usize, weight: u32, penalty: f64, up_for: Nanos) -> f64 {
    let share = (up_for as f64 / SLOW_START as f64).clamp(0.1, 1.0);
    (in_flight as f64 + 1.0 + penalty) / (f64::from(weight) * share)
}

/// How long a backend that came back has a reduced weight.
pub(crate) const SLOW_START: Nanos = 10 * SECOND;

/// A count of failures that halves every 5 s. Keeps a backend that fails fast from looking idle.
///
/// A value that has decayed below [`NEGLIGIBLE`] is exactly 0: a residue must not decide a tie.
#[derive(Debug, Default)]
pub(crate) struct Penalty {
    /// Upper [`VALUE_BITS`]: the value in sixteenths. Other bits: the time of that value, in milliseconds since the
    /// process started. 0: no failure yet.
    word: AtomicU64,
}

const PER_FAILURE: f64 = 10.0;
const HALF_LIFE_MS: f64 = 5_000.0;
/// A smaller penalty counts as 0.
const NEGLIGIBLE: f64 = 0.1;
/// Enough for 65,535 requests, a value that takes 900 failures a second.
const VALUE_BITS: u32 = 20;
const STEPS: f64 = 16.0;
/// Milliseconds: enough for 557 years.
const TIME_MASK: u64 = u64::MAX >> VALUE_BITS;

impl Penalty {
    /// Adds one failure at `now`.
    pub(crate) fn add(&self, now: Nanos) {
        let change = |word| {
            // Another thread may have read its clock later but written first: time must not go back.
            let at = Self::millis(now).max(word & TIME_MASK);
            Some(Self::pack(Self::value(word, at) + PER_FAILURE, at))
        };
        let _ = self.word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
    }

    /// Returns what is left of the penalty at `now`, in requests in flight.
    pub(crate) fn at(&self, now: Nanos) -> f64 {
        match self.word.load(Ordering::Relaxed) {
            0 => 0.0,
            word => Self::value(word, Self::millis(now)),
        }
    }

    fn value(word: u64, millis: u64) -> f64 {
        let value = (word >> (u64::BITS - VALUE_BITS)) as f64 / STEPS;
        // A clock that was read before the word was written gives an age of 0.
        let age = millis.saturating_sub(word & TIME_MASK);
        let left = value * (-(age as f64) / HALF_LIFE_MS).exp2();
        if left < NEGLIGIBLE { 0.0 } else { left }
    }

    fn pack(value: f64, millis: u64) -> u64 {
        let max = ((1u64 << VALUE_BITS) - 1) as f64;
        let steps = (value * STEPS).round().min(max) as u64;
        steps << (u64::BITS - VALUE_BITS) | millis
    }

    fn millis(now: Nanos) -> u64 {
        (now / crate::time::MILLI).min(TIME_MASK)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn first_tries(cursor: &Cursor) -> Turns<'_> {
        Turns { cursor, advance: true }
    }

    fn picks(weights: &[u32], n: usize) -> String {
        let s = Schedule::new(weights.iter().copied().enumerate());
        let c = Cursor::default();
        (0..n).map(|_| char::from(b'A' + s.round_robin(first_tries(&c), |_| true).unwrap() as u8)).collect()
    }

    /// The members that 1,000 conversations are assigned to, with these weights and none in flight.
    fn assigned(weights: &[u32], is_eligible: impl Fn(usize) -> bool) -> Vec<usize> {
        let s = Schedule::new(weights.iter().copied().enumerate());
        let view = |id| is_eligible(id).then_some((id as u64, 0));
        (0..1_000).map(|key| s.by_affinity(mix(key), view).unwrap()).collect()
    }

    #[test]
    fn conversations_spread_by_weight_and_stay_when_another_member_leaves() {
        let all = assigned(&[1, 2, 1], |_| true);
        let share = |assigned: &[usize], id| assigned.iter().filter(|a| **a == id).count();
        assert!((200..300).contains(&share(&all, 0)) && (450..550).contains(&share(&all, 1)), "{all:?}");
        let without = assigned(&[1, 2, 1], |id| id != 1);
        for (before, after) in all.iter().zip(&without) {
            assert!(*before == 1 || before == after, "a conversation moved without need");
        }
        assert!((400..600).contains(&share(&without, 0)));
    }

    #[test]
    fn a_conversation_whose_member_is_full_goes_to_the_next() {
        let s = Schedule::new([(0, 1), (1, 1), (2, 1), (3, 1)]);
        let home = s.by_affinity(7, |id| Some((id as u64, 0))).unwrap();
        let next = s.by_affinity(7, |id| (id != home).then_some((id as u64, 0))).unwrap();
        // 40 in flight: ceil(1.25 x 41 / 4) = 13 each.
        let spread =
            |busy: usize| move |id: usize| Some((id as u64, if id == home { busy } else { (40 - busy) / 3 }));
        assert_eq!(s.by_affinity(7, spread(12)), Some(home));
        assert_eq!(s.by_affinity(7, spread(13)), Some(next));
        assert_eq!(s.by_affinity(7, |_| None), None);
        assert_eq!((bound(40, 1, 4), bound(0, 1, 4), bound(0, 1, 1), bound(7, 3, 4)), (13, 1, 2, 8));
    }

    #[test]
    fn follows_the_smooth_order() {
        assert_eq!(picks(&[2, 1], 6), "ABAABA");
        assert_eq!(picks(&[5, 1, 1], 7), "AABACAA");
        assert_eq!(picks(&[1, 1, 1], 6), "ABCABC");
        assert_eq!(picks(&[20, 10], 3), "ABA");
        assert_eq!(picks(&[0, 3], 2), "BB");
    }

    #[test]
    fn no_backend_is_picked_if_none_is_eligible() {
        let c = Cursor::default();
        let turns = first_tries(&c);
        assert_eq!(Schedule::new([]).round_robin(turns, |_| true), None);
        assert_eq!(Schedule::new([(0, 0)]).round_robin(turns, |_| true), None);
        assert_eq!(Schedule::new([(0, 1), (1, 1)]).round_robin(turns, |_| false), None);
        assert_eq!(Schedule::new([]).least_loaded(turns, |_, _| Some(0.0)), None);
        assert_eq!(Schedule::new([(0, 1)]).least_loaded(turns, |_, _| None), None);
        assert_eq!(c.0.load(Ordering::Relaxed), 0, "the cursor did not move");
    }

    #[test]
    fn a_retry_does_not_advance_the_cursor() {
        let s = Schedule::new([(0, 1), (1, 1)]);
        let c = Cursor::default();
        let mut firsts = [0; 2];
        for _ in 0..120 {
            let first = s.round_robin(first_tries(&c), |_| true).unwrap();
            firsts[first] += 1;
            let retry = Turns { cursor: &c, advance: false };
            if first == 0 {
                assert_eq!(s.round_robin(retry, |id| id != first), Some(1));
                assert_eq!(s.least_loaded(retry, |id, _| (id != first).then_some(1.0)), Some(1));
            }
        }
        assert_eq!(firsts, [60, 60]);
    }

    /// Weights without a common divisor, whose smooth order would take too long to write down.
    fn odd_weights(n: u32) -> Vec<u32> {
        (0..n).map(|i| 501 + i * 7 % 499).collect()
    }

    #[test]
    fn a_long_turn_is_quick_to_compute_and_gives_each_member_its_weight() {
        for n in [100, 300, 1_000] {
            let weights = odd_weights(n);
            let s = Schedule::new(weights.iter().copied().enumerate());
            assert!(matches!(s.order, TurnOrder::Strided { .. }), "{n} members");
            let c = Cursor::default();
            let mut got = vec![0; weights.len()];
            let mut last = vec![0; weights.len()];
            let (mut longest, turn) = (0, weights.iter().map(|w| u64::from(*w)).sum::<u64>());
            // A full turn may start at any position.
            for _ in 0..77 {
                s.round_robin(first_tries(&c), |_| true);
            }
            for pick in 0..turn {
                let id = s.round_robin(first_tries(&c), |_| true).unwrap();
                got[id] += 1;
                longest = longest.max(pick - last[id]);
                last[id] = pick;
            }
            assert_eq!(got, weights);
            // A fair gap is `turn / weight`, at most twice the number of members.
            assert!(longest < 6 * u64::from(n), "{longest} picks without one of {n}");
        }
    }

    #[test]
    fn only_a_short_turn_is_written_down() {
        let is_written = |weights: &[u32]| {
            let s = Schedule::new(weights.iter().copied().enumerate());
            matches!(s.order, TurnOrder::Smooth(_))
        };
        assert!(is_written(&[8_191, 1]) && is_written(&[1_000; 200]));
        assert_eq!(Schedule::new([(0, u32::MAX), (1, u32::MAX - 1)]).turn(u64::from(u32::MAX) * 2 - 2), 0);
        assert!(!is_written(&[8_192, 1]) && !is_written(&[u32::MAX, u32::MAX - 1]));
        // A turn of two members that is not written down alternates as well as one that is.
        let picks = picks(&[6_001, 6_000], 12_001);
        assert!(!picks.contains("AAA") && !picks.contains("BBB"), "{}", &picks[..100]);
        assert_eq!(picks.matches('A').count(), 6_001);
    }

    #[test]
    fn the_remaining_members_keep_their_proportions() {
        let c = Cursor::default();
        let s = Schedule::new([(0, 5), (1, 1), (2, 1)]);
        let picks: Vec<_> = (0..40).map(|_| s.round_robin(first_tries(&c), |id| id != 0).unwrap()).collect();
        assert_eq!(picks.iter().filter(|id| **id == 1).count(), 20, "{picks:?}");
        let s = Schedule::new([(0, 1000), (1, 2), (2, 1)]);
        let picks: Vec<_> =
            (0..3000).map(|_| s.round_robin(first_tries(&c), |id| id != 0).unwrap()).collect();
        let share = picks.iter().filter(|id| **id == 1).count();
        assert!((1800..2200).contains(&share), "{share} of 3000");
    }

    #[test]
    fn least_loaded_respects_weights_and_breaks_ties_in_rotation() {
        let s = Schedule::new([(0, 1), (1, 2)]);
        let c = Cursor::default();
        let turns = first_tries(&c);
        let pick = |flight: [usize; 2]| {
            s.least_loaded(turns, |id, w| Some(load(flight[id], w, 0.0, SLOW_START))).unwrap()
        };
        assert_eq!(pick([0, 0]), 1);
        assert_eq!(pick([0, 2]), 0);
        assert_eq!(pick([2, 4]), 1);
        let ties: Vec<_> = (0..4).map(|_| s.least_loaded(turns, |_, _| Some(1.0)).unwrap()).collect();
        assert_eq!(ties.iter().sum::<usize>(), 2, "{ties:?}");
    }

    #[test]
    fn a_penalty_decays_with_time() {
        let p = Penalty::default();
        assert_eq!(p.at(7), 0.0);
        p.add(SECOND);
        assert_eq!(p.at(SECOND), 10.0);
        assert_eq!(p.at(6 * SECOND), 5.0);
        p.add(6 * SECOND);
        assert_eq!(p.at(11 * SECOND), 7.5);
        assert_eq!(p.at(5 * SECOND), 15.0, "a clock that runs behind does not increase the penalty");
    }

    #[test]
    fn a_penalty_never_comes_back() {
        const DAY: Nanos = 86_400 * SECOND;
        let p = Penalty::default();
        p.add(SECOND);
        // 32 bits of milliseconds would wrap after 49.7 days, signed ones after half of that.
        for age in
            [DAY, 24 * DAY, 25 * DAY, 40 * DAY, 49 * DAY, 50 * DAY, 75 * DAY, 100 * DAY, 400 * 365 * DAY]
        {
            assert_eq!(p.at(SECOND + age), 0.0, "after {} days", age / DAY);
        }
        p.add(100 * DAY);
        assert_eq!((p.at(100 * DAY), p.at(100 * DAY + 5 * SECOND)), (10.0, 5.0));
        p.add(Nanos::MAX);
        assert_eq!(p.at(Nanos::MAX), 10.0, "the time saturates and does not wrap");
    }

    #[test]
    fn a_penalty_below_a_tenth_of_a_request_is_zero() {
        let p = Penalty::default();
        p.add(SECOND);
        // 10 halves to 0.1 in log2(100) = 6.64 half-lives of 5 s.
        assert!((0.1..0.11).contains(&p.at(34 * SECOND)), "{}", p.at(34 * SECOND));
        assert_eq!(p.at(SECOND + 34 * SECOND), 0.0);
        p.add(SECOND + 34 * SECOND);
        assert_eq!(p.at(SECOND + 34 * SECOND), 10.0, "the rest of the first failure is gone");
        let (s, c) = (Schedule::new([(0, 1), (1, 1)]), Cursor::default());
        let pick = || {
            s.least_loaded(first_tries(&c), |id, w| {
                Some(load(0, w, if id == 0 { p.at(90 * SECOND) } else { 0.0 }, SLOW_START))
            })
        };
        assert_ne!(pick(), pick(), "ties are broken in rotation again");
    }

    #[test]
    fn a_penalty_has_a_bound() {
        let p = Penalty::default();
        (0..200_000).for_each(|_| p.add(SECOND));
        assert!((60_000.0..70_000.0).contains(&p.at(SECOND)), "{}", p.at(SECOND));
    }

    #[test]
    fn a_backend_that_came_back_starts_slowly() {
        assert_eq!(load(0, 10, 0.0, 0), 1.0);
        assert_eq!(load(0, 10, 0.0, SLOW_START / 2), 0.2);
        assert_eq!(load(0, 10, 0.0, SLOW_START), 0.1);
    }

    #[test]
    fn threads_share_one_cursor() {
        let (s, c) = (Schedule::new([(0, 3), (1, 2), (2, 1)]), Cursor::default());
        let counts: Vec<[usize; 3]> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let mut n = [0; 3];
                        (0..2_000).for_each(|_| n[s.round_robin(first_tries(&c), |_| true).unwrap()] += 1);
                        n
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let sum = |i: usize| counts.iter().map(|c| c[i]).sum::<usize>();
        assert_eq!([sum(0), sum(1), sum(2)], [3_000, 2_000, 1_000]);
    }

    proptest! {
        #[test]
        fn every_full_turn_gives_each_member_its_weight(weights in prop::collection::vec(0u32..30, 1..8), skip in 0usize..50) {
            let total: u32 = weights.iter().sum();
            let (s, c) = (Schedule::new(weights.iter().copied().enumerate()), Cursor::default());
            for _ in 0..skip {
                s.round_robin(first_tries(&c), |_| true);
            }
            let mut got = vec![0; weights.len()];
            for _ in 0..total {
                got[s.round_robin(first_tries(&c), |_| true).unwrap()] += 1;
            }
            prop_assert_eq!(got, weights);
        }
    }
}

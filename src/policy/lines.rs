//! Who is next among those that wait: one line a client, so that a client's burst delays its own requests alone.
//!
//! Next is the client with the fewest requests in flight. Clients with equally many take turns: one that begins to
//! wait, or whose request has ended, comes after the others. So as long as a client has the fewest, at most one request
//! of each other client goes before its own. Within a line the order is first in, first out. A lower priority value
//! comes first, always, as for backends.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::BuildHasherDefault;

use crate::policy::key_hasher::KeyHasher;

/// Whose turn it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// A hash of the client.
    pub client: u64,
    /// Clients of a lower value come first.
    pub priority: u32,
}

/// The lines.
#[derive(Debug)]
pub(crate) struct Lines<T>(BTreeMap<u32, Tier<T>>);

/// The lines of one priority. No line is empty.
#[derive(Debug)]
struct Tier<T> {
    /// The clients in the order of their turns.
    turns: VecDeque<u64>,
    lines: HashMap<u64, VecDeque<T>, BuildHasherDefault<KeyHasher>>,
}

impl<T> Default for Lines<T> {
    fn default() -> Self {
        Lines(BTreeMap::new())
    }
}

impl<T> Default for Tier<T> {
    fn default() -> Self {
        Tier { turns: VecDeque::new(), lines: HashMap::default() }
    }
}

impl<T> Lines<T> {
    /// Adds a request at the end of its client's line.
    pub(crate) fn push(&mut self, Turn { client, priority }: Turn, request: T) {
        let tier = self.0.entry(priority).or_default();
        let line = tier.lines.entry(client).or_default();
        if line.is_empty() {
            tier.turns.push_back(client);
        }
        line.push_back(request);
    }

    /// Removes the next request. `in_flight` returns how many requests a client has in flight; requests that do not
    /// wait any more are discarded.
    pub(crate) fn pop(
        &mut self,
        in_flight: impl Fn(u64) -> u32,
        is_waiting: impl Fn(&T) -> bool,
    ) -> Option<T> {
        while let Some(mut tier) = self.0.first_entry() {
            if let Some(next) = tier.get_mut().pop(&in_flight, &is_waiting) {
                return Some(next);
            }
            tier.remove();
        }
        None
    }

    /// A request of this client has ended: the others are next.
    pub(crate) fn end_turn(&mut self, client: u64) {
        for tier in self.0.values_mut().filter(|tier| tier.lines.contains_key(&client)) {
            let at = tier.turns.iter().position(|other| *other == client);
            if let Some(client) = at.and_then(|at| tier.turns.remove(at)) {
                tier.turns.push_back(client);
            }
        }
    }

    /// Discards the requests that do not wait any more.
    pub(crate) fn retain(&mut self, is_waiting: impl Fn(&T) -> bool) {
        self.0.retain(|_, tier| {
            tier.lines.retain(|_, line| {
                line.retain(&is_waiting);
                !line.is_empty()
            });
            tier.turns.retain(|client| tier.lines.contains_key(client));
            !tier.turns.is_empty()
        });
    }
}

impl<T> Tier<T> {
    fn pop(&mut self, in_flight: impl Fn(u64) -> u32, is_waiting: impl Fn(&T) -> bool) -> Option<T> {
        while let Some(at) = self.next_turn(&in_flight) {
            let client = self.turns.remove(at)?;
            let line = self.lines.get_mut(&client)?;
            let next = std::iter::from_fn(|| line.pop_front()).find(&is_waiting);
            if line.is_empty() {
                self.lines.remove(&client);
            } else {
                self.turns.push_back(client);
            }
            if next.is_some() {
                return next;
            }
        }
        None
    }

    /// The first of the clients with the fewest requests in flight. None has fewer than 0, so the search ends there.
    fn next_turn(&self, in_flight: impl Fn(u64) -> u32) -> Option<usize> {
        let mut fewest: Option<(u32, usize)> = None;
        for (at, client) in self.turns.iter().enumerate() {
            let count = in_flight(*client);
            if fewest.is_none_or(|(least, _)| count < least) {
                fewest = Some((count, at));
            }
            if count == 0 {
                break;
            }
        }
        fewest.map(|(_, at)| at)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;

    use super::*;

    fn lines(requests: &[(u64, u32, &'static str)]) -> Lines<&'static str> {
        let mut lines = Lines::default();
        for (client, priority, name) in requests {
            lines.push(Turn { client: *client, priority: *priority }, *name);
        }
        lines
    }

    /// Serves all; each stays in flight.
    fn order(mut lines: Lines<&'static str>, in_flight: &[(u64, u32)]) -> String {
        let counts = RefCell::new(in_flight.iter().copied().collect::<HashMap<u64, u32>>());
        let count = |client| counts.borrow().get(&client).copied().unwrap_or(0);
        let mut served = Vec::new();
        while let Some(name) = lines.pop(count, |_| true) {
            let client = u64::from(name.as_bytes()[0] - b'a' + 1);
            *counts.borrow_mut().entry(client).or_default() += 1;
            served.push(name);
        }
        assert!(lines.0.is_empty());
        served.join(" ")
    }

    #[test]
    fn a_single_request_comes_before_the_burst_of_another_client() {
        let burst = [(1, 0, "a1"), (1, 0, "a2"), (1, 0, "a3"), (2, 0, "b1")];
        assert_eq!(order(lines(&burst), &[(1, 1)]), "b1 a1 a2 a3", "one of the burst is in flight");
        assert_eq!(order(lines(&burst), &[]), "a1 b1 a2 a3", "the burst was first");
    }

    #[test]
    fn clients_with_equally_many_in_flight_take_turns() {
        let all = [(1, 0, "a1"), (1, 0, "a2"), (2, 0, "b1"), (2, 0, "b2"), (3, 0, "c1"), (3, 0, "c2")];
        assert_eq!(order(lines(&all), &[]), "a1 b1 c1 a2 b2 c2");
        assert_eq!(order(lines(&all), &[(1, 2), (2, 1)]), "c1 b1 c2 a1 b2 a2");
    }

    #[test]
    fn a_client_whose_request_has_ended_comes_after_the_others() {
        let all = [(1, 0, "a1"), (1, 0, "a2"), (2, 0, "b1"), (3, 1, "c1")];
        let mut ended = lines(&all);
        [1, 3, 4].iter().for_each(|client| ended.end_turn(*client));
        assert_eq!(order(ended, &[]), "b1 a1 a2 c1");
    }

    #[test]
    fn a_lower_priority_value_comes_first() {
        let all = [(1, 1, "a1"), (2, 0, "b1"), (2, 0, "b2"), (1, 0, "a2")];
        assert_eq!(order(lines(&all), &[]), "b1 a2 b2 a1");
    }

    #[test]
    fn who_has_left_does_not_take_the_turn_of_its_client() {
        let mut lines = lines(&[(1, 0, "gone"), (1, 0, "a"), (2, 0, "gone"), (3, 0, "c")]);
        let mut next = || lines.pop(|_| 0, |name| *name != "gone");
        assert_eq!([next(), next(), next()], [Some("a"), Some("c"), None]);
        let mut lines = super::tests::lines(&[(1, 0, "gone"), (1, 0, "a"), (2, 1, "gone")]);
        lines.retain(|name| *name != "gone");
        assert_eq!((lines.0.len(), lines.pop(|_| 0, |_| true)), (1, Some("a")));
    }

    proptest! {
        /// However many others wait and are served, a client that has the fewest in flight waits for at most one
        /// request of each other client.
        #[test]
        fn nobody_waits_for_two_of_another_client(burst in prop::collection::vec(1u64..6, 1..60)) {
            let mut lines = Lines::default();
            for client in &burst {
                lines.push(Turn { client: *client, priority: 0 }, *client);
            }
            lines.push(Turn { client: 9, priority: 0 }, 9);
            let counts = RefCell::new(HashMap::<u64, u32>::new());
            let mut before = Vec::new();
            while let Some(client) = lines.pop(|client| counts.borrow().get(&client).copied().unwrap_or(0), |_| true) {
                if client == 9 {
                    break;
                }
                *counts.borrow_mut().entry(client).or_default() += 1;
                before.push(client);
            }
            before.sort_unstable();
            let served = before.len();
            before.dedup();
            prop_assert_eq!(served, before.len());
        }
    }
}

//! The order in which the keys of a [`Limiter`](crate::policy::limit::Limiter) were last used.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::time::Nanos;

/// No node.
pub(crate) const NONE: u32 = u32::MAX;

/// The keys of one shard in the order of their last use.
#[derive(Debug)]
pub(crate) struct Shard {
    order: Mutex<UseOrder>,
    /// Sequence number of the oldest key's last use; `u64::MAX` if the shard has no key.
    oldest: AtomicU64,
}

#[derive(Debug)]
struct UseOrder {
    /// A doubly linked list in a slab: `head` is the oldest key, `free` is a list of unused nodes, linked by `next`.
    nodes: Vec<Node>,
    head: u32,
    tail: u32,
    free: u32,
}

/// A key in the list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Node {
    /// The key.
    pub key: u64,
    /// The sequence number of its last use.
    pub sequence: u64,
    /// The time of its last use.
    pub used: Nanos,
    prev: u32,
    next: u32,
}

impl Shard {
    /// Creates a shard without keys.
    pub(crate) fn new() -> Self {
        Shard { order: Mutex::new(UseOrder::new()), oldest: AtomicU64::new(u64::MAX) }
    }

    /// The sequence number of the oldest key's last use; `u64::MAX` if the shard has no key.
    pub(crate) fn oldest_sequence(&self) -> u64 {
        self.oldest.load(Ordering::Acquire)
    }

    /// The oldest key.
    pub(crate) fn oldest(&self) -> Option<Node> {
        self.order.lock().oldest()
    }

    /// Makes `key` the most recently used; returns its node.
    pub(crate) fn touch(&self, node: u32, key: u64, sequence: u64, used: Nanos) -> u32 {
        let mut order = self.order.lock();
        let node = if node == NONE { order.allocate() } else { order.detach(node) };
        order.nodes[node as usize] = Node { key, sequence, used, prev: NONE, next: NONE };
        order.append(node);
        self.publish(&order);
        node
    }

    /// Makes the key that was `seen` the most recently used, unless it was used since. The caller holds the map's lock.
    pub(crate) fn renew(&self, node: u32, seen: Node, sequence: u64) {
        let last = self.order.lock().nodes.get(node as usize).map(|n| n.sequence);
        if last == Some(seen.sequence) {
            self.touch(node, seen.key, sequence, seen.used);
        }
    }

    /// Frees `node` if its last use is still `sequence`.
    pub(crate) fn unlink(&self, node: u32, sequence: u64) -> bool {
        let mut order = self.order.lock();
        let same = order.nodes.get(node as usize).is_some_and(|n| n.sequence == sequence);
        if same {
            order.detach(node);
            order.release(node);
            self.publish(&order);
        }
        same
    }

    fn publish(&self, order: &UseOrder) {
        self.oldest.store(order.oldest().map_or(u64::MAX, |n| n.sequence), Ordering::Release);
    }
}

impl UseOrder {
    fn new() -> Self {
        UseOrder { nodes: Vec::new(), head: NONE, tail: NONE, free: NONE }
    }

    fn oldest(&self) -> Option<Node> {
        self.nodes.get(self.head as usize).copied()
    }

    fn allocate(&mut self) -> u32 {
        if self.free != NONE {
            let node = self.free;
            self.free = self.nodes[node as usize].next;
            return node;
        }
        self.nodes.push(Node { key: 0, sequence: 0, used: 0, prev: NONE, next: NONE });
        (self.nodes.len() - 1) as u32
    }

    fn release(&mut self, node: u32) {
        self.nodes[node as usize].next = self.free;
        self.nodes[node as usize].sequence = u64::MAX;
        self.free = node;
    }

    fn detach(&mut self, node: u32) -> u32 {
        let Node { prev, next, .. } = self.nodes[node as usize];
        match self.nodes.get_mut(prev as usize) {
            Some(n) => n.next = next,
            None => self.head = next,
        }
        match self.nodes.get_mut(next as usize) {
            Some(n) => n.prev = prev,
            None => self.tail = prev,
        }
        node
    }

    fn append(&mut self, node: u32) {
        let tail = std::mem::replace(&mut self.tail, node);
        self.nodes[node as usize].prev = tail;
        match self.nodes.get_mut(tail as usize) {
            Some(n) => n.next = node,
            None => self.head = node,
        }
    }
}

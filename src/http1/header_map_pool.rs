//! Header maps that have served a request, to hold the headers of an answer: a worker's own, empty, with their room.

use std::cell::RefCell;

use http::HeaderMap;

/// Maps that a worker keeps.
const MAX_MAPS: usize = 64;

/// Headers that a map may have room for to be kept.
const MAX_ROOM: usize = 64;

thread_local! {
    static MAPS: RefCell<Vec<HeaderMap>> = const { RefCell::new(Vec::new()) };
}

/// An empty map with room for `headers`.
pub(crate) fn map(headers: usize) -> HeaderMap {
    let mut map = MAPS.with_borrow_mut(Vec::pop).unwrap_or_default();
    map.reserve(headers);
    map
}

/// Takes a map that is not needed any more.
pub(crate) fn give_back(mut map: HeaderMap) {
    MAPS.with_borrow_mut(|maps| {
        if maps.len() < MAX_MAPS && map.capacity() <= MAX_ROOM {
            map.clear();
            maps.push(map);
        }
    });
}

#[cfg(test)]
mod tests {
    use http::header::{ACCEPT, HeaderValue};

    use super::*;

    #[test]
    fn a_map_comes_back_empty_and_with_its_room() {
        let mut one = map(8);
        one.insert(ACCEPT, HeaderValue::from_static("*/*"));
        let room = one.capacity();
        give_back(one);
        let again = map(0);
        assert_eq!((again.len(), again.capacity()), (0, room));
        give_back(HeaderMap::with_capacity(MAX_ROOM * 2));
        assert_eq!(map(0).capacity(), 0, "a large one is not kept");
        (0..MAX_MAPS + 9).for_each(|_| give_back(HeaderMap::with_capacity(8)));
        assert_eq!(MAPS.with_borrow(Vec::len), MAX_MAPS);
    }
}

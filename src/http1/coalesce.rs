//! Copies the slices of a small message into one buffer, to write it in one piece.
//!
//! For a kilobyte or two, a write of several slices costs more in the kernel than the copy costs Zap.
//!
//! Benefit: without the copy, the gauge measures 2.3 % more CPU time per request in `json-1k`, 3.9 % in `json-c256`,
//! and 4.5 % more per chunk in `stream` (5 rounds, one run). To remove it, let [`one_piece`] return `None`.

use std::io::IoSlice;

use smallvec::SmallVec;

/// Largest message that is copied into one buffer, in bytes.
const MAX: usize = 4096;

/// A buffer on the stack for a small message.
pub(crate) type Scratch = SmallVec<[u8; MAX]>;

/// Returns the message as one piece, if it is a single slice or small. `None`: the caller must write the slices as they
/// are.
pub(crate) fn one_piece<'p>(slices: &'p [IoSlice<'_>], scratch: &'p mut Scratch) -> Option<&'p [u8]> {
    if let [one] = slices {
        return Some(one);
    }
    if slices.iter().map(|slice| slice.len()).sum::<usize>() > MAX {
        return None;
    }
    scratch.clear();
    slices.iter().for_each(|slice| scratch.extend_from_slice(slice));
    Some(scratch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_small_messages_are_copied() {
        let (small, large) = ([b'a'; 10], [b'b'; MAX - 9]);
        let piece = |slices: &[&[u8]]| {
            let slices: Vec<_> = slices.iter().map(|s| IoSlice::new(s)).collect();
            one_piece(&slices, &mut Scratch::new()).map(<[u8]>::to_vec)
        };
        assert_eq!(piece(&[&small, b"bc"]), Some(b"aaaaaaaaaabc".to_vec()));
        assert_eq!(piece(&[&small[1..], &large]).map(|p| p.len()), Some(MAX));
        assert_eq!(piece(&[&small, &large]), None);
        assert_eq!(piece(&[&[0; 2 * MAX]]), Some(vec![0; 2 * MAX]));
        assert_eq!(piece(&[]), Some(Vec::new()));
    }
}

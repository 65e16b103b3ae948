//! Small messages are written in one piece.
//!
//! For a kilobyte or two the kernel takes longer to be told of several slices than Zap takes to copy them together.

use std::io::IoSlice;

use smallvec::SmallVec;

/// Largest message that is copied together, in bytes.
const MAX: usize = 4096;

/// Room for a small message, on the stack.
pub(crate) type Scratch = SmallVec<[u8; MAX]>;

/// The slices as one piece, if they are one already or a small message; else they are to be written as they are.
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
    fn only_what_is_small_is_copied() {
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

//! The chunks of a request body as they are kept: small ones merged, and those of a large body in memory of their own,
//! which goes back to the system with the body.
//!
//! The allocator would keep the memory of a burst of large bodies, since what small things were allocated meanwhile
//! lies between the chunks.

use bytes::{Bytes, BytesMut};
use memmap2::MmapMut;
use smallvec::SmallVec;

/// Chunks smaller than this are copied into a shared buffer, except the first. A chunk keeps the whole read buffer that
/// it points into alive, so a body sent byte by byte would take much more memory than one sent at once.
const SMALL_CHUNK: usize = 4096;

/// A body longer than this is large. To copy a shorter one would cost more than its memory.
const LARGE_BODY: usize = 256 * 1024;

/// Size of the pieces in which the memory of a large body is taken, in bytes.
const PIECE: usize = 1024 * 1024;

/// The chunks of a body: usually one.
pub(crate) type Chunks = SmallVec<[Bytes; 1]>;

/// Collects the chunks of a body.
#[derive(Default)]
pub(super) struct ChunkBuffer {
    done: Chunks,
    /// Small chunks, which are not yet in `done`.
    small: BytesMut,
    /// Bytes of a body that is not known to be large.
    length: usize,
    /// Whether the body is large.
    is_large: bool,
    /// The end of a large body, which is not yet in `done`.
    piece: Option<Piece>,
}

/// Memory that comes from the system and goes back there.
struct Piece {
    memory: MmapMut,
    filled: usize,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.memory[..self.filled]
    }
}

impl ChunkBuffer {
    /// A buffer for a body. `length`: its length, if the head says it.
    pub(super) fn of_length(length: Option<u64>) -> Self {
        let is_large = length.is_some_and(|length| length > LARGE_BODY as u64);
        ChunkBuffer { is_large, ..ChunkBuffer::default() }
    }

    /// Adds a chunk.
    pub(super) fn push(&mut self, chunk: Bytes) {
        if chunk.is_empty() {
            return;
        }
        if self.is_large {
            return self.push_large(chunk);
        }
        self.length += chunk.len();
        if self.length > LARGE_BODY {
            self.flush();
            self.is_large = true;
            std::mem::take(&mut self.done).into_iter().for_each(|earlier| self.push_large(earlier));
            return self.push_large(chunk);
        }
        if self.done.is_empty() && self.small.is_empty() || chunk.len() >= SMALL_CHUNK {
            self.flush();
            self.done.push(chunk);
            return;
        }
        self.small.extend_from_slice(&chunk);
        if self.small.len() >= 4 * SMALL_CHUNK {
            self.flush();
        }
    }

    /// Copies a chunk of a large body.
    fn push_large(&mut self, chunk: Bytes) {
        let mut rest = &chunk[..];
        while !rest.is_empty() {
            let piece = match &mut self.piece {
                Some(piece) => piece,
                None => match MmapMut::map_anon(PIECE) {
                    Ok(memory) => self.piece.insert(Piece { memory, filled: 0 }),
                    // The system has no room for another mapping.
                    Err(_) => return self.done.push(chunk.slice_ref(rest)),
                },
            };
            let n = rest.len().min(PIECE - piece.filled);
            piece.memory[piece.filled..piece.filled + n].copy_from_slice(&rest[..n]);
            piece.filled += n;
            rest = &rest[n..];
            if piece.filled == PIECE {
                self.end_piece();
            }
        }
    }

    fn end_piece(&mut self) {
        self.done.extend(self.piece.take().map(Bytes::from_owner));
    }

    fn flush(&mut self) {
        if !self.small.is_empty() {
            self.done.push(self.small.split().freeze());
        }
    }

    /// The chunks of the whole body.
    pub(super) fn finish(mut self) -> Chunks {
        self.flush();
        self.end_piece();
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_sent_byte_by_byte_is_kept_in_few_chunks_and_in_order() {
        let mut chunks = ChunkBuffer::default();
        let body: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        body[..100_000].iter().for_each(|b| chunks.push(Bytes::copy_from_slice(&[*b])));
        chunks.push(Bytes::copy_from_slice(&body[100_000..110_000]));
        body[110_000..].iter().for_each(|b| chunks.push(Bytes::copy_from_slice(&[*b])));
        let done = chunks.finish();
        // The first chunk, the large chunk, and the merged chunks before and after the large one.
        assert_eq!(
            done.len(),
            2 + 99_999usize.div_ceil(4 * SMALL_CHUNK) + 90_000usize.div_ceil(4 * SMALL_CHUNK)
        );
        assert!(done[1..].iter().all(|chunk| chunk.len() <= 4 * SMALL_CHUNK));
        assert_eq!(done.concat(), body);
    }

    #[test]
    fn a_large_body_is_kept_in_whole_pieces_and_in_order() {
        let body: Vec<u8> = (0..2 * PIECE + 5).map(|i| (i % 251) as u8).collect();
        for (known, size) in [(true, 7000), (false, 7000), (false, 64 * 1024), (false, 3 * PIECE), (true, 10)]
        {
            let mut chunks = ChunkBuffer::of_length(known.then_some(body.len() as u64));
            body.chunks(size).for_each(|chunk| chunks.push(Bytes::copy_from_slice(chunk)));
            let done = chunks.finish();
            assert_eq!(done.iter().map(Bytes::len).collect::<Vec<_>>(), [PIECE, PIECE, 5], "{known} {size}");
            assert!(done.concat() == body);
        }
    }

    #[test]
    fn a_short_body_is_not_copied() {
        let chunks: Vec<_> = (0..4).map(|i| Bytes::from(vec![i; LARGE_BODY / 4])).collect();
        let mut buffer = ChunkBuffer::of_length(Some(LARGE_BODY as u64));
        chunks.iter().for_each(|chunk| buffer.push(chunk.clone()));
        let done = buffer.finish();
        assert!(done.iter().zip(&chunks).all(|(kept, chunk)| kept.as_ptr() == chunk.as_ptr()));
    }
}

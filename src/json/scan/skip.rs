//! Skips the text of JSON strings up to the next byte that the scanner must read itself.
//!
//! Most of a body is text, which is skipped sixteen bytes at a time. Non-ASCII characters are validated over a long
//! stretch at once. The scanner reads byte by byte only the end of a string, sequences that may continue in the next
//! chunk, and errors.

use wide::i8x16;

/// Bytes of a block.
const BLOCK: usize = 16;
/// Bytes of the four blocks that are tested together in the middle of a long text.
const WIDE: usize = 4 * BLOCK;

/// Returns the index, from `at` on, of the first byte of a string's text that the scanner must read itself: a quote, a
/// control character, or an escape or a character that is invalid or not complete in this chunk.
///
/// `valid_until`: index up to which the chunk is known to be UTF-8; the second result is its new value. The work is
/// linear: every byte is skipped once and validated at most twice.
pub(super) fn text_end(chunk: &[u8], mut at: usize, mut valid_until: usize) -> (usize, usize) {
    loop {
        if at < valid_until {
            at = special_after_escapes::<false>(&chunk[..valid_until], at);
            if at == valid_until {
                continue;
            }
        } else {
            at = special_after_escapes::<true>(chunk, at);
        }
        match chunk.get(at) {
            Some(0x80..) => {
                let valid = at + valid_prefix(&chunk[at..]);
                if valid == at {
                    return (at, valid_until);
                }
                valid_until = valid;
            }
            _ => return (at, valid_until),
        }
    }
}

/// Returns the end of a string whose text begins at `at`, if the text has no special bytes and ends in the first block;
/// else, as the error, the index at which [`text_end`] must continue.
#[inline(always)]
pub(super) fn short_end(chunk: &[u8], at: usize) -> Result<usize, usize> {
    let Some(block) = chunk.get(at..).and_then(<[u8]>::first_chunk) else { return Err(at) };
    work::add(BLOCK);
    let found = marks::<true>(block);
    if found == 0 {
        return Err(at + BLOCK);
    }
    let end = at + found.trailing_zeros() as usize;
    if chunk[end] == b'"' { Ok(end) } else { Err(end) }
}

/// Returns the index, from `at` on, of the first quote, backslash, control character or non-ASCII byte.
pub(super) fn plain_end(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() {
        let (found, length) = block_marks::<true>(bytes, at);
        if found != 0 {
            return at + found.trailing_zeros() as usize;
        }
        at += length;
    }
    at
}

/// Returns the index, from `at` on, of the first special byte that does not begin a valid, complete escape. Non-ASCII
/// bytes are special if `ASCII` is set.
fn special_after_escapes<const ASCII: bool>(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() {
        if let Some(wide) = bytes[at..].first_chunk() {
            let mut found = wide_marks::<ASCII>(wide);
            let mut next = WIDE;
            while found != 0 {
                let special = found.trailing_zeros() as usize;
                match escape_len(bytes, at + special) {
                    0 => return at + special,
                    length => next = special + length,
                }
                // Special bytes inside the escape do not count.
                found = if next < WIDE { found & (u64::MAX << next) } else { 0 };
            }
            at += next.max(WIDE);
            continue;
        }
        let (found, length) = block_marks::<ASCII>(bytes, at);
        if found == 0 {
            at += length;
            continue;
        }
        at += found.trailing_zeros() as usize;
        match escape_len(bytes, at) {
            0 => return at,
            length => at += length,
        }
    }
    at
}

/// Returns the length of the escape at `at`; 0 if there is no valid, complete one.
fn escape_len(bytes: &[u8], at: usize) -> usize {
    work::add(1);
    if bytes[at] != b'\\' {
        return 0;
    }
    match bytes.get(at + 1) {
        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => 2,
        Some(b'u') => match bytes.get(at + 2..at + 6) {
            Some(hex) if hex.iter().all(u8::is_ascii_hexdigit) => 6,
            _ => 0,
        },
        _ => 0,
    }
}

/// Tests the next block, or the bytes that are left if they are fewer. Returns a bit for each special byte, and the
/// number of bytes tested. `at` is a valid index of `bytes`.
fn block_marks<const ASCII: bool>(bytes: &[u8], at: usize) -> (u32, usize) {
    work::add(BLOCK);
    if let Some(block) = bytes[at..].first_chunk() {
        return (marks::<ASCII>(block), BLOCK);
    }
    let left = bytes.len() - at;
    // The last block overlaps bytes that were tested before.
    if let Some(block) = bytes.last_chunk() {
        return (marks::<ASCII>(block) >> (BLOCK - left), left);
    }
    let mut block = [b' '; BLOCK];
    block[..left].copy_from_slice(&bytes[at..]);
    (marks::<ASCII>(&block), left)
}

/// Returns a bit for each byte of a block that is a quote, a backslash or a control character, or, if `ASCII` is set, a
/// non-ASCII byte.
fn marks<const ASCII: bool>(block: &[u8; BLOCK]) -> u32 {
    let signed = i8x16::new(block.map(u8::cast_signed));
    let quotes = signed.simd_eq(i8x16::splat(b'"'.cast_signed()));
    let escapes = signed.simd_eq(i8x16::splat(b'\\'.cast_signed()));
    // As signed numbers, non-ASCII bytes are below the control characters.
    let low = signed.simd_lt(i8x16::splat(0x20));
    let low = if ASCII { low } else { low & !signed.simd_lt(i8x16::ZERO) };
    (quotes | escapes | low).to_bitmask()
}

/// [`marks`] of four blocks.
fn wide_marks<const ASCII: bool>(wide: &[u8; WIDE]) -> u64 {
    work::add(WIDE);
    let [a, b, c, d] = wide.as_chunks::<BLOCK>().0 else { return 0 };
    let (a, b) = (u64::from(marks::<ASCII>(a)), u64::from(marks::<ASCII>(b)));
    let (c, d) = (u64::from(marks::<ASCII>(c)), u64::from(marks::<ASCII>(d)));
    a | b << BLOCK | c << (2 * BLOCK) | d << (3 * BLOCK)
}

/// Returns the length of the longest prefix that is valid UTF-8.
fn valid_prefix(bytes: &[u8]) -> usize {
    work::add(bytes.len());
    // A character that the end of the chunk cuts off is not an error. Without it, the fast check passes for most
    // chunks.
    let whole = bytes.len() - cut_off(bytes);
    match simdutf8::basic::from_utf8(&bytes[..whole]) {
        Ok(_) => whole,
        Err(_) => std::str::from_utf8(&bytes[..whole]).map_or_else(|e| e.valid_up_to(), str::len),
    }
}

/// Returns the number of bytes at the end that begin a character but do not complete it.
fn cut_off(bytes: &[u8]) -> usize {
    for (back, b) in bytes.iter().rev().take(3).enumerate() {
        let needs = match b {
            0x80..=0xBF => continue,
            0xC0..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0.. => 4,
            _ => 1,
        };
        return if needs > back + 1 { back + 1 } else { 0 };
    }
    0
}

/// Counts the work of a scan in tests, in bytes read, so that they can check how it grows.
pub(super) mod work {
    #[cfg(test)]
    thread_local! {
        static DONE: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
    }

    /// Adds `bytes` to the count.
    #[inline(always)]
    pub(crate) fn add(bytes: usize) {
        #[cfg(test)]
        DONE.set(DONE.get() + bytes as u64);
        #[cfg(not(test))]
        let _ = bytes;
    }

    /// Returns the count since the last call.
    #[cfg(test)]
    pub(crate) fn take() -> u64 {
        DONE.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_first_special_byte_at_any_position() {
        for len in 0..100 {
            for at in 0..=len {
                for special in [0, 0x1F, b'"', b'\\', 0x80, 0xC3, 0xFF] {
                    let mut bytes = vec![b'!'; len];
                    bytes.extend([b' ', b'~', 0x7F]);
                    bytes.insert(at, special);
                    bytes.push(special);
                    assert_eq!(plain_end(&bytes, 0), at, "{special:x} at {at} of {len}");
                    let want = if special < 0x80 { at } else { bytes.len() };
                    assert_eq!(
                        special_after_escapes::<false>(&bytes, 0),
                        want,
                        "{special:x} at {at} of {len}"
                    );
                    assert_eq!(special_after_escapes::<true>(&bytes, 0), at, "{special:x} at {at} of {len}");
                    assert_eq!(plain_end(&bytes, at), at);
                }
            }
        }
        for b in 0..=255u8 {
            let (block, special) = ([b; BLOCK], b < 0x20 || b == b'"' || b == b'\\');
            assert_eq!(marks::<false>(&block), if special { 0xFFFF } else { 0 }, "{b:x}");
            assert_eq!(marks::<true>(&block), if special || b >= 0x80 { 0xFFFF } else { 0 }, "{b:x}");
        }
    }

    #[test]
    fn skips_valid_complete_text_and_stops_before_the_rest() {
        let long = "x".repeat(70);
        for (start, stop) in [
            ("", "\""),
            ("ab", "\n"),
            (r#"a\"\\\/\b\f\n\r\tb"#, "\""),
            (r"\u00e9\uD83D", "\""),
            ("é中😀é", "\""),
            ("é\\n中", "\u{1f}"),
            ("", r"\"),
            ("a", r"\x"),
            ("é", r"\u12"),
            ("é", r"\u12g4"),
        ] {
            for padding in ["", &long] {
                let body = format!("{padding}{start}{padding}{stop}");
                assert_eq!(text_end(body.as_bytes(), 0, 0).0, body.len() - stop.len(), "{body}");
            }
        }
        for (start, stop) in [
            ("é", &b"\xC3"[..]),
            ("é", b"\xE4\xB8"),
            ("é", b"\xF0\x9F\x98"),
            ("é", b"\xC3\""),
            ("", b"\x80"),
            ("中", b"\xED\xA0\x80 and on"),
            ("a", b"\xFF\xFF"),
        ] {
            let body = [start.as_bytes(), stop].concat();
            assert_eq!(text_end(&body, 0, 0).0, start.len(), "{body:x?}");
        }
    }

    #[test]
    fn a_stretch_is_validated_once() {
        let body = "é".repeat(100) + "\"";
        assert_eq!(text_end(body.as_bytes(), 0, 0), (200, 201), "the whole chunk is known to be UTF-8 now");
    }
}

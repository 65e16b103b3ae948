//! The position in an HTTP/1.1 message, the chunked transfer coding (RFC 9112, section 7.1) as its transitions, and the
//! end of a chunked message.

use crate::http1::head::is_token;

/// Why the input is not a valid HTTP/1.1 response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Invalid(pub &'static str);

/// Most headers of a response, and most trailer lines.
pub(crate) const MAX_HEADERS: usize = 100;

/// Largest trailers in bytes, line ends not counted.
pub(super) const MAX_TRAILERS: u16 = 8 * 1024;

/// Longest line with a chunk's size in bytes, extensions included.
pub(super) const MAX_SIZE_LINE: usize = 1024;

pub(super) const BAD_CHUNK: Invalid = Invalid("a chunk is malformed");

pub(super) const BAD_TRAILER: Invalid = Invalid("a trailer is malformed");

/// The position in a response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Position {
    /// The input is invalid from here on.
    Broken,
    /// The response is complete.
    Done,
    /// In the head, or before it.
    #[default]
    Head,
    /// In a body of a stated length: the bytes still to come.
    Length(u64),
    /// In a body that ends with the connection.
    UntilClose,
    /// In the data of a chunk: the bytes still to come.
    Data(u64),
    /// After a chunk's data: the CR must follow.
    DataCr,
    /// After that CR: the LF must follow.
    DataLf,
    /// In a chunk's size: the size so far, its digits, and the bytes of the line.
    Size { size: u64, digits: u8, read: u16 },
    /// After the size: white space, or an extension (`begun`), which is ignored.
    Extension { size: u64, read: u16, begun: bool },
    /// After the CR of the size line.
    SizeLf(u64),
    /// In the trailers, which are not forwarded.
    Trailer(Trailer),
    /// After the CR of a trailer line.
    TrailerLf(Trailer),
}

/// A message with a chunked body, of which only the end is searched.
///
/// The grammar is that of [`Position::after`], which is stricter than hyper's. If hyper accepts a coding that Zap
/// refuses, Zap does not know where the message ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkedMessage {
    /// Bytes of the head that are still to come.
    head: usize,
    position: Position,
}

impl ChunkedMessage {
    /// A message with a head of `head` bytes, at its start.
    pub(crate) fn new(head: usize) -> Self {
        ChunkedMessage { head, position: Position::Size { size: 0, digits: 0, read: 0 } }
    }

    /// Takes the next `bytes` of the connection. Returns how many of them belong to the message: fewer than all if the
    /// message ends before, or if a byte breaks the coding.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> usize {
        let mut at = self.head.min(bytes.len());
        self.head -= at;
        while at < bytes.len() {
            self.position = match self.position {
                Position::Done | Position::Broken => break,
                Position::Data(0) => Position::DataCr,
                Position::Data(left) => {
                    let n = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len() - at);
                    at += n;
                    Position::Data(left - n as u64)
                }
                position => match position.after(bytes[at]) {
                    Ok(next) => {
                        at += 1;
                        next
                    }
                    Err(_) => Position::Broken,
                },
            };
        }
        at
    }

    /// Whether the message has come to its end.
    pub(crate) fn is_done(self) -> bool {
        self.position == Position::Done
    }

    /// Whether a byte has broken the coding.
    pub(crate) fn is_broken(self) -> bool {
        self.position == Position::Broken
    }
}

/// How far the trailers were read: their bytes, their lines, and the position in the current line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Trailer {
    read: u16,
    lines: u8,
    line: TrailerLine,
}

/// The position in a line of the trailers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum TrailerLine {
    #[default]
    Empty,
    Name,
    Value,
}

impl Position {
    /// Returns the position after the byte `b`, outside of the data of chunks.
    #[inline(always)] // The decoder of responses calls it for most bytes of the coding; a request rarely has any.
    pub(super) fn after(self, b: u8) -> Result<Position, Invalid> {
        Ok(match (self, b) {
            (Position::DataCr, b'\r') => Position::DataLf,
            (Position::DataLf, b'\n') => Position::Size { size: 0, digits: 0, read: 0 },
            (Position::Size { size, digits, read }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                let digit = (b as char).to_digit(16).ok_or(BAD_CHUNK)?;
                // At most sixteen digits: with more, another reader could overflow and see another size.
                if digits == 16 {
                    return Err(BAD_CHUNK);
                }
                Position::Size { size: size << 4 | u64::from(digit), digits: digits + 1, read: read + 1 }
            }
            (Position::Size { digits: 0, .. }, _) => return Err(BAD_CHUNK),
            (Position::Size { size, .. } | Position::Extension { size, .. }, b'\r') => Position::SizeLf(size),
            (Position::Size { size, read, .. }, b';' | b' ' | b'\t') => {
                Position::Extension { size, read: read + 1, begun: b == b';' }
            }
            (Position::Extension { size, read, begun }, b'\t' | b' '..=b'~' | 0x80..)
                if usize::from(read) < MAX_SIZE_LINE && (begun || b";\t ".contains(&b)) =>
            {
                Position::Extension { size, read: read + 1, begun: begun || b == b';' }
            }
            (Position::SizeLf(0), b'\n') => Position::Trailer(Trailer::default()),
            (Position::SizeLf(size), b'\n') => Position::Data(size),
            (Position::Trailer(trailer), _) => trailer.after(b)?,
            (Position::TrailerLf(Trailer { line: TrailerLine::Empty, .. }), b'\n') => Position::Done,
            (Position::TrailerLf(trailer), b'\n') => {
                Position::Trailer(Trailer { line: TrailerLine::Empty, lines: trailer.lines + 1, ..trailer })
            }
            (Position::TrailerLf(_), _) => return Err(BAD_TRAILER),
            _ => return Err(BAD_CHUNK),
        })
    }
}

impl Trailer {
    /// Returns the position after the byte `b` in a line of the trailers.
    fn after(self, b: u8) -> Result<Position, Invalid> {
        let line = match (self.line, b) {
            (TrailerLine::Empty | TrailerLine::Value, b'\r') => return Ok(Position::TrailerLf(self)),
            (TrailerLine::Empty | TrailerLine::Name, _) if is_token(b) => TrailerLine::Name,
            (TrailerLine::Name, b':') => TrailerLine::Value,
            (TrailerLine::Value, b'\t' | b' '..=b'~' | 0x80..) => TrailerLine::Value,
            _ => return Err(BAD_TRAILER),
        };
        if self.read == MAX_TRAILERS || usize::from(self.lines) == MAX_HEADERS {
            return Err(Invalid("the trailers are too large"));
        }
        Ok(Position::Trailer(Trailer { read: self.read + 1, line, ..self }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "POST / HTTP/1.1\r\n\r\n";

    /// How many bytes of `text`, fed in pieces of `size` bytes, belong to the message, and where it then stands.
    fn take(text: &str, size: usize) -> (usize, ChunkedMessage) {
        let mut message = ChunkedMessage::new(HEAD.len());
        let mut taken = 0;
        for piece in text.as_bytes().chunks(size) {
            let n = message.take(piece);
            taken += n;
            if n < piece.len() {
                break;
            }
        }
        (taken, message)
    }

    #[test]
    fn a_chunked_message_ends_at_the_same_byte_however_it_is_cut() {
        for body in [
            "0\r\n\r\n",
            "1\r\n{\r\n00a;x=\"y\"\r\n0123456789\r\n0\r\n\r\n",
            "3 \r\n\r\n\r\r\n0\t;a\r\nx-t: 1\r\ny: \r\n\r\n",
        ] {
            let message = format!("{HEAD}{body}");
            let text = format!("{message}GET / HTTP/1.1\r\n");
            for size in 1..=text.len() {
                let (taken, state) = take(&text, size);
                assert_eq!(
                    (taken, state.is_done(), state.is_broken()),
                    (message.len(), true, false),
                    "{body:?}"
                );
            }
            for end in 0..message.len() {
                let (taken, state) = take(&message[..end], 7);
                assert_eq!((taken, state.is_done(), state.is_broken()), (end, false, false), "{body:?}");
            }
        }
    }

    #[test]
    fn a_broken_coding_is_taken_up_to_the_byte_that_breaks_it() {
        for (good, rest) in [
            ("", "\r\n0\r\n\r\n"),
            ("", "-1\r\n"),
            ("1", "\n{\n"),
            ("1", "x\r\n"),
            ("1 ", "2\r\n"),
            ("1;a", "\n{\r\n"),
            ("1\r", "{"),
            ("1\r\n{", "}\r\n"),
            ("1\r\n{\r", "0\r\n"),
            ("1\r\n{", "\n0\r\n\r\n"),
            ("0000000000000001", "1\r\n"),
            ("0\r\n", "\n"),
            ("0\r\n\r", "x"),
            ("0\r\nx", " : y\r\n"),
            ("0\r\nx: y", "\n\r\n"),
            ("0\r\n", " folded\r\n"),
        ] {
            for size in [1, 3, 1000] {
                let (taken, state) = take(&format!("{HEAD}{good}{rest}"), size);
                let want = (HEAD.len() + good.len(), false, true);
                assert_eq!((taken, state.is_done(), state.is_broken()), want, "{good:?} {rest:?}");
            }
        }
    }
}

//! Numbers and literals (RFC 8259, sections 3 and 6).

use crate::json::scan::{BoxedError, NumberPart, Scanner, TokenRead, Within, skip};

impl Scanner<'_> {
    /// Reads a number, `true`, `false` or `null`; it begins at `i` with the byte `b`.
    #[inline(always)] // Called from two places.
    pub(super) fn scalar(&mut self, chunk: &[u8], i: usize, b: u8) -> Result<TokenRead, BoxedError> {
        match b {
            b'-' => self.number(chunk, i + 1, NumberPart::Minus),
            b'0' => self.number(chunk, i + 1, NumberPart::Zero),
            b'1'..=b'9' => self.number(chunk, i + 1, NumberPart::Integer),
            b't' => self.literal(chunk, i + 1, b"rue"),
            b'f' => self.literal(chunk, i + 1, b"alse"),
            b'n' => self.literal(chunk, i + 1, b"ull"),
            _ => self.invalid(i),
        }
    }

    /// Reads on in a number.
    pub(super) fn number(
        &mut self,
        chunk: &[u8],
        mut i: usize,
        mut number: NumberPart,
    ) -> Result<TokenRead, BoxedError> {
        use NumberPart::{E, Exponent, Fraction, Integer, Minus, Point, Sign, Zero};
        loop {
            if matches!(number, Integer | Fraction | Exponent) {
                let digits = chunk[i..].iter().take_while(|b| b.is_ascii_digit()).count();
                skip::work::add(digits);
                i += digits;
            }
            let Some(&b) = chunk.get(i) else { break };
            skip::work::add(1);
            number = match (number, b) {
                (Minus, b'0') => Zero,
                (Minus, b'1'..=b'9') => Integer,
                (Zero | Integer, b'.') => Point,
                (Point, b'0'..=b'9') => Fraction,
                (Zero | Integer | Fraction, b'e' | b'E') => E,
                (E, b'+' | b'-') => Sign,
                (E | Sign, b'0'..=b'9') => Exponent,
                (Zero | Integer | Fraction | Exponent, _) => return Ok(TokenRead::Whole(i)),
                (Minus | Point | E | Sign, _) => return self.invalid(i),
            };
            i += 1;
        }
        self.within = Within::NumberPart(number);
        Ok(TokenRead::Part(i))
    }

    /// Reads on in a literal; `rest` is to come.
    pub(super) fn literal(
        &mut self,
        chunk: &[u8],
        i: usize,
        rest: &'static [u8],
    ) -> Result<TokenRead, BoxedError> {
        let here = &chunk[i..chunk.len().min(i + rest.len())];
        if *here != rest[..here.len()] {
            let mismatch = here.iter().zip(rest).position(|(b, want)| b != want);
            return self.invalid(i + mismatch.unwrap_or(0));
        }
        let end = i + here.len();
        if here.len() == rest.len() {
            return Ok(TokenRead::Whole(end));
        }
        self.within = Within::Literal(&rest[here.len()..]);
        Ok(TokenRead::Part(end))
    }
}

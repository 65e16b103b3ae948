//! The numbers of RFC 8259, section 6.

use crate::json::scan::{BoxedError, NumberPart, Scanner, TokenRead, Within, skip};

impl Scanner<'_> {
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
}

//! The part of the scanner that reads strings. Some are kept: keys that may have to be noted, a model's name, a role.

use crate::json::scan::{BoxedError, Keep, MAX_NAME, Scanner, Utf8Rest, Within, skip};

impl Scanner<'_> {
    /// Reads the text of a string from `i`.
    pub(super) fn text(&mut self, chunk: &[u8], i: usize, key: bool) -> Result<usize, BoxedError> {
        let end = if self.keep == Keep::Nothing {
            self.text_end(chunk, i)
        } else {
            let end = skip::plain_end(chunk, i);
            if end > i {
                self.keep_run(&chunk[i..end]);
            }
            end
        };
        self.within = Within::Text { key };
        let Some(&b) = chunk.get(end) else { return Ok(end) };
        match b {
            b'"' => self.text_ends(end + 1, key)?,
            b'\\' => self.within = Within::Escape { key },
            0x00..0x20 => return self.invalid(end),
            _ => {
                let (left, low, high) = match b {
                    0xC2..=0xDF => (1, 0x80, 0xBF),
                    0xE0 => (2, 0xA0, 0xBF),
                    0xE1..=0xEC | 0xEE..=0xEF => (2, 0x80, 0xBF),
                    0xED => (2, 0x80, 0x9F),
                    0xF0 => (3, 0x90, 0xBF),
                    0xF1..=0xF3 => (3, 0x80, 0xBF),
                    0xF4 => (3, 0x80, 0x8F),
                    _ => return self.invalid(end),
                };
                self.push(b);
                self.within = Within::Utf8 { key, rest: Utf8Rest { left, low, high } };
            }
        }
        Ok(end + 1)
    }

    /// Reads the next byte of a UTF-8 sequence.
    pub(super) fn utf8(&mut self, b: u8, i: usize, key: bool, rest: Utf8Rest) -> Result<usize, BoxedError> {
        let Utf8Rest { left, low, high } = rest;
        if b < low || b > high {
            return self.invalid(i);
        }
        self.push(b);
        self.within = match left {
            1 => Within::Text { key },
            _ => Within::Utf8 { key, rest: Utf8Rest { left: left - 1, low: 0x80, high: 0xBF } },
        };
        Ok(i + 1)
    }

    /// Reads the byte after a backslash.
    pub(super) fn escape(&mut self, b: u8, i: usize, key: bool) -> Result<usize, BoxedError> {
        let plain = match b {
            b'"' | b'\\' | b'/' => b,
            b'b' => 0x08,
            b'f' => 0x0C,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => {
                self.within = Within::Hex { key, left: 4, code: 0 };
                return Ok(i + 1);
            }
            _ => return self.invalid(i),
        };
        self.flush_surrogate();
        self.push(plain);
        self.within = Within::Text { key };
        Ok(i + 1)
    }

    /// Reads a digit of a `\u` escape.
    pub(super) fn hex(
        &mut self,
        b: u8,
        i: usize,
        key: bool,
        left: u8,
        code: u16,
    ) -> Result<usize, BoxedError> {
        let Some(digit) = (b as char).to_digit(16) else { return self.invalid(i) };
        let code = code << 4 | digit as u16;
        if left > 1 {
            self.within = Within::Hex { key, left: left - 1, code };
            return Ok(i + 1);
        }
        if self.keep != Keep::Nothing {
            self.push_unit(code);
        }
        self.within = Within::Text { key };
        Ok(i + 1)
    }

    /// [`skip::text_end`], which learns how far the chunk is UTF-8.
    pub(super) fn text_end(&mut self, chunk: &[u8], at: usize) -> usize {
        let (end, valid_until) = skip::text_end(chunk, at, self.valid_until);
        self.valid_until = valid_until;
        end
    }

    pub(super) fn start_keeping(&mut self, keep: Keep) {
        self.keep = keep;
        self.text.clear();
        self.text_is_cut = false;
        self.high_surrogate = 0;
    }

    pub(super) fn push(&mut self, b: u8) {
        self.keep_run(&[b]);
    }

    /// Appends `run` to the kept text, truncated at [`MAX_NAME`] bytes.
    pub(super) fn keep_run(&mut self, run: &[u8]) {
        if self.keep == Keep::Nothing {
            return;
        }
        self.flush_surrogate();
        let room = MAX_NAME - self.text.len();
        self.text.extend_from_slice(&run[..run.len().min(room)]);
        self.text_is_cut |= run.len() > room;
    }

    /// Keeps one UTF-16 unit of a `\u` escape. A lone surrogate, which RFC 8259 allows, is kept as U+FFFD.
    pub(super) fn push_unit(&mut self, unit: u16) {
        let high = std::mem::take(&mut self.high_surrogate);
        let units = [high, unit];
        let units = if high == 0 { &units[1..] } else { &units[..] };
        if high == 0 && (0xD800..0xDC00).contains(&unit) {
            self.high_surrogate = unit;
            return;
        }
        for c in char::decode_utf16(units.iter().copied()) {
            let mut buf = [0; 4];
            let c = c.unwrap_or(char::REPLACEMENT_CHARACTER);
            self.keep_run(c.encode_utf8(&mut buf).as_bytes());
        }
    }

    /// Keeps a pending high surrogate, which has turned out to be a lone one, as U+FFFD.
    pub(super) fn flush_surrogate(&mut self) {
        if std::mem::take(&mut self.high_surrogate) != 0 {
            self.keep_run("\u{FFFD}".as_bytes());
        }
    }
}

//! The header `traceparent` (W3C Trace Context, section 3.2): which trace a request belongs to.

use http::{HeaderMap, HeaderName};

/// `traceparent`
pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The id of a trace: not all bytes are 0.
pub(crate) type TraceId = [u8; 16];

/// The id of a span: not all bytes are 0.
pub(crate) type SpanId = [u8; 8];

/// The flag of a trace that is recorded.
pub(crate) const SAMPLED: u8 = 1;

/// The length of a header of version 00, in bytes.
const LENGTH: usize = 55;

/// What a `traceparent` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TraceContext {
    /// The trace.
    pub trace_id: TraceId,
    /// The span of the caller.
    pub parent: SpanId,
    /// The flags; [`SAMPLED`] is one of them.
    pub flags: u8,
}

impl TraceContext {
    /// Reads the `traceparent` of a request. `None` if there is none, if there are several, or if it is not valid.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let context = TraceContext::parse(values.next()?.as_bytes());
        context.filter(|_| values.next().is_none())
    }

    /// Reads a value. A version above 00 may have further fields; 255 is no version.
    pub(crate) fn parse(value: &[u8]) -> Option<Self> {
        let (fields, rest) = value.split_at_checked(LENGTH)?;
        let [version] = hex(fields.get(..2)?)?;
        let is_whole = match version {
            0 => rest.is_empty(),
            255 => false,
            _ => rest.is_empty() || rest.starts_with(b"-"),
        };
        let has_dashes = [2, 35, 52].iter().all(|at| fields.get(*at) == Some(&b'-'));
        let context = TraceContext {
            trace_id: hex(fields.get(3..35)?)?,
            parent: hex(fields.get(36..52)?)?,
            flags: u8::from_be_bytes(hex(fields.get(53..)?)?),
        };
        let is_set = context.trace_id != TraceId::default() && context.parent != SpanId::default();
        (is_whole && has_dashes && is_set).then_some(context)
    }

    /// Whether the caller records the trace.
    pub(crate) fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// Writes the value.
    pub(crate) fn write(&self) -> [u8; LENGTH] {
        let mut out = *b"00-00000000000000000000000000000000-0000000000000000-00";
        let mut put = |at: usize, bytes: &[u8]| {
            for (digits, byte) in out[at..].chunks_exact_mut(2).zip(bytes) {
                digits.copy_from_slice(&digits_of(*byte));
            }
        };
        put(3, &self.trace_id);
        put(36, &self.parent);
        put(53, &[self.flags]);
        out
    }
}

/// Two hexadecimal digits in lower case.
pub(crate) fn digits_of(byte: u8) -> [u8; 2] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]
}

/// Reads `2 * N` hexadecimal digits. Capitals are not valid here.
fn hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let mut out = [0; N];
    for (byte, digits) in out.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(digits[0])? << 4 | digit(digits[1])?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_value_is_read_and_written_as_it_came() {
        for flags in ["00", "01", "03"] {
            let value = format!("{}{flags}", &GOOD[..53]);
            let context = TraceContext::parse(value.as_bytes()).unwrap();
            assert_eq!(context.write(), *value.as_bytes());
            assert_eq!(context.is_sampled(), flags != "00");
        }
    }

    #[test]
    fn a_later_version_may_have_more_fields() {
        for (value, is_good) in [
            (format!("01{}", &GOOD[2..]), true),
            (format!("cc{}-what-else", &GOOD[2..]), true),
            (format!("cc{}.", &GOOD[2..]), false),
            (format!("ff{}", &GOOD[2..]), false),
            (format!("{GOOD}-x"), false),
        ] {
            assert_eq!(TraceContext::parse(value.as_bytes()).is_some(), is_good, "{value}");
        }
    }

    #[test]
    fn a_malformed_value_is_none() {
        let mut bad = vec![
            String::new(),
            GOOD.to_uppercase(),
            GOOD.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            GOOD.replace("00f067aa0ba902b7", &"0".repeat(16)),
            format!(" {GOOD}"),
            format!("{GOOD} "),
        ];
        // Each position with a byte that may not stand there, and each length.
        for at in 0..GOOD.len() {
            bad.push(format!("{}g{}", &GOOD[..at], &GOOD[at + 1..]));
            bad.push(GOOD[..at].to_owned());
        }
        for value in bad {
            assert_eq!(TraceContext::parse(value.as_bytes()), None, "{value}");
        }
    }

    #[test]
    fn two_headers_are_none() {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, GOOD.parse().unwrap());
        assert!(TraceContext::of(&headers).is_some());
        headers.append(TRACEPARENT, GOOD.parse().unwrap());
        assert_eq!(TraceContext::of(&headers), None);
    }
}

//! Strict checks of a request head, before a more lenient parser reads it.
//!
//! The checks follow RFC 9112. If it lets a server choose, Zap chooses the strict side: request smuggling needs two
//! servers that read the same head differently. This module frames the head and its body; it does not decode them.

use memchr::{memchr, memmem};
use wide::i8x16;

/// Number of bytes that are tested together.
const BLOCK: usize = 16;

/// Why a head is refused: the message for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadFault(pub &'static str);

/// The framing of the body after a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// `Transfer-Encoding: chunked`
    Chunked,
    /// The body has this many bytes; 0 if the head announces no body.
    Length(u64),
}

/// A complete head that may be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestHead {
    /// Length in bytes, up to and including the empty line.
    pub len: usize,
    /// Framing of the body.
    pub framing: Framing,
    /// Whether the head has `Origin` or `Sec-Fetch-Site`, which browsers send about the page that made the request.
    pub has_page_headers: bool,
}

/// The headers that determine the framing and the authority, and whether there are any about a page.
#[derive(Default)]
struct KeyHeaders<'a> {
    host: Option<&'a [u8]>,
    length: Option<u64>,
    chunked: bool,
    page: bool,
}

/// Checks the bytes received so far. Returns `None` while the head is incomplete.
///
/// # Errors
/// Returns a [`HeadFault`] for the first rule that the head breaks, as soon as the bytes received show it.
pub(crate) fn inspect(bytes: &[u8]) -> Result<Option<RequestHead>, HeadFault> {
    // RFC 9112, section 2.2: ignore an empty line before a request. A lone CR or LF is not a line.
    let start = match bytes {
        [b'\r'] => return Ok(None),
        [b'\r', b'\n', ..] => 2,
        _ => 0,
    };
    let Some(&first) = bytes.get(start) else { return Ok(None) };
    if !is_token(first) {
        return Err(HeadFault("the request line is not HTTP/1.1"));
    }
    let mut lines = HeadLines { bytes, at: start, block: start, next: start, marks: 0 };
    let Some(line) = lines.next()? else { return Ok(None) };
    let (target, is_11) = request_line(line)?;
    let mut seen = KeyHeaders::default();
    loop {
        let Some(line) = lines.next()? else { return Ok(None) };
        if line.is_empty() {
            break;
        }
        header(line, &mut seen, is_11)?;
    }
    let framing = match (seen.chunked, seen.length) {
        (true, Some(_)) => {
            return Err(HeadFault("the request has both Transfer-Encoding and Content-Length"));
        }
        (true, None) => Framing::Chunked,
        (false, length) => Framing::Length(length.unwrap_or(0)),
    };
    match seen.host {
        None if is_11 => return Err(HeadFault("the Host header is missing")),
        None => {}
        Some(host) => same_authority(target, host)?,
    }
    Ok(Some(RequestHead { len: lines.at, framing, has_page_headers: seen.page }))
}

/// Whether an incomplete head, of which the first `parsed` bytes were parsed already, should be parsed again: if it
/// may have ended since, or has grown by a quarter. This keeps the work linear in the length of the head, for pieces
/// of any size. Used for requests and for responses.
pub(crate) fn is_worth_parsing(head: &[u8], parsed: usize) -> bool {
    // The end may begin up to two bytes before the new bytes.
    let fresh = &head[parsed.saturating_sub(2).min(head.len())..];
    head.len() > parsed + parsed / 4
        || [&b"\n\r\n"[..], b"\n\n"].iter().any(|end| memmem::find(fresh, end).is_some())
}

/// Splits a head into lines by its control characters, which are searched for sixteen bytes at a time.
struct HeadLines<'a> {
    bytes: &'a [u8],
    /// Start of the next line.
    at: usize,
    /// Start of the current block.
    block: usize,
    /// Start of the next block.
    next: usize,
    /// A bit for each control character of the current block that is not yet handled.
    marks: u32,
}

impl<'a> HeadLines<'a> {
    /// Returns the next line without its CRLF; `None` if it is incomplete.
    fn next(&mut self) -> Result<Option<&'a [u8]>, HeadFault> {
        loop {
            while self.marks == 0 {
                if self.next >= self.bytes.len() {
                    return Ok(None);
                }
                self.block = self.next;
                self.marks = controls(&self.bytes[self.block..]);
                self.next += BLOCK;
            }
            let i = self.block + self.marks.trailing_zeros() as usize;
            self.marks &= self.marks - 1;
            match (self.bytes[i], self.bytes.get(i + 1)) {
                (b'\r', Some(b'\n')) => {}
                (b'\r', None) => return Ok(None),
                (b'\n', _) if i > self.at && self.bytes[i - 1] == b'\r' => {
                    let line = &self.bytes[self.at..i - 1];
                    self.at = i + 1;
                    return Ok(Some(line));
                }
                (b'\n', _) => {
                    return Err(HeadFault("a line of the request head ends with LF but without CR"));
                }
                _ => return Err(HeadFault("the request head contains a control character")),
            }
        }
    }
}

/// Returns a bit for each control character, except the tab, among the first sixteen bytes.
fn controls(bytes: &[u8]) -> u32 {
    let block = bytes.first_chunk().copied().unwrap_or_else(|| {
        let mut block = [b' '; BLOCK];
        block[..bytes.len()].copy_from_slice(bytes);
        block
    });
    let signed = i8x16::new(block.map(u8::cast_signed));
    // As signed numbers, non-ASCII bytes are below the control characters.
    let low = signed.simd_lt(i8x16::splat(0x20)) & !signed.simd_lt(i8x16::ZERO);
    let tab = signed.simd_eq(i8x16::splat(b'\t'.cast_signed()));
    let delete = signed.simd_eq(i8x16::splat(0x7F));
    ((low & !tab) | delete).to_bitmask()
}

fn request_line(line: &[u8]) -> Result<(&[u8], bool), HeadFault> {
    let fault = HeadFault("the request line is not HTTP/1.1");
    let (rest, is_11) = match (line.strip_suffix(b" HTTP/1.1"), line.strip_suffix(b" HTTP/1.0")) {
        (Some(rest), _) => (rest, true),
        (_, Some(rest)) => (rest, false),
        _ => return Err(fault),
    };
    let Some(space) = memchr(b' ', rest) else { return Err(fault) };
    let (method, target) = (&rest[..space], &rest[space + 1..]);
    if method == b"CONNECT" {
        return Err(HeadFault("the CONNECT method is not supported"));
    }
    if !target.iter().all(|b| IN_TARGET[usize::from(*b)]) {
        return Err(HeadFault("the request target contains a character that is not allowed in a URL"));
    }
    if method.is_empty() || target.is_empty() || !method.iter().all(|b| is_token(*b)) {
        return Err(fault);
    }
    Ok((target, is_11))
}

fn header<'a>(line: &'a [u8], seen: &mut KeyHeaders<'a>, is_11: bool) -> Result<(), HeadFault> {
    let Some(end) = line.iter().position(|b| !is_token(*b)) else {
        return Err(HeadFault("a header line has no colon"));
    };
    let (name, value) = line.split_at(end);
    if name.is_empty() || value[0] != b':' {
        return Err(HeadFault("a header name is not a token (RFC 9110, section 5.6.2)"));
    }
    // The length excludes most of the other names.
    match name.len() {
        4 | 14 | 17 => {}
        // No value is needed: `accept` is in every request.
        6 => {
            seen.page |= name.eq_ignore_ascii_case(b"origin");
            return Ok(());
        }
        _ => return Ok(()),
    }
    let value = value[1..].trim_ascii();
    if name.eq_ignore_ascii_case(b"host") {
        if seen.host.replace(value).is_some() {
            return Err(HeadFault("the Host header is repeated"));
        }
        if !is_host(value) {
            return Err(HeadFault("the Host header is not a host with an optional port"));
        }
    } else if name.eq_ignore_ascii_case(b"content-length") {
        let digits = !value.is_empty() && value.len() < 19 && value.iter().all(u8::is_ascii_digit);
        if !digits {
            return Err(HeadFault("Content-Length is not a decimal number of at most 18 digits"));
        }
        let length = value.iter().fold(0, |n, b| n * 10 + u64::from(b - b'0'));
        if seen.length.replace(length).is_some() {
            return Err(HeadFault("Content-Length is repeated"));
        }
    } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
        if seen.chunked {
            return Err(HeadFault("Transfer-Encoding is repeated"));
        }
        if !is_11 || !value.eq_ignore_ascii_case(b"chunked") {
            return Err(HeadFault("Transfer-Encoding must be chunked, and only with HTTP/1.1"));
        }
        seen.chunked = true;
    } else {
        seen.page |= name.eq_ignore_ascii_case(b"sec-fetch-site");
    }
    Ok(())
}

/// Checks that an absolute-form target names the same authority as the Host header.
fn same_authority(target: &[u8], host: &[u8]) -> Result<(), HeadFault> {
    if target[0] == b'/' || target == b"*" {
        return Ok(());
    }
    let rest = [&b"http://"[..], b"https://"].iter().find_map(|scheme| {
        let (head, rest) = target.split_at_checked(scheme.len())?;
        head.eq_ignore_ascii_case(scheme).then_some(rest)
    });
    let authority = rest.and_then(|r| r.split(|b| matches!(b, b'/' | b'?')).next());
    match authority {
        Some(authority) if authority.eq_ignore_ascii_case(host) => Ok(()),
        Some(_) => Err(HeadFault("the request target and the Host header name different hosts")),
        None => Err(HeadFault("the request target must be a path or an http or https URL")),
    }
}

/// Whether a value is `host [":" port]` with the characters of RFC 3986, without userinfo.
pub(super) fn is_host(value: &[u8]) -> bool {
    let colon = if value.starts_with(b"[") {
        match memchr(b']', value) {
            Some(end) if end + 1 == value.len() => None,
            Some(end) if value[end + 1] == b':' => Some(end + 1),
            _ => return false,
        }
    } else {
        memchr(b':', value)
    };
    let (name, port) = match colon {
        Some(colon) => (&value[..colon], &value[colon + 1..]),
        None => (value, &b""[..]),
    };
    !name.is_empty()
        && name.iter().all(|b| IN_HOST[usize::from(*b)])
        && port.len() <= 5
        && port.iter().all(u8::is_ascii_digit)
}

/// Whether a byte is a `tchar` of RFC 9110, section 5.6.2.
pub(crate) fn is_token(b: u8) -> bool {
    TOKEN[usize::from(b)]
}

const TOKEN: [bool; 256] = alphanumeric_and(b"!#$%&'*+-.^_`|~");

const IN_HOST: [bool; 256] = alphanumeric_and(b"-._~%!$&'()*+,;=[]:");

/// The characters of RFC 3986 without the fragment, plus `{}|^`, which clients leave unescaped in queries.
const IN_TARGET: [bool; 256] = alphanumeric_and(b"-._~%!$&'()*+,;=:@/?[]{}|^");

const fn alphanumeric_and(marks: &[u8]) -> [bool; 256] {
    let mut table = [false; 256];
    let mut b = 0;
    while b < 128 {
        table[b] = (b as u8).is_ascii_alphanumeric();
        b += 1;
    }
    let mut i = 0;
    while i < marks.len() {
        table[marks[i] as usize] = true;
        i += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(head: &str) -> Result<Option<RequestHead>, HeadFault> {
        inspect(head.as_bytes())
    }

    #[test]
    fn accepts_and_frames_valid_heads() {
        for (head, framing) in [
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", Framing::Length(0)),
            ("\r\nGET / HTTP/1.1\r\nHost: a:80\r\n\r\n", Framing::Length(0)),
            ("GET / HTTP/1.0\r\n\r\n", Framing::Length(0)),
            ("POST /chat HTTP/1.1\r\nhost: [::1]:8000\r\ncontent-length: 12 \r\n\r\n", Framing::Length(12)),
            ("POST /chat HTTP/1.1\r\nHOST: a\r\nTransfer-Encoding: Chunked\r\n\r\n", Framing::Chunked),
            ("GET http://a:1/chat HTTP/1.1\r\nHost: A:1\r\n\r\n", Framing::Length(0)),
            ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", Framing::Length(0)),
            ("GET /v1/models/a:b@c~d%C3%A9 HTTP/1.1\r\nHost: a\r\n\r\n", Framing::Length(0)),
            ("GET /chat?a[]={b}|^c&d='(e)!$*+,;=? HTTP/1.1\r\nHost: a\r\n\r\n", Framing::Length(0)),
        ] {
            assert_eq!(
                verdict(head),
                Ok(Some(RequestHead { len: head.len(), framing, has_page_headers: false })),
                "{head:?}"
            );
            let with_body = format!("{head}{{}}");
            assert_eq!(
                verdict(&with_body),
                Ok(Some(RequestHead { len: head.len(), framing, has_page_headers: false })),
                "{with_body:?}"
            );
            for cut in 0..head.len() {
                assert_eq!(verdict(&head[..cut]), Ok(None), "{:?}", &head[..cut]);
            }
        }
    }

    #[test]
    fn refuses_heads_that_other_servers_could_read_differently() {
        for head in [
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost:\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a:x\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
            "GET / HTTP/1.1\nHost: a\n\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX: b\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n folded\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\n\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nnocolon\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1,1\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n",
            "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
            "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET chat HTTP/1.1\r\nHost: a\r\n\r\n",
            "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
            "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
            "\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "\rGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "\n\rGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "\r\rGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "\r\n\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "\n",
            "\r\r",
            "GET /metrics#x HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /metrics?a#x HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET http://a/chat#x HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /a\\b HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /a?\" HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /<a HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /a> HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /a` HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /\t HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /é HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /?é HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
            "GET /\r\nHost: a\r\n\r\n",
            "\x16\x03\x01",
        ] {
            assert!(verdict(head).is_err(), "{head:?} passed");
        }
    }

    #[test]
    fn a_head_that_arrives_in_many_pieces_is_parsed_only_a_few_times() {
        let mut head = b"GET / HTTP/1.1\r\nhost: a\r\n".to_vec();
        let (mut parsed, mut count) = (0, 0);
        while head.len() < 64 * 1024 {
            if is_worth_parsing(&head, parsed) {
                (parsed, count) = (head.len(), count + 1);
            }
            head.extend_from_slice(b"a:\r\n");
        }
        assert!(count < 50, "{count}");
        for end in [&b"\r\n"[..], b"\n"] {
            let mut whole = head.clone();
            for byte in end {
                let before = whole.len();
                whole.push(*byte);
                assert_eq!(is_worth_parsing(&whole, before), *byte == b'\n', "{end:?}");
            }
        }
    }

    #[test]
    fn a_line_may_end_anywhere_in_a_block() {
        for length in 0..40 {
            let head = format!("GET / HTTP/1.1\r\nx: {}\r\nhost: a\r\n\r\n", "v".repeat(length));
            let want = RequestHead { len: head.len(), framing: Framing::Length(0), has_page_headers: false };
            assert_eq!(verdict(&head), Ok(Some(want)), "{length}");
            (0..head.len()).for_each(|cut| assert_eq!(verdict(&head[..cut]), Ok(None), "{length}, {cut}"));
            let bare = head.replacen("v\r\n", "v\n", 1).replacen("x: \r\n", "x: \n", 1);
            assert!(verdict(&bare).is_err(), "{bare:?}");
        }
    }

    #[test]
    fn a_control_character_is_refused_at_any_position() {
        let head = |value: &[u8]| [b"GET / HTTP/1.1\r\nhost: a\r\nx: ", value, b"\r\n\r\n"].concat();
        for place in 0..40 {
            for b in 0..=u8::MAX {
                let mut value = [b'v'; 40];
                value[place] = b;
                let good = b == b'\t' || (b >= 0x20 && b != 0x7F);
                let got = inspect(&head(&value));
                assert_eq!(matches!(got, Ok(Some(_))), good, "{b:#x} at {place}: {got:?}");
            }
        }
    }

    #[test]
    fn either_of_two_headers_is_about_a_page() {
        for (headers, want) in [
            ("origin: http://b\r\n", true),
            ("ORIGIN:\r\n", true),
            ("x: y\r\nSec-Fetch-Site: cross-site\r\naccept: */*\r\n", true),
            ("content-length: 0\r\norigin: null\r\ncontent-type: a\r\n", true),
            ("sec-fetch-mode: cors\r\naccept: */*\r\nrefere: a\r\n", false),
            ("x-origin: a\r\norigins: a\r\n", false),
        ] {
            let head = format!("GET / HTTP/1.1\r\nhost: a\r\n{headers}\r\n");
            assert_eq!(inspect(head.as_bytes()).map(|h| h.unwrap().has_page_headers), Ok(want), "{headers}");
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(proptest::sample::select(b"GET /:.@[]\r\n\t\x00HostHTTP/1.1".to_vec()), 0..120)) {
            let _ = inspect(&bytes);
        }
    }
}

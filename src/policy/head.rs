//! The edge's strictness: what of a request head Zap refuses before a parser that forgives more sees it.
//!
//! Follows RFC 9112 where it lets a server choose, always on the strict side, because two servers that read one
//! head differently are how requests get smuggled. It frames the head and its body; it does not decode them.

use memchr::memchr;

/// A head that is never served: what to tell the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadFault(pub &'static str);

/// How the body that follows a head is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// `Transfer-Encoding: chunked`
    Chunked,
    /// So many bytes; 0 where the head announces none.
    Length(u64),
}

/// A complete head that may be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes up to and including the empty line.
    pub len: usize,
    /// The body behind it.
    pub framing: Framing,
}

#[derive(Default)]
struct Seen<'a> {
    host: Option<&'a [u8]>,
    length: Option<u64>,
    chunked: bool,
}

/// Looks at the bytes received so far: `None` while the head is incomplete.
///
/// # Errors
/// The first rule that the head breaks, as soon as it can be seen.
pub fn inspect(bytes: &[u8]) -> Result<Option<Head>, HeadFault> {
    let start = bytes.iter().take(2).take_while(|b| matches!(b, b'\r' | b'\n')).count();
    let Some(&first) = bytes.get(start) else { return Ok(None) };
    if !is_token(first) {
        return Err(HeadFault("the request line is not HTTP/1.1"));
    }
    let Some((line, mut at)) = next_line(bytes, start)? else { return Ok(None) };
    let (target, is_11) = request_line(line)?;
    let mut seen = Seen::default();
    loop {
        let Some((line, next)) = next_line(bytes, at)? else { return Ok(None) };
        at = next;
        if line.is_empty() {
            break;
        }
        header(line, &mut seen, is_11)?;
    }
    let framing = match (seen.chunked, seen.length) {
        (true, Some(_)) => return Err(HeadFault("Transfer-Encoding and Content-Length exclude each other")),
        (true, None) => Framing::Chunked,
        (false, length) => Framing::Length(length.unwrap_or(0)),
    };
    match seen.host {
        None if is_11 => return Err(HeadFault("the Host header is missing")),
        None => {}
        Some(host) => same_authority(target, host)?,
    }
    Ok(Some(Head { len: at, framing }))
}

/// The line from `at` on without its CRLF, and where the next one begins.
fn next_line(bytes: &[u8], at: usize) -> Result<Option<(&[u8], usize)>, HeadFault> {
    let Some(n) = memchr(b'\n', &bytes[at..]) else { return Ok(None) };
    let Some(line) = bytes[at..at + n].strip_suffix(b"\r") else {
        return Err(HeadFault("a line of the head ends without CR"));
    };
    if line.iter().fold(false, |bad, &b| bad | ((b < 0x20) & (b != b'\t')) | (b == 0x7F)) {
        return Err(HeadFault("the head holds a control character"));
    }
    Ok(Some((line, at + n + 1)))
}

fn request_line(line: &[u8]) -> Result<(&[u8], bool), HeadFault> {
    let fault = HeadFault("the request line is not HTTP/1.1");
    let mut parts = line.split(|b| *b == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(fault);
    };
    let is_11 = match version {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        _ => return Err(fault),
    };
    if method == b"CONNECT" {
        return Err(HeadFault("CONNECT is not served"));
    }
    if method.is_empty() || target.is_empty() || !method.iter().all(|b| is_token(*b)) {
        return Err(fault);
    }
    Ok((target, is_11))
}

fn header<'a>(line: &'a [u8], seen: &mut Seen<'a>, is_11: bool) -> Result<(), HeadFault> {
    let Some(end) = line.iter().position(|b| !is_token(*b)) else {
        return Err(HeadFault("a header line has no colon"));
    };
    let (name, value) = line.split_at(end);
    if name.is_empty() || value[0] != b':' {
        return Err(HeadFault("a header name is not a token"));
    }
    // Most names are of no interest, and their lengths say so.
    if !matches!(name.len(), 4 | 14 | 17) {
        return Ok(());
    }
    let value = value[1..].trim_ascii();
    if name.eq_ignore_ascii_case(b"host") {
        if seen.host.replace(value).is_some() {
            return Err(HeadFault("the Host header is repeated"));
        }
        if !is_host(value) {
            return Err(HeadFault("the Host header is malformed"));
        }
    } else if name.eq_ignore_ascii_case(b"content-length") {
        let digits = !value.is_empty() && value.len() < 19 && value.iter().all(u8::is_ascii_digit);
        if !digits {
            return Err(HeadFault("Content-Length is not a number"));
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
            return Err(HeadFault("Transfer-Encoding is not chunked"));
        }
        seen.chunked = true;
    }
    Ok(())
}

/// An absolute-form target must name the authority that Host names.
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
        Some(_) => Err(HeadFault("the request target and Host name different authorities")),
        None => Err(HeadFault("the request target is not a path")),
    }
}

/// `host [":" port]` with the characters of RFC 3986; no userinfo.
fn is_host(value: &[u8]) -> bool {
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

/// `tchar` of RFC 9110, section 5.6.2.
fn is_token(b: u8) -> bool {
    TOKEN[usize::from(b)]
}

const TOKEN: [bool; 256] = alphanumeric_and(b"!#$%&'*+-.^_`|~");

const IN_HOST: [bool; 256] = alphanumeric_and(b"-._~%!$&'()*+,;=[]:");

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

    fn verdict(head: &str) -> Result<Option<Head>, HeadFault> {
        inspect(head.as_bytes())
    }

    #[test]
    fn frames_what_may_be_served() {
        for (head, framing) in [
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", Framing::Length(0)),
            ("\r\nGET / HTTP/1.1\r\nHost: a:80\r\n\r\n", Framing::Length(0)),
            ("GET / HTTP/1.0\r\n\r\n", Framing::Length(0)),
            ("POST /chat HTTP/1.1\r\nhost: [::1]:8000\r\ncontent-length: 12 \r\n\r\n", Framing::Length(12)),
            ("POST /chat HTTP/1.1\r\nHOST: a\r\nTransfer-Encoding: Chunked\r\n\r\n", Framing::Chunked),
            ("GET http://a:1/chat HTTP/1.1\r\nHost: A:1\r\n\r\n", Framing::Length(0)),
            ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", Framing::Length(0)),
        ] {
            assert_eq!(verdict(head), Ok(Some(Head { len: head.len(), framing })), "{head:?}");
            let behind = format!("{head}{{}}");
            assert_eq!(verdict(&behind), Ok(Some(Head { len: head.len(), framing })), "{behind:?}");
            for cut in 0..head.len() {
                assert_eq!(verdict(&head[..cut]), Ok(None), "{:?}", &head[..cut]);
            }
        }
    }

    #[test]
    fn refuses_what_others_could_read_otherwise() {
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
            "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
            "GET /\r\nHost: a\r\n\r\n",
            "\x16\x03\x01",
        ] {
            assert!(verdict(head).is_err(), "{head:?} passed");
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(proptest::sample::select(b"GET /:.@[]\r\n\t\x00HostHTTP/1.1".to_vec()), 0..120)) {
            let _ = inspect(&bytes);
        }
    }
}

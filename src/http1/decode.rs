//! The decoder of HTTP/1.1 responses (RFC 9112), without I/O: bytes in, heads and bodies out, for any chunking of the
//! input.
//!
//! The decoder is strict wherever two lenient readers could see two different messages: one framing, exact chunks, no
//! folded lines, no bare CR or LF. A response that it refuses ends the connection. `httparse` parses the heads, as in
//! hyper.

use std::mem::{self, MaybeUninit};

use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderName, HeaderValue, TRANSFER_ENCODING};
use http::{Response, StatusCode, Version, response};

use crate::http1::chunked::Position;
pub(crate) use crate::http1::chunked::{Invalid, MAX_HEADERS};
use crate::http1::head::is_worth_parsing;
use crate::http1::header_map_pool;

/// Largest head of a response in bytes, interim responses included.
pub(crate) const MAX_HEAD: usize = 64 * 1024;

const NO_STATUS_LINE: Invalid = Invalid("no status line");

const TOO_LARGE: Invalid = Invalid("the head is too large");

const BAD_HEADER: Invalid = Invalid("a header is malformed");

/// Decodes the responses of one connection, one after the other.
#[derive(Default)]
pub(crate) struct Decoder {
    state: Position,
    /// The connection can be used again after this response.
    keep_alive: bool,
    /// The head states the length of the body.
    has_length: bool,
    /// The bytes of an incomplete head, interim responses included.
    head: BytesMut,
    parsed: Parsed,
}

/// How far an incomplete head was parsed.
#[derive(Clone, Copy, Default)]
struct Parsed {
    /// Bytes of interim responses, which are not parsed again.
    interim: usize,
    /// Length of the head when it was parsed last.
    len: usize,
}

impl Decoder {
    /// Resets the decoder for the next response.
    pub(crate) fn begin(&mut self) {
        self.state = Position::Head;
        self.head = BytesMut::new();
        self.parsed = Parsed::default();
    }

    /// Whether the response is complete.
    pub(crate) fn is_done(&self) -> bool {
        self.state == Position::Done
    }

    /// Whether the input became invalid inside the body.
    pub(crate) fn is_broken(&self) -> bool {
        self.state == Position::Broken
    }

    /// Whether the response is complete and the connection can be used again.
    pub(crate) fn may_go_on(&self) -> bool {
        self.is_done() && self.keep_alive
    }

    /// Returns the number of bytes of the body still to come, if the head states its length.
    pub(crate) fn remaining(&self) -> Option<u64> {
        match self.state {
            Position::Length(left) => Some(left),
            _ => self.has_length.then_some(0),
        }
    }

    /// Reports that the connection ended. Returns whether the response is complete.
    pub(crate) fn end(&mut self) -> bool {
        if self.state == Position::UntilClose {
            self.state = Position::Done;
        }
        self.is_done()
    }

    /// Reports that the connection ended inside a head, and parses the bytes that were not parsed yet.
    ///
    /// # Errors
    /// Returns [`Invalid`] if the bytes received cannot be the beginning of a response.
    pub(crate) fn end_of_head(&mut self) -> Result<(), Invalid> {
        read_head(&mem::take(&mut self.head), &mut self.parsed).map(drop)
    }

    /// Decodes more bytes of a head. Once the head is complete, returns it with the part of the body that is in
    /// `input`. Interim responses except 101 are dropped.
    ///
    /// # Errors
    /// Returns [`Invalid`] if the head is invalid or too large, or if the body begins with an error, as
    /// [`body`](Decoder::body) does. An error in a head that arrives in pieces may be returned later: at the latest
    /// at the end of the head, or by [`end_of_head`](Decoder::end_of_head).
    pub(crate) fn head(&mut self, input: &[u8]) -> Result<Option<(response::Parts, Bytes)>, Invalid> {
        // Nearly always the whole head arrives at once and need not be buffered.
        let mut before = mem::take(&mut self.head);
        let read = if before.is_empty() {
            read_head(input, &mut self.parsed)?
        } else {
            before.extend_from_slice(input);
            let Parsed { interim, len } = self.parsed;
            let is_worth = before.len() > MAX_HEAD || is_worth_parsing(&before[interim..], len - interim);
            if is_worth { read_head(&before, &mut self.parsed)? } else { None }
        };
        let Some(Head { parts, framing, copy, rest }) = read else {
            if before.is_empty() {
                before.extend_from_slice(input);
            }
            self.head = before;
            return Ok(None);
        };
        self.state = framing.body_start(parts.status, parts.version)?;
        self.keep_alive =
            parts.version == Version::HTTP_11 && !framing.closes && self.state != Position::UntilClose;
        self.has_length = matches!(self.state, Position::Done | Position::Length(_));
        let data = match self.state {
            Position::Length(left) if left >= rest as u64 => {
                self.took(left, rest);
                copy.slice(copy.len() - rest..)
            }
            Position::UntilClose => copy.slice(copy.len() - rest..),
            // The head ended inside `input`, so all of the rest is at its end.
            _ => self.body(&input[input.len() - rest..])?,
        };
        Ok(Some((parts, data)))
    }

    /// Counts `n` received bytes of a body that had `left` bytes to come.
    fn took(&mut self, left: u64, n: usize) {
        self.state = if left == n as u64 { Position::Done } else { Position::Length(left - n as u64) };
    }

    /// Decodes more bytes of a body. Returns the part of the body that is in `input`, in one piece. If bytes follow the
    /// response, the connection cannot be used again.
    ///
    /// # Errors
    /// Returns [`Invalid`] if the chunked coding is invalid before the first data in `input`, or was already invalid
    /// in the last call. An error after some data only makes [`is_broken`](Decoder::is_broken) true.
    pub(crate) fn body(&mut self, input: &[u8]) -> Result<Bytes, Invalid> {
        let (data, read) = match self.state {
            Position::Length(left) => {
                let n = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                self.took(left, n);
                (Bytes::copy_from_slice(&input[..n]), n)
            }
            Position::UntilClose => (Bytes::copy_from_slice(input), input.len()),
            _ => self.chunks(input)?,
        };
        if read < input.len() {
            self.keep_alive = false;
        }
        Ok(data)
    }

    /// Returns the data of all chunks in `input`, and how many bytes of `input` were read.
    fn chunks(&mut self, input: &[u8]) -> Result<(Bytes, usize), Invalid> {
        let mut data = Vec::new();
        let mut at = 0;
        while at < input.len() && self.state != Position::Done {
            if let Position::Data(left) = self.state {
                let n = usize::try_from(left).unwrap_or(usize::MAX).min(input.len() - at);
                data.reserve_exact(input.len() - at);
                data.extend_from_slice(&input[at..at + n]);
                at += n;
                self.state =
                    if left == n as u64 { Position::DataCr } else { Position::Data(left - n as u64) };
                continue;
            }
            match self.state.after(input[at]) {
                Ok(next) => self.state = next,
                // Deliver the data before the error first; `is_broken` reports the error.
                Err(_) if !data.is_empty() => {
                    self.state = Position::Broken;
                    break;
                }
                Err(invalid) => return Err(invalid),
            }
            at += 1;
        }
        Ok((Bytes::from(data), at))
    }
}

/// A complete head.
struct Head {
    parts: response::Parts,
    framing: BodyFraming,
    /// The copy that the header values share. Includes the rest, unless a transfer coding applies to it.
    copy: Bytes,
    /// Number of received bytes after the head.
    rest: usize,
}

#[cfg(test)]
thread_local! {
    /// Number of bytes of heads that were parsed; a byte that is parsed twice counts twice.
    static PARSED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Parses a head and drops the interim responses before it. Returns `None` if the head is incomplete; `parsed` then
/// says how far it was parsed.
fn read_head(bytes: &[u8], parsed: &mut Parsed) -> Result<Option<Head>, Invalid> {
    let mut from = parsed.interim;
    #[cfg(test)]
    PARSED.set(PARSED.get() + bytes.len() - from);
    loop {
        // `httparse` would skip empty lines before a status line.
        if matches!(bytes.get(from), Some(b'\r' | b'\n')) {
            return Err(NO_STATUS_LINE);
        }
        let mut lines = [const { MaybeUninit::uninit() }; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut []);
        let parser = httparse::ParserConfig::default();
        let length =
            match parser.parse_response_with_uninit_headers(&mut response, &bytes[from..], &mut lines) {
                Ok(httparse::Status::Complete(length)) => length,
                Ok(httparse::Status::Partial) if bytes.len() <= MAX_HEAD => {
                    *parsed = Parsed { interim: from, len: bytes.len() };
                    return Ok(None);
                }
                Ok(httparse::Status::Partial) => return Err(TOO_LARGE),
                Err(error) => return Err(why(error)),
            };
        if from + length > MAX_HEAD {
            return Err(TOO_LARGE);
        }
        if has_bare_lf(&bytes[from..from + length]) {
            return Err(Invalid("a line of the head ends with LF but without CR"));
        }
        let status = StatusCode::from_u16(response.code.unwrap_or(0)).map_err(|_| NO_STATUS_LINE)?;
        if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
            from += length;
            continue;
        }
        let (mut parts, ()) = Response::new(()).into_parts();
        parts.status = status;
        parts.version = if response.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
        // All header values share one copy, and so does the beginning of the body if it has no transfer coding.
        let is_coded =
            |line: &httparse::Header<'_>| line.name.eq_ignore_ascii_case(TRANSFER_ENCODING.as_str());
        let end = if response.headers.iter().any(is_coded) { from + length } else { bytes.len() };
        let copy = Bytes::copy_from_slice(&bytes[from..end]);
        // Leave room for the headers that Zap adds.
        parts.headers = header_map_pool::map(response.headers.len() + 8);
        let mut framing = BodyFraming::default();
        for line in response.headers.iter() {
            let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| BAD_HEADER)?;
            let start = line.value.as_ptr().addr() - bytes[from..].as_ptr().addr();
            let value = copy.slice(start..start + line.value.len());
            framing.note(&name, line.value);
            parts.headers.append(name, HeaderValue::from_maybe_shared(value).map_err(|_| BAD_HEADER)?);
        }
        return Ok(Some(Head { parts, framing, copy, rest: bytes.len() - from - length }));
    }
}

/// Converts an error of `httparse`.
fn why(error: httparse::Error) -> Invalid {
    match error {
        httparse::Error::Version | httparse::Error::Status => NO_STATUS_LINE,
        httparse::Error::TooManyHeaders => Invalid("too many headers"),
        _ => BAD_HEADER,
    }
}

/// Whether a line ends with LF but without CR, which `httparse` would accept.
fn has_bare_lf(head: &[u8]) -> bool {
    memchr::memchr_iter(b'\n', head).any(|at| at == 0 || head[at - 1] != b'\r')
}

/// The headers that determine where the body ends, and whether the connection closes.
#[derive(Debug, Default)]
struct BodyFraming {
    /// Number of `Content-Length` headers.
    lengths: u8,
    /// The last `Content-Length`, if it is a number.
    length: Option<u64>,
    /// Number of `Transfer-Encoding` headers.
    codings: u8,
    /// The last `Transfer-Encoding` is exactly `chunked`.
    chunked: bool,
    /// `Connection: close`
    closes: bool,
}

impl BodyFraming {
    fn note(&mut self, name: &HeaderName, value: &[u8]) {
        if *name == CONTENT_LENGTH {
            self.lengths = self.lengths.saturating_add(1);
            let is_number = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
            self.length = std::str::from_utf8(value).ok().filter(|_| is_number).and_then(|t| t.parse().ok());
        } else if *name == TRANSFER_ENCODING {
            self.codings = self.codings.saturating_add(1);
            self.chunked = value.eq_ignore_ascii_case(b"chunked");
        } else if *name == CONNECTION {
            let mut options = value.split(|b| *b == b',').map(<[u8]>::trim_ascii);
            self.closes |= options.any(|option| option.eq_ignore_ascii_case(b"close"));
        }
    }

    /// Returns the position at the start of the body, by its framing (RFC 9112, section 6.3). Refuses a head that
    /// could be framed in two ways: a length together with a coding, a repeated length or coding, a coding other than
    /// `chunked`.
    fn body_start(&self, status: StatusCode, version: Version) -> Result<Position, Invalid> {
        let coded = match (self.codings, self.lengths) {
            (0, 0) => false,
            (0, 1) if self.length.is_some() => false,
            (1, 0) if self.chunked && version > Version::HTTP_10 => true,
            (0, 1) => return Err(Invalid("content-length is not a number")),
            (0, _) => return Err(Invalid("two content-lengths")),
            (1, 0) => return Err(Invalid("transfer-encoding is not chunked, or not on HTTP/1.1")),
            (_, 0) => return Err(Invalid("repeated transfer-encoding")),
            _ => return Err(Invalid("both content-length and transfer-encoding")),
        };
        let bodiless = [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED, StatusCode::SWITCHING_PROTOCOLS];
        Ok(match self.length {
            _ if bodiless.contains(&status) => Position::Done,
            _ if coded => Position::Size { size: 0, digits: 0, read: 0 },
            Some(0) => Position::Done,
            Some(length) => Position::Length(length),
            None => Position::UntilClose,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http1::chunked::{BAD_CHUNK, MAX_SIZE_LINE};

    #[test]
    fn a_response_with_ambiguous_framing_is_refused() {
        const LENGTH: (&str, &str) = ("content-length", "5");
        const CHUNKED: (&str, &str) = ("transfer-encoding", "chunked");
        for (headers, version, want) in [
            (&[][..], Version::HTTP_11, true),
            (&[LENGTH], Version::HTTP_10, true),
            (&[LENGTH, LENGTH], Version::HTTP_11, false),
            (&[("content-length", "5, 5")], Version::HTTP_11, false),
            (&[("content-length", "+5")], Version::HTTP_11, false),
            (&[("content-length", "")], Version::HTTP_11, false),
            (&[CHUNKED], Version::HTTP_11, true),
            (&[("transfer-encoding", "Chunked")], Version::HTTP_11, true),
            (&[CHUNKED], Version::HTTP_10, false),
            (&[CHUNKED, LENGTH], Version::HTTP_11, false),
            (&[CHUNKED, CHUNKED], Version::HTTP_11, false),
            (&[("transfer-encoding", "chunked, chunked")], Version::HTTP_11, false),
            (&[("transfer-encoding", "gzip, chunked")], Version::HTTP_11, false),
            (&[("transfer-encoding", "identity")], Version::HTTP_11, false),
        ] {
            let mut framing = BodyFraming::default();
            headers
                .iter()
                .for_each(|(name, value)| framing.note(&HeaderName::from_static(name), value.as_bytes()));
            assert_eq!(framing.body_start(StatusCode::OK, version).is_ok(), want, "{headers:?}");
        }
    }

    /// Decodes a response in pieces of `size`. Returns its status and body, whether it is complete, and whether the
    /// connection can be used again.
    fn read(bytes: &str, size: usize) -> Result<Option<(u16, String, bool, bool)>, Invalid> {
        let mut decoder = Decoder::default();
        decoder.begin();
        let (mut status, mut body) = (None, Vec::new());
        for piece in bytes.as_bytes().chunks(size) {
            let data = match status {
                None => match decoder.head(piece)? {
                    None => continue,
                    Some((head, data)) => {
                        status = Some(head.status.as_u16());
                        data
                    }
                },
                Some(_) => decoder.body(piece)?,
            };
            body.extend_from_slice(&data);
        }
        if status.is_none() {
            decoder.end_of_head()?;
        }
        let is_reusable = decoder.may_go_on();
        let whole = decoder.end();
        Ok(status.map(|s| (s, String::from_utf8_lossy(&body).into_owned(), whole, is_reusable)))
    }

    const OK: &str = "HTTP/1.1 200 OK\r\n";

    #[test]
    fn decodes_every_framing_with_any_chunking() {
        for (rest, body, whole, is_reusable) in [
            ("content-length: 2\r\n\r\nok", "ok", true, true),
            ("content-length: 2\r\nconnection: Keep-Alive , Close\r\n\r\nok", "ok", true, false),
            ("content-length: 3\r\n\r\nok", "ok", false, false),
            ("content-length: 0\r\n\r\n", "", true, true),
            ("\r\nall there is", "all there is", true, false),
            (
                "transfer-encoding: chunked\r\n\r\n2\r\nok\r\nA ;x=y\r\n0123456789\r\n0\r\nt: u\r\n\r\n",
                "ok0123456789",
                true,
                true,
            ),
            ("transfer-encoding: chunked\r\n\r\n0\r\n\r\n", "", true, true),
            ("transfer-encoding: chunked\r\n\r\n2\r\nok\r\n", "ok", false, false),
        ] {
            let bytes = format!("{OK}{rest}");
            for size in 1..=bytes.len() {
                let read = read(&bytes, size);
                assert_eq!(read, Ok(Some((200, body.to_owned(), whole, is_reusable))), "{bytes:?} in {size}");
            }
        }
        for (bytes, status) in [
            ("HTTP/1.1 204 No\r\ncontent-length: 5\r\n\r\n", 204),
            ("HTTP/1.1 304 Not\r\ncontent-length: 5\r\n\r\n", 304),
            (
                "HTTP/1.1 100 C\r\n\r\nHTTP/1.1 103 E\r\na: b\r\n\r\nHTTP/1.1 201\r\ncontent-length: 0\r\n\r\n",
                201,
            ),
        ] {
            for size in 1..=bytes.len() {
                assert_eq!(read(bytes, size), Ok(Some((status, String::new(), true, true))), "{bytes:?}");
            }
        }
    }

    #[test]
    fn bytes_after_a_response_end_the_connection() {
        for rest in ["content-length: 2\r\n\r\nok", "transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"]
        {
            let bytes = format!("{OK}{rest}HTTP/1.1 200 OK\r\n\r\n");
            assert_eq!(read(&bytes, bytes.len()), Ok(Some((200, "ok".to_owned(), true, false))));
        }
    }

    #[test]
    fn refuses_invalid_and_ambiguous_responses() {
        for bytes in [
            "HTTP/9 200 OK\r\n\r\n",
            "\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "\r",
            "HTTP/1.1 100 C\r\n\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 2x0 OK\r\n\r\n",
            "HTTP/1.1 200 OK\na: b\r\n\r\n",
            "HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n",
            "HTTP/1.1 200 OK\r\na : b\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 1\r\n\r\n",
        ] {
            assert!(read(bytes, bytes.len()).is_err(), "{bytes:?}");
        }
        for chunks in [
            "\r\n",
            "g\r\n",
            "-1\r\n",
            "0x1\r\n",
            "1\n",
            "1\rx",
            ";x\r\n",
            "00000000000000001\r\n",
            "1;\u{7}\r\n",
            "1 x\r\n",
        ] {
            let bytes = format!("{OK}transfer-encoding: chunked\r\n\r\n{chunks}ok\r\n0\r\n\r\n");
            assert_eq!(read(&bytes, bytes.len()), Err(BAD_CHUNK), "{chunks:?}");
        }
        for chunks in [
            "2\r\nok0\r\n\r\n",
            "2\r\nok\n0\r\n\r\n",
            "2\r\nok\r\n0\r\nx: \u{1}\r\n\r\n",
            "2\r\nok\r\n0\r\n!\r\n\r\n",
            "2\r\nok\r\n0\r\n: x\r\n\r\n",
        ] {
            let bytes = format!("{OK}transfer-encoding: chunked\r\n\r\n{chunks}");
            let read = read(&bytes, bytes.len());
            assert_eq!(
                read,
                Ok(Some((200, "ok".to_owned(), false, false))),
                "the data before the error is kept: {chunks:?}"
            );
        }
    }

    #[test]
    fn an_invalid_answer_has_a_reason() {
        for (head, why) in [
            ("SSH-2.0-x\r\n\r\n", "no status line"),
            ("HTTP/1.1 200 OK\r\na : b\r\n\r\n", "a header is malformed"),
            ("HTTP/1.1 200 OK\r\na: b\n\r\n", "a line of the head ends with LF but without CR"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\n", "two content-lengths"),
            ("HTTP/1.1 200 OK\r\ncontent-length: +1\r\n\r\n", "content-length is not a number"),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
                "transfer-encoding is not chunked, or not on HTTP/1.1",
            ),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 1\r\n\r\n",
                "both content-length and transfer-encoding",
            ),
        ] {
            assert_eq!(read(head, head.len()), Err(Invalid(why)), "{head:?}");
        }
        let large = format!("{OK}{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(read(&large, large.len()), Err(Invalid("too many headers")));
        let large = format!("{OK}a: {}\r\n\r\n", "b".repeat(MAX_HEAD));
        assert_eq!(read(&large, large.len()), Err(TOO_LARGE));
    }

    #[test]
    fn the_work_on_a_head_in_many_pieces_is_linear() {
        let lines = format!("x-{}: {}\r\n", "a".repeat(20), "b".repeat(600)).repeat(90);
        let interim = "HTTP/1.1 103 E\r\na: b\r\n\r\n".repeat(1_000);
        for head in [format!("{OK}{lines}\r\n"), format!("{interim}{OK}\r\n")] {
            for size in [1, 3, 100] {
                let mut decoder = Decoder::default();
                decoder.begin();
                PARSED.take();
                for (i, piece) in head.as_bytes().chunks(size).enumerate() {
                    let whole = decoder.head(piece).unwrap().is_some();
                    assert_eq!(whole, (i + 1) * size >= head.len());
                }
                let times = PARSED.take() as f64 / head.len() as f64;
                assert!((1.0..12.0).contains(&times), "each byte {times} times in pieces of {size}");
            }
        }
    }

    #[test]
    fn an_error_in_a_head_is_returned_at_its_end_at_the_latest() {
        for (bytes, is_valid) in [
            ("HTTP/1.1 200 OK\r\nname", true),
            ("HTTP/1.1 200 OK\r\nbad name", false),
            ("HTTP/1.1 2x", false),
            ("HTTP/1.1 100 C\r\n\r\nHTTP/1.1 2", true),
            ("HTTP/1.1 100 C\r\n\r\nHTTP/2 200", false),
            ("220 ready\r\n", false),
        ] {
            for size in 1..=bytes.len() {
                let read = read(bytes, size);
                assert_eq!(read.is_ok(), is_valid, "{bytes:?} in {size}");
                assert!(read.is_err() || read == Ok(None), "{bytes:?} in {size}");
            }
        }
    }

    #[test]
    fn heads_lines_and_trailers_have_limits() {
        let lines =
            |n: usize, value: usize| format!("{OK}{}\r\n", format!("a: {}\r\n", "x".repeat(value)).repeat(n));
        assert!(matches!(read(&lines(MAX_HEADERS, 9), 100), Ok(Some(_))));
        assert!(read(&lines(MAX_HEADERS + 1, 9), 100).is_err());
        assert!(matches!(read(&lines(60, 1000), 1000), Ok(Some(_))));
        assert!(read(&lines(66, 1000), 1000).is_err());
        let endless = "HTTP/1.1 100 Continue\r\n\r\n".repeat(4000);
        assert_eq!(read(&endless, 1000), Err(TOO_LARGE), "interim responses count");
        let extension = format!("{OK}transfer-encoding: chunked\r\n\r\n1;{}", "x".repeat(MAX_SIZE_LINE + 1));
        assert!(read(&extension, extension.len()).is_err());
        let trailers = format!(
            "{OK}transfer-encoding: chunked\r\n\r\n0\r\n{}",
            format!("a: {}\r\n", "b".repeat(99)).repeat(90)
        );
        assert!(read(&trailers, trailers.len()).is_err());
    }
}

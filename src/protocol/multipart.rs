//! Scans a form (RFC 7578, RFC 2046 section 5.1.1) as its bytes pass, in any chunking and in bounded memory, for the
//! value of the part `model`.
//!
//! A delimiter is a line that begins with two hyphens and the boundary. It must end with the boundary, white space
//! aside, or with two hyphens that close the form. Lines end with CRLF. Parsers of forms disagree about anything else
//! (other text behind a boundary, a delimiter behind a bare line feed, a folded or nameless header), so it is refused:
//! a backend must not find another model than Zap does.

use bytes::Bytes;
use memchr::memmem::Finder;
use memchr::memrchr;

use crate::json::members::{MAX_NAME, Model, same_but_for_case};
use crate::json::patch::Splice;
use crate::protocol::form_header::{PartHeaders, boundary};

/// Most parts of a form.
pub(crate) const MAX_PARTS: usize = 256;

/// Longest headers of a part, in bytes with their line ends.
pub(crate) const MAX_HEADERS: usize = 8 * 1024;

/// The name of the part that names the model.
pub(crate) const MODEL: &str = "model";

/// Why a form is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FormError {
    /// A part's name differs from `model` only in case: some backends read it as the model. Its name.
    CaseVariant(Box<str>),
    /// There are two parts `model`.
    Duplicate,
    /// The form is framed badly, or exceeds a limit; why.
    Invalid(&'static str),
}

/// What a scan found in a form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    /// The value of the part `model`. It is never [`Model::Other`].
    pub model: Model,
    /// The length of the body, in bytes.
    pub length: u64,
    /// Where the first delimiter begins, at its hyphens.
    first: u64,
    boundary: Box<[u8]>,
}

impl Form {
    /// The splice that sets the model: in the place of the value that the form has, or as a part of its own before all
    /// others.
    pub(crate) fn model_splice(&self, model: &str) -> Splice {
        match &self.model {
            Model::Named { span, .. } | Model::Nothing(span) => Splice {
                at: span.start,
                skip: span.end - span.start,
                insert: Bytes::copy_from_slice(model.as_bytes()),
            },
            Model::Absent | Model::Other => {
                let headers = b"\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n";
                let part = [b"--", &*self.boundary, headers, model.as_bytes(), b"\r\n"].concat();
                Splice { at: self.first, skip: 0, insert: part.into() }
            }
        }
    }
}

/// The position in a form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first delimiter.
    Preamble,
    /// Behind the boundary of a delimiter.
    Delimiter,
    /// Behind the first hyphen after a boundary.
    Hyphen,
    /// In the white space behind a boundary.
    Padding,
    /// Behind the CR of a delimiter.
    Feed,
    /// In the headers of a part.
    Headers,
    /// In the value of a part.
    Value,
    /// Behind the close delimiter, in its line.
    Closed,
    /// Behind the CR of the close delimiter.
    ClosedFeed,
    /// Behind the line of the close delimiter.
    Epilogue,
}

/// Scans one form. [`feed`](FormScanner::feed) the chunks in order, then [`finish`](FormScanner::finish).
#[derive(Debug)]
pub(crate) struct FormScanner {
    /// A line feed, two hyphens and the boundary: of these, only the line feed can begin another one.
    delimiter: Finder<'static>,
    state: State,
    /// Bytes read.
    length: u64,
    /// The last byte read.
    last: u8,
    /// How many of the last bytes are the beginning of a delimiter.
    matched: usize,
    /// Whether a CR stands before them.
    has_return: bool,
    parts: usize,
    /// The headers of the part, as far as they have come.
    headers: Vec<u8>,
    /// Where the value of the part begins.
    start: u64,
    is_model: bool,
    /// The beginning of the model, and perhaps of the delimiter behind it.
    value: Vec<u8>,
    model: Model,
    first: Option<u64>,
}

impl FormScanner {
    /// Starts the scan of a body with this `Content-Type`.
    ///
    /// # Errors
    /// The content type is not that of a form, or has no valid boundary.
    pub(crate) fn new(content_type: &[u8]) -> Result<Self, FormError> {
        let boundary = boundary(content_type)
            .ok_or(FormError::Invalid("the Content-Type is not multipart/form-data with a valid boundary"))?;
        Ok(FormScanner {
            delimiter: Finder::new(&[b"\n--", &boundary[..]].concat()).into_owned(),
            state: State::Preamble,
            length: 0,
            last: 0,
            // The body begins a line.
            matched: 1,
            has_return: true,
            parts: 0,
            headers: Vec::new(),
            start: 0,
            is_model: false,
            value: Vec::new(),
            model: Model::Absent,
            first: None,
        })
    }

    /// Reads the next chunk.
    ///
    /// # Errors
    /// The first rule that the form breaks. The scan cannot go on then.
    pub(crate) fn feed(&mut self, data: &[u8]) -> Result<(), FormError> {
        let mut at = 0;
        while at < data.len() {
            at = match self.state {
                State::Preamble | State::Value | State::Epilogue => self.search(data, at)?,
                State::Headers => self.read_header(data, at)?,
                _ => {
                    self.read_delimiter(data[at], self.length + at as u64 + 1)?;
                    at + 1
                }
            };
        }
        self.length += data.len() as u64;
        self.last = data.last().copied().unwrap_or(self.last);
        Ok(())
    }

    /// Ends the scan.
    ///
    /// # Errors
    /// The form is not closed.
    pub(crate) fn finish(self) -> Result<Form, FormError> {
        match (self.state, self.first) {
            (State::Closed | State::Epilogue, Some(first)) => Ok(Form {
                model: self.model,
                length: self.length,
                first,
                boundary: self.delimiter.needle()[3..].into(),
            }),
            _ => Err(FormError::Invalid("the body ends before the form does")),
        }
    }

    /// Looks for the next delimiter. Returns where to go on.
    fn search(&mut self, data: &[u8], from: usize) -> Result<usize, FormError> {
        let end = self.delimiter_end(data, from);
        if self.state == State::Value && self.is_model {
            // With the delimiter, so that the value is there up to its longest length.
            let room = MAX_NAME + 2 + self.delimiter.needle().len() - self.value.len();
            let part = &data[from..end.unwrap_or(data.len())];
            self.value.extend_from_slice(&part[..part.len().min(room)]);
        }
        let Some(end) = end else { return Ok(data.len()) };
        self.matched = 0;
        if !self.has_return {
            return Err(FormError::Invalid("a boundary is behind a line feed without CR"));
        }
        let line = self.length + end as u64 + 1 - self.delimiter.needle().len() as u64;
        match self.state {
            State::Epilogue => return Err(FormError::Invalid("a part is behind the end of the form")),
            // The line end before the delimiter belongs to it, so that of the headers is not enough.
            State::Value if line < self.start + 2 => {
                return Err(FormError::Invalid("a boundary follows the headers of a part at once"));
            }
            State::Value if self.is_model => self.end_model(line - 2)?,
            _ => {}
        }
        self.first = self.first.or(Some(line));
        self.state = State::Delimiter;
        Ok(end)
    }

    /// Where the next delimiter ends in `data`; `None` if none does.
    fn delimiter_end(&mut self, data: &[u8], mut at: usize) -> Option<usize> {
        let needle = self.delimiter.needle();
        while self.matched > 0 && at < data.len() {
            if data[at] != needle[self.matched] {
                self.matched = 0;
                break;
            }
            (self.matched, at) = (self.matched + 1, at + 1);
            if self.matched == needle.len() {
                return Some(at);
            }
        }
        let is_return = |at: usize| at.checked_sub(1).map_or(self.last, |before| data[before]) == b'\r';
        if self.matched == 0
            && let Some(found) = self.delimiter.find(&data[at..])
        {
            self.has_return = is_return(at + found);
            return Some(at + found + needle.len());
        }
        // The end of the chunk may be the beginning of a delimiter. The last line feed alone can begin it.
        let tail = data.len().saturating_sub(needle.len() - 1).max(at);
        if let Some(feed) = memrchr(b'\n', &data[tail..]).map(|feed| tail + feed)
            && needle.starts_with(&data[feed..])
        {
            (self.matched, self.has_return) = (data.len() - feed, is_return(feed));
        }
        None
    }

    /// Reads a byte of a delimiter, behind its boundary. `end`: the offset behind the byte.
    fn read_delimiter(&mut self, b: u8, end: u64) -> Result<(), FormError> {
        self.state = match (self.state, b) {
            (State::Delimiter, b'-') => State::Hyphen,
            (State::Hyphen, b'-') => State::Closed,
            (State::Delimiter | State::Padding, b' ' | b'\t') => State::Padding,
            (State::Delimiter | State::Padding, b'\r') => State::Feed,
            (State::Feed, b'\n') => {
                self.parts += 1;
                if self.parts > MAX_PARTS {
                    return Err(FormError::Invalid("the form has too many parts"));
                }
                self.headers.clear();
                State::Headers
            }
            (State::Closed, b' ' | b'\t') => State::Closed,
            (State::Closed, b'\r') => State::ClosedFeed,
            (State::ClosedFeed, b'\n') => {
                self.begin_text(end);
                State::Epilogue
            }
            _ => return Err(FormError::Invalid("a boundary is followed by other text")),
        };
        Ok(())
    }

    /// Begins a text that a delimiter ends. `start`: where it begins, behind a line end.
    fn begin_text(&mut self, start: u64) {
        (self.start, self.matched, self.has_return) = (start, 1, true);
    }

    /// Reads headers up to the empty line behind them. Returns where to go on.
    fn read_header(&mut self, data: &[u8], from: usize) -> Result<usize, FormError> {
        for (at, b) in data.iter().enumerate().skip(from) {
            if self.headers.len() == MAX_HEADERS {
                return Err(FormError::Invalid("the headers of a part are too large"));
            }
            self.headers.push(*b);
            if *b == b'\n' && (self.headers.ends_with(b"\r\n\r\n") || self.headers == b"\r\n") {
                self.begin_part(self.length + at as u64 + 1)?;
                return Ok(at + 1);
            }
        }
        Ok(data.len())
    }

    /// Begins the value of a part, whose headers are whole, at `start`.
    fn begin_part(&mut self, start: u64) -> Result<(), FormError> {
        let headers = PartHeaders::of(&self.headers).map_err(FormError::Invalid)?;
        self.is_model = headers.name == MODEL.as_bytes();
        if self.is_model {
            if self.model != Model::Absent {
                return Err(FormError::Duplicate);
            }
            if !headers.is_plain {
                return Err(FormError::Invalid("the part \"model\" has a Content-Transfer-Encoding"));
            }
        } else if same_but_for_case(headers.name, MODEL.as_bytes()) {
            return Err(FormError::CaseVariant(String::from_utf8_lossy(headers.name).into()));
        }
        self.begin_text(start);
        self.state = State::Value;
        Ok(())
    }

    /// Ends the value of the model at `end`.
    fn end_model(&mut self, end: u64) -> Result<(), FormError> {
        let span = self.start..end;
        let length = usize::try_from(end - self.start).unwrap_or(usize::MAX);
        let value = std::mem::take(&mut self.value);
        let value = &value[..length.min(value.len())];
        let whole = length <= MAX_NAME;
        let text = match std::str::from_utf8(&value[..length.min(MAX_NAME)]) {
            Ok(text) => text,
            // The cut may be within a character.
            Err(error) if !whole && error.error_len().is_none() => {
                std::str::from_utf8(&value[..error.valid_up_to()]).unwrap_or_default()
            }
            Err(_) => return Err(FormError::Invalid("the model is not UTF-8")),
        };
        self.model = match text {
            "" => Model::Nothing(span),
            name => Model::Named { span, name: name.into(), whole },
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav\r\n\r\nRIFF\0\r\n--c\r\n\r\n";
    const END: &str = "--b--\r\n";

    fn model(value: &str) -> String {
        format!("--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{value}\r\n")
    }

    /// The verdict on a form, which must be the same for any chunking.
    fn scan(body: &str) -> Result<Form, FormError> {
        let of = |size: usize| {
            let mut scanner = FormScanner::new(b"multipart/form-data; boundary=b")?;
            body.as_bytes().chunks(size).try_for_each(|chunk| scanner.feed(chunk))?;
            scanner.finish()
        };
        let whole = of(body.len().max(1));
        (1..body.len().min(50)).for_each(|size| assert_eq!(of(size), whole, "{body} in chunks of {size}"));
        whole
    }

    fn spliced(body: &str, name: &str) -> String {
        let splice = scan(body).unwrap().model_splice(name);
        let (at, end) = (splice.at as usize, (splice.at + splice.skip) as usize);
        format!("{}{}{}", &body[..at], std::str::from_utf8(&splice.insert).unwrap(), &body[end..])
    }

    #[test]
    fn finds_and_replaces_the_model_wherever_it_stands() {
        for (before, after) in [("", FILE), (FILE, ""), ("a preamble\r\n", FILE), (FILE, "an epilogue")] {
            let end = |value: &str| match after {
                "an epilogue" => format!("{before}{}{END}{after}", model(value)),
                _ => format!("{before}{}{after}{END}", model(value)),
            };
            let body = end("whisper-1");
            let at = body.find("whisper-1").unwrap() as u64;
            let named = Model::Named { span: at..at + 9, name: "whisper-1".into(), whole: true };
            assert_eq!(scan(&body).unwrap().model, named);
            assert_eq!(spliced(&body, "other"), end("other"));
            assert_eq!(scan(&end("")).unwrap().model, Model::Nothing(at..at));
            assert_eq!(spliced(&end(""), "other"), end("other"));
        }
        let without = format!("{FILE}{END}");
        assert_eq!(scan(&without).unwrap().model, Model::Absent);
        let inserted =
            format!("--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nother\r\n{FILE}{END}");
        assert_eq!(spliced(&without, "other"), inserted);
        assert_eq!(spliced(END, "other"), format!("{}{END}", model("other")));
        assert_eq!(spliced(&format!("x\r\n{END}"), "other"), format!("x\r\n{}{END}", model("other")));
        let long = "é".repeat(MAX_NAME);
        let model = scan(&format!("{}{END}", model(&long))).unwrap().model;
        assert!(matches!(model, Model::Named { name, whole: false, .. } if *name == long[..MAX_NAME]));
    }

    #[test]
    fn refuses_what_parsers_may_read_in_two_ways() {
        let invalid = |why| Err(FormError::Invalid(why));
        let part = |headers: &str| format!("--b\r\n{headers}\r\n\r\nx\r\n{END}");
        let disposition = "Content-Disposition: form-data; name=\"model\"";
        for (body, want) in [
            (format!("{}{}{END}", model("a"), model("b")), Err(FormError::Duplicate)),
            (format!("{}{}{END}", model(""), model("")), Err(FormError::Duplicate)),
            (part(&disposition.replace("model", "MODEL")), Err(FormError::CaseVariant("MODEL".into()))),
            (String::new(), invalid("the body ends before the form does")),
            (model("a"), invalid("the body ends before the form does")),
            (format!("{}--b-", model("a")), invalid("the body ends before the form does")),
            (format!("{}--b--\r", model("a")), invalid("the body ends before the form does")),
            (format!("{}--b--x", model("a")), invalid("a boundary is followed by other text")),
            (format!("{}--bx\r\n{END}", model("a")), invalid("a boundary is followed by other text")),
            (format!("{}--b\n{END}", model("a")), invalid("a boundary is followed by other text")),
            (format!("{}x\n{END}", FILE), invalid("a boundary is behind a line feed without CR")),
            (format!("{}{END}{END}", model("a")), invalid("a part is behind the end of the form")),
            (
                format!("--b\r\n{disposition}\r\n\r\n{END}"),
                invalid("a boundary follows the headers of a part at once"),
            ),
            (part("X: y"), invalid("a part has no Content-Disposition")),
            (part(""), invalid("a part has no Content-Disposition")),
            (
                part(&format!("{disposition}\r\n{disposition}")),
                invalid("a part has two Content-Dispositions"),
            ),
            (part(&format!("{disposition}\r\n folded")), invalid("a header of a part is malformed")),
            (part(&format!("X: y\n{disposition}")), invalid("a header of a part is malformed")),
            (part(&format!("--b: y\r\n{disposition}")), invalid("a header of a part is malformed")),
            (
                part(&format!("{disposition}\r\nContent-Transfer-Encoding: quoted-printable")),
                invalid("the part \"model\" has a Content-Transfer-Encoding"),
            ),
        ] {
            assert_eq!(scan(&body), want, "{body}");
        }
        let mut scanner = FormScanner::new(b"multipart/form-data; boundary=b").unwrap();
        let body = [model("x").replace('x', "\u{1}").as_bytes(), b"--b--"].concat();
        let body: Vec<u8> = body.into_iter().map(|b| if b == 1 { 0xFF } else { b }).collect();
        assert_eq!(scanner.feed(&body), Err(FormError::Invalid("the model is not UTF-8")));
        assert!(FormScanner::new(b"application/json").is_err());
    }

    #[test]
    fn memory_is_bounded_and_so_are_parts_and_headers() {
        let mut scanner = FormScanner::new(b"multipart/form-data; boundary=b").unwrap();
        scanner.feed(model("").trim_end_matches("\r\n").as_bytes()).unwrap();
        scanner.feed(b"\r\n\r\n").unwrap();
        (0..1000).for_each(|_| scanner.feed(&[b'x'; 1000]).unwrap());
        assert!(scanner.value.capacity() < 4 * MAX_NAME && scanner.headers.capacity() < 256);
        let parts = |n: usize| scan(&format!("{}{END}", FILE.repeat(n)));
        assert!(parts(MAX_PARTS).is_ok());
        assert_eq!(parts(MAX_PARTS + 1), Err(FormError::Invalid("the form has too many parts")));
        let header = |n: usize| {
            let rest = "--b\r\nContent-Disposition: form-data; name=\"a\"\r\nX: \r\n\r\n".len() - 5;
            scan(&format!(
                "--b\r\nContent-Disposition: form-data; name=\"a\"\r\nX: {}\r\n\r\n\r\n{END}",
                "y".repeat(n - rest)
            ))
        };
        assert!(header(MAX_HEADERS).is_ok());
        assert_eq!(header(MAX_HEADERS + 1), Err(FormError::Invalid("the headers of a part are too large")));
    }
}

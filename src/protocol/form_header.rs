//! The headers of forms (RFC 7578): the boundary in `Content-Type`, and what the headers of a part say.
//!
//! Parsers of forms differ where a header is unusual. What two of them may read differently is refused, so that no
//! backend finds another model in a form than Zap does.

use std::borrow::Cow;

use memchr::memchr;

use crate::http1::head::is_token;

/// Longest boundary (RFC 2046, section 5.1.1), in bytes.
pub(crate) const MAX_BOUNDARY: usize = 70;

const MALFORMED: &str = "a header of a part is malformed";

/// A parameter of a header, with its value without quotes and escapes.
type Param<'h> = (&'h [u8], Cow<'h, [u8]>);

/// What the headers of a part say.
#[derive(Debug)]
pub(crate) struct PartHeaders<'h> {
    /// The name of the part.
    pub name: &'h [u8],
    /// Whether the value is written as it is.
    pub is_plain: bool,
}

impl<'h> PartHeaders<'h> {
    /// Reads the headers with the empty line behind them.
    ///
    /// # Errors
    /// A header is malformed, or the name can be read in two ways; says why.
    pub(crate) fn of(headers: &'h [u8]) -> Result<Self, &'static str> {
        let (mut name, mut is_plain) = (None, true);
        let mut rest = headers.strip_suffix(b"\r\n").unwrap_or_default();
        while !rest.is_empty() {
            let end = memchr(b'\r', rest).ok_or(MALFORMED)?;
            let line = &rest[..end];
            rest = rest[end..].strip_prefix(b"\r\n").ok_or(MALFORMED)?;
            let (key, value) = line.split_at(memchr(b':', line).ok_or(MALFORMED)?);
            let is_token = |key: &[u8]| key.iter().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(b));
            if key.is_empty() || key.starts_with(b"-") || !is_token(key) {
                return Err(MALFORMED);
            }
            if value.iter().any(|b| b.is_ascii_control() && *b != b'\t') {
                return Err(MALFORMED);
            }
            let value = value[1..].trim_ascii();
            if key.eq_ignore_ascii_case(b"content-disposition") {
                if name.replace(part_name(value)?).is_some() {
                    return Err("a part has two Content-Dispositions");
                }
            } else if key.eq_ignore_ascii_case(b"content-transfer-encoding") {
                is_plain &= [&b"7bit"[..], b"8bit", b"binary"].iter().any(|e| value.eq_ignore_ascii_case(e));
            }
        }
        let name = name.ok_or("a part has no Content-Disposition")?;
        Ok(PartHeaders { name, is_plain })
    }
}

/// The boundary in the value of a `Content-Type`; `None` if that is no form with a valid boundary.
pub(crate) fn boundary(content_type: &[u8]) -> Option<Vec<u8>> {
    let (kind, params) = split(content_type)?;
    if !kind.eq_ignore_ascii_case(b"multipart/form-data") {
        return None;
    }
    // With an escape it is no slice of the header, and parsers without escapes read another boundary.
    let Cow::Borrowed(value) = only(&params, b"boundary").ok()?? else { return None };
    let is_valid = (1..=MAX_BOUNDARY).contains(&value.len())
        && value.iter().all(|b| is_boundary_char(*b))
        && !value.ends_with(b" ");
    is_valid.then(|| value.to_vec())
}

fn is_boundary_char(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"'()+_,-./:=? ".contains(&b)
}

/// The name in the value of a `Content-Disposition`.
///
/// # Errors
/// The header is not that of a part of a form, or its name can be read in two ways; says why.
pub(crate) fn part_name(disposition: &[u8]) -> Result<&[u8], &'static str> {
    let (kind, params) = split(disposition).ok_or("a Content-Disposition is malformed")?;
    if !kind.eq_ignore_ascii_case(b"form-data") {
        return Err("a part is not form-data");
    }
    let is_extended = |name: &[u8]| name.len() > 4 && name[..5].eq_ignore_ascii_case(b"name*");
    if params.iter().any(|(name, _)| is_extended(name)) {
        return Err("a part has an encoded name");
    }
    let name = only(&params, b"name").map_err(|()| "a part has two names")?;
    let name = name.ok_or("a part has no name")?;
    match name {
        Cow::Borrowed(name) => Ok(name),
        Cow::Owned(_) => Err("the name of a part has an escape"),
    }
}

/// The value of a parameter that may be there once.
fn only<'h>(params: &[Param<'h>], wanted: &[u8]) -> Result<Option<Cow<'h, [u8]>>, ()> {
    let mut found = params.iter().filter(|(name, _)| name.eq_ignore_ascii_case(wanted));
    let first = found.next();
    if found.next().is_some() { Err(()) } else { Ok(first.map(|(_, value)| value.clone())) }
}

/// Splits the value of a header into its first word and its parameters (RFC 9110, section 5.6.6); `None` if it is
/// malformed.
fn split(header: &[u8]) -> Option<(&[u8], Vec<Param<'_>>)> {
    let end = header.iter().position(|b| *b == b';').unwrap_or(header.len());
    let kind = header[..end].trim_ascii();
    let (mut rest, mut params) = (&header[end..], Vec::new());
    while let Some(more) = rest.strip_prefix(b";") {
        let more = more.trim_ascii_start();
        // A semicolon at the end is common.
        if more.is_empty() {
            break;
        }
        let (name, value) = more.split_at(more.iter().position(|b| *b == b'=')?);
        let name = name.trim_ascii_end();
        if name.is_empty() || !name.iter().all(|b| is_token(*b)) {
            return None;
        }
        let value = value[1..].trim_ascii_start();
        let (value, after) = match value.strip_prefix(b"\"") {
            Some(quoted) => unquoted(quoted)?,
            None => {
                let (value, after) =
                    value.split_at(value.iter().position(|b| *b == b';').unwrap_or(value.len()));
                let value = value.trim_ascii_end();
                if value.is_empty() || value.iter().any(|b| b"\" \t\\".contains(b)) {
                    return None;
                }
                (Cow::Borrowed(value), after)
            }
        };
        params.push((name, value));
        rest = after.trim_ascii_start();
    }
    if rest.is_empty() || rest.trim_ascii() == b";" { Some((kind, params)) } else { None }
}

/// The value of a quoted string, whose text behind its first quote is given, and what follows it; `None` if it has no
/// end.
fn unquoted(text: &[u8]) -> Option<(Cow<'_, [u8]>, &[u8])> {
    let mut escaped: Option<Vec<u8>> = None;
    let mut at = 0;
    loop {
        match text.get(at)? {
            b'"' => {
                let value = escaped.map_or(Cow::Borrowed(&text[..at]), Cow::Owned);
                return Some((value, &text[at + 1..]));
            }
            b'\\' => {
                let next = *text.get(at + 1)?;
                escaped.get_or_insert_with(|| text[..at].to_vec()).push(next);
                at += 2;
            }
            b => {
                if let Some(escaped) = &mut escaped {
                    escaped.push(*b);
                }
                at += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_boundary_of_a_form() {
        for (content_type, want) in [
            ("multipart/form-data; boundary=abc", Some("abc")),
            ("Multipart/Form-Data;BOUNDARY = \"a b'()+_,-./:=?\" ; charset=utf-8;", Some("a b'()+_,-./:=?")),
            ("multipart/form-data; boundary=a/b=c", Some("a/b=c")),
            ("multipart/form-data; boundary=\"a\\bc\"", None),
            ("multipart/form-data", None),
            ("multipart/form-data; boundary=", None),
            ("multipart/form-data; boundary=\"\"", None),
            ("multipart/form-data; boundary=\"a \"", None),
            ("multipart/form-data; boundary=\"a", None),
            ("multipart/form-data; boundary=a b", None),
            ("multipart/form-data; boundary=\"a\"b", None),
            ("multipart/form-data; boundary=a; boundary=b", None),
            ("multipart/form-data; boundary=a\u{7f}", None),
            ("multipart/form-data, boundary=a", None),
            ("multipart/mixed; boundary=a", None),
            ("application/json", None),
            ("", None),
        ] {
            let found = boundary(content_type.as_bytes());
            assert_eq!(found.as_deref(), want.map(str::as_bytes), "{content_type}");
        }
        let long = |n| boundary(format!("multipart/form-data; boundary={}", "a".repeat(n)).as_bytes());
        assert!(long(MAX_BOUNDARY).is_some() && long(MAX_BOUNDARY + 1).is_none());
    }

    #[test]
    fn reads_the_name_of_a_part() {
        for (disposition, want) in [
            ("form-data; name=\"model\"", Ok("model")),
            ("Form-Data;NAME=model", Ok("model")),
            ("form-data; filename=\"a; name=\\\"x\\\"\"; name=\"file\"", Ok("file")),
            ("form-data; name=\"file\"; filename=\"\u{e9}.wav\"; filename*=utf-8''%C3%A9.wav", Ok("file")),
            ("form-data; name=\"\"", Ok("")),
            ("form-data; name=\"file\"; filename=\"C:\\dir\\a\"", Ok("file")),
            ("form-data; name=\"mod\\el\"", Err("the name of a part has an escape")),
            ("form-data; name*=utf-8''model", Err("a part has an encoded name")),
            ("form-data; name=\"a\"; name*0=\"model\"", Err("a part has an encoded name")),
            ("form-data; name=a; name=model", Err("a part has two names")),
            ("form-data", Err("a part has no name")),
            ("attachment; name=\"model\"", Err("a part is not form-data")),
            ("form-data; name=\"model", Err("a Content-Disposition is malformed")),
            ("form-data; name=\"a\"x; b=c", Err("a Content-Disposition is malformed")),
            (
                "form-data; name=\"x\"; filename=\"a\\\"; name=\"model\"",
                Err("a Content-Disposition is malformed"),
            ),
            ("form-data; name", Err("a Content-Disposition is malformed")),
        ] {
            let found = part_name(disposition.as_bytes());
            assert_eq!(found, want.map(str::as_bytes), "{disposition}");
        }
    }
}

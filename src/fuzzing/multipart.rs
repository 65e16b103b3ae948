//! Fuzzes the scan of forms.

use bytes::Bytes;

use crate::json::members::{MAX_NAME, Model};
use crate::json::patch::slices;
use crate::protocol::form_header::part_name;
use crate::protocol::multipart::{Form, FormError, FormScanner, MAX_HEADERS, MAX_PARTS};

/// The content type of all forms; the first byte of the input chooses among them.
const CONTENT_TYPES: [(&[u8], &[u8]); 3] = [
    (b"multipart/form-data; boundary=b", b"b"),
    (b"multipart/form-data; boundary=\"-- b\"", b"-- b"),
    (b"multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxk", b"----WebKitFormBoundary7MA4YWxk"),
];

/// Fuzzes [`FormScanner`]: in any chunking it finds the model that a naive reader of the whole body finds, and the
/// splice that replaces it leaves all other bytes as they are. The first byte chooses the boundary, the next seven are
/// the lengths of the chunks; the rest is the body.
pub fn multipart(data: &[u8]) {
    let Some((header, body)) = data.split_at_checked(8) else { return };
    let (content_type, boundary) = CONTENT_TYPES[usize::from(header[0]) % CONTENT_TYPES.len()];
    let chunks = chunks(&header[1..], body);
    let found = scan(content_type, &chunks);
    let want = naive(boundary, body);
    assert_eq!(found.is_ok(), want.is_some(), "{found:?} and not {want:?}");
    if let (Ok(form), Some(want)) = (&found, want) {
        assert_eq!(form.length, body.len() as u64);
        model_is(&form.model, want, body);
        replaced(content_type, form, &chunks, body);
    }
}

fn chunks(lengths: &[u8], mut body: &[u8]) -> Vec<Bytes> {
    let (mut chunks, mut lengths) = (Vec::new(), lengths.iter().cycle());
    while !body.is_empty() {
        let length = lengths.next().map_or(1, |n| 1 + usize::from(*n)).min(body.len());
        let (chunk, rest) = body.split_at(length);
        chunks.push(Bytes::copy_from_slice(chunk));
        body = rest;
    }
    chunks
}

fn scan(content_type: &[u8], chunks: &[Bytes]) -> Result<Form, FormError> {
    let mut scanner = FormScanner::new(content_type)?;
    chunks.iter().try_for_each(|chunk| scanner.feed(chunk))?;
    scanner.finish()
}

/// Where the value of the model begins and ends.
type Span = Option<(usize, usize)>;

/// Reads a whole form: `None` if it is refused, else the value of its model.
fn naive(boundary: &[u8], body: &[u8]) -> Option<Span> {
    // The body begins a line.
    let text = [b"\r\n", body].concat();
    let line = [b"\n--", boundary].concat();
    let ends: Vec<usize> =
        text.windows(line.len()).enumerate().filter(|(_, w)| *w == line).map(|(at, _)| at).collect();
    if ends.iter().any(|feed| *feed == 0 || text[feed - 1] != b'\r') {
        return None;
    }
    let (mut model, mut parts) = (None, 0);
    for (i, feed) in ends.iter().enumerate() {
        let start = feed + line.len();
        let end = ends.get(i + 1).map_or(text.len(), |next| next - 1);
        let rest = text.get(start..end)?;
        if let Some(closed) = rest.strip_prefix(b"--") {
            let space = closed.iter().take_while(|b| b" \t".contains(b)).count();
            let closed = &closed[space..];
            let is_last = i + 1 == ends.len();
            return (is_last && (closed.is_empty() || closed.starts_with(b"\r\n"))).then_some(model);
        }
        let space = rest.iter().take_while(|b| b" \t".contains(b)).count();
        let part = rest[space..].strip_prefix(b"\r\n")?;
        let empty = part.windows(4).position(|w| w == b"\r\n\r\n")?;
        parts += 1;
        if parts > MAX_PARTS || empty + 4 > MAX_HEADERS || part.starts_with(b"\r\n") {
            return None;
        }
        let value = start + space + 2 + empty + 4;
        if headers(&part[..empty])? {
            let text = &text[value..end];
            let text = if text.len() > MAX_NAME {
                longest(&text[..MAX_NAME])
            } else {
                std::str::from_utf8(text).ok()
            };
            if model.is_some() || text.is_none() {
                return None;
            }
            // Without the line end that was put before the body.
            model = Some((value - 2, end - 2));
        }
    }
    None
}

/// The longest text at the beginning, if only its last character may be cut.
fn longest(text: &[u8]) -> Option<&str> {
    (0..4).find_map(|cut| {
        std::str::from_utf8(&text[..text.len() - cut]).ok().filter(|_| cut == 0 || is_cut(text))
    })
}

fn is_cut(text: &[u8]) -> bool {
    std::str::from_utf8(text).is_err_and(|error| error.error_len().is_none())
}

/// Whether a part with these headers is the model; `None` if it is refused.
fn headers(text: &[u8]) -> Option<bool> {
    let text = std::str::from_utf8(text)
        .map(str::to_owned)
        .unwrap_or_else(|_| text.iter().map(|b| *b as char).collect());
    let (mut name, mut is_plain) = (None, true);
    for line in text.split("\r\n") {
        let (key, value) = line.split_once(':')?;
        let is_key = key.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)) && !key.is_empty();
        if !is_key || key.starts_with('-') || value.chars().any(|c| c.is_ascii_control() && c != '\t') {
            return None;
        }
        match key.to_ascii_lowercase().as_str() {
            "content-disposition" if name.is_some() => return None,
            "content-disposition" => {
                let value = value.trim_matches([' ', '\t']).as_bytes();
                // Production's own: this reader checks the framing, not the values of headers.
                name = Some(String::from_utf8_lossy(part_name(value).ok()?).into_owned());
            }
            "content-transfer-encoding" => {
                let value = value.trim_matches([' ', '\t']).to_ascii_lowercase();
                is_plain = is_plain && ["7bit", "8bit", "binary"].contains(&value.as_str());
            }
            _ => {}
        }
    }
    match name?.as_str() {
        "model" => is_plain.then_some(true),
        name if name.eq_ignore_ascii_case("model") => None,
        _ => Some(false),
    }
}

fn model_is(model: &Model, want: Span, body: &[u8]) {
    let found = match model {
        Model::Absent | Model::Other => None,
        Model::Nothing(span) => {
            assert!(span.is_empty());
            Some((span.start as usize, span.end as usize))
        }
        Model::Named { span, name, whole } => {
            let value = &body[span.start as usize..span.end as usize];
            assert!(value.starts_with(name.as_bytes()) && (!whole || value.len() == name.len()));
            assert_eq!(*whole, value.len() <= MAX_NAME);
            Some((span.start as usize, span.end as usize))
        }
    };
    assert_eq!(found, want);
}

/// Replaces the model, and checks what else has changed.
fn replaced(content_type: &[u8], form: &Form, chunks: &[Bytes], body: &[u8]) {
    const NAME: &str = "another/model-1";
    let splice = form.model_splice(NAME);
    let (at, skip) = (splice.at as usize, splice.skip as usize);
    let insert = splice.insert.clone();
    let out = slices(chunks, std::iter::once(splice)).concat();
    assert_eq!(out, [&body[..at], &insert, &body[at + skip..]].concat());
    let after = scan(content_type, &[Bytes::from(out)]).map(|form| form.model);
    // A part more may be one too many.
    let is_full = after == Err(FormError::Invalid("the form has too many parts"));
    assert!(is_full || matches!(&after, Ok(Model::Named { name, .. }) if **name == *NAME), "{after:?}");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    /// Pieces of forms with the boundary `b`, whole and broken ones.
    const PIECES: [&str; 30] = [
        "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nwhisper-1\r\n",
        "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n\r\n",
        "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav\r\n\r\n\r\n\n\r--\r\n--\r\n-b\r\n",
        "--b \t\r\ncontent-disposition: form-data; name=prompt\r\n\r\nname=\"model\"\r\n",
        "--b\r\nContent-Transfer-Encoding: 8bit\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\u{e9}\r\n",
        "--b--\r\n",
        "--b--",
        "--b-- \r\nepilogue",
        "preamble\r\n",
        "\r\n",
        "\n",
        "\r",
        "--b",
        "\r\n--b",
        "\n--b",
        "-",
        "b",
        "\r\n\r\n",
        "Content-Disposition: form-data; name=\"model\"\r\n",
        "Content-Disposition: form-data; name=\"Model\"\r\n\r\n",
        "Content-Disposition: form-data; name=\"a\"; name*=utf-8''model\r\n\r\n",
        "Content-Disposition: form-data; name=\"mod\\el\"\r\n\r\n",
        " folded\r\n",
        "X: y\r\n",
        "--b\r\nX: y\r\n\r\n",
        "--b\r\n\r\n",
        "--bb\r\n",
        "Content-Transfer-Encoding: quoted-printable\r\n",
        "value",
        "\u{1F600}",
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn the_model_of_a_form_is_found_where_a_naive_reader_finds_it(
            lengths in prop_oneof![prop::array::uniform7(0u8..12), any::<[u8; 7]>()],
            parts in prop::collection::vec(prop_oneof![3 => select(&PIECES[..8]), 1 => select(&PIECES[..])], 0..7),
            is_closed in any::<bool>(),
        ) {
            let end = if is_closed { "--b--\r\n" } else { "" };
            multipart(&[&[0][..], &lengths, parts.concat().as_bytes(), end.as_bytes()].concat());
        }

        #[test]
        fn a_value_of_any_bytes_is_found_and_replaced(
            lengths in prop::array::uniform7(0u8..40),
            value in prop_oneof![
                "[a-z/:.-]{0,12}".prop_map(String::into_bytes),
                prop::collection::vec(any::<char>(), 0..200).prop_map(|text| text.into_iter().collect::<String>().into_bytes()),
                prop::collection::vec(any::<u8>(), 0..300),
            ],
            file in prop::collection::vec(prop_oneof![select(b"\r\n-b".to_vec()), any::<u8>()], 0..300),
            is_first in any::<bool>(),
        ) {
            let model = [b"--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n", &value[..], b"\r\n"].concat();
            let file = [b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n", &file[..], b"\r\n"].concat();
            let parts = if is_first { [model, file] } else { [file, model] };
            multipart(&[&[0][..], &lengths, &parts.concat(), b"--b--\r\n"].concat());
        }
    }
}

//! How much text the body of a request has, for estimates of its tokens.

use memchr::{memchr3, memrchr3};

/// A run of so many bytes without a space, a quote or a backslash is data, such as an image in base64, and no text.
const RUN: usize = 2048;

/// A shorter body is text as a whole: it has no room for much data.
const SHORT: u64 = 16 * 1024;

/// The length of a body's text in bytes. Of each run of data, the first [`RUN`] bytes count. The search for a delimiter
/// begins at the end of a block, so that most blocks of text are not read.
pub(crate) fn prose_length<'a>(length: u64, chunks: impl Iterator<Item = &'a [u8]>) -> u64 {
    if length < SHORT {
        return length;
    }
    // `run`: the bytes since the last delimiter.
    let (mut data, mut run) = (0, 0);
    let beyond = |run: usize| run.saturating_sub(RUN) as u64;
    for mut rest in chunks {
        while !rest.is_empty() {
            let block = rest.get(..RUN).unwrap_or(rest);
            let Some(last) = memrchr3(b' ', b'"', b'\\', block) else {
                run += block.len();
                rest = &rest[block.len()..];
                continue;
            };
            if run > 0 {
                data += beyond(run + memchr3(b' ', b'"', b'\\', block).unwrap_or(0));
                run = 0;
            }
            rest = &rest[last + 1..];
        }
    }
    length.saturating_sub(data + beyond(run))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn is_delimiter(byte: &u8) -> bool {
        matches!(byte, b' ' | b'"' | b'\\')
    }

    /// [`prose_length`] of a whole body, byte by byte.
    fn naive(body: &[u8]) -> u64 {
        if (body.len() as u64) < SHORT {
            return body.len() as u64;
        }
        let runs = body.split(is_delimiter).map(|run| run.len().min(RUN) as u64).sum::<u64>();
        runs + body.iter().filter(|byte| is_delimiter(byte)).count() as u64
    }

    #[test]
    fn an_image_in_base64_is_no_text() {
        let image = "iVBORw0KGgo".repeat(100_000);
        let body =
            format!("{{\"messages\":[{{\"content\":\"what is this? data:image/png;base64,{image}\"}}]}}");
        let length = prose_length(body.len() as u64, [body.as_bytes()].into_iter());
        assert!((RUN as u64..RUN as u64 + 100).contains(&length), "{length}");
        let words = "plain words ".repeat(10_000);
        assert_eq!(prose_length(words.len() as u64, [words.as_bytes()].into_iter()), words.len() as u64);
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_count_in_any_chunks(
            runs in prop::collection::vec((0usize..6000, prop::sample::select(vec![b' ', b'"', b'\\'])), 0..30),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        ) {
            let mut body = Vec::new();
            for (run, delimiter) in runs {
                body.resize(body.len() + run, b'x');
                body.push(delimiter);
            }
            let length = body.len() as u64;
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(body.len() + 1)).collect();
            at.extend([0, body.len()]);
            at.sort_unstable();
            let chunks = at.windows(2).map(|w| &body[w[0]..w[1]]);
            prop_assert_eq!(prose_length(length, chunks), naive(&body));
        }
    }
}

//! Fuzzes the classification of event streams.

use bytes::Bytes;

use crate::protocol::endpoint::StreamFormat;
use crate::protocol::event_class::{Class, read_event};
use crate::protocol::event_lines::end_of_event;
use crate::protocol::event_shape::null_usage;
use crate::protocol::event_stream::{EventStream, MAX_HELD, StreamEnd};
use crate::protocol::redact::holds_key;
use crate::protocol::usage::{Usage, UsageParts};

/// The result of a naive reader that has the whole text.
#[derive(Debug, PartialEq)]
struct Said {
    has_content: bool,
    end: Option<StreamEnd>,
    is_whole: bool,
    early_error: Option<u16>,
    usage: Option<Usage>,
}

const FORMATS: [StreamFormat; 4] =
    [StreamFormat::Done, StreamFormat::Plain, StreamFormat::Responses, StreamFormat::Messages];

const KEY: &str = "sk-key-of-the-backend";

/// Fuzzes [`EventStream`]: any chunking passes the same bytes and gives the verdict of a naive reading, line by line.
/// The first byte chooses the endpoint, whether Zap has asked for the token counts (128), and whether a key is taken
/// out of errors (64), which changes nothing in a stream without the key; the next seven choose the lengths of the
/// chunks; the rest is the stream.
pub fn events(data: &[u8]) {
    let Some((header, text)) = data.split_at_checked(8) else { return };
    let format = FORMATS[header[0] as usize % FORMATS.len()];
    let (hides, has_key) = (header[0] & 128 != 0, header[0] & 64 != 0);
    if text.len() > MAX_HELD || has_key && holds_key(KEY.as_bytes(), text) {
        return;
    }
    let mut stream = EventStream::new(format, hides).without_key(has_key.then(|| KEY.into()));
    let (mut rest, mut out, mut lengths) = (text, Vec::new(), header[1..].iter().cycle());
    while !rest.is_empty() {
        let length = lengths.next().map_or(1, |n| 1 + *n as usize);
        let (piece, more) = rest.split_at(length.min(rest.len()));
        out.extend_from_slice(&stream.push(Bytes::copy_from_slice(piece)));
        if !hides {
            assert!(text.starts_with(&out), "what goes out is what came");
            assert_eq!(out.len() + stream.held(), text.len() - more.len(), "the rest is held back");
            assert!(out.is_empty() || out.ends_with(b"\n") || out.ends_with(b"\r"));
        }
        rest = more;
    }
    out.extend_from_slice(&stream.finish());
    assert_eq!(out, if hides { without_usage(format, text) } else { text.to_vec() });
    let early_error = stream.take_early_error();
    if let Some(error) = &early_error {
        assert!(
            serde_json::from_slice::<serde_json::Value>(&error.body)
                .is_ok_and(|body| !body["error"].is_null())
        );
    }
    let said = Said {
        has_content: stream.has_content(),
        end: stream.end(),
        is_whole: stream.is_whole(),
        early_error: early_error.map(|error| error.status),
        usage: stream.usage(),
    };
    assert_eq!(said, naive(format, text, hides));
}

fn naive(format: StreamFormat, text: &[u8], hides: bool) -> Said {
    let text = text.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(text);
    let (mut lines, mut line, mut feed_of_pair) = (Vec::new(), Vec::new(), false);
    for b in text {
        match b {
            b'\n' if feed_of_pair => feed_of_pair = false,
            b'\n' | b'\r' => {
                lines.push(std::mem::take(&mut line));
                feed_of_pair = *b == b'\r';
            }
            _ => {
                line.push(*b);
                feed_of_pair = false;
            }
        }
    }
    lines.push(line);
    let (mut said, mut is_finished) =
        (Said { has_content: false, end: None, is_whole: false, early_error: None, usage: None }, false);
    let mut parts = UsageParts::default();
    for event in lines.split(|line| line.is_empty()).filter(|event| !event.is_empty()) {
        if said.end.is_some() && !hides {
            break;
        }
        let event = read_event(format, &event.join(&b'\n'));
        match event.usage {
            Some(later) if format == StreamFormat::Messages => {
                parts.update(&later);
                let is_last = said.usage.is_some() || event.class != Class::Prelude;
                said.usage = parts.usage().filter(|_| is_last);
            }
            Some(usage) => said.usage = usage.usage(),
            None => {}
        }
        if said.end.is_some() {
            continue;
        }
        match event.class {
            Class::Prelude | Class::Usage => {}
            Class::Content => said.has_content = true,
            Class::Finish => (said.has_content, is_finished) = (true, true),
            Class::Terminal => {
                said.end = Some(StreamEnd::Complete);
                said.has_content |= format == StreamFormat::Responses;
            }
            Class::Error(status) => {
                said.end = Some(StreamEnd::Error);
                said.early_error = Some(status).filter(|_| !said.has_content);
            }
        }
    }
    said.is_whole = format == StreamFormat::Plain
        || said.end == Some(StreamEnd::Complete)
        || is_finished && format == StreamFormat::Done;
    said
}

/// The stream without the token counts that Zap has asked for: read event by event, each with a parser.
fn without_usage(format: StreamFormat, text: &[u8]) -> Vec<u8> {
    let (mut out, mut at, mut is_over) = (Vec::new(), 0, false);
    if text.starts_with(b"\xEF\xBB\xBF") {
        at = 3;
        out.extend_from_slice(&text[..3]);
    }
    while at < text.len() {
        let start = at + text[at..].iter().take_while(|b| matches!(b, b'\n' | b'\r')).count();
        out.extend_from_slice(&text[at..start]);
        let end = end_of_event(text, start).unwrap_or(text.len());
        let event = &text[start..end];
        at = end;
        if event.is_empty() {
            continue;
        }
        let class = read_event(format, event).class;
        if is_over {
            // Behind the end, only events with token counts and nothing else are taken out.
            if class != Class::Usage {
                out.extend_from_slice(event);
            }
            continue;
        }
        is_over = matches!(class, Class::Terminal | Class::Error(_));
        match (class, null_usage(event)) {
            (Class::Usage, _) => {}
            (_, Some(cut)) => {
                out.extend_from_slice(&event[..cut.start]);
                out.extend_from_slice(&event[cut.end..]);
            }
            (_, None) => out.extend_from_slice(event),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    /// Events of a message, and some that are none, in all spellings.
    const EVENTS: [&str; 18] = [
        "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"m\",\"usage\":{\"input_tokens\":25,\"cache_read_input_tokens\":7,\"output_tokens\":1}}}\n\n",
        "data: {\"message\":{\"usage\":{\"input_tokens\":3}},\"type\":\"message_start\"}\r\n\r\n",
        "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n",
        "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":1,\"content_block\":{\"type\":\"tool_use\",\"id\":\"t\",\"name\":\"f\",\"input\":{}}}\n\n",
        "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"a\"}}\n\n",
        "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"bc\\n\"}}\n\n",
        "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":1,\"delta\":{\"type\":\"input_json_delta\",\"partial_json\":\"{\"}}\n\n",
        "data: {\"type\":\"content_block_delta\",\"index\":2,\"delta\":{\"type\":\"thinking_delta\",\"thinking\":\"hm\"}}\r\r",
        "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n",
        "event: ping\ndata: {\"type\": \"ping\"}\n\n",
        "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":15}}\n\n",
        "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":null},\"usage\":{\"input_tokens\":9,\"output_tokens\":4}}\n\n",
        "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
        "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"m\"}}\n\n",
        "event: error\ndata: it broke\n\n",
        ": comment\n\n",
        "event: later\ndata: {\"type\":\"later\",\"usage\":null}\n\n",
        "data: {\"type\":\"message_del",
    ];

    proptest! {
        #[test]
        fn a_message_is_read_as_a_naive_reader_does(
            lengths in any::<[u8; 7]>(),
            hides in any::<bool>(),
            has_key in any::<bool>(),
            parts in prop::collection::vec(select(&EVENTS[..]), 0..12),
        ) {
            let header = 3 | u8::from(hides) << 7 | u8::from(has_key) << 6;
            events(&[&[header][..], &lengths, parts.concat().as_bytes()].concat());
        }
    }
}

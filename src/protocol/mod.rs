//! The APIs of OpenAI and Anthropic as Zap knows them: endpoints, stream events, rate-limit headers, and redaction of
//! keys.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub(crate) mod endpoint;

pub(crate) mod api_family;

pub(crate) mod body_class;

pub(crate) mod event_class;

pub(crate) mod event_lines;

pub(crate) mod event_shape;

pub(crate) mod oversized_event;

mod edits;

pub(crate) mod event_stream;

pub(crate) mod responses;

pub(crate) mod model_list;

pub(crate) mod error_body;

pub(crate) mod error_event;

pub(crate) mod form_header;

pub(crate) mod multipart;

pub(crate) mod rate_limits;

pub(crate) mod redact;

pub(crate) mod answer_ids;

pub(crate) mod answer_text;

pub(crate) mod answer_notes;

pub(crate) mod provider_name;

pub(crate) mod provider_state;

pub(crate) mod stored;

pub(crate) mod null_member;

pub(crate) mod usage;

pub(crate) mod usage_request;

pub(crate) mod request_limits;

pub(crate) mod body_text;

mod plain_usage;

pub(crate) mod body_usage;

pub(crate) use self::endpoint::Endpoint;

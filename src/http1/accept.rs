//! The headers `Accept` and `Accept-Encoding` (RFC 9110, sections 12.5.1 and 12.5.3): what a client prefers.

use http::header::{ACCEPT, ACCEPT_ENCODING, HeaderMap, HeaderName};

/// The weight of a member that names none, in thousandths.
const WHOLE: u16 = 1000;

/// One member of a list.
struct Member<'h> {
    /// The type or the coding, as the client wrote it.
    name: &'h str,
    /// The parameters, with the weight.
    parameters: &'h str,
}

impl<'h> Member<'h> {
    /// All members of a header.
    fn all(headers: &'h HeaderMap, name: HeaderName) -> impl Iterator<Item = Self> {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).map(|member| {
            let (name, parameters) = member.split_once(';').unwrap_or((member, ""));
            Member { name: name.trim(), parameters }
        })
    }

    fn is(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name)
    }

    /// The value of a parameter.
    fn parameter(&self, name: &str) -> Option<&'h str> {
        self.parameters.split(';').find_map(|parameter| {
            let (known, value) = parameter.split_once('=')?;
            known.trim().eq_ignore_ascii_case(name).then(|| value.trim().trim_matches('"'))
        })
    }

    /// The weight in thousandths; 0 if it is not valid.
    fn weight(&self) -> u16 {
        let Some(text) = self.parameter("q") else { return WHOLE };
        let weight = text.parse().ok().filter(|weight: &f64| (0.0..=1.0).contains(weight));
        weight.map_or(0, |weight| (weight * f64::from(WHOLE)) as u16)
    }
}

/// Whether a client prefers OpenMetrics 1.0.0 to the text format of Prometheus. Of two with one weight, it is
/// OpenMetrics, since that is asked for by name. `*/*` does not ask for it.
pub(crate) fn prefers_openmetrics(headers: &HeaderMap) -> bool {
    let members = || Member::all(headers, ACCEPT);
    let best =
        |is_wanted: &dyn Fn(&Member<'_>) -> bool| members().filter(is_wanted).map(|m| m.weight()).max();
    let is_known = |member: &Member<'_>| member.parameter("version").is_none_or(|version| version == "1.0.0");
    let openmetrics = best(&|member| member.is("application/openmetrics-text") && is_known(member));
    // The most specific range counts for the text format.
    let text = ["text/plain", "text/*", "*/*"].iter().find_map(|name| best(&|member| member.is(name)));
    openmetrics.is_some_and(|weight| weight > 0 && weight >= text.unwrap_or(0))
}

/// Whether a client takes a body that is compressed with gzip. It must say so: without the header none is.
pub(crate) fn accepts_gzip(headers: &HeaderMap) -> bool {
    let weight = |name: &str| Member::all(headers, ACCEPT_ENCODING).find(|m| m.is(name)).map(|m| m.weight());
    ["gzip", "x-gzip", "*"].into_iter().find_map(weight).is_some_and(|weight| weight > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(name: HeaderName, values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn openmetrics_is_sent_to_those_that_ask_for_it_by_name() {
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
             application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,\
             text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        for (accept, want) in [
            (&[prometheus][..], true),
            (&["application/openmetrics-text"], true),
            (&["Application/OpenMetrics-Text; Version=\"1.0.0\"; Q=0.1"], true),
            (&["text/plain", "application/openmetrics-text"], true),
            (&["application/openmetrics-text;q=0.5, */*;q=0.6, text/plain;q=0.4"], true),
            (&["application/openmetrics-text;q=0.4, text/plain;q=0.5"], false),
            (&["application/openmetrics-text;q=0.4, */*;q=0.5"], false),
            (&["application/openmetrics-text;version=0.0.1, text/plain;q=0.5"], false),
            (&["application/openmetrics-text;version=2.0.0"], false),
            (&["application/openmetrics-text;q=0"], false),
            (&["application/openmetrics-text;q=x"], false),
            (&["application/openmetrics-text;q=1.001"], false),
            (&["*/*"], false),
            (&["text/html, application/json"], false),
            (&[], false),
        ] {
            assert_eq!(prefers_openmetrics(&map(ACCEPT, accept)), want, "{accept:?}");
        }
    }

    #[test]
    fn gzip_is_sent_to_those_that_take_it() {
        for (accept, want) in [
            (&["gzip"][..], true),
            (&["deflate, GZIP;q=0.5"], true),
            (&["br", "x-gzip"], true),
            (&["*"], true),
            (&["gzip;q=0, *"], false),
            (&["gzip;q=0.0"], false),
            (&["identity"], false),
            (&["br;q=1, *;q=0"], false),
            (&[""], false),
            (&[], false),
        ] {
            assert_eq!(accepts_gzip(&map(ACCEPT_ENCODING, accept)), want, "{accept:?}");
        }
    }
}

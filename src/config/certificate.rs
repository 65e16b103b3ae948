//! Reads the names and the validity of a certificate.

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The names and the validity of a listener's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFacts {
    /// Its DNS names in lower case, such as `a.example` and `*.a.example`; without any, its common name.
    pub names: Vec<String>,
    /// The first second in which it is valid, in seconds since 1970.
    pub begins: i64,
    /// The last second in which it is valid, in seconds since 1970.
    pub ends: i64,
}

impl CertificateFacts {
    /// Reads a certificate. Returns `None` if it is not valid.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let mut names = Vec::new();
        if let Some(alternatives) = parsed.subject_alternative_name().ok()? {
            names.extend(alternatives.value.general_names.iter().filter_map(|name| match name {
                GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
                _ => None,
            }));
        }
        if names.is_empty() {
            names.extend(only_common_name(&parsed).map(str::to_ascii_lowercase));
        }
        let validity = parsed.validity();
        Some(CertificateFacts {
            names,
            begins: validity.not_before.timestamp(),
            ends: validity.not_after.timestamp(),
        })
    }
}

/// The common name of the subject of a certificate. A subject with two of them has none, since it is not clear which of
/// them counts.
pub(crate) fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    only_common_name(&parsed).map(str::to_owned)
}

fn only_common_name<'c>(certificate: &'c X509Certificate<'_>) -> Option<&'c str> {
    let mut names = certificate.subject().iter_common_name();
    let first = names.next()?;
    if names.next().is_some() { None } else { first.as_str().ok() }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn made(names: &[&str], common_names: &[&str]) -> CertificateDer<'static> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for name in common_names {
            params.distinguished_name.push(DnType::CommonName, *name);
        }
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn the_names_and_the_end_of_a_certificate_are_read() {
        for (names, common, expected) in [
            (vec!["A.example", "*.b.example"], vec!["c"], vec!["a.example", "*.b.example"]),
            (vec![], vec!["C.example"], vec!["c.example"]),
            (vec!["10.0.0.1"], vec![], vec![]),
        ] {
            let facts = CertificateFacts::of(&made(&names, &common)).unwrap();
            assert_eq!(facts.names, expected, "{names:?}");
            assert_eq!((facts.begins, facts.ends), (1_577_836_800, 1_609_459_200));
        }
        assert_eq!(CertificateFacts::of(&CertificateDer::from(vec![0x30, 0])), None);
    }

    #[test]
    fn a_subject_has_one_common_name_or_none() {
        assert_eq!(common_name(&made(&["a"], &["batch jobs"])).as_deref(), Some("batch jobs"));
        assert_eq!(common_name(&made(&["a"], &[])), None);
    }
}

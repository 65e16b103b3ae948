//! `models` of a backend, and the named routes of `[models.NAME]`.

use std::collections::HashSet;

use crate::config::Backend;
use crate::config::common::{PRIORITY, WEIGHT};
use crate::config::text::{Text, shown_name};
use crate::config::toml_reader::Section;
use crate::policy::near::nearest;
use crate::policy::pattern::{MAX_NAME, Pattern};
use crate::policy::route::{CATCH_ALL, Named, NamedTarget, Rule};

/// `models_from`: what `/v1/models` lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelsFrom {
    /// What the configuration names, and what backends without `models` say they serve.
    Backends,
    /// What the configuration names.
    Config,
}

const MODELS_FROM: [(&str, ModelsFrom); 2] =
    [("backends", ModelsFrom::Backends), ("config", ModelsFrom::Config)];

/// Reads `models_from`.
pub(super) fn models_from(root: &mut Section<'_, '_>) -> ModelsFrom {
    root.choice("models_from", ModelsFrom::Backends, &MODELS_FROM)
}

/// The condition that a model name must meet, for messages; `more` is a further condition.
pub(super) fn must_be(more: &str) -> String {
    format!("must be 1 to {MAX_NAME} bytes without control characters{more}")
}

/// Reads `models` of a backend: a list of names, or a table from public names to the backend's own.
pub(super) fn rules(t: &mut Section<'_, '_>) -> Option<Vec<Rule>> {
    let line = t.line_of("models");
    let faults = t.sink().count();
    let entries = t.texts_or_pairs("models")?;
    if entries.is_empty() && t.sink().count() == faults {
        let what = "is empty; must be left out if the backend serves any model";
        t.fault(line.unwrap_or(t.line()), "models", what);
    }
    let (mut rules, mut known) = (Vec::new(), HashSet::new());
    for (public, own) in entries {
        let Some(pattern) = pattern(t, &public) else { continue };
        if !known.insert(public.value.clone()) {
            t.fault_of(&public, "repeats a name; each name must be listed once");
        }
        let own = own.and_then(|own| own_name(t, own, &pattern));
        rules.push(Rule { public: pattern, own });
    }
    Some(rules)
}

/// Reads a name, or a prefix that ends in `*`. Returns `None` if it is not valid: then a fault is recorded.
pub(super) fn pattern(t: &Section<'_, '_>, text: &Text) -> Option<Pattern> {
    let pattern = Pattern::parse(&text.value);
    if pattern.is_none() {
        t.invalid(text, &must_be(", `*` only at the end"));
    }
    pattern
}

/// Reads the backend's own name for `public`.
fn own_name(t: &Section<'_, '_>, text: Text, public: &Pattern) -> Option<Box<str>> {
    pattern(t, &text)?;
    if text.value.ends_with('*') && !public.is_prefix() {
        let what = "maps a name without `*` to a name that ends in `*`; both names must end in `*`";
        t.fault_of(&text, what);
    }
    Some(text.value.into())
}

/// Reads a model name that is sent unchanged. Returns `None` if it is not set, or if it is not valid: then a fault is
/// recorded.
pub(super) fn model_name(t: &mut Section<'_, '_>, key: &'static str) -> Option<String> {
    let text = t.text(key)?;
    let valid = (1..=MAX_NAME).contains(&text.value.len()) && !text.value.chars().any(char::is_control);
    if !valid {
        t.invalid(&text, &must_be(""));
    }
    valid.then_some(text.value)
}

/// Reads `[models.NAME]`. `all_known`: every backend was read without a fault.
pub(super) fn named_routes(root: &mut Section<'_, '_>, backends: &[Backend], all_known: bool) -> Vec<Named> {
    root.named_sections("models", &["targets"], |t, name| {
        let valid = name.value == CATCH_ALL
            || Pattern::parse(&name.value).is_some_and(|pattern| !pattern.is_prefix());
        if !valid {
            let what = must_be(" and without `*`, or only `*` for all other names");
            t.fault_of(&name, &format!("is not a valid name; {what}"));
        }
        let line = t.line_of("targets");
        let faults = t.sink().count();
        let targets = t.sections("targets", |t| target(t, backends, all_known));
        if targets.as_ref().is_none_or(Vec::is_empty) && t.sink().count() == faults {
            let what =
                "is missing or empty; at least one `{ backend = \"name\", model = \"name\" }` is required";
            t.fault(line.unwrap_or(name.line), "targets", what);
        }
        Named { name: name.value, targets: targets.into_iter().flatten().flatten().collect() }
    })
}

fn target(t: &mut Section<'_, '_>, backends: &[Backend], all_known: bool) -> Option<NamedTarget> {
    let name = t.required_text("backend");
    let model = model_name(t, "model");
    let weight = t.optional("weight", WEIGHT);
    let priority = t.optional("priority", PRIORITY.range);
    let name = name?;
    let Some(backend) = backends.iter().position(|b| b.name == name.value) else {
        if all_known {
            let names = backends.iter().map(|b| shown_name(&b.name));
            let allowed = match nearest(&name.value, names.clone(), 1).first() {
                Some(near) => format!("must be the name of a backend; did you mean `{near}`?"),
                None => {
                    format!("must be the name of a backend: `{}`", names.collect::<Vec<_>>().join("`, `"))
                }
            };
            t.invalid(&name, &allowed);
        }
        return None;
    };
    Some(NamedTarget { backend, model, weight, priority })
}

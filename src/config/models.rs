//! Which models a backend serves, and the routes that have names of their own.

use crate::config::toml_reader::{Number, Range, Section, Text};
use crate::config::{Backend, backend};
use crate::policy::near::nearest;
use crate::policy::route::{CATCH_ALL, MAX_NAME, Named, NamedTarget, Pattern, Rule};

/// What a model's name must be.
fn no_model(more: &str) -> String {
    format!("is no model; allowed: 1 to {MAX_NAME} bytes, no control character{more}")
}

/// `models` of a backend: a list of names, or a table from public names to the backend's own.
pub(super) fn rules(t: &mut Section<'_, '_>) -> Option<Vec<Rule>> {
    let line = t.line_of("models");
    let entries = t.texts_or_pairs("models")?;
    if entries.is_empty() {
        let what = "is empty; leave it out where the backend serves any model";
        t.fault(line.unwrap_or(t.line()), "models", what);
    }
    let mut rules: Vec<Rule> = Vec::new();
    for (public, own) in entries {
        let Some(pattern) = pattern(t, &public) else { continue };
        if rules.iter().any(|rule| rule.public == pattern) {
            t.fault(public.line, "models", "holds a name twice; once is enough");
        }
        let own = own.and_then(|own| own_name(t, own, &pattern));
        rules.push(Rule { public: pattern, own });
    }
    Some(rules)
}

/// A name, or a prefix with a `*` at its end; `None` is a noted fault.
pub(super) fn pattern(t: &Section<'_, '_>, text: &Text) -> Option<Pattern> {
    let pattern = Pattern::parse(&text.value);
    if pattern.is_none() {
        let what = format!("holds what {}", no_model(", `*` at the end alone"));
        t.fault(text.line, "models", &what);
    }
    pattern
}

fn own_name(t: &Section<'_, '_>, Text { value, line }: Text, public: &Pattern) -> Option<Box<str>> {
    if Pattern::parse(&value).is_none() {
        t.fault(line, "models", &format!("maps a name to what {}", no_model(", `*` at the end alone")));
        return None;
    }
    if value.ends_with('*') && !public.is_prefix() {
        let what = "maps a name to one that ends in `*`; allowed: only where the name itself ends in `*`";
        t.fault(line, "models", what);
    }
    Some(value.into())
}

/// A model that is sent as it stands; `None` is a noted fault.
pub(super) fn model(t: &mut Section<'_, '_>, key: &'static str) -> Option<String> {
    let Text { value, line } = t.text(key)?;
    let valid = (1..=MAX_NAME).contains(&value.len()) && !value.chars().any(char::is_control);
    if !valid {
        t.fault(line, key, &no_model(""));
    }
    valid.then_some(value)
}

/// `[models.NAME]`. `known`: `backends` are all that there are.
pub(super) fn named(root: &mut Section<'_, '_>, backends: &[Backend], known: bool) -> Vec<Named> {
    root.named_sections("models", |t, name| {
        let valid = name.value == CATCH_ALL
            || Pattern::parse(&name.value).is_some_and(|pattern| !pattern.is_prefix());
        if !valid {
            let what = format!("a name in `models` {}", no_model("; or `*` for any other name"));
            t.sink().fault(name.line, what);
        }
        let line = t.line_of("targets");
        let faults = t.sink().count();
        let targets = t.sections("targets", |t| target(t, backends, known));
        if targets.as_ref().is_none_or(Vec::is_empty) && t.sink().count() == faults {
            let what =
                "is missing or empty; `{ backend = \"name\", model = \"name\" }`, at least one, is needed";
            t.fault(line.unwrap_or(name.line), "targets", what);
        }
        Named { name: name.value, targets: targets.into_iter().flatten().flatten().collect() }
    })
}

fn target(t: &mut Section<'_, '_>, backends: &[Backend], known: bool) -> Option<NamedTarget> {
    const WEIGHT: Range<u32> = backend::WEIGHT;
    const PRIORITY: Number<u32> = backend::PRIORITY;
    let name = t.required_text("backend");
    let model = model(t, "model");
    let weight = t.optional("weight", WEIGHT);
    let priority = t.optional("priority", PRIORITY.range);
    let Text { value, line } = name?;
    let Some(backend) = backends.iter().position(|b| b.name == value) else {
        if known {
            let names = backends.iter().map(|b| b.name.as_str());
            let hint = match nearest(&value, names.clone(), 1).first() {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("there are: `{}`", names.collect::<Vec<_>>().join("`, `")),
            };
            t.fault(line, "backend", &format!("is the name of no backend; {hint}"));
        }
        return None;
    };
    Some(NamedTarget { backend, model, weight, priority })
}

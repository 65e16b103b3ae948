//! `zap example`: a commented configuration for the providers that the operator names.

use std::fmt::Write as _;

use crate::manual::recipes::{RECIPES, Recipe};
use crate::policy::near::hint;

const HEAD: &str = "\
# Zap's configuration. `zap check` validates it, `zap check --live` asks each backend, `zap` serves it.
# config.example.toml and `zap help configuration` have every key; `zap help KEY` explains one.
# Names of models change: `zap check --live` says whether a backend lists those of this file.

[server]
host = \"127.0.0.1\"    # for this machine only; \"0.0.0.0\" for all: then add [[client_keys]], or anybody spends your keys
port = 8000
";

const CLIENTS: &str = "
# Without client keys everybody who reaches the port may call.
#[[client_keys]]
#name = \"my-team\"
#key = \"${ZAP_KEY_MY_TEAM}\"
";

/// The configuration for the providers of these names; without names for OpenAI.
///
/// # Errors
/// Returns a message if there is no recipe for a name.
pub(crate) fn example(names: &[String]) -> Result<String, String> {
    let mut recipes = Vec::new();
    for name in names {
        let recipe = find(name)?;
        if !recipes.iter().any(|known: &&Recipe| known.name == recipe.name) {
            recipes.push(recipe);
        }
    }
    let mut out = HEAD.to_owned();
    if recipes.is_empty() {
        recipes.extend(RECIPES.iter().filter(|recipe| recipe.name == "openai"));
        let _ = write!(out, "\n# `zap example PROVIDER…` prints other providers: {}.\n", names_of_all());
    }
    recipes.into_iter().for_each(|recipe| write_backend(&mut out, recipe));
    out.push_str(CLIENTS);
    Ok(out)
}

fn find(name: &str) -> Result<&'static Recipe, String> {
    let plain = name.to_lowercase().replace(['-', '_', '.', ' '], "");
    let meant = match plain.as_str() {
        "claude" => "anthropic",
        "google" => "gemini",
        "grok" => "xai",
        "azureopenai" => "azure",
        "llama" | "llamaserver" => "llamacpp",
        "togetherai" => "together",
        "fireworksai" => "fireworks",
        "hf" => "huggingface",
        "nim" | "nvidianim" => "nvidia",
        other => other,
    };
    RECIPES.iter().find(|recipe| recipe.name == meant).ok_or_else(|| {
        let hint = hint(name, RECIPES.iter().map(|recipe| recipe.name), 1);
        let name: String = name.chars().take(40).collect();
        format!(
            "there is no example for \"{}\"{hint}\nproviders: {}\n\
             any other that speaks OpenAI's chat completions: `zap example openai`, with its own url and key",
            name.escape_debug(),
            names_of_all()
        )
    })
}

fn names_of_all() -> String {
    RECIPES.iter().map(|recipe| recipe.name).collect::<Vec<_>>().join(", ")
}

fn write_backend(out: &mut String, recipe: &Recipe) {
    let Recipe { name, key, keys, notes, checked } = recipe;
    out.push('\n');
    for note in notes.iter() {
        let _ = writeln!(out, "# {name}: {note}");
    }
    let _ = writeln!(out, "# checked: {checked}");
    let _ = writeln!(out, "[[backends]]\nname = \"{name}\"\n{keys}");
    if let Some(key) = key {
        let _ = writeln!(
            out,
            "api_key = \"${{{key}}}\"    # export {key}=… before the start, or {{ file = \"path\" }}"
        );
    }
    out.push_str("weight = 1\n");
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    fn load(text: &str) -> Config {
        let env = |name: &str| RECIPES.iter().any(|r| r.key == Some(name)).then(|| "key".to_owned());
        Config::parse(text, "example", Path::new(""), &env)
            .unwrap_or_else(|faults| panic!("{faults}\n{text}"))
    }

    #[test]
    fn every_recipe_loads_without_a_warning_and_has_the_urls_of_its_provider() {
        use crate::upstream::paths::shown_url;
        let rows = [
            (
                "groq",
                "https://api.groq.com/openai/v1/chat/completions",
                "https://api.groq.com/openai/v1/models",
            ),
            ("cerebras", "https://api.cerebras.ai/v1/chat/completions", "https://api.cerebras.ai/v1/models"),
            ("openai", "https://api.openai.com/v1/chat/completions", "https://api.openai.com/v1/models"),
            (
                "azure",
                "https://my-resource.openai.azure.com/openai/v1/chat/completions",
                "https://my-resource.openai.azure.com/openai/v1/models",
            ),
            (
                "anthropic",
                "https://api.anthropic.com/v1/chat/completions",
                "https://api.anthropic.com/v1/models",
            ),
            (
                "gemini",
                "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
                "https://generativelanguage.googleapis.com/v1beta/openai/models",
            ),
            (
                "openrouter",
                "https://openrouter.ai/api/v1/chat/completions",
                "https://openrouter.ai/api/v1/models",
            ),
            (
                "together",
                "https://api.together.xyz/v1/chat/completions",
                "https://api.together.xyz/v1/models",
            ),
            ("mistral", "https://api.mistral.ai/v1/chat/completions", "https://api.mistral.ai/v1/models"),
            (
                "deepseek",
                "https://api.deepseek.com/v1/chat/completions",
                "https://api.deepseek.com/v1/models",
            ),
            ("xai", "https://api.x.ai/v1/chat/completions", "https://api.x.ai/v1/models"),
            (
                "fireworks",
                "https://api.fireworks.ai/inference/v1/chat/completions",
                "https://api.fireworks.ai/inference/v1/models",
            ),
            (
                "sambanova",
                "https://api.sambanova.ai/v1/chat/completions",
                "https://api.sambanova.ai/v1/models",
            ),
            (
                "nvidia",
                "https://integrate.api.nvidia.com/v1/chat/completions",
                "https://integrate.api.nvidia.com/v1/models",
            ),
            (
                "huggingface",
                "https://router.huggingface.co/v1/chat/completions",
                "https://router.huggingface.co/v1/models",
            ),
            ("ollama", "http://localhost:11434/v1/chat/completions", "http://localhost:11434/"),
            ("vllm", "http://localhost:8001/v1/chat/completions", "http://localhost:8001/health"),
            ("sglang", "http://localhost:30000/v1/chat/completions", "http://localhost:30000/health"),
            ("llamacpp", "http://localhost:8080/v1/chat/completions", "http://localhost:8080/health"),
            ("lmstudio", "http://localhost:1234/v1/chat/completions", "http://localhost:1234/v1/models"),
        ];
        assert_eq!(rows.map(|(name, ..)| name), RECIPES.map(|recipe| recipe.name));
        for (name, chat, health) in rows {
            let config = load(&example(&[name.to_owned()]).unwrap());
            let [backend] = &config.backends[..] else { panic!("{name} has another number of backends") };
            assert_eq!(backend.name, name);
            assert_eq!(shown_url(backend, &backend.chat_path), chat);
            assert_eq!(shown_url(backend, &backend.health_path), health);
            assert_eq!(config.warnings, [""; 0], "{name}");
            assert_eq!(backend.api_key.is_some(), RECIPES.iter().any(|r| r.name == name && r.key.is_some()));
        }
    }

    #[test]
    fn the_example_without_names_names_all_providers_and_the_whole_set_loads() {
        let text = example(&[]).unwrap();
        assert_eq!(load(&text).backends.len(), 1);
        assert!(RECIPES.iter().all(|recipe| text.contains(recipe.name) && !recipe.checked.is_empty()));
        let all: Vec<String> = RECIPES.iter().map(|recipe| recipe.name.to_owned()).collect();
        assert_eq!(load(&example(&all).unwrap()).backends.len(), RECIPES.len());
        let twice = ["groq", "Groq", "Claude", "llama.cpp"].map(str::to_owned);
        assert_eq!(load(&example(&twice).unwrap()).backends.len(), 3);
    }

    #[test]
    fn an_unknown_provider_gets_a_suggestion_and_the_list() {
        let what = example(&["mistal".to_owned()]).unwrap_err();
        assert!(what.starts_with("there is no example for \"mistal\"; did you mean mistral?\n"), "{what}");
        assert!(what.contains("providers: groq, cerebras, openai, "), "{what}");
        let what = example(&["\u{1b}[31m".repeat(100)]).unwrap_err();
        assert!(!what.contains('\u{1b}') && what.len() < 600, "{what}");
    }

    #[test]
    fn comments_and_keys_have_at_most_120_columns() {
        let all: Vec<String> = RECIPES.iter().map(|recipe| recipe.name.to_owned()).collect();
        let text = example(&all).unwrap();
        let long = text.lines().find(|line| line.chars().count() > 120);
        assert_eq!(long, None);
    }
}

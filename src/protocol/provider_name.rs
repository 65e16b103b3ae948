//! The names of providers in OpenTelemetry's conventions for generative AI (`gen_ai.provider.name`).

use crate::protocol::endpoint::Protocol;

/// Hosts, each with the name of its provider. A host that begins with a dot stands for all hosts below it.
const KNOWN: [(&str, &str); 17] = [
    ("api.openai.com", "openai"),
    ("api.anthropic.com", "anthropic"),
    (".openai.azure.com", "azure.ai.openai"),
    (".cognitiveservices.azure.com", "azure.ai.openai"),
    (".services.ai.azure.com", "azure.ai.inference"),
    (".models.ai.azure.com", "azure.ai.inference"),
    (".amazonaws.com", "aws.bedrock"),
    ("generativelanguage.googleapis.com", "gcp.gemini"),
    (".aiplatform.googleapis.com", "gcp.vertex_ai"),
    ("aiplatform.googleapis.com", "gcp.vertex_ai"),
    (".cohere.com", "cohere"),
    ("api.deepseek.com", "deepseek"),
    ("api.groq.com", "groq"),
    ("api.mistral.ai", "mistral_ai"),
    ("api.moonshot.ai", "moonshot_ai"),
    ("api.perplexity.ai", "perplexity"),
    ("api.x.ai", "x_ai"),
];

/// The name of the provider at a host. An unknown host has the name of the API that it speaks.
pub(crate) fn provider_name(host: &str, protocol: Protocol) -> &'static str {
    let is_at = |known: &str| match known.starts_with('.') {
        true => host.ends_with(known),
        // Regional hosts of Vertex AI: `us-central1-aiplatform.googleapis.com`.
        false => {
            host == known
                || known == "aiplatform.googleapis.com" && host.ends_with("-aiplatform.googleapis.com")
        }
    };
    KNOWN.iter().find(|(known, _)| is_at(known)).map_or(
        match protocol {
            Protocol::OpenAi => "openai",
            Protocol::Anthropic => "anthropic",
        },
        |(_, name)| name,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_provider_is_known_by_its_host_and_others_by_their_api() {
        for (host, protocol, want) in [
            ("api.openai.com", Protocol::OpenAi, "openai"),
            ("mine.openai.azure.com", Protocol::OpenAi, "azure.ai.openai"),
            ("bedrock-runtime.eu-west-1.amazonaws.com", Protocol::OpenAi, "aws.bedrock"),
            ("us-central1-aiplatform.googleapis.com", Protocol::OpenAi, "gcp.vertex_ai"),
            ("api.deepseek.com", Protocol::Anthropic, "deepseek"),
            ("notapi.openai.com", Protocol::Anthropic, "anthropic"),
            ("localhost", Protocol::OpenAi, "openai"),
        ] {
            assert_eq!(provider_name(host, protocol), want, "{host}");
        }
    }
}

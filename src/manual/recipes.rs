//! Providers: what `[[backends]]` needs for each, as facts that `zap example` prints.

/// The keys of one provider.
pub(crate) struct Recipe {
    pub(crate) name: &'static str,
    /// The environment variable that the provider's own tools read the key from; `None`: it takes no key.
    pub(crate) key: Option<&'static str>,
    /// The other keys of the table but `name` and `weight`, as TOML.
    pub(crate) keys: &'static str,
    /// What is known of the provider, one comment a line.
    pub(crate) notes: &'static [&'static str],
    /// What was checked, and where.
    pub(crate) checked: &'static str,
}

/// All recipes, in the order of the list that `zap example` prints. A test loads each and compares its URLs with a
/// table.
pub(crate) const RECIPES: [Recipe; 20] = [
    Recipe {
        name: "groq",
        key: Some("GROQ_API_KEY"),
        keys: r#"url = "https://api.groq.com/openai"
health_path = "/v1/models"
default_model = "llama-3.1-8b-instant"
drop_fields = ["logprobs", "top_logprobs", "logit_bias"]"#,
        notes: &["refuses logprobs, top_logprobs, logit_bias and n > 1; status 498 means no capacity"],
        checked: "URL and refused members at console.groq.com/docs/openai in 2026-11",
    },
    Recipe {
        name: "cerebras",
        key: Some("CEREBRAS_API_KEY"),
        keys: r#"url = "https://api.cerebras.ai"
health_path = "/v1/models"
default_model = "gpt-oss-120b"
drop_fields = ["store", "metadata"]"#,
        notes: &["refuses store and metadata; reserves max_completion_tokens against its limit of tokens"],
        checked: "URL and model at docs.pipecat.ai in 2026-11; the refused members are not verified",
    },
    Recipe {
        name: "openai",
        key: Some("OPENAI_API_KEY"),
        keys: r#"url = "https://api.openai.com"
health_path = "/v1/models"
default_model = "gpt-4o-mini""#,
        notes: &[],
        checked: "URL and paths at docs.rs (openai_dive), the model at docs.helicone.ai in 2026-11",
    },
    Recipe {
        name: "azure",
        key: Some("AZURE_OPENAI_API_KEY"),
        keys: r#"url = "https://${AZURE_RESOURCE:-my-resource}.openai.azure.com/openai"
health_path = "/v1/models"
auth_header = "api-key"
default_model = "my-deployment""#,
        notes: &[
            "the v1 API: my-resource and my-deployment are names that you chose in Azure; a model is a deployment",
            "the older API: chat_path = \"/deployments/my-deployment/chat/completions?api-version=2024-10-21\"",
        ],
        checked: "URL at learn.microsoft.com in 2026-11; the header is not verified",
    },
    Recipe {
        name: "anthropic",
        key: Some("ANTHROPIC_API_KEY"),
        keys: r#"url = "https://api.anthropic.com"
health_path = "/v1/models"
protocols = ["openai", "anthropic"]
extra_headers = { "anthropic-version" = "2023-06-01", "x-api-key" = "${ANTHROPIC_API_KEY}" }
default_model = "claude-opus-5-5""#,
        notes: &[
            "serves its own API at /v1/messages, and OpenAI's chat completions; status 529 means overloaded",
            "a key without a workspace also needs the header anthropic-workspace-id in extra_headers",
            "chat reads the key as Bearer, the list of models as x-api-key with anthropic-version: both are sent",
            "for its own API alone: protocols = [\"anthropic\"], without extra_headers",
        ],
        checked: "URL and model at platform.claude.com in 2026-11; the headers are not verified",
    },
    Recipe {
        name: "gemini",
        key: Some("GEMINI_API_KEY"),
        keys: r#"url = "https://generativelanguage.googleapis.com"
chat_path = "/v1beta/openai/chat/completions"
health_path = "/v1beta/openai/models"
default_model = "gemini-3.8-flash""#,
        notes: &[
            "its endpoint that speaks OpenAI's chat completions; refuses unknown members: list them in drop_fields",
        ],
        checked: "URL at g4f.dev, the model at ai.google.dev in 2026-11; the path of the models is not verified",
    },
    Recipe {
        name: "openrouter",
        key: Some("OPENROUTER_API_KEY"),
        keys: r#"url = "https://openrouter.ai/api"
health_path = "/v1/models"
default_model = "openai/gpt-4o-mini""#,
        notes: &[
            "sends comments in streams, and may answer 200 with an error in the body: Zap handles both",
            "lists its models to everybody: a wrong key shows only in the first request",
        ],
        checked: "URL and model in documentation of other programs in 2026-11",
    },
    Recipe {
        name: "together",
        key: Some("TOGETHER_API_KEY"),
        keys: r#"url = "https://api.together.xyz"
health_path = "/v1/models"
default_model = "openai/gpt-oss-20b""#,
        notes: &["its documentation now writes https://api.together.ai"],
        checked: "URL at docs.pipecat.ai, the model at docs.together.ai in 2026-11",
    },
    Recipe {
        name: "mistral",
        key: Some("MISTRAL_API_KEY"),
        keys: r#"url = "https://api.mistral.ai"
health_path = "/v1/models"
default_model = "mistral-small-latest""#,
        notes: &["strict with members that it does not know: list them in drop_fields"],
        checked: "URL and model in documentation of other programs in 2026-11",
    },
    Recipe {
        name: "deepseek",
        key: Some("DEEPSEEK_API_KEY"),
        keys: r#"url = "https://api.deepseek.com"
health_path = "/v1/models"
default_model = "deepseek-v4-flash""#,
        notes: &["the names of its models change: see `zap check --live` or its documentation"],
        checked: "URL, `/v1` and model at api-docs.deepseek.com in 2026-11",
    },
    Recipe {
        name: "xai",
        key: Some("XAI_API_KEY"),
        keys: r#"url = "https://api.x.ai"
health_path = "/v1/models"
default_model = "grok-4.3""#,
        notes: &[],
        checked: "URL and model in documentation of other programs in 2026-11",
    },
    Recipe {
        name: "fireworks",
        key: Some("FIREWORKS_API_KEY"),
        keys: r#"url = "https://api.fireworks.ai/inference"
health_path = "/v1/models"
default_model = "accounts/fireworks/models/gpt-oss-120b""#,
        notes: &["the name of a model begins with accounts/fireworks/models/"],
        checked: "URL and model at docs.agno.com in 2026-11; the path of the models is not verified",
    },
    Recipe {
        name: "sambanova",
        key: Some("SAMBANOVA_API_KEY"),
        keys: r#"url = "https://api.sambanova.ai"
health_path = "/v1/models"
protocols = ["openai", "anthropic"]
default_model = "gpt-oss-120b""#,
        notes: &["serves Anthropic's API at /v1/messages too, with the same key"],
        checked: "URL and paths at docs.sambanova.ai, the model at lava.so/docs in 2026-11",
    },
    Recipe {
        name: "nvidia",
        key: Some("NVIDIA_API_KEY"),
        keys: r#"url = "https://integrate.api.nvidia.com"
health_path = "/v1/models"
default_model = "meta/llama-3.3-70b-instruct""#,
        notes: &["the hosted models of build.nvidia.com; a NIM of your own has another url"],
        checked: "URL and model at docs.openclaw.ai in 2026-11; the path of the models is not verified",
    },
    Recipe {
        name: "huggingface",
        key: Some("HF_TOKEN"),
        keys: r#"url = "https://router.huggingface.co"
health_path = "/v1/models"
default_model = "openai/gpt-oss-120b""#,
        notes: &["Inference Providers: the token needs the permission to call them"],
        checked: "URL and paths at openclawlab.com, the model at pkg.go.dev (Tangerg/scope) in 2026-11",
    },
    Recipe {
        name: "ollama",
        key: None,
        keys: r#"url = "http://localhost:11434"
health_path = "/"
default_model = "llama3.1:8b"
max_in_flight = 4"#,
        notes: &["on this machine; serves as many requests at once as OLLAMA_NUM_PARALLEL says"],
        checked: "URL at hexdocs.pm (req_llm) in 2026-11; the health path is not verified",
    },
    Recipe {
        name: "vllm",
        key: None,
        keys: r#"url = "http://localhost:8001"
health_path = "/health""#,
        notes: &["on this machine, started with `vllm serve MODEL --port 8001`: 8000 is Zap's own port"],
        checked: "paths at docs.vllm.ai in 2026-11",
    },
    Recipe {
        name: "sglang",
        key: None,
        keys: r#"url = "http://localhost:30000"
health_path = "/health""#,
        notes: &[
            "on this machine, started with `python -m sglang.launch_server --model-path MODEL --port 30000`",
        ],
        checked: "URL at mintlify.com/sgl-project, `/health` at docs.sglang.io in 2026-11",
    },
    Recipe {
        name: "llamacpp",
        key: None,
        keys: r#"url = "http://localhost:8080"
health_path = "/health"
max_in_flight = 4"#,
        notes: &[
            "on this machine, `llama-server`; /health is 503 while the model is read; as many at once as -np says",
        ],
        checked: "URL and paths at mintlify.com/ggml-org and mvysny.github.io in 2026-11",
    },
    Recipe {
        name: "lmstudio",
        key: None,
        keys: r#"url = "http://localhost:1234"
health_path = "/v1/models"
max_in_flight = 1"#,
        notes: &["on this machine, the local server of LM Studio"],
        checked: "URL and paths at lmstudio.ai/docs in 2026-11",
    },
];

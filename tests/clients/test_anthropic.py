"""Tests of Anthropic's Python SDK, and of forms with OpenAI's, against Zap in front of mock providers; lab.py starts both."""
import json
import anthropic, openai
from cases import case, fetch, finish, mocks, raises, zap_url

SAID = [{"role": "user", "content": "hello"}]


def client(key="team-key"):
    return anthropic.Anthropic(base_url=zap_url("MESSAGES"), api_key=key, max_retries=0, timeout=20)


def ask(text="hello", model="m-1", key="team-key", **more):
    said = [{"role": "user", "content": text}]
    return client(key).messages.create(model=model, max_tokens=8, messages=said, **more)


@case("[plain] a plain message, with its token counts")
def _():
    answer = ask()
    assert answer.content[0].text.endswith(" got m-1: hello") and answer.stop_reason == "end_turn", answer
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 5)


@case("the backend's key goes as x-api-key, and the client's goes nowhere")
def _():
    ask()
    seen = "".join(fetch(f"{url}/_seen") for url in mocks("MESSAGES"))
    assert "key-of-" in seen and "team-key" not in seen and "anthropic-version" in seen, seen


@case("[stream] a streamed message arrives whole, event by event")
def _():
    with client().messages.stream(model="m-1", max_tokens=8, messages=SAID) as stream:
        parts = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(parts) == 5 and "".join(parts).endswith(" got m-1: hello"), parts
    assert (final.usage.output_tokens, final.stop_reason) == (5, "end_turn"), final


@case("[failover] another backend serves after a failure")
def _():
    assert ask(model="claude").content[0].text == "beta got claude-own: hello"


@case("BadRequestError: an upstream error passes unchanged")
def _():
    error = raises(anthropic.BadRequestError, lambda: ask("status:400"))
    assert "says 400" in str(error.body), error.body


@case("[429] AuthenticationError, NotFoundError and RateLimitError have the shape of Anthropic's API")
def _():
    for kind, name, call in (
            (anthropic.AuthenticationError, "authentication_error", lambda: ask(key="wrong")),
            (anthropic.NotFoundError, "not_found_error", lambda: ask(key="few-tokens-key", model="other")),
            (anthropic.RateLimitError, "rate_limit_error", lambda: ask(key="few-tokens-key", text="x" * 4000))):
        error = raises(kind, call)
        assert error.body["type"] == "error" and error.body["error"]["type"] == name, error.body


for verb, where in {"cut": "after content", "half": "inside an event"}.items():
    @case(f"[cut] a stream cut {where} raises an error of the API after the received text")
    def _(verb=verb):
        parts = []

        def run():
            with client().messages.stream(model="m-1", max_tokens=8, messages=[{"role": "user", "content": verb}]) as stream:
                for text in stream.text_stream:
                    parts.append(text)

        error = raises(anthropic.APIStatusError, run)
        assert error.body["error"]["type"] == "api_error" and len(parts) == 3, (error.body, parts)


@case("openai: a transcription and an image edit are forwarded as forms, by their model")
def _():
    zap = openai.OpenAI(base_url=zap_url("MESSAGES") + "/v1", api_key="team-key", max_retries=0, timeout=20)
    heard = zap.audio.transcriptions.create(model="whisper-1", file=("a.wav", b"RIFF" * 5000))
    assert heard.text.endswith(" got whisper-1: 20000 bytes"), heard
    edited = zap.images.edit(model="image-1", image=("a.png", b"PNG" * 100), prompt="a cat")
    assert edited.data[0].url.endswith(" got image-1: 300 bytes"), edited


finish("anthropic")

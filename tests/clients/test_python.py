"""Tests of the official Python SDK against Zap in front of mock providers; lab.py starts both."""
import asyncio, collections, itertools, json, time
import openai
from cases import case, fetch, finish, mocks, raises, rejected, total, zap_url

CLIENT_KEY = "client-key-that-must-not-leak"
APIS = "chat", "responses"


def client(name, kind=openai.OpenAI, key=CLIENT_KEY, **options):
    return kind(base_url=zap_url(name) + "/v1", api_key=key, **{"max_retries": 0, "timeout": 20, **options})


def ask(zap, text, model="m-1", raw=False, api="chat", **more):
    if api == "chat":
        resource, said = zap.chat.completions, {"messages": [{"role": "user", "content": text}]}
    else:
        resource, said = zap.responses, {"input": text}
    return (resource.with_raw_response if raw else resource).create(model=model, **said, **more)


def text_of(event):
    """The piece of text in an event of a stream, of a chat or of /v1/responses; "" if there is none."""
    if hasattr(event, "choices"):
        return "".join(choice.delta.content or "" for choice in event.choices)
    return event.delta if event.type == "response.output_text.delta" else ""


def check_retry_after(header, low, high):
    assert header is not None and header.isdigit() and low <= int(header) <= high, f"retry-after {header!r}"


@case("[plain] a response")
def _():
    raw = ask(client("MAIN"), "hello", raw=True)
    answer = raw.parse()
    assert (answer.model, answer.usage.total_tokens, answer.choices[0].finish_reason) == ("m-1", 8, "stop")
    assert answer.choices[0].message.content == f"{raw.headers['x-zap-backend']} got m-1: hello"
    assert raw.headers["x-zap-attempts"] == "1" and raw.headers["x-request-id"]


@case("an empty model becomes the backend's default_model")
def _():
    for _ in range(2):
        raw = ask(client("MAIN"), "hello", model="", raw=True)
        assert raw.parse().model == f"default-{raw.headers['x-zap-backend']}"


for name, api in itertools.product(("MAIN", "NGINX"), APIS):
    @case(f"[stream] {api}: a stream arrives chunk by chunk and ends whole{' behind nginx' * (name == 'NGINX')}")
    def _(name=name, api=api):
        with ask(client(name), f"gated:py-{api}", stream=True, api=api, timeout=8) as stream:
            parts, events = [], []
            for event in stream:
                events.append(event)
                if text_of(event):
                    parts.append(text_of(event))
                    time.sleep(0.1)
                    # The provider sends the next chunk only after this: a gateway that buffers chunks times out.
                    for url in mocks(name):
                        fetch(f"{url}/_next?py-{api}")
        assert len(parts) == 5 and "".join(parts).endswith(f" got m-1: gated:py-{api}"), parts
        if api == "chat":
            assert events[-2].choices[0].finish_reason == "stop" and events[-1].usage.total_tokens == 8, events[-2:]
        else:
            assert events[-1].response.status == "completed" and events[-1].response.usage.total_tokens == 8, events[-1]


@case("[stream] chat: a stream with finish_reason but without [DONE] is whole")
def _():
    events = list(ask(client("CUT"), "no-done", stream=True))
    assert "".join(map(text_of, events)) == "alpha got m-1: no-done"
    assert events[-2].choices[0].finish_reason == "stop" and events[-1].usage.total_tokens == 8, events[-2:]


@case("50 concurrent requests, plain and streamed, are spread evenly")
def _():
    async def one(zap, n):
        if n % 2:
            answer = await ask(zap, f"n{n}")
            return answer.choices[0].message.content
        stream = await ask(zap, f"n{n}", stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def all_of_them():
        async with client("MAIN", openai.AsyncOpenAI) as zap:
            return await asyncio.gather(*(one(zap, n) for n in range(50)))

    answers = asyncio.run(all_of_them())
    for n, text in enumerate(answers):
        assert text.endswith(f" got m-1: n{n}"), text
    by = collections.Counter(text.split()[0] for text in answers)
    assert by == {"alpha": 25, "beta": 25}, by


@case("BadRequestError: Zap's own error for messages of a wrong type")
def _():
    error = raises(openai.BadRequestError, lambda: client("MAIN").chat.completions.create(model="m-1", messages="hello"))
    assert error.code == "missing_messages" and error.type == "invalid_request_error", error.body
    assert error.request_id and error.response.headers["x-zap-attempts"] == "0"


@case("BadRequestError: an upstream error passes unchanged")
def _():
    error = raises(openai.BadRequestError, lambda: ask(client("MAIN"), "status:400"))
    name = error.response.headers["x-zap-backend"]
    assert error.body == {"message": f"{name} says 400", "type": "mock", "param": None, "code": "mock_400"}, error.body
    assert error.response.headers["x-zap-attempts"] == "1"


@case("the client's key never reaches a provider")
def _():
    headers = {"x-api-key": CLIENT_KEY, "api-key": CLIENT_KEY, "cookie": CLIENT_KEY}
    for _ in range(2):
        ask(client("MAIN"), "hello", extra_headers=headers)
    for url, name in zip(mocks("MAIN"), ("alpha", "beta")):
        seen = json.loads(fetch(f"{url}/_seen"))
        assert seen["requests"] > 0 and seen["authorization"] == [f"Bearer key-of-{name}"], seen["authorization"]
        assert CLIENT_KEY not in json.dumps(seen)


@case("[429] RateLimitError: Zap's own limit, for each key")
def _():
    zap = client("LIMIT")
    for n in range(5):
        headers = ask(zap, "hello", raw=True).headers
        assert headers["x-ratelimit-limit-requests"] == "5"
        assert headers["x-ratelimit-remaining-requests"] == str(4 - n)
    error = raises(openai.RateLimitError, lambda: ask(zap, "hello"))
    assert error.code == "rate_limit_exceeded" and error.type == "rate_limit_error", error.body
    check_retry_after(error.response.headers.get("retry-after"), 1, 60)
    assert ask(client("LIMIT", key="another"), "hello").choices


@case("[429] RateLimitError: the limit of tokens, with a true wait")
def _():
    zap = client("MONEY", key="few-tokens-key")
    for n in range(5):  # 3 and 5 tokens each
        raw = ask(zap, "hello", max_tokens=5, raw=True)
        assert raw.headers["x-ratelimit-limit-tokens"] == "40" and raw.headers["x-zap-attempts"] == "1", raw.headers
    assert raw.headers["x-ratelimit-remaining-tokens"] == "0", raw.headers
    error = raises(openai.RateLimitError, lambda: ask(zap, "hello", max_tokens=5))
    assert error.code == "rate_limit_exceeded" and error.type == "rate_limit_error", error.body
    check_retry_after(error.response.headers.get("retry-after"), 50, 60)
    error = raises(openai.RateLimitError, lambda: ask(zap, "hello", max_tokens=50))
    assert error.code == "request_too_large_for_limit" and "lower the maximum" in error.message, error.body


@case("[429] RateLimitError: a spent budget, which the SDK does not retry")
def _():
    zap = client("MONEY", key="little-money-key", max_retries=3)
    assert ask(zap, "hello", max_tokens=5).choices
    began = time.monotonic()
    error = raises(openai.RateLimitError, lambda: ask(zap, "hello", max_tokens=5))
    assert error.code == "insufficient_quota" and error.type == "insufficient_quota", error.body
    assert "opens again on" in error.message and error.response.headers["x-should-retry"] == "false", error.body
    assert rejected(zap_url("MONEY"), "insufficient_quota") == 1 and time.monotonic() - began < 1.5, "the SDK has retried"


@case("[429] RateLimitError: the upstream's error, once every backend cools down")
def _():
    error = raises(openai.RateLimitError, lambda: ask(client("COOL"), "status:429"))
    assert error.code == "mock_429" and error.response.headers["x-zap-attempts"] == "2", error.body
    check_retry_after(error.response.headers.get("retry-after"), 1, 7)
    error = raises(openai.RateLimitError, lambda: ask(client("COOL"), "hello"))
    assert error.code == "upstream_rate_limited" and error.response.headers["x-zap-attempts"] == "0", error.body
    check_retry_after(error.response.headers.get("retry-after"), 1, 7)
    assert total("COOL", "requests") == 2


@case("a retry by the SDK obeys retry-after and succeeds")
def _():
    began = time.monotonic()
    answer = ask(client("ONCE", max_retries=1), "once:py")
    assert answer.choices[0].message.content.endswith("once:py")
    assert time.monotonic() - began >= 0.9 and total("ONCE", "requests") == 3


@case("InternalServerError: an upstream 500 on every try, then a good response")
def _():
    error = raises(openai.InternalServerError, lambda: ask(client("FAIL"), "status:500"))
    assert error.status_code == 500 and error.code == "mock_500", error.body
    assert error.response.headers["x-zap-attempts"] == "3" and total("FAIL", "requests") == 3
    assert ask(client("FAIL"), "hello").choices


@case("APIStatusError 502 if no backend listens")
def _():
    error = raises(openai.APIStatusError, lambda: ask(client("DEAD"), "hello"))
    assert isinstance(error, openai.InternalServerError)
    assert error.status_code == 502 and error.code == "upstream_unreachable", error.body
    assert error.type == "upstream_error"


CUTS = {"cut": "after content", "half": "inside an event", "cut-clean": "by a clean end"}
for api, (verb, where) in itertools.product(APIS, CUTS.items()):
    @case(f"[cut] {api}: a stream cut {where} raises stream_interrupted after the received text")
    def _(api=api, verb=verb):
        def sync():
            for event in ask(client("CUT"), verb, stream=True, api=api):
                parts.append(text_of(event))

        async def aio():
            async with client("CUT", openai.AsyncOpenAI) as zap:
                async for event in await ask(zap, verb, stream=True, api=api):
                    parts.append(text_of(event))

        for run in (sync, lambda: asyncio.run(aio())):
            parts = []
            error = raises(openai.APIError, run)
            assert error.code == "stream_interrupted", repr(error)
            assert f"alpha got m-1: {verb}".startswith("".join(parts)) and len(list(filter(None, parts))) == 3, parts


for api in APIS:
    @case(f"{api}: a provider's error event after content is raised, and Zap adds nothing behind it")
    def _(api=api):
        parts = []

        def run():
            for event in ask(client("CUT"), "cut-error", stream=True, api=api):
                parts.append(text_of(event))

        error = raises(openai.APIError, run)
        assert error.body == {"message": "alpha says 503", "code": 503}, repr(error)
        assert len(list(filter(None, parts))) == 3, parts
        raw = ask(client("CUT"), "cut-error", stream=True, api=api, raw=True).http_response.read()
        assert raw.endswith(b'data: {"error": {"message": "alpha says 503", "code": 503}}\n\n'), raw[-500:]


for api, stream in itertools.product(APIS, (False, True)):
    what = f"{api}, {'stream' if stream else 'JSON'}"

    @case(f"{what}: InternalServerError with the provider's message for an error inside a 200")
    def _(api=api, stream=stream):
        for model, code, status in (("alone", 503, 503), ("alone-by-name", "overloaded", 502)):
            error = raises(openai.InternalServerError, lambda: ask(client("ERROR"), "hello", model, api=api, stream=stream))
            assert error.status_code == status and error.body == {"message": f"alpha says {code}", "code": code}, repr(error)

    @case(f"[failover] {what}: another provider serves after an error inside a 200")
    def _(api=api, stream=stream):
        for model in ("first", "late"):
            raw = ask(client("ERROR"), "hello", model, api=api, stream=stream, raw=True)
            assert (raw.headers["x-zap-backend"], raw.headers["x-zap-attempts"]) == ("beta", "2"), raw.headers
            answer = raw.parse()
            if stream:
                text = "".join(map(text_of, answer))
            else:
                text = answer.choices[0].message.content if api == "chat" else answer.output_text
            assert text == "beta got big: hello", text


@case("InternalServerError: a short response cut in its body")
def _():
    error = raises(openai.InternalServerError, lambda: ask(client("SHORT"), "short:1000"))
    assert error.status_code == 502, error.body


@case("APIConnectionError: a long response cut in its body")
def _():
    error = raises(openai.APIConnectionError, lambda: ask(client("SHORT"), "short:100000"))
    assert not isinstance(error, openai.APITimeoutError)


@case("APITimeoutError: a disconnect of the client closes the provider's connection")
def _():
    raises(openai.APITimeoutError, lambda: ask(client("SLOW"), "slow", timeout=0.5))
    deadline = time.monotonic() + 2
    while total("SLOW", "disconnected") == 0:
        assert time.monotonic() < deadline, "the provider's connection is still open"
        time.sleep(0.02)


@case("the models that the key may use are listed and found")
def _():
    listed = lambda key: [(m.id, m.owned_by) for m in client("ROUTES", key=key).models.list()]
    assert listed("team-key") == [("smart", "zap"), ("meta/llama", "alpha")], listed("team-key")
    assert [name for name, _ in listed("all-key")] == ["smart", "meta/llama", "default-alpha", "other", "default-beta"]
    assert client("ROUTES", key="team-key").models.retrieve("meta/llama").id == "meta/llama"
    error = raises(openai.NotFoundError, lambda: client("ROUTES", key="team-key").models.retrieve("other"))
    assert error.code == "model_not_found", error.body


@case("AuthenticationError, NotFoundError and BadRequestError: wrong key, model not allowed, no model")
def _():
    error = raises(openai.AuthenticationError, lambda: ask(client("ROUTES", key="wrong"), "hello"))
    assert (error.code, error.type) == ("invalid_api_key", "authentication_error"), error.body
    error = raises(openai.NotFoundError, lambda: ask(client("ROUTES", key="team-key"), "hello", model="other"))
    assert (error.code, error.param) == ("model_not_found", "model"), error.body
    error = raises(openai.BadRequestError, lambda: ask(client("ROUTES", key="team-key"), "hello", model=""))
    assert (error.code, error.param) == ("missing_model", "model"), error.body


@case("[failover] each backend gets its own name of a model, and a route falls back to another target")
def _():
    zap = client("ROUTES", key="all-key")
    said = {ask(zap, "hello", model="meta/llama").choices[0].message.content for _ in range(2)}
    assert said == {"alpha got meta/llama: hello", "beta got llama-of-beta: hello"}, said
    raw = ask(zap, "hello", model="smart", raw=True)
    assert raw.parse().choices[0].message.content == "beta got big: hello" and raw.headers["x-zap-attempts"] == "2"


finish("openai-python")

"""Tests of pydantic-ai against Zap in front of a mock provider; lab.py starts both."""
from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from cases import finish, sdk, zap_url


def client(key):
    return Agent(OpenAIChatModel("m-1", provider=OpenAIProvider(base_url=zap_url("SDK") + "/v1", api_key=key)))


def ask(text, key):
    return client(key).run_sync(text).output


def stream(text, key):
    return client(key).run_stream_sync(text).stream_text(delta=True, debounce_by=None)


sdk(ask, stream, limited=ModelHTTPError, broken=ModelAPIError)
finish("pydantic-ai")

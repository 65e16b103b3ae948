"""Tests of langchain-openai against Zap in front of a mock provider; lab.py starts both."""
import langchain_openai, openai
from cases import finish, sdk, zap_url


def client(key):
    return langchain_openai.ChatOpenAI(model="m-1", base_url=zap_url("SDK") + "/v1", api_key=key, timeout=20)


def ask(text, key):
    return client(key).invoke(text).content


def stream(text, key):
    return (chunk.content for chunk in client(key).stream(text) if chunk.content)


sdk(ask, stream, limited=openai.RateLimitError, broken=openai.APIError)
finish("langchain-openai")

"""Tests of litellm as a client of Zap in front of a mock provider; lab.py starts both."""
import os
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # the import fetches a list of prices otherwise
import litellm
litellm.suppress_debug_info = True
from cases import finish, sdk, zap_url


def create(text, key, **more):
    return litellm.completion("openai/m-1", [{"role": "user", "content": text}], api_base=zap_url("SDK") + "/v1",
                              api_key=key, timeout=20, **more)


def ask(text, key):
    return create(text, key).choices[0].message.content


def stream(text, key):
    return (text for chunk in create(text, key, stream=True) if (text := chunk.choices[0].delta.content))


sdk(ask, stream, limited=litellm.RateLimitError, broken=litellm.exceptions.MidStreamFallbackError)
finish("litellm")

"""Tests of the llm CLI against Zap in front of a mock provider; lab.py starts both."""
import os, pathlib, subprocess, sys, tempfile
from cases import finish, running, sdk, zap_url

LLM = pathlib.Path(sys.executable).parent / "llm"
MODELS = """- model_id: zap
  model_name: m-1
  api_base: {url}/v1
  api_key_name: zap
"""


class Failed(Exception):
    """llm has ended with an exit status other than 0; the text is that of its error."""


def stream(text, key, *options):
    with tempfile.TemporaryDirectory(prefix="zap-llm.") as home:
        (pathlib.Path(home) / "extra-openai-models.yaml").write_text(MODELS.format(url=zap_url("SDK")))
        with running([LLM, "-m", "zap", "--key", key, "--no-log", *options, text], stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE, env={**os.environ, "HOME": home, "LLM_USER_PATH": home}) as llm:
            while piece := os.read(llm.stdout.fileno(), 65536).decode():
                if piece := piece.removesuffix("\n"):
                    yield piece
            if llm.wait():
                raise Failed(llm.stderr.read().decode())


def ask(text, key):
    return "".join(stream(text, key, "--no-stream"))


sdk(ask, stream, limited=Failed, broken=Failed)
finish("llm")

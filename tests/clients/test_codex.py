"""Tests of the Codex CLI against Zap in front of mock providers; lab.py starts both."""
import json, os, pathlib, subprocess, tempfile
from cases import case, fetch, finish, running, total, zap_url

CODEX = pathlib.Path(__file__).resolve().parent / ".work/node/node_modules/.bin/codex"
TURN_SECS = 30
# Plugins and apps would be looked up outside this machine.
CONFIG = """model = "m-1"
model_provider = "zap"
check_for_update_on_startup = false
[analytics]
enabled = false
[features]
plugins = false
apps = false
[model_providers.zap]
name = "zap"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "CLIENT_KEY"
request_max_retries = 0
stream_max_retries = {retries}
supports_websockets = {websockets}
"""


def turn(said, retries=0, websockets="false"):
    """Runs one turn. Returns the exit status, the agent's messages and the text of all errors, with Codex's retries."""
    with tempfile.TemporaryDirectory(prefix="zap-codex.") as home:
        text = CONFIG.format(url=zap_url("CUT"), retries=retries, websockets=websockets)
        (pathlib.Path(home) / "config.toml").write_text(text)
        with running([CODEX, "exec", "--json", "--skip-git-repo-check", said], cwd=home, text=True,
                     env={**os.environ, "HOME": home, "CODEX_HOME": home, "CLIENT_KEY": "client-key"},
                     stdout=subprocess.PIPE, stderr=subprocess.PIPE) as codex:
            out, err = codex.communicate(timeout=TURN_SECS)
    assert out, err
    events = [json.loads(line) for line in out.splitlines()]
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    messages = [item["text"] for item in items if item["type"] == "agent_message"]
    errors = [item["message"] for item in items if item["type"] == "error"]
    errors += [event["message"] for event in events if event["type"] == "error"]
    return codex.returncode, messages, [error for error in errors if "Model metadata" not in error]


@case("[stream] a response")
def _():
    assert turn("hello") == (0, ["alpha got m-1: hello"], [])


for verb, where in {"cut": "after content", "half": "inside an event"}.items():
    @case(f"[cut] a stream cut {where} fails the turn with Zap's message")
    def _(verb=verb):
        status, messages, errors = turn(verb)
        assert (status, messages, len(errors)) == (1, [], 1) and "The stream was cut before its end" in errors[0], errors


@case("a cut stream is retried by Codex, and the second one is whole")
def _():
    before = total("CUT", "requests")
    status, messages, errors = turn("cut-once:1", retries=1)
    assert (status, messages) == (0, ["alpha got m-1: cut-once:1"]), (status, messages, errors)
    assert len(errors) == 1 and "The stream was cut before its end" in errors[0], errors
    assert total("CUT", "requests") - before == 2


@case("a websocket gets 426, and Codex turns to HTTP at once")
def _():
    # To another status Codex answers with further tries and an error item.
    assert turn("hello", websockets="true") == (0, ["alpha got m-1: hello"], [])
    assert 'zap_requests_total{endpoint="responses",backend="",status="426"} 1\n' in fetch(zap_url("CUT") + "/metrics")


finish("codex")

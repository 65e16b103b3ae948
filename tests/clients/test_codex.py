"""Tests of the Codex CLI against Zap in front of mock providers; lab.py starts both."""
import pathlib, tempfile
from cases import NODE, agent, agent_events, case, fetch, finish, total, zap_url

# Plugins and apps would be looked up outside this machine.
CONFIG = """model = "{model}"
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


def turn(said, model="direct", key="team-key", retries=0, websockets="false"):
    """Runs one turn. Returns the exit status, the agent's last message and all errors, with Codex's retries."""
    with tempfile.TemporaryDirectory(prefix="zap-codex.") as home:
        text = CONFIG.format(model=model, url=zap_url("AGENT"), retries=retries, websockets=websockets)
        (pathlib.Path(home) / "config.toml").write_text(text)
        # Its sandbox needs rights that a container may not have.
        command = [NODE / "codex", "exec", "--json", "--skip-git-repo-check",
                   "--dangerously-bypass-approvals-and-sandbox", said]
        status, events = agent_events(command, home, CODEX_HOME=home, CLIENT_KEY=key)
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    messages = [item["text"] for item in items if item["type"] == "agent_message"]
    errors = [item["message"] for item in items if item["type"] == "error"]
    errors += [event["message"] for event in events if event["type"] == "error"]
    return status, "".join(messages[-1:]), "\n".join(error for error in errors if "Model metadata" not in error)


agent(turn)


@case("a cut stream is retried by Codex, and the second one is whole")
def _():
    before = total("AGENT", "requests")
    status, text, errors = turn("cut-once:1", retries=1)
    assert (status, text) == (0, "alpha got m-1: cut-once:1"), (status, text, errors)
    assert errors.count("The stream was cut before its end") == 1, errors
    assert total("AGENT", "requests") - before == 2


@case("a websocket gets 426, and Codex turns to HTTP at once")
def _():
    # To another status Codex answers with further tries and an error item.
    assert turn("hello", websockets="true") == (0, "alpha got m-1: hello", "")
    assert 'zap_requests_total{endpoint="responses",backend="",status="426"} 1\n' in fetch(zap_url("AGENT") + "/metrics")


finish("codex")

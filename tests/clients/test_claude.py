"""Tests of the Claude Code CLI against Zap in front of mock providers; lab.py starts both."""
import tempfile
from cases import NODE, agent, agent_events, case, finish, total, zap_url

QUIET = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", "DISABLE_ERROR_REPORTING": "1",
         "DISABLE_TELEMETRY": "1"}


def turn(said, model="direct", key="team-key", retries=0, fallback=False):
    """Runs one turn. Returns the exit status, the agent's last message and the text of the error that ended the turn.

    With `fallback`, the agent asks once more without a stream after a stream that failed, as it does by itself.
    """
    command = [NODE / "claude", "-p", said, "--model", model, "--output-format", "stream-json", "--verbose",
               "--allowedTools", "Bash"]
    with tempfile.TemporaryDirectory(prefix="zap-claude.", ignore_cleanup_errors=True) as home:
        status, events = agent_events(
            command, home, ANTHROPIC_BASE_URL=zap_url("AGENT"), ANTHROPIC_API_KEY=key,
            CLAUDE_CODE_MAX_RETRIES=str(retries), CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK="" if fallback else "1", **QUIET)
    assert events[-1]["type"] == "result", events[-1]
    failed, told = events[-1]["is_error"], events[-1]["result"]
    return (status, "", told) if failed else (status, told, "")


agent(turn)


@case("[plain] a cut stream is asked for again without a stream, and the turn succeeds")
def _():
    before = total("AGENT", "requests")
    assert turn("cut", fallback=True) == (0, "alpha got m-1: cut", "")
    assert total("AGENT", "requests") - before == 2


finish("claude-code")

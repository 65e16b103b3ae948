"""A minimal test runner: mark each test with @case("description"), then call finish("suite").

A description that begins with [plain], [stream], [tools], [failover], [429] or [cut] counts in that column of the table
that lab.py prints.
`zap_url`, `mocks` and `total` tell about one of the CASES that lab.py has started.
"""
import contextlib, json, os, pathlib, re, signal, subprocess, sys, traceback, urllib.request

NODE = pathlib.Path(__file__).resolve().parent / ".work/node/node_modules/.bin"
TURN_SECS = 60  # of a coding agent

_cases = []
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a test ends what it has started


def case(what):
    def add(test):
        _cases.append((what, test))
        return test
    return add


def zap_url(name):
    return os.environ[f"ZAP_{name}"]


def mocks(name):
    return os.environ[f"MOCKS_{name}"].split()


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def total(name, what):
    return sum(json.loads(fetch(f"{url}/_seen"))[what] for url in mocks(name))


def metric(url, sample):
    """The value of a sample, as in `name{label="value"}`, of the Zap at `url`; 0 if there is none."""
    found = re.search(rf"^{re.escape(sample)} (\d+)$", fetch(url + "/metrics"), re.MULTILINE)
    return int(found[1]) if found else 0


def rejected(url, reason):
    """The number of requests that the Zap at `url` has refused for `reason`."""
    return metric(url, f'zap_rejected_total{{reason="{reason}"}}')


def raises(kind, call):
    try:
        value = call()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, got {value!r}")


@contextlib.contextmanager
def running(command, **options):
    """A process that is killed at the end, with all that it has started."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def agent_events(command, home, **env):
    """Runs a coding agent in the folder `home`; returns the exit status and the JSON objects that it has printed.

    Of the environment, it gets what it needs and `env`: a key or a setting of a developer's own agent stays outside.
    """
    kept = {name: os.environ[name] for name in ("PATH", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")}
    with running(command, cwd=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                 env={**kept, "HOME": home, **env}) as process:
        out, err = process.communicate(timeout=TURN_SECS)
    events = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert events, err
    return process.returncode, events


def sdk(ask, stream, limited, broken):
    """Adds the cases of a client of chats. `ask(text, key)` returns a text; `stream(text, key)` yields the pieces of one.

    `limited` and `broken` are what the client raises for a 429, and for a stream that is cut.
    """
    @case("[plain] a response")
    def _():
        assert ask("hello", "team-key") == "alpha got m-1: hello"

    @case("[stream] the pieces arrive one by one, to the end")
    def _():
        parts = []
        for piece in stream("gated:sdk", "team-key"):
            parts.append(piece)
            # The provider sends the next piece only after this: a gateway that buffers never gets it.
            fetch(f"{mocks('SDK')[0]}/_next?sdk")
        assert len(parts) == 5 and "".join(parts) == "alpha got m-1: gated:sdk", parts

    @case("[429] the limit of the key, which the client tells and does not retry")
    def _():
        error = raises(limited, lambda: ask("x" * 4000, "few-tokens-key"))
        assert "lower the maximum, or shorten the input" in str(error), error
        assert rejected(zap_url("SDK"), "request_too_large_for_limit") == 1, "the client has retried"

    for verb, where in {"cut": "after content", "half": "inside an event"}.items():
        @case(f"[cut] a stream cut {where} raises an error after the received text")
        def _(verb=verb):
            parts = []
            error = raises(broken, lambda: parts.extend(stream(verb, "team-key")) or parts)
            assert "The stream was cut before its end" in str(error), repr(error)
            assert parts and f"alpha got m-1: {verb}".startswith("".join(parts)), parts


def agent(turn):
    """Adds the cases of a coding agent, which streams every response.

    `turn(said, model, key, retries)` returns the exit status, the last text and the errors. Its default key has a limit
    of requests, one of tokens and a budget.
    """
    tokens = lambda: metric(zap_url("AGENT"), 'zap_client_tokens_total{client="team",type="output"}')
    seen = lambda: [json.loads(fetch(f"{url}/_seen"))["requests"] for url in mocks("AGENT")]

    @case("[stream] a response")
    def _():
        assert turn("hello", "direct") == (0, "alpha got m-1: hello", "")

    for model, why in {"direct": "", "busy": "answers 503", "broken": "cuts each stream before content"}.items():
        @case("[tools] a command runs, and its output is sent back" if model == "direct" else
              f"[failover] the same while the first backend of the route {why}")
        def _(model=model):
            before, used = seen(), tokens()
            status, text, errors = turn("run:echo $((6 * 7))", model)
            assert (status, errors) == (0, "") and "42" in text, (status, text, errors)
            assert text.startswith("alpha got m-1: " if model == "direct" else "beta got m-2: "), text
            took = [after - n for n, after in zip(before, seen())]
            assert took == ([2, 0] if model == "direct" else [2, 2]), took
            assert tokens() - used == 10, "the key's limits do not count the two responses"

    @case("[429] the key's limit of requests ends the turn after the first request")
    def _():
        before = sum(seen())
        status, text, errors = turn("run:echo 42", "direct", "one-request-key")
        assert status == 1 and "429" in errors, (status, text, errors)
        assert sum(seen()) - before == 1

    @case("[429] the key's limit of tokens refuses the turn, and the agent does not retry")
    def _():
        # Nothing has been learnt of this model. A mock's answer teaches Zap that a long request has few tokens.
        status, text, errors = turn("hello", "unused", "few-tokens-key", retries=2)
        assert status == 1 and "429" in errors, (status, text, errors)
        assert rejected(zap_url("AGENT"), "request_too_large_for_limit") == 1, "the agent has retried"

    @case("a model that the key may not use")
    def _():
        status, text, errors = turn("hello", "secret")
        assert status == 1 and "secret" in errors, (status, text, errors)

    for verb, where in {"cut": "after content", "half": "inside an event"}.items():
        @case(f"[cut] a stream cut {where} fails the turn with Zap's message")
        def _(verb=verb):
            status, text, errors = turn(verb, "direct")
            assert status == 1 and "The stream was cut before its end" in errors, (status, text, errors)


def finish(suite, skip=False):
    failed = 0
    if skip:
        _cases.clear()
    for what, test in _cases:
        try:
            test()
            print(f"ok   {suite}: {what}", flush=True)
        except Exception as error:
            failed += 1
            at = traceback.extract_tb(error.__traceback__)[-1]
            told = " ".join(str(error).split())
            print(f"FAIL {suite}: {what}: {type(error).__name__} {told} ({at.name}:{at.lineno} `{at.line}`)", flush=True)
    print(f"{suite}: {len(_cases) - failed} passed, {failed} failed", flush=True)
    sys.exit(1 if failed else 0)

"""A minimal test runner: mark each test with @case("description"), then call finish("suite").

A description that begins with [plain], [stream], [failover], [429] or [cut] counts in that column of the table
that lab.py prints.
`zap_url`, `mocks` and `total` tell about one of the CASES that lab.py has started.
"""
import contextlib, json, os, re, signal, subprocess, sys, traceback, urllib.request

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


def rejected(url, reason):
    """The number of requests that the Zap at `url` has refused for `reason`."""
    return int(re.search(rf'zap_rejected_total{{reason="{reason}"}} (\d+)', fetch(url + "/metrics"))[1])


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

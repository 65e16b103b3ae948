"""A minimal test runner: mark each test with @case("description"), then call finish("suite").

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

#!/usr/bin/env python3
"""Starts a Zap instance with mock providers for each group of cases that would disturb the others, and runs the suites.

Environment of a suite: ZAP_<CASE> is the base URL of an instance, MOCKS_<CASE> are the URLs of its providers.
Prints a table of the cases that each client must pass; the last line is the total of all suites: `N passed, N failed`.
"""
import os, pathlib, re, signal, socket, subprocess, sys, tempfile, time
from provider import Provider

HERE = pathlib.Path(__file__).resolve().parent
REPO = HERE.parent.parent
SUITE_SECS = 300
# A client that looks for a host outside this machine asks a proxy that does not exist.
OFFLINE = {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
COLUMNS = "plain", "stream", "tools", "failover", "429", "cut"
NEVER_EJECT = "failure_threshold = 1000\n"  # belongs to [health], which config() has begun
KEYS = """[[client_keys]]
name = "team"
key = "team-key"
[[client_keys]]
name = "few-tokens"
key = "few-tokens-key"
tokens_per_minute = 30
"""
# name: (names of the running providers, extra configuration)
CASES = {
    "MAIN": (["alpha", "beta"], ""),
    "LIMIT": (["alpha"], "[rate_limit]\nrequests_per_minute = 5\n"),
    "COOL": (["alpha", "beta"], ""),
    "ONCE": (["alpha", "beta"], ""),
    "FAIL": (["alpha", "beta"], ""),
    "DEAD": ([], ""),
    "CUT": (["alpha"], NEVER_EJECT),
    "ERROR": (["alpha", "beta"], NEVER_EJECT + """[retry]
max_retries = 1
budget_percent = 100
[models.alone]
targets = [{ backend = "alpha", model = "error:503" }]
[models.alone-by-name]
targets = [{ backend = "alpha", model = "error:overloaded" }]
[models.first]
targets = [{ backend = "alpha", model = "error:503" }, { backend = "beta", model = "big", priority = 1 }]
[models.late]
targets = [{ backend = "alpha", model = "late-error:503" }, { backend = "beta", model = "big", priority = 1 }]
"""),
    "SHORT": (["alpha"], ""),
    "SLOW": (["alpha"], ""),
    "NGINX": (["alpha"], ""),  # ZAP_NGINX is the URL of an nginx in front of Zap
    "MONEY": (["alpha"], """[[client_keys]]
name = "few-tokens"
key = "few-tokens-key"
tokens_per_minute = 40
[[client_keys]]
name = "little-money"
key = "little-money-key"
budget = { usd = 0.1, per = "month" }
"""),
    "MESSAGES": (["alpha", "beta"], NEVER_EJECT + KEYS + """models = ["m-1"]
[models.claude]
targets = [{ backend = "alpha", model = "status:503" }, { backend = "beta", model = "claude-own", priority = 1 }]
"""),
    "SDK": (["alpha"], NEVER_EJECT + KEYS),
    "AGENT": (["alpha", "beta"], NEVER_EJECT + """[retry]
budget_percent = 100
[rate_limit]
requests_per_minute = 1000
[[client_keys]]
name = "team"
key = "team-key"
models = ["direct", "busy", "broken"]
tokens_per_minute = 10000000
budget = { usd = 1000, per = "month" }
[[client_keys]]
name = "one-request"
key = "one-request-key"
requests_per_minute = 1
[[client_keys]]
name = "few-tokens"
key = "few-tokens-key"
tokens_per_minute = 30
[models.direct]
targets = [{ backend = "alpha", model = "m-1" }]
[models.unused]
targets = [{ backend = "alpha", model = "m-3" }]
[models.busy]
targets = [{ backend = "alpha", model = "status:503" }, { backend = "beta", model = "m-2", priority = 1 }]
[models.broken]
targets = [{ backend = "alpha", model = "drop" }, { backend = "beta", model = "m-2", priority = 1 }]
"""),
    "ROUTES": (["alpha", "beta"], """[[client_keys]]
name = "team"
key = "team-key"
models = ["smart", "meta/*"]
[[client_keys]]
name = "all"
key = "all-key"
[models.smart]
targets = [{ backend = "alpha", model = "status:503" }, { backend = "beta", model = "big", priority = 1 }]
"""),
}
# Models that the backends of a case serve in addition to their default model.
SERVES = {
    "MESSAGES": {name: 'protocols = ["openai", "anthropic"]' for name in ("alpha", "beta")},
    "AGENT": {name: 'protocols = ["openai", "anthropic"]\nprices = { "*" = { input = 1, output = 1 } }'
              for name in ("alpha", "beta")},
    "MONEY": {"alpha": 'prices = { "*" = { input = 1000, output = 10000 } }'},
    "ROUTES": {"alpha": 'models = ["meta/llama"]', "beta": 'models = { "meta/llama" = "llama-of-beta", other = "o" }'},
}
OPENAI = [name for name in CASES if name not in ("MESSAGES", "SDK", "AGENT")]
# name: (command, names of its cases)
SUITES = {
    "openai-python": ([sys.executable, "test_python.py"], OPENAI),
    "openai-node": (["node", "test_node.mjs"], OPENAI),
    "anthropic": ([sys.executable, "test_anthropic.py"], ["MESSAGES"]),
    "llm": ([sys.executable, "test_llm.py"], ["SDK"]),
    "langchain-openai": ([sys.executable, "test_langchain.py"], ["SDK"]),
    "pydantic-ai": ([sys.executable, "test_pydantic_ai.py"], ["SDK"]),
    "litellm": ([sys.executable, "test_litellm.py"], ["SDK"]),
    "ai-sdk": (["node", "test_ai.mjs"], ["SDK"]),
    "codex": ([sys.executable, "test_codex.py"], ["AGENT"]),
    "claude-code": ([sys.executable, "test_claude.py"], ["AGENT"]),
}
# These start what they need by themselves.
OWN = {"browser": [sys.executable, "test_browser.py"], "real-llm": [sys.executable, "test_real_llm.py"]}


def zap_binary():
    if os.environ.get("ZAP_BIN"):
        return os.environ["ZAP_BIN"]
    built = [p for p in (REPO / "target/release/zap", REPO / "target/debug/zap") if p.exists()]
    return str(built[0]) if built else "target/debug/zap"


def dead_port():
    """A bound socket that does not listen: its port stays reserved, and every connection is refused."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock, sock.getsockname()[1]


def config(backends, extra=""):
    head = """[server]
host = "127.0.0.1"
port = 0
workers = 2
drain_secs = 1
[queue]
max_wait_secs = 1
[health]
interval_secs = 1
"""
    return head + extra + "".join(
        "[[backends]]\nweight = 1\n" + b.pop("more", "") + "".join(f'{key} = "{value}"\n' for key, value in b.items())
        for b in backends)


class Process:
    """A process whose output goes to a file in `folder`."""

    def __init__(self, command, folder, **options):
        self.log = folder / "stderr"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options)

    def tail(self, lines=15):
        return "\n".join("    " + line for line in self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Zap(Process):
    """A Zap process. The constructor waits until it listens at `url`."""

    def __init__(self, text, folder):
        folder.mkdir(mode=0o700)
        file = folder / "config.toml"
        file.write_text(text)
        file.chmod(0o600)
        super().__init__([zap_binary(), "--config", str(file)], folder)
        try:
            self.url = f"http://127.0.0.1:{self.wait_for_port()}"
        except BaseException:
            self.close()
            raise

    def wait_for_port(self, secs=15):
        deadline = time.monotonic() + secs
        while time.monotonic() < deadline:
            if found := re.search(r"listening on (?:http://)?127\.0\.0\.1:(\d+)\b", self.log.read_text(errors="replace")):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"Zap does not listen (exit {self.process.poll()}):\n{self.tail()}")


class Nginx(Process):
    """An nginx process at `url` that passes everything to `target`, with nginx's default settings for a proxy."""

    def __init__(self, target, folder):
        folder.mkdir(mode=0o700)
        temp = "".join(f" {kind}_temp_path {kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        with socket.create_server(("127.0.0.1", 0)) as sock:  # nginx inherits the socket, so the port stays reserved
            address = f"127.0.0.1:{sock.getsockname()[1]}"
            (folder / "nginx.conf").write_text(f"""daemon off; pid pid; events {{ }}
http {{ access_log off;{temp} server {{ listen {address}; location / {{ proxy_pass {target}; }} }} }}
""")
            super().__init__(["nginx", "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"], folder,
                             pass_fds=[sock.fileno()], env={**os.environ, "NGINX": f"{sock.fileno()};"})
        self.url = f"http://{address}"


def build(cases, folder, opened):
    """Starts an instance for each of `cases`; returns the suite's environment. Adds each resource to `opened` at once."""
    env = dict(OFFLINE)
    for case in cases:
        names, extra = CASES[case]
        mocks = []
        for name in names:
            mocks.append(Provider(name))
            opened.append(mocks[-1])
        backends = [dict(name=m.name, url=m.url, api_key=f"key-of-{m.name}", default_model=f"default-{m.name}",
                         more=SERVES.get(case, {}).get(m.name, "") + "\n") for m in mocks]
        if not mocks:
            for name in ("gone", "lost"):
                sock, port = dead_port()
                opened.append(sock)
                backends.append(dict(name=name, url=f"http://127.0.0.1:{port}", default_model="none"))
        zap = Zap(config(backends, extra), folder / case.lower())
        opened.append(zap)
        if case == "NGINX":
            opened.append(Nginx(zap.url, folder / "nginx-itself"))
        env[f"ZAP_{case}"], env[f"MOCKS_{case}"] = opened[-1].url, " ".join(m.url for m in mocks)
    return env


def run_suite(name, command, env):
    """Returns (passed, failed) from the suite's last line, and the outcome of each column of the table as a dict.

    A suite that ends early adds one failure, and fails every column that it has not passed.
    """
    print(f"== {name}", flush=True)
    child = subprocess.Popen(command, env={**os.environ, "NO_PROXY": "127.0.0.1", **env}, cwd=HERE,
                             stdout=subprocess.PIPE, text=True, start_new_session=True)
    # End a suite that hangs. SIGTERM lets it stop the processes that it started.
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child.pid, signal.SIGTERM))
    signal.alarm(SUITE_SECS)
    passed = failed = 0
    reported, cells = False, {}
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
            if found := re.match(rf"(ok  |FAIL) {name}: \[(\w+)\]", line):
                cells[found[2]] = "failed" if found[1] == "FAIL" else cells.get(found[2], "ok")
            if counts := re.fullmatch(rf"{name}: (\d+) passed, (\d+) failed\n", line):
                passed, failed, reported = int(counts[1]), int(counts[2]), True
        status = child.wait()
    finally:
        signal.alarm(0)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
    if not reported or (status != 0 and failed == 0):
        print(f"FAIL {name}: ended early with {status}", flush=True)
        failed += 1
        cells = {**dict.fromkeys(COLUMNS, "failed"), **cells}
    return passed, failed, cells


def print_table(rows):
    width = max(map(len, rows), default=0)
    print("\n== the clients\n" + "  ".join(["client".ljust(width), *(column.ljust(8) for column in COLUMNS)]).rstrip())
    for name, cells in rows.items():
        print("  ".join([name.ljust(width), *(cells.get(column, "-").ljust(8) for column in COLUMNS)]).rstrip())
    print()


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not os.access(zap_binary(), os.X_OK):
        print(f"FAIL no binary {zap_binary()}: run cargo build, or set ZAP_BIN\n0 passed, 1 failed")
        return 1
    passed = failed = 0
    rows = {}
    for name, (command, cases) in SUITES.items():
        opened = []
        with tempfile.TemporaryDirectory(prefix="zap-clients.") as folder:
            try:
                p, f, rows[name] = run_suite(name, command, build(cases, pathlib.Path(folder), opened))
                for process in (o for o in opened if isinstance(o, Process)):
                    if process.process.poll() is not None:
                        print(f"FAIL {name}: a process of {process.log.parent.name} ended with {process.process.returncode}")
                        f += 1
                    if f:
                        print(f"  last log lines of {process.log.parent.name}:\n{process.tail()}")
            except RuntimeError as error:
                print(f"FAIL {name}: {error}")
                p, f, rows[name] = 0, 1, dict.fromkeys(COLUMNS, "failed")
            finally:
                for resource in reversed(opened):
                    resource.close()
        passed, failed = passed + p, failed + f
    for name, command in OWN.items():
        p, f, rows[name] = run_suite(name, command, {})
        passed, failed = passed + p, failed + f
    print_table(rows)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())

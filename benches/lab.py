"""Shared parts of the benchmark scripts: the gauge's provider and load, gateways pinned to a core, and their CPU time.

The gauge is `benches/gauge`: `measure.py`, `peers/` and the sources of `load` and `upstream`. Cargo builds both on
first use, in `benches/gauge/target` or $GAUGE_TARGET."""

import contextlib, json, os, shlex, signal, socket, statistics, subprocess, time

HERE = os.path.dirname(os.path.abspath(__file__))
GAUGE = os.path.join(HERE, "gauge")
BUILT = os.path.abspath(os.environ.get("GAUGE_TARGET", os.path.join(GAUGE, "target")))
ZAP = os.path.abspath(os.environ.get("ZAP_BIN", os.path.join(HERE, "..", "target", "release", "zap")))
PROVIDERS = (9301, 9302)
ZAP_PORT = 9412
OTHERS, GATEWAY = "0", "1"  # cores

# One turn of a conversation, with quotes, escapes and non-ASCII text, as in the gauge's own bodies.
TURN = 'The quick brown fox jumps over the lazy dog; \\"quoted\\", a \\n newline and some é中 text. '


def build():
    if not os.path.exists(ZAP):
        raise SystemExit(f"{ZAP} does not exist: run cargo build --release")
    # A provider left over from an earlier run would respond in place of the one of this run.
    for port in (*PROVIDERS, ZAP_PORT, 9401, 9402):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            raise SystemExit(f"port {port} is in use: stop the process that listens there")
    env = {**os.environ, "CARGO_TARGET_DIR": BUILT}
    subprocess.run(["cargo", "build", "--release", "--locked", "--quiet"], cwd=GAUGE, check=True, env=env)


def config(folder, name="zap.toml", port=ZAP_PORT, workers=1, urls=None, more="", settings="", weights=(2, 1)):
    """Writes a configuration of Zap with every feature on; returns the command that runs Zap with it.

    `more` is added to each backend; `settings` adds further tables."""
    urls = urls or [f"http://127.0.0.1:{p}" for p in PROVIDERS]
    path = os.path.join(folder, name)
    with open(path, "w") as file:
        file.write(
            f'[server]\nhost = "127.0.0.1"\nport = {port}\nworkers = {workers}\nmax_connections = 20000\n'
            "[queue]\nmax_in_flight = 10000\n[log]\nrequests = false\n"
            f"[rate_limit]\nrequests_per_minute = 4000000000\nmax_keys = 2000000\n{settings}"
        )
        for i, url in enumerate(urls):
            file.write(
                f'[[backends]]\nname = "b{i}"\nurl = "{url}"\nweight = {weights[i % 2]}\napi_key = "sk-upstream"\n'
                f'default_model = "mock"\nhealth_path = "/v1/models"\n{more}'
            )
    return f"{ZAP} --config {path}"


def body(folder, size):
    """Writes a conversation of about `size` bytes to a file; returns its path."""
    path = os.path.join(folder, f"{size}.json")
    text = TURN * max(1, min(8, size // 5000))
    turns = max(1, (size - 100) // (len(text.encode()) + 30))
    messages = ('{"role":"%s","content":"%s"}' % (("user", "assistant")[i % 2], text) for i in range(turns))
    with open(path, "w") as file:
        file.write('{"messages":[%s],"temperature":0.7,"max_tokens":256,"model":"mock"}' % ",".join(messages))
    return path


def wait_port(port, process):
    end = time.time() + 30
    while time.time() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        time.sleep(0.002)
    raise RuntimeError(f"nothing listens on {port}")


@contextlib.contextmanager
def running(command, port, core):
    pinned = ["taskset", "-c", core] + shlex.split(command)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(pinned, start_new_session=True, **quiet)
    try:
        wait_port(port, process)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def providers(options=()):
    command = " ".join([f"{BUILT}/release/upstream", *map(str, PROVIDERS), *options])
    return running(command, PROVIDERS[0], OTHERS)


def family(pid):
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{found[-1]}/task"):
                with open(f"/proc/{found[-1]}/task/{task}/children") as file:
                    todo += map(int, file.read().split())
    return found


def cpu(pid):
    """Seconds of user and system time of a process and its children."""
    ticks = 0
    for p in family(pid):
        with contextlib.suppress(OSError), open(f"/proc/{p}/stat") as file:
            ticks += sum(map(int, file.read().rsplit(")", 1)[1].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def rss(pid):
    kib = 0
    for p in family(pid):
        with contextlib.suppress(OSError), open(f"/proc/{p}/status") as file:
            kib += next((int(line.split()[1]) for line in file if line.startswith("VmRSS")), 0)
    return kib


def load(port, options, secs, core=OTHERS, warm=1.0, before=()):
    command = [*before, "taskset", "-c", core, f"{BUILT}/release/load", str(port), "--secs", str(secs), "--warm", str(warm)]
    return subprocess.Popen(command + list(map(str, options)), stdout=subprocess.PIPE, text=True)


def measure(process, port, options, secs, unit="request", warm=1.0):
    """Loads a gateway; returns microseconds of CPU per unit of work and the report of the load."""
    loading = load(port, options, secs, warm=warm)
    time.sleep(warm + 0.1)
    before, since = cpu(process.pid), time.time()
    time.sleep(secs - 0.3)
    used, span = cpu(process.pid) - before, time.time() - since
    report = json.loads(loading.communicate(timeout=120)[0])
    per_second = report["chunks_per_s"] if unit == "chunk" else report["rps"]
    bad = report["bad"] + report["errors"] + report["truncated"]
    return {"cpu_us": used / span / max(per_second, 1e-9) * 1e6, "per_s": per_second, "bad": bad, "report": report}


def median(values):
    return statistics.median(values)

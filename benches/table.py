#!/usr/bin/env python3
"""The table of figures: nginx, HAProxy and Zap with the same task, each figure beside its target.

  benches/table.py [--rounds 5] [--secs 4] [--cases json-1k,…] [--after 60]
                   [--parts cases,bound,first,memory,tls,listener,exact,syscalls,workers,spread,process]

nginx and HAProxy forward and insert the key; Zap also has every other feature on. Each has one worker. Ratios are of
medians of one run; `bound` and `memory` run 3 rounds at most. With 5 rounds the table takes 45 minutes.

From a fresh clone, on Debian, with two free cores and a limit of 20,000 open files (`ulimit -n`):

  apt-get install nginx haproxy valgrind strace openssl binutils
  cargo build --release
  benches/table.py"""

import argparse, contextlib, json, math, os, re, shutil, signal, socket, subprocess, sys, tempfile, time
import lab

PEERS = os.path.join(lab.GAUGE, "peers")
NGINX = f"nginx -c {PEERS}/nginx.conf"
HAPROXY = f"haproxy -f {PEERS}/haproxy.cfg"

# Row, case, figure, what Zap is compared with, target.
CASES = [
    ("json-1k: CPU/request", "json-1k", "cpu_us", "better", 1.00),
    ("json-c256: CPU/request", "json-c256", "cpu_us", "better", 1.05),
    ("json-100k: CPU/request", "json-100k", "cpu_us", "better", 1.00),
    ("keys: CPU/request, of Zap's json-1k", "keys", "cpu_us", "json-1k", 1.05),
    ("rate: p99", "rate", "p99", "haproxy", 1.0),
    ("stream: CPU/chunk", "stream", "cpu_us", "haproxy", 1.00),
    ("stream: p99 delay of a chunk", "stream", "chunk99", "haproxy", 1.0),
    ("burst: CPU/chunk", "burst", "cpu_us", "haproxy", 1.15),
    ("idle: KiB/stream", "idle", "kb_conn", None, 17),
    ("silent: KiB/connection", "silent", "kb_conn", None, 2),
]

BOUNDS = (1, 5, 10)  # limits of the added p99, in ms
RATES = (500, 100_000)  # requests/s: the step and the upper end of the search


def row(what, nginx, haproxy, zap, ratio, target, met=False):
    cells = [f"{v:,.2f}" if isinstance(v, float) else str(v) for v in (nginx, haproxy, zap)]
    figure = "" if ratio is None else f"{ratio:.2f}"
    judged = "" if target == "none" else "met" if met else "not met"
    print(f"| {what} | {' | '.join(cells)} | {figure} | {target} | {judged} |", flush=True)


def gateways(folder):
    """The port and command of each gateway, in the order of the columns."""
    return {"nginx": (9401, NGINX), "haproxy": (9402, HAPROXY), "zap": (lab.ZAP_PORT, lab.config(folder))}


def cases(folder, args):
    out = os.path.join(folder, "cases.json")
    command = [sys.executable, os.path.join(lab.GAUGE, "measure.py"), "--json", out]
    command += ["--rounds", str(args.rounds), "--secs", str(args.secs), "--cases", args.cases]
    command += [f"nginx=9401:{NGINX}", f"haproxy=9402:{HAPROXY}", f"zap={lab.ZAP_PORT}:{lab.config(folder)}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    with open(out) as file:
        found = json.load(file)
    for what, case, figure, against, target in CASES:
        if case not in found or against not in (*found, "better", "haproxy", None):
            continue
        nginx, haproxy, zap = (found[case][name][figure] for name in ("nginx", "haproxy", "zap"))
        other = {"better": min(nginx, haproxy), "haproxy": haproxy, None: 1}
        ratio = zap / (other[against] if against in other else found[against]["zap"]["cpu_us"])
        row(what, nginx, haproxy, zap, ratio if against else None, target, ratio <= target)
        if bad := found[case]["zap"]["bad"]:
            print(f"# {what}: {bad:.0f} bad responses from Zap", file=sys.stderr)


def open_loop(port, options, rate):
    """The p99 in ms at a request rate; infinite if a request fails or the rate is not reached."""
    report = json.loads(lab.load(port, [*options, "--rate", rate, "--sleep"], 1, warm=0.5).communicate(timeout=60)[0])
    failed = report["bad"] + report["errors"] + report["truncated"]
    return math.inf if failed or report["rps"] < 0.98 * rate else report["latency_us"]["p99"] / 1000


class Direct:
    """The p99 of the provider alone at a rate, with the load on the same core as when a gateway is measured."""

    def __init__(self, options):
        self.options, self.known = options, {}

    def p99(self, rate):
        if rate not in self.known:
            self.known[rate] = min(open_loop(lab.PROVIDERS[0], self.options, rate) for _ in range(2))
            if self.known[rate] == math.inf:
                print(f"# bound: the provider alone does not reach {rate} requests/s", file=sys.stderr)
        return self.known[rate]


def fastest(port, options, direct):
    """For each bound the highest rate whose p99 exceeds the provider's by at most the bound; found by bisection."""
    added = {}

    def holds(rate, bound):
        tries = added.setdefault(rate, [])
        # Repeat a missed rate once: a single pause of the machine must not halve the result.
        while len(tries) < 2 and not any(ms <= bound for ms in tries):
            alone = direct.p99(rate)
            tries.append(open_loop(port, options, rate) - alone if alone < math.inf else math.inf)
        return min(tries) <= bound

    rates, top = {}, RATES[1] // RATES[0] + 1
    for bound in sorted(BOUNDS, reverse=True):
        # A rate that meets a tighter bound meets a looser one too, so the next search ends at this result.
        low = 0
        while top - low > 1:
            middle = (low + top) // 2
            low, top = (middle, top) if holds(middle * RATES[0], bound) else (low, middle)
        rates[bound], top = low * RATES[0], low + 1
    return rates


def bound(folder, args):
    """Requests/s of each gateway at which its p99 exceeds the provider's own by at most a bound."""
    options = ["--conns", 64, "--body", lab.body(folder, 1000)]
    found = {name: [] for name in gateways(folder)}
    for _ in range(min(args.rounds, 3)):
        with lab.providers(["--body-bytes", "700"]):
            direct = Direct(options)
            for name, (port, command) in gateways(folder).items():
                with lab.running(command, port, lab.GATEWAY):
                    time.sleep(1)
                    found[name].append(fastest(port, options, direct))
    for ms in BOUNDS:
        nginx, haproxy, zap = (lab.median(rates[ms] for rates in found[name]) for name in found)
        better = max(nginx, haproxy)
        cells = [f"{v:,.0f}" for v in (nginx, haproxy, zap)]
        row(f"requests/s at {ms} ms of added p99, higher is better", *cells, zap / better if better else None, "none")


def first(folder, args):
    """The time that a gateway adds before the first event of a stream, with streams that keep starting and ending."""
    options = ["--conns", 500, "--stream"]
    found = {name: {"p50": [], "p99": []} for name in gateways(folder)}

    def ask(name, port):
        loading = lab.load(port, options, args.secs, warm=2)
        report = json.loads(loading.communicate(timeout=120)[0])
        if failed := report["bad"] + report["errors"] + report["truncated"]:
            print(f"# first event, {name}: {failed} failed", file=sys.stderr)
        return report["ttft_us"]

    for _ in range(args.rounds):
        with lab.providers(["--chunks", "20", "--chunk-bytes", "220", "--interval-ms", "20"]):
            alone = ask("direct", lab.PROVIDERS[0])
            for name, (port, command) in gateways(folder).items():
                with lab.running(command, port, lab.GATEWAY):
                    time.sleep(1)
                    timed = ask(name, port)
                for figure, values in found[name].items():
                    values.append(timed[figure] - alone[figure])
    for figure in ("p50", "p99"):
        nginx, haproxy, zap = (lab.median(found[name][figure]) for name in found)
        better = min(nginx, haproxy)
        row(f"added time to the first event: {figure}, us", nginx, haproxy, zap, zap / better if better > 0 else None, "none")


def memory(folder, args):
    """RSS of a gateway and its children at rest, during a burst of large bodies and streams, and some time after it.

    While one gateway waits for its last reading, the next one has its burst."""
    streams = ["--conns", 1000, "--stream"]
    bodies = ["--conns", 40, "--body", lab.body(folder, 4 * 2**20)]
    found = {name: {"rest": [], "plateau": [], "after": []} for name in gateways(folder)}

    def burst(name, port, pid):
        loads = [lab.load(port, streams, args.secs + 1, warm=3)]
        time.sleep(3)  # all streams are open now and outlast the burst
        loads.append(lab.load(port, bodies, args.secs, warm=1))
        time.sleep(1)
        end, readings = time.time() + args.secs - 0.3, []
        while time.time() < end:
            readings.append(lab.rss(pid))
            time.sleep(0.1)
        for loading in loads:
            report = json.loads(loading.communicate(timeout=120)[0])
            if failed := report["bad"] + report["errors"] + report["truncated"]:
                print(f"# memory, {name}: {failed} failed: {report}", file=sys.stderr)
        return lab.median(readings)

    for _ in range(min(args.rounds, 3)):
        with contextlib.ExitStack() as stack:
            stack.enter_context(lab.providers(["--body-bytes", "700", "--chunks", "3000", "--chunk-bytes", "220", "--interval-ms", "20"]))
            due = []
            for name, (port, command) in gateways(folder).items():
                process = stack.enter_context(lab.running(command, port, lab.GATEWAY))
                time.sleep(1.5)
                found[name]["rest"].append(lab.rss(process.pid))
                found[name]["plateau"].append(burst(name, port, process.pid))
                due.append((name, process.pid, time.time() + args.after))
            for name, pid, at in due:
                time.sleep(max(0, at - time.time()))
                found[name]["after"].append(lab.rss(pid))
    mib = {name: {at: lab.median(values) / 1024 for at, values in figures.items()} for name, figures in found.items()}

    def cells(at):
        return (figures[at] for figures in mib.values())

    kept = mib["zap"]["after"] / mib["zap"]["rest"]
    row("memory: RSS at rest, MiB", *cells("rest"), None, "none")
    row("memory: RSS with 40 bodies of 4 MiB and 1,000 streams, MiB", *cells("plateau"), None, "none")
    row(f"memory: RSS {args.after:.0f} s after them, MiB; ratio to rest", *cells("after"), kept, "1.50", kept <= 1.5)


def haproxy_info(path):
    """The values of HAProxy's `show info`, read from its socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.sendall(b"show info\n")
        text = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)


def certificate(folder):
    """Makes a certificate with a key on P-256: `pem.crt`, `pem.key`, and both in `pem`. Returns the path of the last."""
    pem = os.path.join(folder, "pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        + ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE", "-keyout", pem + ".key", "-out", pem + ".crt"],
        check=True, capture_output=True,
    )
    with open(pem, "w") as file:
        file.write(open(pem + ".crt").read() + open(pem + ".key").read())
    return pem


# One request and one handshake cost the same for all only if all use the same cipher: the client offers no other.
SUITE = "TLS_AES_128_GCM_SHA256"


def listener(folder, args):
    """CPU with TLS clients, at one rate for all, and full handshakes: one certificate, TLS 1.3, one cipher.

    The load speaks plain HTTP to an extra HAProxy on its core, which speaks TLS to the gateways. The handshakes are those
    of `openssl s_time`; what a core could do is worked out from the CPU time of one, since the client is the slower."""
    pem = certificate(folder)
    with open(os.path.join(PEERS, "haproxy.cfg")) as file, open(os.path.join(folder, "haproxy.cfg"), "w") as to:
        to.write(file.read().replace("bind 127.0.0.1:9402", f"bind 127.0.0.1:9402 ssl crt {pem} ssl-min-ver TLSv1.3"))
    with open(os.path.join(PEERS, "nginx.conf")) as file, open(os.path.join(folder, "nginx.conf"), "w") as to:
        secure = f"listen 127.0.0.1:9401 ssl backlog=65535; ssl_certificate {pem}.crt; ssl_certificate_key {pem}.key; ssl_protocols TLSv1.3;"
        to.write(file.read().replace("listen 127.0.0.1:9401 backlog=65535;", secure))
    zap = lab.config(folder, "listener.toml", settings=f'[[server.tls]]\ncert = "{pem}.crt"\nkey = "{pem}.key"\n')
    gateways = {
        "nginx": (9401, f"nginx -c {folder}/nginx.conf"),
        "haproxy": (9402, f"haproxy -f {folder}/haproxy.cfg"),
        "zap": (lab.ZAP_PORT, zap),
    }
    fronts = {name: str(9321 + i) for i, name in enumerate(gateways)}
    with open(os.path.join(folder, "front.cfg"), "w") as file:
        file.write(f"global\n  nbthread 1\n  maxconn 9000\n  ssl-default-server-ciphersuites {SUITE}\ndefaults\n  mode http\n")
        file.write("  timeout connect 5s\n  timeout client 300s\n  timeout server 300s\n  option http-no-delay\n")
        for name, (port, _) in gateways.items():
            file.write(f"listen {name}\n  bind 127.0.0.1:{fronts[name]}\n  server s 127.0.0.1:{port} ssl verify none\n")
    loads = {
        "request": (["--body-bytes", "700"], ["--conns", 64, "--body", lab.body(folder, 1000), "--rate", 5000], 1),
        "chunk": (["--chunks", "100", "--chunk-bytes", "220", "--interval-ms", "20"], ["--conns", 300, "--stream"], 3),
    }
    figures = {(unit, name): [] for unit in (*loads, "handshake") for name in gateways}
    for unit, (upstream, options, warm) in loads.items():
        for _ in range(args.rounds):
            for name, (port, command) in gateways.items():
                with lab.providers(upstream), lab.running(f"haproxy -f {folder}/front.cfg", int(fronts[name]), lab.OTHERS):
                    with lab.running(command, port, lab.GATEWAY) as process:
                        time.sleep(1)
                        found = lab.measure(process, int(fronts[name]), options, args.secs, unit, warm)
                        figures[unit, name].append(found["cpu_us"])
                        if found["bad"]:
                            print(f"# TLS listener, {unit}, {name}: {found['bad']} bad", file=sys.stderr)
    for _ in range(args.rounds):
        for name, (port, command) in gateways.items():
            with lab.providers(), lab.running(command, port, lab.GATEWAY) as process:
                time.sleep(1)
                ask = ["openssl", "s_time", "-connect", f"127.0.0.1:{port}", "-new", "-tls1_3", "-ciphersuites", SUITE]
                before = lab.cpu(process.pid)
                made = subprocess.run(["taskset", "-c", lab.OTHERS, *ask, "-time", str(math.ceil(args.secs))], capture_output=True, text=True)
                used = lab.cpu(process.pid) - before
                count = int(re.search(r"(\d+) connections in \d+ real seconds", made.stdout)[1])
                figures["handshake", name].append(count / used)
    for unit in loads:
        nginx, haproxy, zap = (lab.median(figures[unit, name]) for name in gateways)
        ratio = zap / min(nginx, haproxy)
        row(f"TLS listener: CPU/{unit}, the same rate for all", nginx, haproxy, zap, ratio, "1.00", ratio <= 1)
    nginx, haproxy, zap = (lab.median(figures["handshake", name]) for name in gateways)
    ratio = zap / max(nginx, haproxy)
    row("TLS listener: full handshakes/s of one core, higher is better", nginx, haproxy, zap, ratio, "1.00", ratio >= 1)


def tls(folder, args):
    """CPU and handshakes with TLS upstreams, at one rate for all; an extra HAProxy on the providers' core ends TLS."""
    pem, stats = certificate(folder), os.path.join(folder, "stats")
    plain = [str(p) for p in lab.PROVIDERS]
    secure = ["9311", "9312"]
    with open(os.path.join(folder, "front.cfg"), "w") as file:
        file.write(f"global\n  nbthread 1\n  maxconn 9000\n  stats socket {stats}\ndefaults\n  mode http\n")
        file.write("  timeout connect 5s\n  timeout client 300s\n  timeout server 300s\n  option http-no-delay\n")
        for to, at in zip(plain, secure):
            file.write(f"listen p{at}\n  bind 127.0.0.1:{at} ssl crt {pem}\n  server s 127.0.0.1:{to}\n")
    with open(os.path.join(PEERS, "haproxy.cfg")) as file, open(os.path.join(folder, "haproxy.cfg"), "w") as to:
        text = file.read()
        for a, b in zip(plain, secure):
            text = text.replace(f"127.0.0.1:{a}", f"127.0.0.1:{b} ssl verify required ca-file {pem}.crt")
        to.write(text)
    with open(os.path.join(PEERS, "nginx.conf")) as file, open(os.path.join(folder, "nginx.conf"), "w") as to:
        text = file.read().replace("proxy_pass http://llm;", f"proxy_pass https://llm; proxy_ssl_verify on; proxy_ssl_name 127.0.0.1; proxy_ssl_trusted_certificate {pem}.crt;")
        for a, b in zip(plain, secure):
            text = text.replace(f"127.0.0.1:{a}", f"127.0.0.1:{b}")
        to.write(text)
    zap = lab.config(folder, "tls.toml", urls=[f"https://127.0.0.1:{p}" for p in secure], more=f'ca_file = "{pem}.crt"\n')
    gateways = {
        "nginx": (9401, f"nginx -c {folder}/nginx.conf"),
        "haproxy": (9402, f"haproxy -f {folder}/haproxy.cfg"),
        "zap": (lab.ZAP_PORT, zap),
    }
    json_load = ["--conns", 64, "--body", lab.body(folder, 1000), "--rate", 5000]
    loads = {
        "request": (["--body-bytes", "700"], json_load, 1),
        "chunk": (["--chunks", "100", "--chunk-bytes", "220", "--interval-ms", "20"], ["--conns", 300, "--stream"], 3),
    }
    figures = {(unit, name): [] for unit in loads for name in gateways}
    handshakes = {name: [] for name in gateways}
    for unit, (upstream, options, warm) in loads.items():
        for _ in range(args.rounds):
            for name, (port, command) in gateways.items():
                with lab.providers(upstream), lab.running(f"haproxy -f {folder}/front.cfg", int(secure[0]), lab.OTHERS):
                    with lab.running(command, port, lab.GATEWAY) as process:
                        time.sleep(1)
                        before = int(haproxy_info(stats)["CumSslConns"])
                        found = lab.measure(process, port, options, args.secs, unit, warm)
                        figures[unit, name].append(found["cpu_us"])
                        if found["bad"]:
                            print(f"# TLS, {unit}, {name}: {found['bad']} bad", file=sys.stderr)
                        if unit == "request":
                            made = int(haproxy_info(stats)["CumSslConns"]) - before
                            handshakes[name].append(made / found["per_s"] / (args.secs + warm) * 10_000)
    for unit in loads:
        nginx, haproxy, zap = (lab.median(figures[unit, name]) for name in gateways)
        ratio = zap / min(nginx, haproxy)
        row(f"TLS upstream: CPU/{unit}, the same rate for all", nginx, haproxy, zap, ratio, "1.00", ratio <= 1)
    nginx, haproxy, zap = (lab.median(handshakes[name]) for name in gateways)
    row("TLS upstream: handshakes per 10,000 requests", nginx, haproxy, zap, None, "the fewest", zap <= 1.05 * min(nginx, haproxy))


def exact(folder, args):
    text = subprocess.run([sys.executable, os.path.join(lab.HERE, "exact.py")], capture_output=True, text=True).stdout
    known = dict(re.findall(r"(\w+ \w+)\s+([\d.]+) a request", text))
    instructions = float(known["json instructions"])
    row("json-1k: user instructions/request", "", 38_000.0, instructions, None, "28,000", instructions <= 28_000)


def syscalls(folder, args):
    """System calls per request, counted for 2 s; both counts come from strace, so its overhead does not matter."""
    found = []
    for port, command in ((9401, NGINX), (9402, HAPROXY), (lab.ZAP_PORT, lab.config(folder))):
        with lab.providers(["--body-bytes", "700"]), lab.running(command, port, lab.GATEWAY) as process:
            loading = lab.load(port, ["--conns", 64, "--body", lab.body(folder, 1000)], 6)
            time.sleep(2)
            out = os.path.join(folder, "strace")
            attach = [x for p in lab.family(process.pid) for x in ("-p", str(p))]
            tracing = subprocess.Popen(["strace", "-f", "-c", "-o", out, *attach], stderr=subprocess.DEVNULL)
            time.sleep(2)
            tracing.send_signal(signal.SIGINT)
            tracing.wait()
            loading.communicate()
        calls = {line.split()[-1]: int(line.split()[3]) for line in open(out) if re.match(r"\s*\d+\.\d+\s", line)}
        total = calls.pop("total")
        # A request causes two writes: the request to the provider and the response to the client.
        written = sum(calls.get(name, 0) for name in ("writev", "write", "sendto", "sendmsg"))
        found.append(total / (written / 2))
    row("json-1k: syscalls/request", *found, None, "6.5", found[2] <= 6.5)


def workers(folder, args):
    """CPU per request with one worker and with two, at a rate that leaves both cores idle time; nothing is pinned."""
    figures = {1: [], 2: []}
    options = ["--conns", 8, "--body", lab.body(folder, 1000), "--rate", 5000]
    for _ in range(args.rounds):
        for n, values in figures.items():
            command = lab.config(folder, f"w{n}.toml", workers=n)
            with lab.providers(["--body-bytes", "700"]), lab.running(command, lab.ZAP_PORT, "0,1") as process:
                values.append(lab.measure(process, lab.ZAP_PORT, options, args.secs)["cpu_us"])
    one, two = lab.median(figures[1]), lab.median(figures[2])
    row("2 workers, 8 connections: CPU/request against 1 worker", "", f"1 worker: {one:.2f}", two, two / one, "1.05", two <= 1.05 * one)


def thread_cpu(pid):
    """CPU ticks of each worker thread."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/stat") as file:
            name, rest = file.read().split("(", 1)[1].rsplit(")", 1)
        if name.startswith("zap-"):
            found.append(sum(map(int, rest.split()[11:13])))
    return found


def reuseport(connections):
    """The larger share of two SO_REUSEPORT listeners, between which the kernel divides connections by a hash."""
    first = socket.socket()
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    first.bind(("127.0.0.1", 0))
    second = socket.socket()
    second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    second.bind(first.getsockname())
    for listener in (first, second):
        listener.listen(64)
        listener.setblocking(False)
    clients = [socket.create_connection(first.getsockname()) for _ in range(connections)]
    taken = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            first.accept()[0].close()
            taken += 1
    for sock in (*clients, first, second):
        sock.close()
    return max(taken, connections - taken) / connections


def spread(folder, args):
    """How evenly 8 busy connections load 2 workers: Zap gives each connection to the worker with the fewest."""
    shares = []
    options = ["--conns", 8, "--body", lab.body(folder, 1000), "--rate", 5000]
    for _ in range(args.rounds):
        with lab.providers(["--body-bytes", "700"]):
            with lab.running(lab.config(folder, "w2.toml", workers=2), lab.ZAP_PORT, "0,1") as process:
                lab.measure(process, lab.ZAP_PORT, options, args.secs)
                ticks = thread_cpu(process.pid)
                shares.append(max(ticks) / sum(ticks))
    kernel = f"SO_REUSEPORT: {sum(reuseport(8) for _ in range(200)) / 200:.2f}"
    share = lab.median(shares)
    row("2 workers, 8 connections: share of the busier", "", kernel, share, None, "0.55", share <= 0.55)


def process(folder, args):
    """The time from exec to a 200 of `/ready`, the RSS at rest, and the size of the stripped binary."""
    command = lab.config(folder).split()
    spans, sizes = [], []
    with lab.providers():
        for _ in range(args.rounds):
            since = time.time()
            zap = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while True:
                with contextlib.suppress(OSError):
                    sock = socket.create_connection(("127.0.0.1", lab.ZAP_PORT), 0.2)
                    sock.sendall(b"GET /ready HTTP/1.1\r\nhost: zap\r\nconnection: close\r\n\r\n")
                    if sock.recv(64).startswith(b"HTTP/1.1 200"):
                        break
            spans.append((time.time() - since) * 1000)
            sizes.append(lab.rss(zap.pid) / 1024)
            zap.terminate()
            zap.wait()
    stripped = os.path.join(folder, "stripped")
    subprocess.run(["strip", "-o", stripped, lab.ZAP], check=True)
    binary = os.path.getsize(stripped) / 2**20
    row("start to ready, ms", "", "", lab.median(spans), None, "50", lab.median(spans) <= 50)
    row("RSS at rest, MiB", "", "", lab.median(sizes), None, "8", lab.median(sizes) <= 8)
    row("stripped binary, MiB", "", "", binary, None, "8", binary <= 8)


def missing(parts):
    """The programs that these parts need and that are not installed."""
    needs = {"tls": ["openssl"], "listener": ["openssl"], "exact": ["valgrind"], "syscalls": ["strace"], "process": ["strip"]}
    tools = [tool for part in parts for tool in needs.get(part, [])]
    if {*parts} & {"cases", "bound", "first", "memory", "tls", "listener", "syscalls"}:
        tools += ["nginx", "haproxy"]
    return [tool for tool in tools if not shutil.which(tool)]


def main():
    parts = {part.__name__: part for part in (cases, bound, first, memory, tls, listener, exact, syscalls, workers, spread, process)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--secs", type=float, default=4)
    parser.add_argument("--after", type=float, default=60, help="seconds from a burst to the last reading of its memory")
    parser.add_argument("--parts", default=",".join(parts))
    parser.add_argument("--cases", default=",".join(dict.fromkeys(case for _, case, *_ in CASES)))
    args = parser.parse_args()
    chosen = args.parts.split(",")
    if unknown := [part for part in chosen if part not in parts]:
        parser.error(f"unknown parts: {', '.join(unknown)}; the parts are {', '.join(parts)}")
    os.environ["PATH"] += ":/usr/sbin"  # where Debian installs nginx and haproxy
    if tools := missing(chosen):
        raise SystemExit(f"not installed: {', '.join(tools)}")
    lab.build()
    print("| figure | nginx | HAProxy | Zap | ratio | target | |\n|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in chosen:
            parts[part](folder, args)


main()

#!/usr/bin/env python3
"""What those who watch Zap cost its clients: 50 open status pages and a scrape a second, with 500 backends.

  benches/watchers.py [--pairs 15] [--secs 4] [--rate 5000] [--backends 500] [--pages 50]

One Zap runs all the time, as in the case `rate`: one worker on core 1, load and providers on core 0. Each pair of
measurements is one with the watchers and one without, in turn first and second, so that what the machine does besides
falls on both. The figure is the median of the pairs' ratios of p99; the target is 1.05. Also printed: the same of p50,
how long the pages took, and what share of the answers was not 200."""

import argparse, json, statistics, subprocess, sys, tempfile, threading, time, urllib.request
import lab

TARGET = 1.05


class Watchers:
    """Ask each second, spread over it, while `is_on` is set. They run in a process of their own on the load's core."""

    def __init__(self, url, pages):
        command = ["taskset", "-c", lab.OTHERS, "nice", "-n", "19", sys.executable, __file__, "--watch", url, str(pages)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def report(self):
        self.tell("end")
        return json.loads(self.process.communicate(timeout=60)[0])


def watch(url, pages):
    """Reads `on`, `off` and `end` from stdin; then prints times and statuses as JSON."""
    is_on, is_over, seen, lock = threading.Event(), threading.Event(), [], threading.Lock()

    def ask(path, headers, delay):
        time.sleep(delay)
        while not is_over.is_set():
            due = time.time() + 1
            if is_on.is_set():
                since = time.time()
                try:
                    with urllib.request.urlopen(urllib.request.Request(url + path, headers=headers), timeout=10) as answer:
                        status, size = answer.status, sum(len(part) for part in iter(lambda: answer.read(1 << 16), b""))
                except OSError as error:
                    status, size = str(error), 0
                with lock:
                    seen.append((path, status, time.time() - since, size))
            time.sleep(max(0, due - time.time()))

    for i in range(pages):
        threading.Thread(target=ask, args=("/status", {"accept": "text/html"}, i / pages), daemon=True).start()
    threading.Thread(target=ask, args=("/metrics", {}, 0.5), daemon=True).start()
    for line in sys.stdin:
        if line.strip() == "end":
            break
        is_on.set() if line.strip() == "on" else is_on.clear()
    is_over.set()
    with lock:
        found = {}
        for path in ("/status", "/metrics"):
            mine = [one for one in seen if one[0] == path]
            if mine:
                found[path] = {
                    "answers": len(mine), "bad": sum(one[1] != 200 for one in mine), "bytes": max(one[3] for one in mine),
                    "p50_ms": statistics.median(one[2] for one in mine) * 1000, "max_ms": max(one[2] for one in mine) * 1000,
                }
    print(json.dumps(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--secs", type=float, default=4)
    parser.add_argument("--rate", type=int, default=5000)
    parser.add_argument("--backends", type=int, default=500)
    parser.add_argument("--pages", type=int, default=50)
    args = parser.parse_args()
    lab.build()
    ratios = {"p50": [], "p99": []}
    figures = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        urls = [f"http://127.0.0.1:{lab.PROVIDERS[i % 2]}" for i in range(args.backends)]
        command = lab.config(folder, urls=urls)
        options = ["--conns", 64, "--body", lab.body(folder, 1000), "--rate", args.rate, "--sleep"]
        with lab.providers(["--body-bytes", "700"]), lab.running(command, lab.ZAP_PORT, lab.GATEWAY):
            watchers = Watchers(f"http://127.0.0.1:{lab.ZAP_PORT}", args.pages)
            time.sleep(3)  # the first health checks

            def measured(is_watched):
                watchers.tell("on" if is_watched else "off")
                time.sleep(1.2)  # all have begun, or ended
                report = json.loads(lab.load(lab.ZAP_PORT, options, args.secs).communicate(timeout=60)[0])
                if failed := report["bad"] + report["errors"]:
                    print(f"# {failed} requests failed: {report}", file=sys.stderr)
                figures[is_watched].append(report["latency_us"])
                return report["latency_us"]

            for pair in range(args.pairs):
                first = pair % 2 == 0
                times = {is_watched: measured(is_watched) for is_watched in (first, not first)}
                for name, values in ratios.items():
                    values.append(times[True][name] / times[False][name])
                print(f"# pair {pair + 1}: p99 {times[True]['p99']:.0f} us watched, {times[False]['p99']:.0f} us not", file=sys.stderr)
            seen = watchers.report()
    for path, found in seen.items():
        print(f"{path}: {found['answers']} answers of {found['bytes']:,} bytes, p50 {found['p50_ms']:.1f} ms, "
              f"longest {found['max_ms']:.1f} ms, {found['bad']} failed")
    for name, values in ratios.items():
        watched, alone = (lab.median([times[name] for times in figures[is_watched]]) for is_watched in (True, False))
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        print(f"{name}: {watched:.0f} us watched, {alone:.0f} us not; ratio of a pair {lab.median(values):.3f} "
              f"(quartiles {low:.3f} and {high:.3f})")
    ratio = lab.median(ratios["p99"])
    is_met = ratio <= TARGET and not any(found["bad"] for found in seen.values())
    print(f"p99 with {args.pages} pages and a scrape a second over {args.backends} backends: {ratio:.3f} of {TARGET}: "
          f"{'met' if is_met else 'MISSED'}")
    sys.exit(0 if is_met else 1)


if sys.argv[1:2] == ["--watch"]:
    watch(sys.argv[2], int(sys.argv[3]))
else:
    main()

#!/usr/bin/env python3
"""What those who watch Zap cost its clients: 50 open status pages and a scrape a second, with 500 backends.

  benches/watchers.py [--pairs 15] [--secs 4] [--rate 5000] [--backends 500] [--pages 50] [--sleep]

One Zap runs all the time, as in the case `rate`: one worker on core 1, load and providers on core 0. The watchers ask
as browsers and Prometheus do, for gzip; they are processes of the load generator on core 0, which give way to the load
(`nice`). Each pair of measurements is one with the watchers and one without, in turn first and second, so that what the
machine does besides falls on both. The figure is the median of the pairs' ratios of p99; the target is 1.05. Also
printed: the same of p50, how long the pages took, and how many were not 200.

With --sleep the load sleeps between requests. In the case `rate` it polls: it takes time slices from the providers, and
these make most of the p99. Without them the figure is a tenth, and shows each delay of the gateway and of the machine."""

import argparse, json, statistics, sys, tempfile, time
import lab

TARGET = 1.05
BROWSER = "accept: text/html,application/xhtml+xml,*/*;q=0.8\naccept-encoding: gzip, deflate, br, zstd"
PROMETHEUS = "accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3\naccept-encoding: gzip"


def watchers(pages, secs):
    """Starts the watchers for so long; returns their processes by what they ask for."""
    asked = {"/status": (pages, BROWSER), "/metrics": (1, PROMETHEUS)}
    options = lambda path, rate, headers: [
        "--path", path, "--get", headers, "--conns", 2 * rate, "--rate", rate, "--sleep"
    ]
    nice = ["nice", "-n", "19"]
    return {path: lab.load(lab.ZAP_PORT, options(path, *how), secs, warm=0.2, before=nice) for path, how in asked.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--secs", type=float, default=4)
    parser.add_argument("--rate", type=int, default=5000)
    parser.add_argument("--backends", type=int, default=500)
    parser.add_argument("--pages", type=int, default=50)
    parser.add_argument("--sleep", action="store_true")
    args = parser.parse_args()
    lab.build()
    ratios = {"p50": [], "p99": []}
    figures = {True: [], False: []}
    seen = {"/status": [], "/metrics": []}
    with tempfile.TemporaryDirectory() as folder:
        urls = [f"http://127.0.0.1:{lab.PROVIDERS[i % 2]}" for i in range(args.backends)]
        command = lab.config(folder, urls=urls)
        options = ["--conns", 64, "--body", lab.body(folder, 1000), "--rate", args.rate]
        options += ["--sleep"] if args.sleep else []
        with lab.providers(["--body-bytes", "700"]), lab.running(command, lab.ZAP_PORT, lab.GATEWAY):
            time.sleep(3)  # the first health checks

            def measured(is_watched):
                # They begin before the load's warm-up has ended, and end after the load.
                watching = watchers(args.pages, args.secs + 1.5) if is_watched else {}
                report = json.loads(lab.load(lab.ZAP_PORT, options, args.secs).communicate(timeout=60)[0])
                if failed := report["bad"] + report["errors"]:
                    print(f"# {failed} requests failed: {report}", file=sys.stderr)
                for path, process in watching.items():
                    seen[path].append(json.loads(process.communicate(timeout=60)[0]))
                figures[is_watched].append(report["latency_us"])
                return report["latency_us"]

            for pair in range(args.pairs):
                first = pair % 2 == 0
                times = {is_watched: measured(is_watched) for is_watched in (first, not first)}
                for name, values in ratios.items():
                    values.append(times[True][name] / times[False][name])
                print(f"# pair {pair + 1}: p99 {times[True]['p99']:.0f} us watched, {times[False]['p99']:.0f} us not", file=sys.stderr)
    failed = 0
    for path, reports in seen.items():
        answers, size = sum(report["ok"] for report in reports), sum(report["bytes"] for report in reports)
        bad = sum(report["bad"] + report["errors"] for report in reports)
        failed += bad or answers == 0
        p50 = lab.median([report["latency_us"]["p50"] for report in reports]) / 1000
        longest = max(report["latency_us"]["max"] for report in reports) / 1000
        print(f"{path}: {answers} answers of {size // max(answers, 1):,} bytes, p50 {p50:.1f} ms, longest {longest:.1f} ms, {bad} failed")
    for name, values in ratios.items():
        watched, alone = (lab.median([times[name] for times in figures[is_watched]]) for is_watched in (True, False))
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        print(f"{name}: {watched:.0f} us watched, {alone:.0f} us not; ratio of a pair {lab.median(values):.3f} "
              f"(quartiles {low:.3f} and {high:.3f})")
    ratio = lab.median(ratios["p99"])
    is_met = ratio <= TARGET and not failed
    print(f"p99 with {args.pages} pages and a scrape a second over {args.backends} backends: {ratio:.3f} of {TARGET}: "
          f"{'met' if is_met else 'MISSED'}")
    sys.exit(0 if is_met else 1)


main()

#!/usr/bin/env python3
"""Time to first content with one slow backend, by strategy.

  benches/slow.py [--secs 10] [--rate 300] [--fast 20] [--slow 500]

Two backends of equal weight: streams of one begin after --fast ms, those of the other after --slow ms. Streams are due at
--rate a second, whatever is still open. Prints a table and draws benches/results/slow.svg: for each strategy the time to
first content that a part of the streams has reached, and the part that the slow backend has got."""

import argparse, contextlib, datetime, json, math, os, tempfile, urllib.request
import lab

STRATEGIES = {"round_robin": "#b83600", "least_loaded": "#8a6d00", "least_latency": "#0a5c9e"}
PARTS = [("p50", 50), ("p90", 90), ("p99", 99), ("p999", 99.9)]


@contextlib.contextmanager
def providers(fast, slow):
    """The two backends on core 0."""
    with contextlib.ExitStack() as all_of_them:
        for port, delay in zip(lab.PROVIDERS, (fast, slow)):
            command = f"{lab.BUILT}/release/upstream {port} --chunks 20 --interval-ms 5 --delay-ms {delay}"
            all_of_them.enter_context(lab.running(command, port, lab.OTHERS))
        yield


def answers():
    """Answers of each backend so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{lab.ZAP_PORT}/status", timeout=10) as status:
        return [backend["requests"] for backend in json.load(status)["backends"]]


def one(folder, strategy, args):
    settings = f'[load_balancer]\nstrategy = "{strategy}"\n'
    command = lab.config(folder, f"{strategy}.toml", settings=settings, weights=(1, 1))
    with providers(args.fast, args.slow), lab.running(command, lab.ZAP_PORT, lab.GATEWAY):
        options = ["--conns", max(64, int(args.rate * (args.slow + 200) / 1000 * 2)), "--stream", "--rate", args.rate, "--sleep"]
        report = json.loads(lab.load(lab.ZAP_PORT, options, args.secs, warm=2).communicate(timeout=120)[0])
        counts = answers()
    bad = report["bad"] + report["errors"] + report["truncated"]
    return {part: report["ttft_us"][part] / 1000 for part, _ in PARTS}, counts[1] / max(1, sum(counts)), bad


def draw(found, args):
    width, height, left, bottom, top, right = 460, 270, 58, 46, 46, 16
    low, high = 10, 10 ** math.ceil(math.log10(max(time for times, _, _ in found.values() for time in times.values())))
    at_x = lambda i: left + i / (len(PARTS) - 1) * (width - left - right)
    at_y = lambda ms: height - bottom - math.log10(max(ms, low) / low) / math.log10(high / low) * (height - bottom - top)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="16" font-size="13">Time to first content, ms: a backend of {args.fast} ms, one of {args.slow} ms</text>',
        f'<text x="{left}" y="32" fill="#666">{datetime.date.today()} · benches/slow.py --rate {args.rate}</text>',
    ]
    y = low
    while y <= high:
        out.append(f'<path d="M{left} {at_y(y):.1f}H{width - right}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:,}</text>')
        y *= 10
    for i, (_, part) in enumerate(PARTS):
        out.append(f'<text x="{at_x(i):.1f}" y="{height - bottom + 16}" text-anchor="middle">{part:g} %</text>')
    for n, (strategy, (times, share, _)) in enumerate(found.items()):
        points = " ".join(f"{at_x(i):.1f},{at_y(times[part]):.1f}" for i, (part, _) in enumerate(PARTS))
        colour = STRATEGIES[strategy]
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="{left + n * 135}" y="{height - 8}" fill="{colour}">{strategy}: {share:.0%} slow</text>')
    out.append("</svg>\n")
    with open(os.path.join(lab.HERE, "results", "slow.svg"), "w") as file:
        file.write("\n".join(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--secs", type=float, default=10)
    parser.add_argument("--rate", type=int, default=300)
    parser.add_argument("--fast", type=int, default=20)
    parser.add_argument("--slow", type=int, default=500)
    args = parser.parse_args()
    lab.build()
    with tempfile.TemporaryDirectory() as folder:
        found = {strategy: one(folder, strategy, args) for strategy in STRATEGIES}
    print("| strategy | p50 ms | p90 ms | p99 ms | p99.9 ms | at the slow backend | failed |\n|---|---|---|---|---|---|---|")
    for strategy, (times, share, bad) in found.items():
        print(f"| `{strategy}` | " + " | ".join(f"{times[part]:.0f}" for part, _ in PARTS) + f" | {share:.1%} | {bad} |")
    draw(found, args)


main()

#!/usr/bin/env python3
"""CPU time per request in Zap by number of backends, client keys, connections, idle connections, and by body size.

  benches/growth.py [--rounds 3] [--secs 4]     prints a table; draws benches/results/*.svg

Every feature of Zap is on; its one worker is pinned to core 1, load and providers to core 0. A figure is microseconds
of CPU per request, the median of interleaved rounds; ratios are to the first column of a row."""

import argparse, contextlib, datetime, math, os, sys, tempfile
import lab

RESULTS = os.path.join(lab.HERE, "results")


def points(folder):
    """A list of (row, label of the x axis, [(x, command, options of the load, idle connections, warm-up seconds)])."""
    small = ["--conns", 64, "--body", lab.body(folder, 1_000)]
    two = lab.config(folder)

    def backends(n):
        urls = [f"http://127.0.0.1:{lab.PROVIDERS[i % 2]}" for i in range(n)]
        return lab.config(folder, f"{n}.toml", urls=urls)

    def bodies(n):
        return ["--conns", 64 if n < 1_000_000 else 8, "--body", lab.body(folder, n)]

    return [
        ("backends", "backends", [(n, backends(n), small, 0, 1) for n in (2, 20, 200)]),
        # The warm-up is long enough to send each key once before the measurement.
        ("keys", "client keys", [(n, two, small + ["--keys", n], 0, w) for n, w in ((1, 1), (10_000, 2), (1_000_000, 45))]),
        ("connections", "busy connections", [(n, two, ["--conns", n] + small[2:], 0, 1) for n in (1, 32, 256, 2_048)]),
        ("bodies", "bytes of a body", [(n, two, bodies(n), 0, 1) for n in (1_000, 100_000, 1_000_000, 10_000_000)]),
        ("idle", "idle connections in addition", [(n, two, small, n, 1) for n in (0, 9_000)]),
    ]


def one(command, options, idle, warm, secs):
    with lab.providers(["--body-bytes", "700"]), lab.running(command, lab.ZAP_PORT, lab.GATEWAY) as zap:
        silent = lab.load(lab.ZAP_PORT, ["--conns", idle, "--silent"], secs + 8, warm=1) if idle else None
        found = lab.measure(zap, lab.ZAP_PORT, options, secs, warm=warm + (3 if idle else 0))
        if silent:
            silent.communicate()
        if found["bad"]:
            print(f"# {found['bad']} bad: {found['report']}", file=sys.stderr)
        return found["cpu_us"]


def draw(name, label, found, command):
    """Draws a plot with two logarithmic axes: the median of each point, and the range of its rounds."""
    width, height, left, bottom, top, right = 460, 270, 58, 46, 46, 16
    xs = [max(x, 1) for x, _ in found]
    every = [v for _, values in found for v in values]
    low, high = 10 ** math.floor(math.log10(min(every))), 10 ** math.ceil(math.log10(max(every)))
    span = math.log10(max(xs) / min(xs)) or 1

    def at_x(x):
        return left + math.log10(max(x, 1) / min(xs)) / span * (width - left - right)

    def at_y(y):
        return height - bottom - math.log10(y / low) / math.log10(high / low) * (height - bottom - top)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="16" font-size="13">CPU time per request, microseconds, by {label}</text>',
        f'<text x="{left}" y="32" fill="#666">{datetime.date.today()} · {command}</text>',
    ]
    y = low
    while y <= high:
        out.append(f'<path d="M{left} {at_y(y):.1f}H{width - right}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:,.0f}</text>')
        y *= 10
    line = " ".join(f"{at_x(x):.1f},{at_y(lab.median(values)):.1f}" for x, values in found)
    out.append(f'<polyline points="{line}" fill="none" stroke="#0a58ca" stroke-width="2"/>')
    for x, values in found:
        middle = lab.median(values)
        out.append(f'<path d="M{at_x(x):.1f} {at_y(min(values)):.1f}V{at_y(max(values)):.1f}" stroke="#0a58ca"/>')
        out.append(f'<circle cx="{at_x(x):.1f}" cy="{at_y(middle):.1f}" r="3" fill="#0a58ca"/>')
        anchor = "start" if x == found[0][0] else "end" if x == found[-1][0] else "middle"
        out.append(f'<text x="{at_x(x):.1f}" y="{at_y(middle) - 8:.1f}" text-anchor="{anchor}">{middle:,.1f}</text>')
        out.append(f'<text x="{at_x(x):.1f}" y="{height - bottom + 16}" text-anchor="{anchor}">{x:,}</text>')
    out.append(f'<text x="{(left + width) // 2}" y="{height - 10}" text-anchor="middle">{label}</text></svg>')
    os.makedirs(RESULTS, exist_ok=True)
    with open(os.path.join(RESULTS, f"{name}.svg"), "w") as file:
        file.write("\n".join(out) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--secs", type=float, default=4)
    parser.add_argument("--rows", default="backends,keys,connections,bodies,idle")
    args = parser.parse_args()
    lab.build()
    command = f"benches/growth.py --rounds {args.rounds} --secs {args.secs:g}"
    print("| CPU time per request by | |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, label, steps in points(folder):
            if name not in args.rows.split(","):
                continue
            found = [(x, []) for x, *_ in steps]
            for _ in range(args.rounds):
                for (_, values), (_, command_line, options, idle, warm) in zip(found, steps):
                    with contextlib.suppress(BrokenPipeError):
                        values.append(one(command_line, options, idle, warm, args.secs))
            draw(name, label, found, command)
            first = lab.median(found[0][1])
            cells = [f"{x:,}: {lab.median(v):.1f} us ({lab.median(v) / first:.2f})" for x, v in found]
            print(f"| {label} | {' · '.join(cells)} |", flush=True)


main()

#!/usr/bin/env python3
"""Whether the measuring still works: builds the gauge and loads Zap for a second each way. For `.ci/run`; judges no figure.

Needs two cores and target/release/zap (or $ZAP_BIN). Fails where a request fails or none is answered."""

import sys, tempfile
import lab

# Name, load, unit.
LOADS = [
    ("json-1k", ["--conns", 64], "request"),
    ("rate", ["--conns", 64, "--rate", 1000, "--sleep"], "request"),
    ("stream", ["--conns", 100, "--stream"], "chunk"),
]


def main():
    lab.build()
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        body = ["--body", lab.body(folder, 1000)]
        with lab.providers(["--body-bytes", "700", "--chunks", "10", "--chunk-bytes", "220", "--interval-ms", "20"]):
            with lab.running(lab.config(folder), lab.ZAP_PORT, lab.GATEWAY) as zap:
                for name, options, unit in LOADS:
                    found = lab.measure(zap, lab.ZAP_PORT, options + (body if unit == "request" else []), 1, unit)
                    good = found["per_s"] > 0 and not found["bad"]
                    fine &= good
                    figures = f"{found['per_s']:,.0f} {unit}s/s, {found['cpu_us']:.1f} us of CPU each, {found['bad']} failed"
                    print(f"{name:8} {figures}: {'fine' if good else 'BAD'}", flush=True)
    sys.exit(0 if fine else 1)


main()

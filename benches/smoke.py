#!/usr/bin/env python3
"""Checks that the benchmarks still work: builds the gauge and puts each kind of load on Zap for a second.

For `.ci/run`; does not judge figures. Needs two cores and target/release/zap (or $ZAP_BIN). Fails if a request fails or
no request is served."""

import sys, tempfile
import lab

# Each row: name, options of the load, unit.
LOADS = [
    ("json-1k", ["--conns", 64], "request"),
    ("rate", ["--conns", 64, "--rate", 1000, "--sleep"], "request"),
    ("stream", ["--conns", 100, "--stream"], "chunk"),
]


def main():
    lab.build()
    ok = True
    with tempfile.TemporaryDirectory() as folder:
        body = ["--body", lab.body(folder, 1000)]
        with lab.providers(["--body-bytes", "700", "--chunks", "10", "--chunk-bytes", "220", "--interval-ms", "20"]):
            with lab.running(lab.config(folder), lab.ZAP_PORT, lab.GATEWAY) as zap:
                for name, options, unit in LOADS:
                    found = lab.measure(zap, lab.ZAP_PORT, options + (body if unit == "request" else []), 1, unit)
                    good = found["per_s"] > 0 and not found["bad"]
                    ok &= good
                    figures = f"{found['per_s']:,.0f} {unit}s/s, {found['cpu_us']:.1f} us of CPU each, {found['bad']} failed"
                    print(f"{name:8} {figures}: {'ok' if good else 'BAD'}", flush=True)
    sys.exit(0 if ok else 1)


main()

#!/usr/bin/env python3
"""The exact number of user instructions and allocations per request in Zap, counted by valgrind.

  benches/exact.py [--write]      fails if a figure is more than 3 % above benches/exact.txt; --write rewrites that file

A figure is the difference of two runs with different numbers of requests; that excludes the cost of start and shutdown.
Every feature of Zap is on. Needs valgrind and target/release/zap (or $ZAP_BIN).
"""

import os, re, signal, socket, subprocess, sys, tempfile, threading
import lab

BASELINE = os.path.join(lab.HERE, "exact.txt")
FEW, MANY = 500, 2500
TURNS = ",".join('{"role":"%s","content":"%s"}' % (("user", "assistant")[i % 2], lab.TURN) for i in range(7))
ANSWER = (
    b'{"choices":[{"message":{"role":"assistant","content":"' + b"x" * 640 + b'"}}],'
    b'"usage":{"prompt_tokens":200,"completion_tokens":160,"total_tokens":360}}'
)
EVENT = b'data: {"choices":[{"delta":{"content":"' + b"x" * 170 + b'"}}]}\n\n'


def body(stream):
    text = '{"messages":[%s],"temperature":0.7,"max_tokens":256,"model":"mock"%s}'
    return (text % (TURNS, ',"stream":true' if stream else "")).encode()


def read_message(sock, buf):
    """Reads one message with a content-length or in chunks; bytes after it stay in buf. Returns None at the end."""
    while b"\r\n\r\n" not in buf:
        piece = sock.recv(65536)
        if not piece:
            return None
        buf += piece
    end = buf.index(b"\r\n\r\n") + 4
    head = bytes(buf[:end]).lower()
    length = re.search(rb"content-length: (\d+)", head)
    chunked = b"transfer-encoding: chunked" in head
    is_complete = lambda: b"\r\n0\r\n\r\n" in buf[end:] if chunked else len(buf) >= end + int(length[1] if length else 0)
    while not is_complete():
        buf += sock.recv(65536)
    stop = buf.index(b"\r\n0\r\n\r\n", end) + 7 if chunked else end + int(length[1] if length else 0)
    message = bytes(buf[:stop])
    del buf[:stop]
    return message


def provider():
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buf = bytearray()
        while (request := read_message(sock, buf)) is not None:
            if b'"stream":true' in request:
                chunk = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
                head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                sock.sendall(head + chunk * 10 + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            else:
                head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER)
                sock.sendall(head + ANSWER)

    def accept():
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


# Functions that allocate: jemalloc's, which Zap uses, and those of the system, which SQLite uses.
ALLOCATES = re.compile(r"cfn=(_rjem_)?(malloc|mallocx|calloc|realloc|rallocx)$")


def calls_of(profile):
    """The number of calls that allocate in a profile of callgrind."""
    with open(profile, errors="replace") as lines:
        return sum(int(next(lines).split()[0].removeprefix("calls=")) for line in lines if ALLOCATES.match(line))


def count(folder, zap_command, requests, stream):
    """Instructions and allocations of a Zap that serves so many requests."""
    profile = f"{folder}/callgrind.out"
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={profile}", "--compress-strings=no"]
    zap = subprocess.Popen(command + zap_command, stderr=subprocess.PIPE, text=True)
    output = []
    for line in zap.stderr:
        output.append(line)
        if "listening on" in line:
            break
    port = int(re.search(r"listening on [^\"]*:(\d+)", output[-1])[1])
    rest = threading.Thread(target=lambda: output.extend(zap.stderr))
    rest.start()
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data, buf = body(stream), bytearray()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: zap\r\nauthorization: Bearer sk-client\r\n"
    head += b"content-type: application/json\r\nuser-agent: exact\r\naccept: */*\r\ncontent-length: %d\r\n\r\n" % len(data)
    for _ in range(requests):
        sock.sendall(head + data)
        answer = read_message(sock, buf)
        assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
    sock.close()
    zap.send_signal(signal.SIGTERM)
    zap.wait()
    rest.join()
    instructions = int(re.search(r"refs:\s+([\d,]+)", "".join(output))[1].replace(",", ""))
    return instructions, calls_of(profile)


def main():
    port = provider()
    with tempfile.TemporaryDirectory() as folder:
        urls = [f"http://127.0.0.1:{port}"] * 2
        command = lab.config(folder, port=0, urls=urls, settings="[health]\ninterval_secs = 3600\n").split()
        figures = {}
        for kind, stream in (("json", False), ("events", True)):
            few, many = (count(folder, command, n, stream) for n in (FEW, MANY))
            for what, less, more in zip(("instructions", "allocations"), few, many):
                figures[f"{kind} {what}"] = (more - less) / (MANY - FEW)
    if "--write" in sys.argv:
        with open(BASELINE, "w") as file:
            file.writelines(f"{name} {value:.1f}\n" for name, value in figures.items())
    limits = dict(line.rsplit(" ", 1) for line in open(BASELINE))
    ok = True
    for name, value in figures.items():
        good = value <= float(limits[name]) * 1.03
        ok &= good
        print(f"{name:22} {value:10.1f} a request, {float(limits[name]):10.1f} baseline: {'ok' if good else 'TOO HIGH'}")
    sys.exit(0 if ok else 1)


main()

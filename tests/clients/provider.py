#!/usr/bin/env python3
"""A scripted mock provider. The last user message, or else the model, selects the response:

  status:NNN   status NNN with an OpenAI error body, code mock_NNN (429: retry-after 7)
  once:ID      429 with retry-after 1 on this provider's first request with ID, then a normal response
  cut          a stream: 3 content chunks, then the connection closes without the terminating chunk
  short        a content-length larger than what is sent, then the connection closes
  slow         wait up to 10 s for the client to disconnect (counted as `disconnected`), then a normal response
  gated:ID     a stream in which each chunk after the first waits for a GET /_next?ID
  other        a chat completion "NAME got MODEL: MESSAGE", streamed in 5 chunks if `stream` is true

GET /health: 200. GET /_seen: counts, keys and headers of the received requests, as JSON. Standalone: provider.py [PORT]
"""
import collections, json, select, socket, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def send(self, status, value, extra=(), missing=0):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body) + missing))
        for name, text in extra:
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)
        if missing:
            self.close_connection = True

    def record(self):
        seen = self.server.seen
        with self.server.lock:
            seen["headers"].update((k.lower(), v) for k, v in self.headers.items())
            seen["authorization"].add(self.headers.get("authorization"))
            seen["requests"] += self.command == "POST"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path == "/_seen":
            with self.server.lock:
                seen = {k: sorted(v, key=str) if isinstance(v, set) else v for k, v in self.server.seen.items()}
            return self.send(200, seen)
        if path == "/_next":
            self.server.gates[query].release()
            return self.send(200, {})
        self.record()
        self.send(200 if path == "/health" else 404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.record()
        model, said = body.get("model"), ""
        for message in body.get("messages", []):
            said = message["content"] if message["role"] == "user" else said
        for verb, _, arg in (text.partition(":") for text in (said, model or "")):
            if verb == "status":
                return self.error(int(arg), 7)
            if verb == "once":
                with self.server.lock:
                    first = arg not in self.server.once
                    self.server.once.add(arg)
                if first:
                    return self.error(429, 1)
            if verb == "slow":
                self.wait_for_disconnect()
            if verb in ("once", "slow", "cut", "short", "gated"):
                break
        else:
            verb = arg = ""
        text = f"{self.server.name} got {model}: {said}"
        if body.get("stream"):
            return self.stream(model, text, verb, arg)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        answer = self.frame(model, "chat.completion", [choice], self.USAGE)
        self.send(200, answer, missing=1000 if verb == "short" else 0)

    USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}

    def frame(self, model, kind, choices, usage=None):
        frame = {"id": "mock-1", "object": kind, "created": 1, "model": model, "choices": choices}
        return {**frame, "usage": usage} if usage else frame

    def error(self, status, retry_after):
        extra = [("retry-after", str(retry_after))] if status == 429 else []
        message = f"{self.server.name} says {status}"
        self.send(status, {"error": {"message": message, "type": "mock", "param": None, "code": f"mock_{status}"}}, extra)

    def stream(self, model, text, verb, arg):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        size = -(-len(text) // 5)
        for n in range(5):
            if verb == "cut" and n == 3:
                self.close_connection = True
                return
            if verb == "gated" and n and not self.server.gates[arg].acquire(timeout=10):
                self.close_connection = True
                return
            self.event(self.delta(model, {"content": text[n * size:(n + 1) * size]}))
            time.sleep(0.01)  # the pace of a provider
        self.event(self.delta(model, {}, "stop"))
        self.event(self.frame(model, "chat.completion.chunk", [], self.USAGE))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def delta(self, model, delta, finish=None):
        return self.frame(model, "chat.completion.chunk", [{"index": 0, "delta": delta, "finish_reason": finish}])

    def event(self, value):
        data = f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def wait_for_disconnect(self):
        ready, _, _ = select.select([self.connection], [], [], 10)
        if ready:
            try:
                gone = not self.connection.recv(1, socket.MSG_PEEK)
            except OSError:
                gone = True
            with self.server.lock:
                self.server.seen["disconnected"] += gone


class Provider(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, name, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.name, self.url = name, f"http://127.0.0.1:{self.server_port}"
        self.lock, self.once = threading.Lock(), set()
        self.gates = collections.defaultdict(lambda: threading.Semaphore(0))
        self.seen = {"requests": 0, "disconnected": 0, "authorization": set(), "headers": set()}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_):
        pass  # a disconnect of the client is expected

    def close(self):
        self.shutdown()
        self.server_close()


if __name__ == "__main__":
    print(Provider("mock", int((sys.argv + ["0"])[1])).url, flush=True)
    threading.Event().wait()

#!/usr/bin/env python3
"""A scripted mock provider of chat completions, of /v1/responses, of Anthropic's /v1/messages and of forms.

The model, or else the last user message, selects the response:

  status:NNN   status NNN with an OpenAI error body, code mock_NNN (429: retry-after 7)
  once:ID      429 with retry-after 1 on this provider's first request with ID, then a normal response
  error:CODE   status 200 with an error instead of a response: as JSON, or as the only event of a stream
  late-error:CODE  as error:CODE, but in a stream behind the events that come before content
  cut          a stream: 3 content chunks, then the connection closes without the terminating chunk
  cut-once:ID  as cut on this provider's first request with ID, then a normal response
  cut-clean    as cut, with the terminating chunk
  drop         as cut, before the first content
  half         as cut, with half of the next event before the connection closes
  cut-error    as cut, with an error event before the connection closes
  no-done      a stream that ends without [DONE]
  short:N      a content-length N larger than what is sent, then the connection closes
  slow         wait up to 10 s for the client to disconnect (counted as `disconnected`), then a normal response
  run:COMMAND  a call of the shell tool of Codex or Claude Code, unless the request brings the result of a call
  gated:ID     a stream in which each chunk after the first waits for a GET /_next?ID
  other        the text "NAME got MODEL: MESSAGE", streamed in 5 chunks if `stream` is true; the message is the result of
               the call if the request brings one

GET /health: 200. GET /_seen: counts, keys and headers of the received requests, as JSON. Standalone: provider.py [PORT]
"""
import collections, email, json, select, socket, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


VERBS = set("status once error late-error cut cut-once cut-clean cut-error drop half no-done short slow run gated".split())


def last_user_message(body):
    """The text of the last user message in `messages` of a chat, or in `input` of /v1/responses."""
    items, said = body.get("messages") or body.get("input") or [], ""
    for item in [{"role": "user", "content": items}] if isinstance(items, str) else items:
        said = item["content"] if item.get("role") == "user" else said
    return said if isinstance(said, str) else said[-1].get("text", "")


def result_of_call(body):
    """The result of a tool's call at the end of a request of /v1/responses or /v1/messages; None if there is none."""
    items = body.get("messages") or body.get("input")
    if not isinstance(items, list):
        return None
    for item in items[::-1]:
        for part in [item, *(item["content"] if isinstance(item.get("content"), list) else [])]:
            if part.get("type") in ("function_call_output", "tool_result"):
                return str(part.get("output") or part.get("content"))
        if item.get("role") in ("user", "assistant"):
            return None
    return None


def pieces(text):
    size = -(-len(text) // 5)
    return [text[n * size:(n + 1) * size] for n in range(5)]


class Chat:
    """A chat completion: `answer` is the JSON body; `events` are those of a stream before, with and after content."""

    USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}

    def __init__(self, model, text):
        self.model, self.text = model, text
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self.answer = self.frame("chat.completion", [choice], self.USAGE)

    def frame(self, kind, choices, usage=None):
        frame = {"id": "mock-1", "object": kind, "created": 1, "model": self.model, "choices": choices}
        return {**frame, "usage": usage} if usage else frame

    def delta(self, delta, finish=None):
        return self.frame("chat.completion.chunk", [{"index": 0, "delta": delta, "finish_reason": finish}])

    def events(self):
        content = [self.delta({"content": piece}) for piece in pieces(self.text)]
        after = [self.delta({}, "stop"), self.frame("chat.completion.chunk", [], self.USAGE), "[DONE]"]
        return [self.delta({"role": "assistant", "content": ""})], content, after


class Responses:
    """A response of /v1/responses, with the members of Chat."""

    USAGE = {"input_tokens": 3, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 5,
             "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 8}

    def __init__(self, model, text, command=None):
        self.model, self.text = model, text
        self.delta, self.begun = "response.output_text.delta", {"content": []}
        self.item = {"id": "msg_mock", "type": "message", "role": "assistant", "status": "completed",
                     "content": [{"type": "output_text", "text": text, "annotations": []}]}
        if command:
            self.text = json.dumps({"cmd": command})
            self.delta, self.begun = "response.function_call_arguments.delta", {"arguments": ""}
            self.item = {"id": "fc_mock", "type": "function_call", "status": "completed", "call_id": "call_mock",
                         "name": "exec_command", "arguments": self.text}
        self.answer = self.frame("completed", [self.item])

    def frame(self, status, output):
        return {"id": "resp_mock", "object": "response", "created_at": 1, "model": self.model, "status": status,
                "output": output, "error": None, "usage": self.USAGE if output else None}

    def events(self):
        at = {"item_id": self.item["id"], "output_index": 0, "content_index": 0}
        before = [{"type": "response.created", "response": self.frame("in_progress", [])},
                  {"type": "response.output_item.added", "output_index": 0,
                   "item": {**self.item, "status": "in_progress", **self.begun}}]
        content = [{"type": self.delta, **at, "delta": piece} for piece in pieces(self.text)]
        after = [{"type": "response.output_item.done", "output_index": 0, "item": self.item},
                 {"type": "response.completed", "response": self.answer}]
        for n, event in enumerate(before + content + after):
            event["sequence_number"] = n
        return before, content, after


class Messages:
    """A message of Anthropic's API, with the members of Chat."""

    def __init__(self, model, text, command=None):
        self.text = json.dumps({"command": command}) if command else text
        self.block, self.delta, self.reason = {"type": "text", "text": ""}, ("text_delta", "text"), "end_turn"
        whole = {"text": text}
        if command:
            self.block = {"type": "tool_use", "id": "toolu_mock", "name": "Bash", "input": {}}
            self.delta, self.reason = ("input_json_delta", "partial_json"), "tool_use"
            whole = {"input": {"command": command}}
        self.answer = {"id": "msg_mock", "type": "message", "role": "assistant", "model": model, "stop_reason": self.reason,
                       "stop_sequence": None, "content": [{**self.block, **whole}],
                       "usage": {"input_tokens": 3, "output_tokens": 5}}

    def events(self):
        begun = {**self.answer, "content": [], "stop_reason": None, "usage": {"input_tokens": 3, "output_tokens": 1}}
        before = [{"type": "message_start", "message": begun},
                  {"type": "content_block_start", "index": 0, "content_block": self.block}]
        kind, member = self.delta
        content = [{"type": "content_block_delta", "index": 0, "delta": {"type": kind, member: piece}}
                   for piece in pieces(self.text)]
        after = [{"type": "content_block_stop", "index": 0},
                 {"type": "message_delta", "delta": {"stop_reason": self.reason, "stop_sequence": None},
                  "usage": {"output_tokens": 5}},
                 {"type": "message_stop"}]
        return before, content, after


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
        body = self.rfile.read(int(self.headers["content-length"]))
        self.record()
        if self.headers["content-type"].startswith("multipart/"):
            return self.form(body)
        body = json.loads(body)
        model, result = body.get("model"), result_of_call(body)
        said = last_user_message(body) if result is None else result
        orders = (text.partition(":") for text in (model or "", said))
        verb, arg = next(((verb, arg) for verb, _, arg in orders if verb in VERBS), ("", ""))
        if verb == "status":
            return self.error(int(arg), 7)
        if verb in ("once", "cut-once"):
            with self.server.lock:
                first = arg not in self.server.once
                self.server.once.add(arg)
            if first and verb == "once":
                return self.error(429, 1)
            verb = "cut" if first else ""
        if verb == "slow":
            self.wait_for_disconnect()
        text = f"{self.server.name} got {model}: {said}"
        kind = {"responses": Responses, "messages": Messages}.get(self.path.partition("?")[0].rpartition("/")[2], Chat)
        dialect = kind(model, text, arg) if verb == "run" else kind(model, text)
        if body.get("stream"):
            self.stream(dialect, verb, arg)
        elif verb in ("error", "late-error"):
            self.send(200, self.error_inside(arg))
        else:
            self.send(200, dialect.answer, missing=int(arg) if verb == "short" else 0)

    def form(self, body):
        """Answers a form with its model and the length of each file."""
        message = email.message_from_bytes(b"content-type: " + self.headers["content-type"].encode() + b"\r\n\r\n" + body)
        parts = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
                 for part in message.get_payload()}
        said = f"{self.server.name} got {parts['model'].decode()}: {len(parts.get('file') or parts.get('image'))} bytes"
        self.send(200, {"text": said} if "audio" in self.path else {"created": 1, "data": [{"url": said}]})

    def error(self, status, retry_after):
        extra = [("retry-after", str(retry_after))] if status == 429 else []
        message = f"{self.server.name} says {status}"
        self.send(status, {"error": {"message": message, "type": "mock", "param": None, "code": f"mock_{status}"}}, extra)

    def error_inside(self, code):
        return {"error": {"message": f"{self.server.name} says {code}", "code": int(code) if code.isdigit() else code}}

    def stream(self, dialect, verb, arg):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        before, content, after = dialect.events()
        if verb in ("error", "late-error"):
            before, content, after = before if verb == "late-error" else [], [], [self.error_inside(arg)]
        for value in before:
            self.event(value)
        for n, value in enumerate(content):
            if n == (0 if verb == "drop" else 3) and verb in ("cut", "cut-clean", "cut-error", "drop", "half"):
                if verb == "cut-clean":
                    self.wfile.write(b"0\r\n\r\n")
                if verb == "cut-error":
                    self.event(self.error_inside("503"))
                if verb == "half":
                    self.event(value, half=True)
                self.close_connection = True
                return
            if verb == "gated" and n and not self.server.gates[arg].acquire(timeout=10):
                self.close_connection = True
                return
            self.event(value)
            time.sleep(0.01)  # the pace of a provider
        for value in after:
            if (verb, value) != ("no-done", "[DONE]"):
                self.event(value)
        self.wfile.write(b"0\r\n\r\n")

    def event(self, value, half=False):
        name = f"event: {value['type']}\n" if "type" in value else ""
        data = f"{name}data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()
        data = data[:len(data) // 2] if half else data
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

"""Tests of web pages in Chromium against Zap in front of a mock provider: what fetch may send, and what it may read; and
Zap's own status page.

Each test of the first kind opens a page that runs a piece of JavaScript and sends its result, as JSON, to the server that
it came from.
"""
import http.server, json, os, pathlib, queue, tempfile, threading, time, urllib.error, urllib.request
from cases import NODE, case, fetch, finish, rejected, running
from chromium import CHROMIUM, SWITCHES, Tab
from lab import Zap, config
from provider import Provider

PAGE_SECS = 60
KEY = "key-of-the-page"
# `ask` posts a chat as an SDK in a page does: with headers that need a preflight.
PAGE = """<!doctype html><meta charset="utf-8"><title>page</title><script type="module">
const zap = %(zap)s, mock = %(mock)s;
const ask = (said, { path = "/v1/chat/completions", headers = {}, ...more } = {}) => fetch(zap + path, {
  method: "POST", headers: { "content-type": "application/json", "x-stainless-lang": "js", ...headers },
  body: JSON.stringify({ model: "m-1", messages: [{ role: "user", content: said }], ...more }) });
const run = async () => { %(script)s };
const result = await run().catch((error) => ({ error: `${error.name}: ${error.message}` }));
await fetch("/result", { method: "POST", body: JSON.stringify(result) });
</script>
"""
opened = []


class Pages(http.server.ThreadingHTTPServer):
    """Serves one page at `url`. `results` gets what the page found."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        # Another site than Zap's, which is 127.0.0.1.
        self.url = f"http://localhost:{self.server_port}"
        self.page, self.results = b"", queue.Queue()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200 if self.path == "/" else 404, self.server.page if self.path == "/" else b"")

    def do_POST(self):
        self.server.results.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.answer(204, b"")


def run(pages, zap, script):
    """Runs `script` in a page of `pages`. Returns what it returns, or {"error": ...} if it throws."""
    pages.page = (PAGE % {"zap": json.dumps(zap.url), "mock": json.dumps(mock.url), "script": script}).encode()
    with tempfile.TemporaryDirectory(prefix="zap-browser.", ignore_cleanup_errors=True) as home:
        command = [CHROMIUM, *SWITCHES, f"--user-data-dir={home}", "--remote-debugging-port=0", pages.url]
        log = pathlib.Path(home) / "log"
        with log.open("wb") as out, running(command, stdout=out, stderr=out, env={**os.environ, "HOME": home}):
            try:
                return pages.results.get(timeout=PAGE_SECS)
            except queue.Empty:
                raise AssertionError(f"no result from the page:\n{log.read_text(errors='replace')[-2000:]}") from None


def posts():
    return json.loads(fetch(mock.url + "/_seen"))["requests"]


@case("[plain] a page of a listed origin reads a response and its headers")
def _():
    got = run(listed, open_zap, """
      const answer = await ask("hello", { headers: { authorization: "Bearer any" } });
      return { status: answer.status, text: (await answer.json()).choices[0].message.content,
               backend: answer.headers.get("x-zap-backend"), id: answer.headers.get("x-request-id"),
               models: (await (await fetch(zap + "/v1/models")).json()).object };""")
    assert got.pop("id"), got
    assert got == {"status": 200, "text": "mock got m-1: hello", "backend": "mock", "models": "list"}, got


@case("[stream] a page reads a stream piece by piece")
def _():
    # The provider sends each next piece only when the page has read the one before.
    got = run(listed, open_zap, """
      const answer = await ask("gated:page", { stream: true });
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader(), parts = [];
      for (let rest = "", ended = false; !ended; ) {
        const { value, done } = await reader.read();
        if (done) break;
        const events = (rest + value).split("\\n\\n");
        rest = events.pop();
        for (const event of events) {
          const data = event.replace(/^data: /, "");
          if (data === "[DONE]") { ended = true; break; }
          const piece = JSON.parse(data).choices[0]?.delta.content;
          if (!piece) continue;
          parts.push(piece);
          await fetch(mock + "/_next?page", { mode: "no-cors" });
        }
      }
      return { status: answer.status, type: answer.headers.get("content-type"), pieces: parts.length, text: parts.join("") };""")
    assert got == {"status": 200, "type": "text/event-stream", "pieces": 5, "text": "mock got m-1: gated:page"}, got


@case("[429] a page reads errors of Zap and of a provider, with their headers")
def _():
    got = run(listed, keyed_zap, """
      const seen = async (answer) => [answer.status, (await answer.json()).error.code, answer.headers.get("retry-after"),
        answer.headers.get("x-ratelimit-limit-requests"), Boolean(answer.headers.get("x-request-id"))];
      const headers = { authorization: "Bearer %s" };
      return [await seen(await ask("hello")), await seen(await ask("status:400", { headers })),
              await seen(await ask("hello", { headers, path: "/v1/nothing" })),
              (await ask("hello", { headers })).status, await seen(await ask("hello", { headers }))];""" % KEY)
    wait = got[4].pop(2)
    assert 1 <= int(wait) <= 60, wait
    assert got == [[401, "invalid_api_key", None, None, True], [400, "mock_400", None, "2", True],
                   [404, "unknown_url", None, None, True], 200, [429, "rate_limit_exceeded", "2", True]], got


@case("a page of another origin can neither read nor spend anything")
def _():
    before, refused = posts(), rejected(open_zap.url, "origin_not_allowed")
    # Requests without a preflight, which a browser sends without asking: a form's type, a beacon, an image.
    got = run(other, open_zap, """
      const tries = {}, body = JSON.stringify({ model: "m-1", messages: [{ role: "user", content: "hello" }] });
      const name = async (what, call) => { tries[what] = await call().catch((error) => error.name); };
      await name("asked", async () => (await ask("hello")).status);
      await name("plain", async () => (await fetch(zap + "/chat", { method: "POST", body })).status);
      await name("blind", async () => (await fetch(zap + "/chat", { method: "POST", body, mode: "no-cors" })).type);
      await name("read", async () => (await fetch(zap + "/v1/models")).status);
      await name("health", async () => (await fetch(zap + "/health")).status);
      await new Promise((done) => { const image = new Image(); image.onerror = image.onload = done; image.src = zap + "/status"; });
      return tries;""")
    fails = "TypeError"
    assert got == {"asked": fails, "plain": fails, "blind": "opaque", "read": fails, "health": fails}, got
    assert posts() == before, "the provider has seen a request of the page"
    # The preflight, two chats, the list and the image. /health is served, but the page cannot read it.
    assert rejected(open_zap.url, "origin_not_allowed") - refused == 5


@case("a page without an origin of its own is refused")
def _():
    before = posts()
    frame = json.dumps("""<script>fetch("%s/chat", { method: "POST", mode: "no-cors", body: '{"messages":[]}' })
      .then((answer) => parent.postMessage(answer.type, "*"), (error) => parent.postMessage(error.name, "*"))</script>"""
                       % open_zap.url)
    got = run(listed, open_zap, """
      const told = new Promise((done) => addEventListener("message", (event) => done([event.origin, event.data])));
      const frame = document.createElement("iframe");
      frame.sandbox = "allow-scripts";
      frame.srcdoc = %s;
      document.body.append(frame);
      return told;""" % frame.replace("</", "<\\/"))
    assert got == ["null", "opaque"], got
    assert posts() == before


AXE = NODE.parent / "axe-core/axe.min.js"
# The page must show a change so soon.
LIVE_SECS = 2
STATE = """document.querySelector('[data-backend="%s"]').dataset.state"""


def post(url, **chat):
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps({"messages": [], **chat}).encode())
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def violations(tab):
    tab.run(AXE.read_text() + ";0")
    found = tab.run("axe.run().then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes[0].html, nodes[0].failureSummary]))")
    return found


def clean(tab, zap):
    assert not tab.complaints(), tab.complaints()
    foreign = [url for url in tab.requested() if not url.startswith((zap.url + "/", "data:,"))]
    assert not foreign, foreign


@case("the status page shows an outage within 2 s, what it is and for whom")
def _():
    zap = start("live", PAGE_MODELS, ["steady", "fragile"])
    with Tab() as tab:
        tab.open(zap.url + "/")
        assert tab.run("document.querySelector('h1').textContent") == "All 2 backends take requests"
        assert tab.run("[...document.querySelectorAll('[data-backend]')].map((row) => row.dataset.backend)") == ["steady", "fragile"]
        # A person has marked a text and reads it; what changes elsewhere must not take that away.
        tab.run("getSelection().selectAllChildren(document.querySelector('h2'))")
        assert post(zap.url, model="steady") == 200
        assert post(zap.url, model="fragile") == 500
        took = tab.until(lambda: tab.run(STATE % "fragile") == "ejected", "the page shows the outage")
        assert took <= LIVE_SECS, took
        head = tab.run("document.querySelector('ul').textContent")
        for part in "fragile is down since ", " s). A request for fragile failed: HTTP 500.", "Client anonymous (fragile) got an error on 1 request":
            assert part in head, (part, head)
        assert tab.run("document.title") == "1 of 2 backends take requests - Zap"
        assert tab.run("[...document.querySelectorAll('[data-backend]')].map((row) => row.dataset.backend)") == ["fragile", "steady"]
        assert tab.run("String(getSelection())") == "Backends"
        clean(tab, zap)


@case("the status page says that it is old when Zap does not answer")
def _():
    zap = start("stopped", PAGE_MODELS, ["steady"])
    with Tab() as tab:
        tab.open(zap.url + "/status")
        time.sleep(1.5)
        assert tab.run("document.getElementById('stale').hidden") and not tab.run("document.body.className")
        clean(tab, zap)
        zap.close()
        took = tab.until(lambda: not tab.run("document.getElementById('stale').hidden"), "the page says that it is old")
        assert took <= 6, took
        text = tab.run("document.getElementById('stale').textContent")
        assert text.startswith("Out of date: what you see is of ") and text.endswith(" s ago. Zap does not answer."), text
        assert tab.run("document.title") == "No answer - Zap"
        assert tab.run("document.body.className") == "stale" and tab.run(STATE % "steady") == "healthy"
        assert not (found := violations(tab)), found


@case("the status page is accessible and fits, narrow and wide, dark and light, with and without faults")
def _():
    zap = start("axe", PAGE_MODELS, ["steady", "fragile"])
    with Tab() as tab:
        for is_out in False, True:
            if is_out:
                assert post(zap.url, model="fragile") == 500
                assert post(zap.url, model=LONG) == 500
            for width in 360, 1440:
                for dark in False, True:
                    tab.look(width, dark)
                    tab.open(zap.url + "/")
                    tab.until(lambda: (tab.run(STATE % "fragile") == "ejected") == is_out, "the page is of now")
                    assert not (found := violations(tab)), (width, dark, is_out, found)
                    assert tab.run("document.documentElement.scrollWidth") <= width, (width, is_out)
        clean(tab, zap)


@case("the status page has all its rows without JavaScript")
def _():
    zap = start("plain", PAGE_MODELS, ["steady", "fragile"])
    post(zap.url, model="fragile")
    with Tab() as tab:
        tab.open(zap.url + "/status", scripts=False)
        root = tab.call("DOM.getDocument")["root"]["nodeId"]
        text = tab.call("DOM.getOuterHTML", nodeId=root)["outerHTML"]
        for part in 'data-backend="steady"', 'data-backend="fragile"', 'data-client="anonymous"', "<strong>fragile</strong>: HTTP 500":
            assert part in text, part
        time.sleep(2.5)
        assert len(tab.requested()) == 1, tab.requested()
        clean(tab, zap)


PAGE_MODELS = """failure_threshold = 1
[retry]
max_retries = 0
[models.steady]
targets = [{ backend = "steady", model = "m-1" }]
"""
LONG = "<b>" + "long-name-of-a-model" * 6
FRAGILE = f"""[models.fragile]
targets = [{{ backend = "fragile", model = "status:500" }}]
[models."{LONG}"]
targets = [{{ backend = "fragile", model = "status:500" }}]
"""

if not CHROMIUM:
    print("skipped: chromium is not installed")
    finish("browser", skip=True)
with tempfile.TemporaryDirectory(prefix="zap-browser-zaps.") as folder:
    try:
        mock = Provider("mock")
        opened.append(mock)
        listed, other = Pages(), Pages()
        opened += [listed, other]

        def start(name, extra="", names=("mock",)):
            backends = [dict(name=name, url=mock.url, default_model="m-1") for name in names]
            text = config(backends, extra + (FRAGILE if "fragile" in names else "")).replace("[server]\n", f'[server]\ncors_origins = ["{listed.url}"]\n', 1)
            opened.append(Zap(text, pathlib.Path(folder) / name))
            return opened[-1]

        open_zap = start("open")
        keyed_zap = start("keyed", f'[[client_keys]]\nname = "page"\nkey = "{KEY}"\nrequests_per_minute = 2\n')
        finish("browser")
    finally:
        for resource in reversed(opened):
            resource.close()

"""Debian's chromium under the control of a test, through DevTools' protocol on two pipes."""
import json, os, pathlib, shutil, subprocess, tempfile, threading, time
from cases import running

CHROMIUM = shutil.which("chromium")
ANSWER_SECS = 30
# The last switches keep the browser from looking for hosts outside of this machine.
SWITCHES = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server",
            "--disable-background-networking", "--disable-component-update", "--disable-sync"]


class Tab:
    """A tab of a browser of its own. `events` are all that it has told, as (method, params)."""

    def __init__(self):
        self.events, self._answers, self._last = [], {}, 0
        self._arrived = threading.Condition()

    def __enter__(self):
        self._home = tempfile.TemporaryDirectory(prefix="zap-tab.", ignore_cleanup_errors=True)
        home = self._home.__enter__()
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The browser reads from 3 and writes to 4. Not every `sh` knows file descriptors above 9.
        command = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", CHROMIUM, *SWITCHES,
                   f"--user-data-dir={home}", "--remote-debugging-pipe", "about:blank"]
        self._running = running(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                pass_fds=(to_browser, from_browser), env={**os.environ, "HOME": home})
        self._running.__enter__()
        os.close(to_browser)
        os.close(from_browser)
        self._session = None
        threading.Thread(target=self._read, daemon=True).start()
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in "Page", "Runtime", "Log", "Network":
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self._running.__exit__(*error)
        os.close(self._out)
        self._home.__exit__(*error)

    def _read(self):
        rest = b""
        while piece := os.read(self._in, 1 << 16):
            *messages, rest = (rest + piece).split(b"\0")
            with self._arrived:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._answers[message["id"]] = message
                    else:
                        self.events.append((message["method"], message["params"]))
                self._arrived.notify_all()
        os.close(self._in)

    def call(self, method, **params):
        """Calls a method of the protocol, and returns its result."""
        self._last += 1
        call = {"id": self._last, "method": method, "params": params}
        if self._session:
            call["sessionId"] = self._session
        os.write(self._out, json.dumps(call).encode() + b"\0")
        with self._arrived:
            assert self._arrived.wait_for(lambda: call["id"] in self._answers, ANSWER_SECS), f"no answer to {method}"
            answer = self._answers.pop(call["id"])
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def run(self, script):
        """The value of an expression, or of the promise that it is."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, url, scripts=True):
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        loaded = len(self.seen("Page.loadEventFired"))
        self.call("Page.navigate", url=url)
        self.until(lambda: len(self.seen("Page.loadEventFired")) > loaded, "the page is loaded")

    def seen(self, method):
        with self._arrived:
            return [params for name, params in self.events if name == method]

    def until(self, holds, what, secs=ANSWER_SECS):
        """Waits until something holds; returns how long that took."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < secs, f"not within {secs} s: {what}"
            time.sleep(0.05)
        return time.monotonic() - began

    def complaints(self):
        """What the console shows of errors and warnings: of the page, of its policy, of its requests."""
        logged = [entry["entry"]["text"] for entry in self.seen("Log.entryAdded")
                  if entry["entry"]["level"] in ("error", "warning")]
        printed = [str(entry["args"]) for entry in self.seen("Runtime.consoleAPICalled") if entry["type"] in ("error", "warning")]
        return logged + printed + [str(thrown) for thrown in self.seen("Runtime.exceptionThrown")]

    def requested(self):
        """The URLs that the tab has asked for."""
        return [request["request"]["url"] for request in self.seen("Network.requestWillBeSent")]

    def look(self, width, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, file):
        import base64
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        pathlib.Path(file).write_bytes(base64.b64decode(data))

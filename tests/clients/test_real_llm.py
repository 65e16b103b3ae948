"""Tests of the Python SDK through Zap to two real model servers; one of them is killed under load."""
import concurrent.futures, json, os, pathlib, signal, socket, subprocess, tempfile, time
import openai
from cases import case, finish
from lab import REPO, Zap, config, dead_port

UP = pathlib.Path(os.environ.get("REAL_LLM_UP") or REPO.parent / "shared/real-llm/up.sh")
HOME = pathlib.Path(os.environ.get("REAL_LLM_HOME") or pathlib.Path(tempfile.gettempdir()) / "real-llm")
MODEL = "smollm2-135m-instruct"
opened, ports = [], []


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def up(*args):
    done = subprocess.run(["bash", str(UP), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, "REAL_LLM_HOME": str(HOME)})
    if done.returncode:
        raise RuntimeError(f"up.sh {args}: {done.stdout}")


def ask(text, **more):
    return client.chat.completions.create(model="", max_tokens=8, messages=[{"role": "user", "content": text}], **more)


@case("[plain] a response")
def _():
    answer = ask("Say hello.")
    assert answer.choices[0].message.content.strip() and answer.usage.completion_tokens > 0


@case("[stream] a streamed response in several chunks, with finish_reason")
def _():
    chunks = [c for c in ask("Count from one to ten.", stream=True) if c.choices]
    parts = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    assert len(parts) > 3, parts
    assert chunks[-1].choices[0].finish_reason in ("stop", "length"), chunks[-1]


WORDS = "the river bends past a mill where old boats dry in the sun and nobody counts the hours of the day".split()


def prompt(n):
    return f"Question {n}: tell a story about " + " ".join(WORDS[(n * 7 + i) % len(WORDS)] for i in range(5 + n * 3 % 40)) + "."


@case("after 50 answers with token counts, streams without them are estimated within 15 %")
def _():
    more = dict(model="", temperature=0.8, extra_body={"cache_prompt": False})
    passive = openai.OpenAI(base_url=zap_passive.url + "/v1", api_key="any", max_retries=0, timeout=60)
    for n in range(50):
        passive.chat.completions.create(max_tokens=8 + n % 25, messages=[{"role": "user", "content": prompt(n)}], **more)
    true = {"input": 0, "output": 0}
    for n in range(50, 80):
        said = [{"role": "user", "content": prompt(n)}]
        chunks = list(passive.chat.completions.create(max_tokens=8 + n % 25, messages=said, stream=True, **more))
        told = [chunk.model_extra["timings"] for chunk in chunks if (chunk.model_extra or {}).get("timings")][-1]
        true["input"] += told["prompt_n"]
        true["output"] += told["predicted_n"]
    deadline = time.monotonic() + 5
    while True:  # a line is written just after the end of its response
        whole = [line for line in zap_passive.log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        tokens = [line["tokens"] for line in map(json.loads, whole) if line.get("stream") and line["tokens"]]
        if len(tokens) == 30 or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert len(tokens) == 30 and {told["source"] for told in tokens} == {"estimate"}, tokens
    for kind, n in true.items():
        estimate = sum(told[kind] for told in tokens)
        print(f"     {kind}: {estimate} estimated, {n} counted by the server", flush=True)
        assert abs(estimate - n) <= 0.15 * n, (kind, estimate, n)


@case("[failover] 20 calls, with one server killed meanwhile: none fails")
def _():
    victim = int((HOME / f"run/{ports[0]}.pid").read_text())
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(ask, f"Say the number {n}.") for n in range(20)]
        calls[7].result()
        assert not calls[19].done()
        os.kill(victim, signal.SIGKILL)
        failed = [repr(error) for call in calls if (error := call.exception())]
    assert not failed, failed
    assert all(call.result().choices[0].finish_reason for call in calls)


if not UP.exists():
    print(f"skipped: {UP} does not exist")
    finish("real-llm", skip=True)
with tempfile.TemporaryDirectory(prefix="zap-real-llm.") as folder:
    try:
        for _ in range(2):
            ports.append(free_port())
            up(ports[-1])
        sock, dead = dead_port()
        opened.append(sock)
        backends = [dict(url=f"http://127.0.0.1:{port}", default_model=MODEL, health_path="/health") for port in (*ports, dead)]
        zap = Zap(config(backends), pathlib.Path(folder) / "zap")
        opened.append(zap)
        one = dict(url=f"http://127.0.0.1:{ports[1]}", default_model=MODEL, health_path="/health", usage="passive")
        zap_passive = Zap(config([one]), pathlib.Path(folder) / "zap-passive")
        opened.append(zap_passive)
        client = openai.OpenAI(base_url=zap.url + "/v1", api_key="any", max_retries=0, timeout=60)
        finish("real-llm")
    finally:
        for resource in reversed(opened):
            resource.close()
        for port in ports:
            up("stop", port)

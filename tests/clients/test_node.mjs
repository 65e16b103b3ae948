// Tests of the official Node SDK against Zap in front of mock providers; lab.py starts both.
import assert from "node:assert/strict";
import { env, finish, get, installed, mocks, raises, total } from "./cases.mjs";
const { OpenAI } = installed("openai");

const CLIENT_KEY = "client-key-that-must-not-leak";
const client = (name, options = {}) =>
  new OpenAI({ baseURL: env(`ZAP_${name}`) + "/v1", apiKey: CLIENT_KEY, maxRetries: 0, timeout: 20_000, ...options });
const ask = (zap, text, { model = "m-1", api = "chat", ...more } = {}, options = {}) =>
  api === "chat"
    ? zap.chat.completions.create({ model, messages: [{ role: "user", content: text }], ...more }, options)
    : zap.responses.create({ model, input: text, ...more }, options);
const raw = (...args) => ask(...args).withResponse();

// The piece of text in an event of a stream, of a chat or of /v1/responses; "" if there is none.
function textOf(event) {
  if (event.choices) return event.choices[0]?.delta.content ?? "";
  return event.type === "response.output_text.delta" ? event.delta : "";
}

// Adds the pieces of text of a stream to `parts`, one by one, so that they are there if the stream raises an error.
async function read(stream, parts) {
  for await (const event of await stream) if (textOf(event)) parts.push(textOf(event));
}

function checkRetryAfter(header, low, high) {
  assert.match(header ?? "none", /^\d+$/);
  assert.ok(low <= +header && +header <= high, `retry-after ${header}`);
}

const cases = {
  async "[plain] a response"() {
    const { data, response } = await raw(client("MAIN"), "hello");
    assert.deepEqual([data.model, data.usage.total_tokens, data.choices[0].finish_reason], ["m-1", 8, "stop"]);
    assert.equal(data.choices[0].message.content, `${response.headers.get("x-zap-backend")} got m-1: hello`);
    assert.equal(response.headers.get("x-zap-attempts"), "1");
    assert.ok(response.headers.get("x-request-id"));
  },

  async "an empty model becomes the backend's default_model"() {
    for (let n = 0; n < 2; n++) {
      const { data, response } = await raw(client("MAIN"), "hello", { model: "" });
      assert.equal(data.model, `default-${response.headers.get("x-zap-backend")}`);
    }
  },

  async "[stream] chat: a stream with finish_reason but without [DONE] is whole"() {
    const events = [];
    for await (const event of await ask(client("CUT"), "no-done", { stream: true })) events.push(event);
    assert.equal(events.map(textOf).join(""), "alpha got m-1: no-done");
    assert.equal(events.at(-2).choices[0].finish_reason, "stop");
    assert.equal(events.at(-1).usage.total_tokens, 8);
  },

  async "50 concurrent requests, plain and streamed, are spread evenly"() {
    const zap = client("MAIN");
    const one = async (n) => {
      if (n % 2) return (await ask(zap, `n${n}`)).choices[0].message.content;
      let text = "";
      for await (const chunk of await ask(zap, `n${n}`, { stream: true })) text += chunk.choices[0]?.delta.content ?? "";
      return text;
    };
    const by = { alpha: 0, beta: 0 };
    (await Promise.all(Array.from({ length: 50 }, (_, n) => one(n)))).forEach((text, n) => {
      assert.ok(text.endsWith(` got m-1: n${n}`), text);
      by[text.split(" ")[0]]++;
    });
    assert.deepEqual(by, { alpha: 25, beta: 25 });
  },

  async "BadRequestError: Zap's own error for messages of a wrong type"() {
    const error = await raises(OpenAI.BadRequestError, () =>
      client("MAIN").chat.completions.create({ model: "m-1", messages: "hello" }));
    assert.deepEqual([error.code, error.type], ["missing_messages", "invalid_request_error"]);
    assert.ok(error.requestID);
    assert.equal(error.headers.get("x-zap-attempts"), "0");
  },

  async "BadRequestError: an upstream error passes unchanged"() {
    const error = await raises(OpenAI.BadRequestError, () => ask(client("MAIN"), "status:400"));
    const message = `${error.headers.get("x-zap-backend")} says 400`;
    assert.deepEqual(error.error, { message, type: "mock", param: null, code: "mock_400" });
    assert.equal(error.headers.get("x-zap-attempts"), "1");
  },

  async "the client's key never reaches a provider"() {
    const headers = { "x-api-key": CLIENT_KEY, "api-key": CLIENT_KEY, cookie: CLIENT_KEY };
    for (let n = 0; n < 2; n++) await ask(client("MAIN"), "hello", {}, { headers });
    for (const [n, name] of ["alpha", "beta"].entries()) {
      const seen = await get(`${mocks("MAIN")[n]}/_seen`);
      assert.ok(seen.requests > 0);
      assert.deepEqual(seen.authorization, [`Bearer key-of-${name}`]);
      assert.ok(!JSON.stringify(seen).includes(CLIENT_KEY));
    }
  },

  async "[429] RateLimitError: Zap's own limit, for each key"() {
    for (let n = 0; n < 5; n++) {
      const { headers } = (await raw(client("LIMIT"), "hello")).response;
      assert.equal(headers.get("x-ratelimit-limit-requests"), "5");
      assert.equal(headers.get("x-ratelimit-remaining-requests"), String(4 - n));
    }
    const error = await raises(OpenAI.RateLimitError, () => ask(client("LIMIT"), "hello"));
    assert.deepEqual([error.code, error.type], ["rate_limit_exceeded", "rate_limit_error"]);
    checkRetryAfter(error.headers.get("retry-after"), 1, 60);
    assert.ok((await ask(client("LIMIT", { apiKey: "another" }), "hello")).choices);
  },

  async "[429] RateLimitError: the limit of tokens, with a true wait"() {
    const zap = client("MONEY", { apiKey: "few-tokens-key" });
    for (let n = 0; n < 5; n++) {
      const { headers } = (await raw(zap, "hello", { max_tokens: 5 })).response;
      assert.equal(headers.get("x-ratelimit-limit-tokens"), "40");
    }
    const error = await raises(OpenAI.RateLimitError, () => ask(zap, "hello", { max_tokens: 5 }));
    assert.deepEqual([error.code, error.type], ["rate_limit_exceeded", "rate_limit_error"]);
    checkRetryAfter(error.headers.get("retry-after"), 50, 60);
  },

  async "[429] RateLimitError: a spent budget, which the SDK does not retry"() {
    const zap = client("MONEY", { apiKey: "little-money-key", maxRetries: 3 });
    assert.ok((await ask(zap, "hello", { max_tokens: 5 })).choices);
    const error = await raises(OpenAI.RateLimitError, () => ask(zap, "hello", { max_tokens: 5 }));
    assert.deepEqual([error.code, error.headers.get("x-should-retry")], ["insufficient_quota", "false"]);
    const metrics = await (await fetch(env("ZAP_MONEY") + "/metrics")).text();
    assert.match(metrics, /^zap_rejected_total{reason="insufficient_quota"} 1$/m, "the SDK has retried");
  },

  async "[429] RateLimitError: the upstream's error, once every backend cools down"() {
    let error = await raises(OpenAI.RateLimitError, () => ask(client("COOL"), "status:429"));
    assert.deepEqual([error.code, error.headers.get("x-zap-attempts")], ["mock_429", "2"]);
    checkRetryAfter(error.headers.get("retry-after"), 1, 7);
    error = await raises(OpenAI.RateLimitError, () => ask(client("COOL"), "hello"));
    assert.deepEqual([error.code, error.headers.get("x-zap-attempts")], ["upstream_rate_limited", "0"]);
    checkRetryAfter(error.headers.get("retry-after"), 1, 7);
    assert.equal(await total("COOL", "requests"), 2);
  },

  async "a retry by the SDK obeys retry-after and succeeds"() {
    const began = performance.now();
    const answer = await ask(client("ONCE", { maxRetries: 1 }), "once:js");
    assert.match(answer.choices[0].message.content, /once:js$/);
    assert.ok(performance.now() - began >= 900);
    assert.equal(await total("ONCE", "requests"), 3);
  },

  async "InternalServerError: an upstream 500 on every try, then a good response"() {
    const error = await raises(OpenAI.InternalServerError, () => ask(client("FAIL"), "status:500"));
    assert.deepEqual([error.status, error.code, error.headers.get("x-zap-attempts")], [500, "mock_500", "3"]);
    assert.equal(await total("FAIL", "requests"), 3);
    assert.ok((await ask(client("FAIL"), "hello")).choices);
  },

  async "APIError 502 if no backend listens"() {
    const error = await raises(OpenAI.InternalServerError, () => ask(client("DEAD"), "hello"));
    assert.deepEqual([error.status, error.code, error.type], [502, "upstream_unreachable", "upstream_error"]);
  },

  async "InternalServerError: a short response cut in its body"() {
    const error = await raises(OpenAI.InternalServerError, () => ask(client("SHORT"), "short:1000"));
    assert.equal(error.status, 502);
  },

  async "an error: a long response cut in its body"() {
    // If the body is cut after its head, this SDK passes on the error of fetch.
    const error = await raises(Error, () => ask(client("SHORT"), "short:100000"));
    assert.ok(error instanceof OpenAI.APIConnectionError || error.message === "terminated", String(error));
    assert.ok(!(error instanceof OpenAI.APIConnectionTimeoutError));
  },

  async "the models that the key may use are listed and found"() {
    const listed = async (apiKey) => {
      const models = [];
      for await (const model of client("ROUTES", { apiKey }).models.list()) models.push(`${model.id} ${model.owned_by}`);
      return models;
    };
    assert.deepEqual(await listed("team-key"), ["smart zap", "meta/llama alpha"]);
    assert.equal((await listed("all-key")).length, 5);
    assert.equal((await client("ROUTES", { apiKey: "team-key" }).models.retrieve("meta/llama")).id, "meta/llama");
    const error = await raises(OpenAI.NotFoundError, () => client("ROUTES", { apiKey: "team-key" }).models.retrieve("other"));
    assert.equal(error.code, "model_not_found");
  },

  async "AuthenticationError and NotFoundError: wrong key, model not allowed"() {
    let error = await raises(OpenAI.AuthenticationError, () => ask(client("ROUTES", { apiKey: "wrong" }), "hello"));
    assert.deepEqual([error.code, error.type], ["invalid_api_key", "authentication_error"]);
    error = await raises(OpenAI.NotFoundError, () => ask(client("ROUTES", { apiKey: "team-key" }), "hello", { model: "other" }));
    assert.deepEqual([error.code, error.param], ["model_not_found", "model"]);
  },

  async "[failover] a route falls back to another backend's model"() {
    const { data, response } = await raw(client("ROUTES", { apiKey: "all-key" }), "hello", { model: "smart" });
    assert.equal(data.choices[0].message.content, "beta got big: hello");
    assert.equal(response.headers.get("x-zap-attempts"), "2");
  },

  async "APIConnectionTimeoutError: a disconnect of the client closes the provider's connection"() {
    await raises(OpenAI.APIConnectionTimeoutError, () => ask(client("SLOW"), "slow", {}, { timeout: 500 }));
    const deadline = performance.now() + 2000;
    while ((await total("SLOW", "disconnected")) === 0) {
      assert.ok(performance.now() < deadline, "the provider's connection is still open");
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  },
};

for (const api of ["chat", "responses"]) {
  for (const name of ["MAIN", "NGINX"]) {
    const behind = name === "NGINX" ? " behind nginx" : "";
    cases[`[stream] ${api}: a stream arrives chunk by chunk and ends whole${behind}`] = async () => {
      const parts = [], events = [];
      for await (const event of await ask(client(name), `gated:js-${api}`, { stream: true, api }, { timeout: 8000 })) {
        events.push(event);
        if (!textOf(event)) continue;
        parts.push(textOf(event));
        await new Promise((resolve) => setTimeout(resolve, 100));
        // The provider sends the next chunk only after this: a gateway that buffers chunks times out.
        await Promise.all(mocks(name).map((url) => get(`${url}/_next?js-${api}`)));
      }
      assert.equal(parts.length, 5);
      assert.ok(parts.join("").endsWith(` got m-1: gated:js-${api}`), parts.join(""));
      const [before, last] = events.slice(-2);
      if (api === "chat") assert.equal(before.choices[0].finish_reason, "stop");
      else assert.equal(last.response.status, "completed");
      assert.equal((last.response ?? last).usage.total_tokens, 8);
    };
  }

  for (const [verb, where] of [["cut", "after content"], ["half", "inside an event"], ["cut-clean", "by a clean end"]])
    cases[`[cut] ${api}: a stream cut ${where} raises stream_interrupted after the received text`] = async () => {
      const parts = [];
      const error = await raises(OpenAI.APIError, () => read(ask(client("CUT"), verb, { stream: true, api }), parts));
      assert.equal(error.code, "stream_interrupted");
      assert.equal(parts.length, 3);
      assert.ok(`alpha got m-1: ${verb}`.startsWith(parts.join("")), parts.join(""));
    };

  cases[`${api}: a provider's error event after content is raised, and Zap adds nothing behind it`] = async () => {
    const told = { message: "alpha says 503", code: 503 }, parts = [];
    const error = await raises(OpenAI.APIError, () => read(ask(client("CUT"), "cut-error", { stream: true, api }), parts));
    assert.deepEqual(error.error, told);
    assert.equal(parts.length, 3);
    const body = await (await ask(client("CUT"), "cut-error", { stream: true, api }).asResponse()).text();
    assert.deepEqual(JSON.parse(body.slice(body.lastIndexOf("data: ") + 6)), { error: told });
  };

  for (const stream of [false, true]) {
    const what = `${api}, ${stream ? "stream" : "JSON"}`;
    cases[`${what}: InternalServerError with the provider's message for an error inside a 200`] = async () => {
      for (const [model, code, status] of [["alone", 503, 503], ["alone-by-name", "overloaded", 502]]) {
        const error = await raises(OpenAI.InternalServerError, () => ask(client("ERROR"), "hello", { model, api, stream }));
        assert.deepEqual([error.status, error.error], [status, { message: `alpha says ${code}`, code }]);
      }
    };

    cases[`[failover] ${what}: another provider serves after an error inside a 200`] = async () => {
      for (const model of ["first", "late"]) {
        const { data, response } = await raw(client("ERROR"), "hello", { model, api, stream });
        assert.deepEqual(["x-zap-backend", "x-zap-attempts"].map((name) => response.headers.get(name)), ["beta", "2"]);
        const parts = stream ? [] : [data.choices?.[0].message.content ?? data.output_text];
        if (stream) await read(data, parts);
        assert.equal(parts.join(""), "beta got big: hello");
      }
    };
  }
}

await finish("openai-node", cases);

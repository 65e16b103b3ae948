// Tests of the AI SDK against Zap in front of a mock provider; lab.py starts both. The cases are those of `sdk` in cases.py.
import assert from "node:assert/strict";
import { env, finish, get, installed, mocks, raises } from "./cases.mjs";
const { APICallError, generateText, streamText } = installed("ai");
const { createOpenAICompatible } = installed("@ai-sdk/openai-compatible");

const model = (apiKey) => createOpenAICompatible({ name: "zap", baseURL: env("ZAP_SDK") + "/v1", apiKey })("m-1");

// Adds the pieces of a stream to `parts`. streamText does not throw by itself: an error is a part of the stream.
async function read(prompt, parts, then = () => {}) {
  for await (const part of streamText({ model: model("team-key"), prompt, onError: () => {} }).fullStream) {
    if (part.type === "error") throw part.error;
    if (part.type !== "text-delta") continue;
    parts.push(part.text);
    await then();
  }
}

const cases = {
  async "[plain] a response"() {
    const { text, usage } = await generateText({ model: model("team-key"), prompt: "hello" });
    assert.deepEqual([text, usage.totalTokens], ["alpha got m-1: hello", 8]);
  },

  async "[stream] the pieces arrive one by one, to the end"() {
    const parts = [];
    // The provider sends the next piece only after the one before has been read.
    await read("gated:sdk", parts, () => get(`${mocks("SDK")[0]}/_next?sdk`));
    assert.deepEqual([parts.length, parts.join("")], [5, "alpha got m-1: gated:sdk"]);
  },

  async "[429] the limit of the key, which the client tells"() {
    // By itself the AI SDK tries each 429 three times; it does not read x-should-retry.
    const ask = () => generateText({ model: model("few-tokens-key"), prompt: "x".repeat(4000), maxRetries: 0 });
    const error = await raises(APICallError, ask);
    assert.deepEqual([error.statusCode, JSON.parse(error.responseBody).error.code], [429, "request_too_large_for_limit"]);
    assert.match(error.message, /lower the maximum, or shorten the input/);
  },
};

for (const [verb, where] of Object.entries({ cut: "after content", half: "inside an event" })) {
  cases[`[cut] a stream cut ${where} raises an error after the received text`] = async () => {
    const parts = [];
    const error = await read(verb, parts).then(() => assert.fail("the stream has ended well"), (error) => error);
    assert.match(error.message, /The stream was cut before its end/);
    assert.ok(parts.length && `alpha got m-1: ${verb}`.startsWith(parts.join("")), parts.join("|"));
  };
}

await finish("ai-sdk", cases);

// What the suites in JavaScript share, as cases.py does for those in Python; lab.py tells the environment.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

// Loads a package that `run` has installed.
export const installed = createRequire(new URL(".work/node/", import.meta.url));
export const env = (name) => process.env[name] ?? assert.fail(`${name} is not set`);
export const get = async (url) => (await fetch(url)).json();
export const mocks = (name) => env(`MOCKS_${name}`).split(" ");
export const total = async (name, what) =>
  (await Promise.all(mocks(name).map((url) => get(`${url}/_seen`)))).reduce((sum, seen) => sum + seen[what], 0);

export async function raises(kind, call) {
  let value;
  try {
    value = await call();
  } catch (error) {
    assert.ok(error instanceof kind, `expected ${kind.name}, got ${error?.constructor?.name}: ${error?.message}`);
    return error;
  }
  assert.fail(`expected ${kind.name}, got ${JSON.stringify(value)}`);
}

// Runs the cases, whose names are their descriptions, and exits.
export async function finish(suite, cases) {
  let failed = 0;
  for (const [what, test] of Object.entries(cases)) {
    try {
      await test();
      console.log(`ok   ${suite}: ${what}`);
    } catch (error) {
      failed++;
      const at = /test_\w+\.mjs:\d+/.exec(error.stack ?? "")?.[0];
      console.log(`FAIL ${suite}: ${what}: ${error.name} ${String(error.message).replaceAll("\n", " ")} (${at})`);
    }
  }
  console.log(`${suite}: ${Object.keys(cases).length - failed} passed, ${failed} failed`);
  process.exit(failed ? 1 : 0);
}

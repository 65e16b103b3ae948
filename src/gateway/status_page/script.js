"use strict";
// Asks for the page again each second and takes over what differs, so that a selection and the focus stay.
// A page counts as out of date after three missed answers. A request that hangs longer than LIMIT is given up, so that
// the next one can find a Zap that has come back.
const INTERVAL = 1000, STALE = 3500, LIMIT = 5000;
const stale = document.getElementById("stale");
let last = Date.now(), why = "", timer = 0;

// Nodes are matched by their place: the server renders the same structure each time, and a row that moves is rewritten.
function take(old, next) {
  if (old.nodeType !== next.nodeType || old.nodeName !== next.nodeName) return old.replaceWith(next.cloneNode(true));
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== next.nodeValue) old.nodeValue = next.nodeValue;
    return;
  }
  for (const { name } of [...old.attributes]) if (!next.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of next.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const mine = [...old.childNodes], others = [...next.childNodes];
  others.forEach((node, at) => at < mine.length ? take(mine[at], node) : old.append(node.cloneNode(true)));
  mine.slice(others.length).forEach((node) => node.remove());
}

function judge() {
  const age = Date.now() - last, isStale = age > STALE;
  document.body.classList.toggle("stale", isStale);
  stale.hidden = !isStale;
  if (!isStale) return;
  const since = new Date(last).toISOString().slice(11, 19);
  const text = `Out of date: what you see is of ${since} UTC, ${Math.round(age / 1000)} s ago. ${why}`;
  // The line is a live region: a screen reader speaks each change of it.
  if (stale.textContent !== text) stale.textContent = text;
}

async function ask() {
  // A page that nobody sees asks nothing, but keeps its timer.
  clearTimeout(timer);
  timer = setTimeout(ask, INTERVAL);
  if (document.hidden) return;
  // From here the next question waits for this answer: a slow Zap must not get several at once.
  clearTimeout(timer);
  try {
    const signal = AbortSignal.timeout(LIMIT);
    const answer = await fetch("status", { headers: { accept: "text/html" }, cache: "no-store", signal });
    if (!answer.ok) throw new Error(`Zap answers HTTP ${answer.status}.`);
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    // A proxy in between may answer 200 with a page of its own.
    if (!next.querySelector("main")) throw new Error("The answer is not Zap's.");
    take(document.querySelector("main"), next.querySelector("main"));
    document.title = next.title;
    last = Date.now();
  } catch (error) {
    // The messages of this script end with a full stop. Those of the browser differ in each, and say no more.
    why = error.message.endsWith(".") ? error.message : "Zap does not answer.";
    document.title = "No answer - Zap";
  }
  judge();
  clearTimeout(timer);
  timer = setTimeout(ask, INTERVAL);
}

document.addEventListener("visibilitychange", ask);
// The age grows while a question hangs, too.
setInterval(judge, INTERVAL);
ask();

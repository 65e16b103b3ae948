"use strict";
// Asks for the page again each second and takes over what differs, so that a selection and the focus stay.
const INTERVAL = 1000, STALE = 3500, LIMIT = 5000;
const stale = document.getElementById("stale");
let last = Date.now(), why = "", timer = 0;

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
  if (stale.textContent !== text) stale.textContent = text;
}

async function ask() {
  clearTimeout(timer);
  timer = setTimeout(ask, INTERVAL);
  if (document.hidden) return;
  clearTimeout(timer);
  try {
    const signal = AbortSignal.timeout(LIMIT);
    const answer = await fetch("status", { headers: { accept: "text/html" }, cache: "no-store", signal });
    if (!answer.ok) throw new Error(`Zap answers HTTP ${answer.status}.`);
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!next.querySelector("main")) throw new Error("The answer is not Zap's.");
    take(document.querySelector("main"), next.querySelector("main"));
    document.title = next.title;
    last = Date.now();
  } catch (error) {
    why = error.message.endsWith(".") ? error.message : "Zap does not answer.";
    document.title = "No answer - Zap";
  }
  judge();
  clearTimeout(timer);
  timer = setTimeout(ask, INTERVAL);
}

document.addEventListener("visibilitychange", ask);
setInterval(judge, INTERVAL);
ask();

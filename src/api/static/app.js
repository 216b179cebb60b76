/**
 * The page: starts generations, and shows the user's, live. Everything that is live is the client's, `stagecast.js`;
 * the page draws what it tells.
 *
 * @typedef {import("./timeline.js").Stage} Stage
 * @typedef {import("./stagecast.js").Generation} Generation
 */

import * as connection from "./connection.js";
import { BASE, announce, byId, write } from "./dom.js";
import * as form from "./form.js";
import * as identity from "./identity.js";
import * as lists from "./lists.js";
import * as stage from "./stage.js";
import { connect, isFinished } from "./stagecast.js";
import * as strip from "./strip.js";
import * as timeline from "./timeline.js";
import { percent, saying, speak, t, titleOf } from "./words.js";

/** The Socket.IO client. Where the service has no copy of it, it says where there is one: that comes, or does not. */
async function client() {
  const script = byId("client")?.content.firstElementChild.cloneNode();
  if (script) await new Promise((done) => {
    script.onload = script.onerror = done;
    setTimeout(done, 5_000);
    document.head.append(script);
  });
  return /** @type {any} */ (globalThis).io ?? null;
}

speak();
byId("language").textContent = t("otherLanguage");
const coming = client();
const who = await identity.identify();
const stagecast = connect({ ...who, url: BASE, io: await coming });

/** @type {Record<string, Stage[]>} */
let tables = {};
/** Nothing has been shown yet. */
let first = true;
/** What has been started here, to start it again. @type {Map<string, form.Order>} */
const orders = new Map();

// ---- Drawing -------------------------------------------------------------------------------------------------------

let waiting = false;

/** Draws soon, and once for all that changes at once. Not in an animation frame: a hidden tab has none. */
function draw() {
  if (waiting) return;
  waiting = true;
  queueMicrotask(() => {
    waiting = false;
    drawNow();
  });
}

function drawNow(anew = false) {
  const { credit, userId, generations } = stagecast;
  byId("credit").hidden = credit === undefined || stagecast.state === "refused";
  write(byId("credit"), credit === undefined ? "" : t("credit")(credit));
  identity.draw(userId);
  connection.draw(stagecast);
  stage.draw(stagecast, tables, anew);
  strip.draw(stagecast);
  lists.draw(stagecast, anew);
  const [running] = generations.filter((generation) => !isFinished(generation));
  document.title = running ? `${percent(running.progress)} · Stagecast` : "Stagecast";
}

setInterval(() => {
  stage.tick();
  lists.tick();
}, 1_000);

// ---- What is done --------------------------------------------------------------------------------------------------

/** @param {form.Order} order @param {string} [idempotencyKey] */
async function start(order, idempotencyKey) {
  const { generationId } = await stagecast.start(order.kind, order.wish, { idempotencyKey });
  orders.set(generationId, order);
  const roomy = form.makeRoom();
  look("");
  drawNow();
  byId("stage").scrollIntoView();
  if (!roomy) byId("stage-title").focus({ preventScroll: true }); // The form has closed over the button.
  const now = stagecast.get(generationId);
  if (now && !isFinished(now)) announce(t("saidStarted")(titleOf(now)));
}

/**
 * The same again; where that cannot help, or is no longer known, the form is filled to change it.
 *
 * @param {Generation} generation
 */
async function again(generation) {
  const { generationId, kind, metadata, inputImage, retryable } = generation;
  const order = orders.get(generationId);
  if (order && retryable !== false) return start(order);
  form.fill(kind, order?.wish ?? {
    prompt: String(metadata?.prompt ?? metadata?.title ?? ""), imageUrls: inputImage ? [inputImage] : [],
    faceSwap: metadata?.faceSwap, aspectRatio: metadata?.aspectRatio,
  });
}

/** Looks at this generation, or at the newest. */
function look(/** @type {string} */ id) {
  if (location.hash.slice(1) !== id) history.pushState(null, "", id ? `#${id}` : location.pathname);
  draw();
  byId("stage").scrollIntoView({ block: "nearest" });
}

// ---- What happens --------------------------------------------------------------------------------------------------

stagecast.on("change", draw);
stagecast.on("event", (event, generation) => {
  if (event.sequence < generation.sequence) return;
  const title = titleOf(generation);
  if (event.status === "completed") announce(t("saidCompleted")(title));
  const { text } = saying(event.error ?? event.message, event.code);
  if (event.status === "failed") announce(t("saidFailed")(title, text));
});
stagecast.on("state", async (state, reason) => {
  draw();
  if (state === "live" || state === "polling") {
    if (first && stagecast.generations.length) form.makeRoom();
    first = false;
    tables = await stagecast.stages().catch(() => tables);
    draw();
  }
  if (state === "refused" && identity.guarded) stagecast.switchUser(await identity.identifyAnew(reason));
});

connection.listen(stagecast);
timeline.listen(stagecast, draw);
lists.listen(stagecast);
stage.listen(stagecast, { again, promptOf: ({ generationId }) => orders.get(generationId)?.wish.prompt });
strip.listen(stagecast);
form.listen(start);
identity.listen((next) => {
  look("");
  form.clear();
  orders.clear();
  stagecast.switchUser(next);
});
byId("language").addEventListener("click", () => {
  speak(true);
  byId("language").textContent = t("otherLanguage");
  form.draw();
  drawNow(true);
});
addEventListener("hashchange", () => {
  draw();
  byId("stage").scrollIntoView();
  byId("stage-title").focus({ preventScroll: true });
});
addEventListener("popstate", draw);
drawNow();

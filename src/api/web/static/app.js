/**
 * The page: starts generations, and shows the user's generations live. `stagecast.js` keeps the live state; the page
 * renders it.
 *
 * @typedef {import("./timeline.js").Stage} Stage
 * @typedef {import("./stagecast.js").Generation} Generation
 */

import * as connection from "./connection.js";
import { BASE, announce, byId, setText } from "./dom.js";
import * as expiry from "./expiry.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import { switchLanguage, t, titleOf, translate, usePreferredLanguage } from "./i18n.js";
import * as identity from "./identity.js";
import * as link from "./link.js";
import * as lists from "./lists.js";
import * as notify from "./notify.js";
import * as result from "./result.js";
import * as stage from "./stage.js";
import { connect, isFinished } from "./stagecast.js";
import * as strip from "./strip.js";
import * as timeline from "./timeline.js";

/**
 * Returns the Socket.IO client, or null if it cannot be loaded. A service without its own copy puts a template into the
 * page that loads the client from a CDN.
 */
async function loadSocketIo() {
  const script = byId("client")?.content.firstElementChild.cloneNode();
  if (script) await new Promise((resolve) => {
    script.onload = script.onerror = resolve;
    setTimeout(resolve, 5_000);
    document.head.append(script);
  });
  return /** @type {any} */ (globalThis).io ?? null;
}

usePreferredLanguage();
byId("language").textContent = t("otherLanguage");
byId("language").addEventListener("click", () => {
  switchLanguage();
  byId("language").textContent = t("otherLanguage");
});
document.querySelector(".skip")?.addEventListener("click", (event) => {
  event.preventDefault(); // The address keeps the generation that is shown.
  byId("stage").scrollIntoView();
  byId("stage").focus({ preventScroll: true });
});
const socketIo = loadSocketIo();
const user = await identity.identify();
const stagecast = connect({ ...user, url: BASE, io: await socketIo });

/** The stages of each kind, as `GET /stages` lists them. @type {Record<string, Stage[]>} */
let stages = {};
/** Whether the page has not been connected yet. */
let firstConnection = true;
/** The user whose token was refused, until a new token is accepted. @type {{userId?: string} | undefined} */
let refusedUser;
/** When the stages were requested. */
let stagesAt = 0;
/** What was submitted in this tab, by generation, for "Try again". @type {Map<string, form.Submission>} */
const submissions = new Map();

// ---- Rendering -----------------------------------------------------------------------------------------------------

let renderScheduled = false;

/** Renders once for all changes of the current task. Not in an animation frame: hidden tabs get none. */
function render() {
  if (renderScheduled) return;
  renderScheduled = true;
  queueMicrotask(() => {
    renderScheduled = false;
    renderNow();
  });
}

/** @param {boolean} [force] also what has not changed, after a change of language */
function renderNow(force = false) {
  const { credit, userId } = stagecast;
  byId("credit").hidden = credit === undefined || stagecast.state === "refused";
  setText(byId("credit"), credit === undefined ? "" : t("credit")(credit));
  identity.render(userId);
  connection.render(stagecast);
  stage.render(stagecast, stages, force);
  strip.render(stagecast);
  lists.render(stagecast, force);
  gallery.render(stagecast, force);
  notify.render(stagecast);
}

setInterval(() => {
  connection.tick(stagecast);
  stage.tick();
  lists.tick();
  gallery.tick();
}, 1_000);

/** Requests the stages and how long they usually take, at most every ten seconds. */
async function loadStages() {
  if (Date.now() - stagesAt < 10_000) return;
  stagesAt = Date.now();
  stages = await stagecast.stages().catch(() => ((stagesAt = 0), stages));
  render();
}

// ---- Actions -------------------------------------------------------------------------------------------------------

/** @param {form.Submission} submission @param {form.StartOptions} [options] */
async function start(submission, options) {
  const { generationId } = await stagecast.start(submission.kind, submission.request, options);
  submissions.set(generationId, submission);
  const wide = form.collapseIfNarrow();
  select("");
  renderNow();
  byId("stage").scrollIntoView();
  if (!wide) byId("stage-title").focus({ preventScroll: true }); // The focused button is now in the collapsed form.
  const generation = stagecast.get(generationId);
  if (generation && !isFinished(generation)) announce(t("announceStarted")(titleOf(generation)));
}

/** Selects the generation to show; an empty id selects the newest. */
function select(/** @type {string} */ id) {
  if (location.hash.slice(1) !== id) history.pushState(null, "", id ? `#${id}` : location.pathname);
  render();
  byId("stage").scrollIntoView({ block: "nearest" });
}

/** Clears what a user has entered and selected, for another user. */
function clear() {
  select("");
  form.clear();
  submissions.clear();
}

// ---- Events --------------------------------------------------------------------------------------------------------

stagecast.on("change", render);
stagecast.on("removed", (id) => id === link.linkedId() && history.replaceState(null, "", location.pathname));
stagecast.on("event", (event, generation) => {
  if (event.sequence < generation.sequence) return;
  if (event.sequence === 1) loadStages();
  const title = titleOf(generation);
  if (event.status === "completed") announce(t("announceCompleted")(title));
  const { text } = translate(event.error ?? event.message, event.code);
  if (event.status === "failed") announce(t("announceFailed")(title, text));
});
stagecast.on("state", async (state, reason) => {
  render();
  if (state === "live" || state === "polling") {
    // A client that polls does not know its user.
    if (refusedUser && (!stagecast.userId || stagecast.userId !== refusedUser.userId)) clear();
    refusedUser = undefined;
    if (firstConnection && stagecast.generations.length) form.collapseIfNarrow();
    firstConnection = false;
    loadStages();
    renderNow(true); // Loads pictures again that could not be loaded.
  }
  if (state === "refused" && identity.tokenRequired) {
    if (!firstConnection) refusedUser ??= { userId: stagecast.userId };
    stagecast.switchUser(await identity.askForNewToken(reason));
  }
});

connection.init(stagecast);
timeline.init(stagecast, render);
gallery.init(stagecast);
expiry.init(stagecast);
link.init(stagecast, render);
notify.init(stagecast);
stage.init(stagecast, {
  promptOf: ({ generationId }) => submissions.get(generationId)?.request.prompt,
  showNewest: () => select(""),
});
result.init(stagecast, { start, submissionOf: ({ generationId }) => submissions.get(generationId) });
strip.init(stagecast);
form.init(start);
identity.init((next) => {
  clear();
  stagecast.switchUser(next);
});
byId("language").addEventListener("click", () => {
  form.render();
  renderNow(true);
});
addEventListener("hashchange", () => {
  render();
  byId("stage").scrollIntoView();
  byId("stage-title").focus({ preventScroll: true });
});
addEventListener("popstate", render);
renderNow();

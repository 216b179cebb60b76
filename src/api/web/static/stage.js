/**
 * The selected generation: its pictures with a before and after slider, its progress bar, actions and timeline.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./connection.js").Stagecast} Stagecast
 * @typedef {import("./timeline.js").Stage} Stage
 */

import * as apiPanel from "./apiPanel.js";
import { byId, setImage, setProgress, setText } from "./dom.js";
import { inSteps, secondsLeft } from "./estimate.js";
import {
  formatDate, formatDuration, formatPercent, formatRange, showMessage, statusName, t, titleOf, translate,
} from "./i18n.js";
import { linkedId, lookupState } from "./link.js";
import { latestOf, picturesOf, ratioOf, sheetOf } from "./pictures.js";
import * as result from "./result.js";
import { isFinished } from "./stagecast.js";
import * as timeline from "./timeline.js";

/** The generation on the page. @type {Generation | undefined} */
let shown;
/** The id of the generation whose whole prompt is shown. */
let expanded = "";
/** Of the generation on the page: the stage that it is in, and those to come. */
let ahead = { present: /** @type {Stage | undefined} */ (undefined), upcoming: /** @type {Stage[]} */ ([]) };
/** Whether what is on the page is up to date. */
let upToDate = false;
/** The whole prompt of a generation, if it was started in this tab. */
let promptOf = (/** @type {Generation} */ _) => /** @type {string | undefined} */ (undefined);

/**
 * The generation in the address; the newest if the address has none. A link never shows another generation than its own.
 *
 * @param {Stagecast} stagecast @returns {Generation | undefined}
 */
export const selected = (stagecast) => (linkedId() ? stagecast.get(linkedId()) : stagecast.generations[0]);

/** How long a finished generation took, in milliseconds. @param {Generation} generation */
const duration = (generation) => Date.parse(generation.updatedAt) - Date.parse(generation.createdAt);
/** How long a generation has been running, in milliseconds. @param {Generation} generation */
export const age = (generation) => Date.now() - Date.parse(generation.createdAt);

/**
 * @param {Stagecast} stagecast @param {Record<string, Stage[]>} stages as `GET /stages` lists them
 * @param {boolean} [force] renders the whole timeline again, after a change of language
 */
export function render(stagecast, stages, force) {
  const generation = selected(stagecast);
  const stage = byId("stage");
  if (generation?.generationId !== shown?.generationId) setText(byId("note"), "");
  upToDate = ["live", "polling"].includes(stagecast.state);
  const previous = shown?.generationId === generation?.generationId ? shown : undefined;
  shown = generation;
  apiPanel.render(stagecast, generation, force);
  if (!generation) {
    stage.dataset.state = emptyState(stagecast);
    if (stage.dataset.state === "missing") setText(byId("missing-text"), t("missingText")(stagecast.userId ?? ""));
    return;
  }
  const { kind, status, progress, createdAt } = generation;
  const finished = isFinished(generation);
  stage.dataset.state = finished ? status : "active";
  setText(byId("stage-kind"), `${t(kind)} · ${formatDate(createdAt)}`);
  setText(byId("percent"), formatPercent(progress));
  setText(byId("stage-name"), statusName(generation));
  const text = t("stageOf")(statusName(generation), formatPercent(progress));
  setProgress(byId("bar"), { label: t("progressOf")(titleOf(generation)), progress, text });
  renderOutcome(generation, stagecast.credit !== undefined);
  renderPictures(generation, previous);
  const table = stages[kind] ?? [];
  timeline.render(stagecast, generation, table, force);
  const present = table.find((stage) => stage.status === status);
  ahead = { present, upcoming: timeline.upcomingStages(table, generation) };
  result.render(generation);
  tick();
}

/** What the section shows without a generation. @param {Stagecast} stagecast */
function emptyState(stagecast) {
  const found = lookupState(stagecast);
  if (found) return found === "failed" ? "failed-link" : found;
  return upToDate ? "empty" : byId("stage").dataset.state === "empty" ? "empty" : "unknown";
}

/** Shows the title, cut off after four lines by CSS, or the whole prompt. @param {Generation} generation */
function renderTitle(generation) {
  const [title, short] = [byId("stage-title"), titleOf(generation)];
  const whole = generation.input?.prompt ?? promptOf(generation) ?? short;
  const open = expanded === generation.generationId;
  setText(title, open ? whole : short);
  title.classList.toggle("whole", open);
  byId("whole").hidden = !open && title.scrollHeight <= title.clientHeight + 1 && whole.trim() === short;
  byId("whole").setAttribute("aria-expanded", String(open));
  setText(byId("whole"), t(open ? "lessPrompt" : "wholePrompt"));
}

/** Renders what changes with time, or with the width of the window. */
export function tick() {
  if (!shown) return;
  renderTitle(shown);
  setText(byId("elapsed"), isFinished(shown) ? formatDuration(duration(shown), 1) : formatDuration(age(shown)));
  setText(byId("left"), timeLeft(shown));
}

/** How long the generation usually still takes; empty if that is not known. @param {Generation} generation */
function timeLeft(generation) {
  if (isFinished(generation) || !ahead.present || !upToDate) return "";
  const waiting = generation.sequence === 1;
  const elapsed = waiting ? 0 : (Date.now() - timeline.enteredAt(generation)) / 1000;
  const range = secondsLeft(waiting ? undefined : ahead.present, ahead.upcoming, elapsed);
  return range ? t(waiting ? "usuallyTakes" : "usuallyLeft")(formatRange(inSteps(range))) : "";
}

/** @param {Generation} generation @param {boolean} hasCredit whether the service keeps balances */
function renderOutcome(generation, hasCredit) {
  const { status, error, message, code, faceSwapError } = generation;
  const outcome = byId("outcome");
  if (status === "failed") {
    showMessage(outcome, error ?? message, code);
    if (hasCredit) outcome.append(" ", t("refunded"));
  } else if (faceSwapError) {
    outcome.lang = "";
    outcome.textContent = t("faceSwapFailed")(translate(faceSwapError.message, faceSwapError.code).text);
  } else {
    showMessage(outcome, status === "completed" ? "" : message);
  }
}

// ---- Pictures ------------------------------------------------------------------------------------------------------

/** @param {Generation} generation @param {Generation} [previous] its state at the last rendering */
function renderPictures(generation, previous) {
  const frame = byId("stage").querySelector(".frame");
  const { status } = generation;
  const title = titleOf(generation);
  const latest = latestOf(generation);
  const sheet = status === "completed" && latest !== sheetOf(generation) ? sheetOf(generation) : undefined;
  const ratio = ratioOf(generation);
  frame.style.setProperty("--ratio", String(ratio));
  const none = isFinished(generation) && !picturesOf(generation).length;
  byId("stage").querySelector("figure").hidden = none;
  byId("stage").dataset.shape = none || ratio > 1 ? "wide" : "";
  const [before, after] = [byId("before"), byId("after")];
  after.classList.toggle("sheet", latest === sheetOf(generation));
  setImage(after, latest, t("pictureOf")(title));
  setImage(before, sheet, t("sheetOf")(title));
  setText(byId("no-picture"), latest ? "" : t(picturesOf(generation).length ? "pictureElsewhere" : "noPictureYet"));
  for (const id of ["wipe", "sides"]) byId(id).hidden = !sheet;
  if (!previous) setSlider(0);
  if (sheet && previous && !isFinished(previous)) animateSlider(generation);
  const links = picturesOf(generation).map(({ name, url, ownUrl }) => {
    const text = ownUrl ? t(name) : t("elsewhere")(t(name), new URL(url).host);
    const [href, target, rel] = [ownUrl ?? url, "_blank", "noopener noreferrer"];
    return Object.assign(document.createElement("a"), { textContent: `${text} ↗`, href, target, rel });
  });
  const box = byId("pictures");
  if (box.textContent !== links.map((link) => link.textContent).join("") || !previous) box.replaceChildren(...links);
}

/** Moves the slider: the sheet is visible left of this position, the result right of it. */
function setSlider(/** @type {number} */ percent) {
  for (const animation of byId("stage").querySelector(".frame").getAnimations()) animation.cancel();
  byId("wipe").value = percent;
  byId("wipe").setAttribute("aria-valuetext", t("wipeAt")(formatPercent(100 - percent)));
  byId("stage").querySelector(".frame").style.setProperty("--at", `${percent}%`);
  for (const [id, value] of [["show-before", 100], ["show-after", 0]]) {
    byId(/** @type {string} */ (id)).setAttribute("aria-pressed", String(percent === value));
  }
}

/** Uncovers the result as soon as both pictures have loaded. */
async function animateSlider(/** @type {Generation} */ { generationId }) {
  const frame = byId("stage").querySelector(".frame");
  await Promise.all([byId("before").decode(), byId("after").decode()]).catch(() => {});
  if (shown?.generationId !== generationId || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  frame.animate({ "--at": ["100%", "0%"] }, { duration: 1_400, easing: "cubic-bezier(0.6, 0, 0.2, 1)" });
}

/** @param {Stagecast} stagecast @param {{promptOf: typeof promptOf, showNewest: () => void}} page */
export function init(stagecast, page) {
  promptOf = page.promptOf;
  apiPanel.init(stagecast);
  byId("whole").addEventListener("click", () => {
    if (!shown) return;
    expanded = expanded === shown.generationId ? "" : shown.generationId;
    renderTitle(shown);
  });
  byId("show-newest").addEventListener("click", page.showNewest);
  byId("wipe").addEventListener("input", () => setSlider(Number(byId("wipe").value)));
  byId("show-before").addEventListener("click", () => setSlider(100));
  byId("show-after").addEventListener("click", () => setSlider(0));
}

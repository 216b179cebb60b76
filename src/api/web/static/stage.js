/**
 * The selected generation: its pictures with a before and after slider, its progress bar, actions and timeline.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./connection.js").Stagecast} Stagecast
 * @typedef {import("./timeline.js").Stage} Stage
 */

import { byId, setImage, setProgress, setText } from "./dom.js";
import {
  formatDate, formatDuration, formatPercent, showMessage, statusName, t, titleOf, translate,
} from "./i18n.js";
import { latestOf, picturesOf, sheetOf } from "./pictures.js";
import { isFinished } from "./stagecast.js";
import * as timeline from "./timeline.js";

const SHAPES = ["2:3", "1:1", "3:2"];

/** The generation on the page. @type {Generation | undefined} */
let shown;
/** The id of the generation whose whole prompt is shown. */
let expanded = "";
/** The id of the generation whose "Delete" button was pressed once: a second press deletes it. */
let pendingDelete = "";
/** The whole prompt of a generation, if it was started in this tab. */
let promptOf = (/** @type {Generation} */ _) => /** @type {string | undefined} */ (undefined);

/** The generation in the address, else the newest. @param {Stagecast} stagecast @returns {Generation | undefined} */
export const selected = (stagecast) => stagecast.get(location.hash.slice(1)) ?? stagecast.generations[0];

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
  if (generation?.generationId !== shown?.generationId) pendingDelete = "", setText(byId("note"), "");
  const previous = shown?.generationId === generation?.generationId ? shown : undefined;
  shown = generation;
  if (!generation) {
    const synced = ["live", "polling"].includes(stagecast.state);
    if (synced || stagecast.state === "connecting") stage.dataset.state = synced ? "empty" : "unknown";
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
  tick();
  renderOutcome(generation, stagecast.credit !== undefined);
  renderPictures(generation, previous);
  timeline.render(stagecast, generation, stages[kind] ?? [], force);
  byId("again").hidden = status !== "failed";
  byId("cancel").hidden = finished;
  byId("delete").hidden = !finished;
  setText(byId("delete"), t(pendingDelete ? "confirmDelete" : "delete"));
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
  const shape = generation.input?.aspectRatio ?? generation.metadata?.aspectRatio;
  const ratio = SHAPES.includes(shape) ? shape : "2:3";
  frame.style.setProperty("--ratio", ratio.replace(":", " / "));
  byId("stage").dataset.shape = ratio === "3:2" ? "wide" : "";
  const [before, after] = [byId("before"), byId("after")];
  after.classList.toggle("sheet", latest === sheetOf(generation));
  setImage(after, latest, t("pictureOf")(title));
  setImage(before, sheet, t("sheetOf")(title));
  const placeholder = isFinished(generation) ? "noPicture" : "noPictureYet";
  setText(byId("no-picture"), latest ? "" : t(picturesOf(generation).length ? "pictureElsewhere" : placeholder));
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

// ---- Actions -------------------------------------------------------------------------------------------------------

/**
 * @param {Stagecast} stagecast
 * @param {{tryAgain: (generation: Generation) => Promise<unknown>, promptOf: typeof promptOf}} page
 */
export function init(stagecast, page) {
  promptOf = page.promptOf;
  /** @param {string} id @param {(generation: Generation) => Promise<unknown> | void} act */
  const onClick = (id, act) => byId(id).addEventListener("click", async () => {
    const generation = shown;
    if (!generation) return;
    setText(byId("note"), "");
    try {
      await act(generation);
    } catch (/** @type {any} */ error) {
      if (shown?.generationId === generation.generationId) showMessage(byId("note"), error.message, error.code);
    }
  });
  onClick("again", page.tryAgain);
  onClick("whole", (generation) => {
    expanded = expanded ? "" : generation.generationId;
    renderTitle(generation);
  });
  onClick("cancel", ({ generationId }) => stagecast.cancel(generationId));
  onClick("delete", ({ generationId }) => {
    if (pendingDelete !== generationId) {
      pendingDelete = generationId;
      return setText(byId("delete"), t("confirmDelete"));
    }
    pendingDelete = "";
    return stagecast.remove(generationId).then(() => byId("stage-title").focus());
  });
  byId("delete").addEventListener("blur", () => {
    pendingDelete = "";
    setText(byId("delete"), t("delete"));
  });
  byId("wipe").addEventListener("input", () => setSlider(Number(byId("wipe").value)));
  byId("show-before").addEventListener("click", () => setSlider(100));
  byId("show-after").addEventListener("click", () => setSlider(0));
}

/**
 * The one generation that is looked at: large, with its picture, before and after, its bar and its timeline.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./connection.js").Stagecast} Stagecast
 * @typedef {import("./timeline.js").Stage} Stage
 */

import { byId, setBar, show, write } from "./dom.js";
import { bestOf, picturesOf, sheetOf } from "./pictures.js";
import { isFinished } from "./stagecast.js";
import * as timeline from "./timeline.js";
import { moment, percent, quote, saying, seconds, standing, t, titleOf } from "./words.js";

const SHAPES = ["2:3", "1:1", "3:2"];

/** @type {Generation | undefined} */
let shown;
/** The one whose whole prompt is shown. */
let unfolded = "";
/** The prompt of a generation that was started here. */
let promptOf = (/** @type {Generation} */ _) => /** @type {string | undefined} */ (undefined);
/** The one for which "delete" was pressed once. */
let doomed = "";

/** The one that the address names, else the newest. @param {Stagecast} stagecast @returns {Generation | undefined} */
export const selected = (stagecast) => stagecast.get(location.hash.slice(1)) ?? stagecast.generations[0];

/** So long it has taken, in milliseconds. @param {Generation} generation */
export const duration = (generation) => Date.parse(generation.updatedAt) - Date.parse(generation.createdAt);
/** So long it has been running, in milliseconds. @param {Generation} generation */
export const age = (generation) => Date.now() - Date.parse(generation.createdAt);

/**
 * @param {Stagecast} stagecast @param {Record<string, Stage[]>} tables as `GET /stages` answers
 * @param {boolean} [anew] also what has not changed: the language has
 */
export function draw(stagecast, tables, anew) {
  const generation = selected(stagecast);
  const stage = byId("stage");
  if (generation?.generationId !== shown?.generationId) doomed = "", write(byId("note"), "");
  const last = shown?.generationId === generation?.generationId ? shown : undefined;
  shown = generation;
  if (!generation) {
    const known = ["live", "polling"].includes(stagecast.state);
    if (known || stagecast.state === "connecting") stage.dataset.state = known ? "empty" : "unknown";
    return;
  }
  const { kind, status, progress, createdAt } = generation;
  const over = isFinished(generation);
  stage.dataset.state = over ? status : "active";
  write(byId("stage-kind"), `${t(kind)} · ${moment(createdAt)}`);
  write(byId("percent"), percent(progress));
  write(byId("stage-name"), standing(generation));
  setBar(byId("bar"), {
    label: t("progressOf")(titleOf(generation)), progress, text: t("stageOf")(standing(generation), percent(progress)),
  });
  tick();
  drawOutcome(generation, stagecast.credit !== undefined);
  drawPictures(generation, last);
  timeline.draw(stagecast, generation, tables[kind] ?? [], anew);
  byId("again").hidden = status !== "failed";
  byId("cancel").hidden = over;
  byId("delete").hidden = !over;
  write(byId("delete"), t(doomed ? "deleteSurely" : "delete"));
}

/** The title, of which at most four lines are shown, or the whole prompt. @param {Generation} generation */
function drawTitle(generation) {
  const [title, short] = [byId("stage-title"), titleOf(generation)];
  const whole = generation.input?.prompt ?? promptOf(generation) ?? short;
  const open = unfolded === generation.generationId;
  write(title, open ? whole : short);
  title.classList.toggle("whole", open);
  byId("whole").hidden = !open && title.scrollHeight <= title.clientHeight + 1 && whole.trim() === short;
  byId("whole").setAttribute("aria-expanded", String(open));
  write(byId("whole"), t(open ? "lessPrompt" : "wholePrompt"));
}

/** What changes with time alone, or with the width of the window. */
export function tick() {
  if (!shown) return;
  drawTitle(shown);
  write(byId("elapsed"), isFinished(shown) ? seconds(duration(shown), 1) : seconds(age(shown)));
}

/** @param {Generation} generation @param {boolean} credits balances are kept */
function drawOutcome(generation, credits) {
  const { status, error, message, code, faceSwapError } = generation;
  const outcome = byId("outcome");
  if (status === "failed") {
    quote(outcome, error ?? message, code);
    if (credits) outcome.append(" ", t("refunded"));
  } else if (faceSwapError) {
    outcome.lang = "";
    outcome.textContent = t("noFace")(saying(faceSwapError.message, faceSwapError.code).text);
  } else {
    quote(outcome, status === "completed" ? "" : message);
  }
}

// ---- The pictures --------------------------------------------------------------------------------------------------

/** @param {Generation} generation @param {Generation} [last] as it was shown before */
function drawPictures(generation, last) {
  const frame = byId("stage").querySelector(".frame");
  const { status, metadata } = generation;
  const title = titleOf(generation);
  const best = bestOf(generation);
  const sheet = status === "completed" && best !== sheetOf(generation) ? sheetOf(generation) : undefined;
  const ratio = SHAPES.includes(metadata?.aspectRatio) ? metadata?.aspectRatio : "2:3";
  frame.style.setProperty("--ratio", ratio.replace(":", " / "));
  byId("stage").dataset.shape = ratio === "3:2" ? "wide" : "";
  const [before, after] = [byId("before"), byId("after")];
  after.classList.toggle("sheet", best === sheetOf(generation));
  show(after, best, t("pictureOf")(title));
  show(before, sheet, t("sheetOf")(title));
  const none = isFinished(generation) ? "neverPicture" : "noPicture";
  write(byId("no-picture"), best ? "" : t(picturesOf(generation).length ? "pictureElsewhere" : none));
  for (const id of ["wipe", "sides"]) byId(id).hidden = !sheet;
  if (!last) wipe(0);
  if (sheet && last && !isFinished(last)) sweep(generation);
  const links = picturesOf(generation).map(({ name, url, own }) => {
    const text = own ? t(name) : t("elsewhere")(t(name), new URL(url).host);
    const [href, target, rel] = [own ?? url, "_blank", "noopener noreferrer"];
    return Object.assign(document.createElement("a"), { textContent: `${text} ↗`, href, target, rel });
  });
  const box = byId("pictures");
  if (box.textContent !== links.map((link) => link.textContent).join("") || !last) box.replaceChildren(...links);
}

/** Up to there, in per cent from the left, the sheet is seen; beyond it the result. */
function wipe(/** @type {number} */ at) {
  for (const sweeping of byId("stage").querySelector(".frame").getAnimations()) sweeping.cancel();
  byId("wipe").value = at;
  byId("wipe").setAttribute("aria-valuetext", t("wipeAt")(percent(100 - at)));
  byId("stage").querySelector(".frame").style.setProperty("--at", `${at}%`);
  for (const [id, value] of [["show-before", 100], ["show-after", 0]]) {
    byId(/** @type {string} */ (id)).setAttribute("aria-pressed", String(at === value));
  }
}

/** The result comes out from under the sheet, as soon as it is here. */
async function sweep(/** @type {Generation} */ { generationId }) {
  const frame = byId("stage").querySelector(".frame");
  await Promise.all([byId("before").decode(), byId("after").decode()]).catch(() => {});
  if (shown?.generationId !== generationId || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  frame.animate({ "--at": ["100%", "0%"] }, { duration: 1_400, easing: "cubic-bezier(0.6, 0, 0.2, 1)" });
}

// ---- What can be done ----------------------------------------------------------------------------------------------

/**
 * @param {Stagecast} stagecast
 * @param {{again: (generation: Generation) => Promise<unknown>, promptOf: typeof promptOf}} page
 */
export function listen(stagecast, { again, promptOf: known }) {
  promptOf = known;
  /** @param {string} id @param {(generation: Generation) => Promise<unknown> | void} act */
  const on = (id, act) => byId(id).addEventListener("click", async () => {
    const generation = shown;
    if (!generation) return;
    write(byId("note"), "");
    try {
      await act(generation);
    } catch (/** @type {any} */ error) {
      if (shown?.generationId === generation.generationId) quote(byId("note"), error.message, error.code);
    }
  });
  on("again", again);
  on("whole", (generation) => {
    unfolded = unfolded ? "" : generation.generationId;
    drawTitle(generation);
  });
  on("cancel", ({ generationId }) => stagecast.cancel(generationId));
  on("delete", ({ generationId }) => {
    if (doomed !== generationId) {
      doomed = generationId;
      return write(byId("delete"), t("deleteSurely"));
    }
    doomed = "";
    return stagecast.remove(generationId).then(() => byId("stage-title").focus());
  });
  byId("delete").addEventListener("blur", () => {
    doomed = "";
    write(byId("delete"), t("delete"));
  });
  byId("wipe").addEventListener("input", () => wipe(Number(byId("wipe").value)));
  byId("show-before").addEventListener("click", () => wipe(100));
  byId("show-after").addEventListener("click", () => wipe(0));
}

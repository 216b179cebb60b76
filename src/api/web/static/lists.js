/**
 * The lists of generations: rows for those that run, tiles for those that have finished.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./connection.js").Stagecast} Stagecast
 * @typedef {{root: HTMLElement, part: (selector: string) => any, rendered?: Generation}} View
 */

import { byId, cloneTemplate, setChildren, setImage, setProgress, setText } from "./dom.js";
import { formatDate, formatDuration, formatPercent, statusName, t, titleOf } from "./i18n.js";
import { latestOf, sheetOf } from "./pictures.js";
import { age, selected } from "./stage.js";
import { isFinished } from "./stagecast.js";

const PAGE_SIZE = 20;

/** The elements on the page, by generation id and whether it has finished. @type {Map<string, View>} */
const views = new Map();
/** The start of the next page of the history; undefined: not requested yet, null: there is none. */
let nextPage = /** @type {string | null | undefined} */ (undefined);

/** @param {Generation} generation */
const keyOf = (generation) => `${generation.generationId} ${isFinished(generation)}`;

/** @param {Stagecast} stagecast @param {Generation} generation */
function renderView(stagecast, generation, force = false) {
  const { generationId: id, status } = generation;
  const finished = isFinished(generation);
  const key = keyOf(generation);
  const view = views.get(key) ?? /** @type {View} */ (cloneTemplate(finished ? "tile-template" : "row-template"));
  if (!views.has(key)) {
    views.set(key, view);
    view.part("a").href = `#${id}`;
    if (!finished) view.part("button").addEventListener("click", () => stagecast.cancel(id).catch(() => {}));
  }
  const { root, part, rendered } = view;
  if (rendered === generation && !force) return root;
  view.rendered = generation;
  root.dataset.state = finished ? status : "active";
  const title = titleOf(generation);
  part(".title").textContent = title;
  const picture = latestOf(generation);
  // Not while it runs: a thumbnail of each preview would be stored.
  setImage(part("img"), picture && finished ? `${picture}?width=320` : picture);
  part("img").classList.toggle("sheet", picture === sheetOf(generation));
  if (finished) {
    const date = formatDate(generation.createdAt);
    setText(part(".meta"), status === "completed" ? date : `${statusName(generation)} · ${date}`);
  } else {
    const { progress } = generation;
    const text = t("stageOf")(statusName(generation), formatPercent(progress));
    setProgress(part(".bar"), { label: t("progressOf")(title), progress, text });
    setText(part("button"), t("cancel"));
    part("button").setAttribute("aria-label", t("cancelOne")(title));
    renderElapsed(view);
  }
  return root;
}

/** @param {View} view */
function renderElapsed({ part, rendered }) {
  if (!rendered || isFinished(rendered)) return;
  const stage = t("stageOf")(statusName(rendered), formatPercent(rendered.progress));
  setText(part(".meta"), `${stage} · ${formatDuration(age(rendered))}`);
}

/** Renders what changes with time. */
export const tick = () => views.forEach(renderElapsed);

/** @param {Stagecast} stagecast @param {boolean} [force] */
export function render(stagecast, force) {
  const { generations } = stagecast;
  const keys = new Set(generations.map(keyOf));
  for (const key of views.keys()) if (!keys.has(key)) views.delete(key);
  const current = selected(stagecast);
  const running = generations.filter((generation) => !isFinished(generation) && generation !== current);
  const finished = generations.filter(isFinished);
  for (const [id, listed] of /** @type {[string, Generation[]][]} */ ([["running", running], ["history", finished]])) {
    byId(id).hidden = !listed.length;
    setChildren(byId(id).querySelector("ul"), listed.map((generation) => {
      const root = renderView(stagecast, generation, force);
      root.querySelector("a")?.setAttribute("aria-current", String(generation === current));
      return root;
    }));
  }
  byId("older").hidden = !nextPage;
}

/** Loads the next page of the history. @param {Stagecast} stagecast */
async function loadNextPage(stagecast) {
  const { userId } = stagecast;
  const page = await stagecast.older(nextPage ?? undefined, PAGE_SIZE);
  if (stagecast.userId !== userId) return;
  nextPage = page.next ?? null;
  render(stagecast);
}

/** @param {Stagecast} stagecast */
export function init(stagecast) {
  // The client already has the newest generations; the first page tells where the next one starts.
  const loadFirstPage = () => {
    nextPage = undefined;
    loadNextPage(stagecast).catch(() => {});
  };
  stagecast.on("state", (state) => {
    if (state === "connecting") nextPage = undefined;
    if ((state === "live" || state === "polling") && nextPage === undefined) loadFirstPage();
  });
  stagecast.on("caughtUp", ({ recovered }) => recovered || loadFirstPage());
  byId("older").addEventListener("click", () => loadNextPage(stagecast).catch(() => {}));
}

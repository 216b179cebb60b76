/**
 * The history: a gallery of the finished generations, with filters and search.
 *
 * The service pages by time only, so the page filters. While a filter or a search is set, it loads the pages that it
 * does not have yet in the background.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./connection.js").Stagecast} Stagecast
 * @typedef {{root: HTMLElement, part: (selector: string) => any, rendered?: Generation, current?: boolean}} Tile
 */

import { byId, cloneTemplate, setChildren, setImage, setText } from "./dom.js";
import { expiryOf } from "./expiry.js";
import { formatDate, formatSpan, statusName, t, titleOf } from "./i18n.js";
import * as pages from "./pages.js";
import { latestOf, ratioOf, sheetOf } from "./pictures.js";
import { selected } from "./stage.js";
import { isFinished } from "./stagecast.js";

/** How many tiles are on the page at first, and how many each press of the button adds. */
const [FIRST, STEP] = [20, 40];

/** The tiles by generation id. They are kept for as long as the generation is known. @type {Map<string, Tile>} */
const tiles = new Map();
/** How many tiles are on the page at most. */
let limit = FIRST;
/** Whether a page could not be loaded. */
let failed = false;
/** When the dates were rendered. */
let ticked = 0;

/** A text as it is searched: without case, accents and the difference between the Turkish letters i. */
const plain = (/** @type {string} */ text) =>
  text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase().replace(/ı/g, "i");

/** What is searched of each generation. @type {WeakMap<Generation, string>} */
const searched = new WeakMap();
function textOf(/** @type {Generation} */ generation) {
  const known = searched.get(generation);
  if (known !== undefined) return known;
  const text = plain(`${titleOf(generation)} ${generation.input?.prompt ?? ""}`);
  searched.set(generation, text);
  return text;
}

/** The filter as it is set, and whether it leaves anything out. */
function currentFilter() {
  const [kind, status] = [byId("filter-kind").value, byId("filter-state").value];
  const words = plain(byId("search").value).split(/\s+/).filter(Boolean);
  return {
    set: Boolean(kind || status || words.length),
    /** @param {Generation} generation */
    accepts: (generation) =>
      (!kind || generation.kind === kind) &&
      (!status || status === (generation.code === "cancelled" ? "cancelled" : generation.status)) &&
      words.every((word) => textOf(generation).includes(word)),
  };
}

/** @param {Generation} generation @param {boolean} force */
function renderTile(generation, force) {
  const { generationId: id, status } = generation;
  const tile = tiles.get(id) ?? /** @type {Tile} */ (cloneTemplate("tile-template"));
  const { root, part, rendered } = tile;
  if (!tiles.has(id)) root.addEventListener("dragstart", (event) => onDrag(event, tile));
  tiles.set(id, tile);
  if (rendered === generation && !force) return tile;
  tile.rendered = generation;
  root.dataset.state = status;
  part("a").href = `#${id}`;
  part(".title").textContent = titleOf(generation);
  const picture = latestOf(generation);
  setImage(part("img"), picture && `${picture}?width=320`);
  part("img").classList.toggle("sheet", picture === sheetOf(generation));
  // Known before the picture is loaded, so that nothing moves.
  root.style.setProperty("--shape", String(ratioOf(generation)));
  renderDates(tile);
  return tile;
}

/** Has a tile dragged as its picture, for example onto the form. @param {DragEvent} event @param {Tile} tile */
function onDrag({ dataTransfer }, { rendered }) {
  const picture = rendered && latestOf(rendered);
  if (picture) dataTransfer?.setData("text/uri-list", picture);
}

/** @param {Tile} tile */
function renderDates({ part, rendered }) {
  if (!rendered) return;
  const date = formatDate(rendered.createdAt);
  setText(part(".meta"), rendered.status === "completed" ? date : `${statusName(rendered)} · ${date}`);
  const expiry = expiryOf(rendered);
  setText(part(".expiry"), expiry ? t("left")(formatSpan(expiry - Date.now())) : "");
}

/** Renders what changes with time, once a minute. */
export function tick() {
  if (Date.now() - ticked < 60_000) return;
  ticked = Date.now();
  for (const tile of tiles.values()) if (tile.root.isConnected) renderDates(tile);
}

/** @param {Stagecast} stagecast @param {boolean} [force] */
export function render(stagecast, force = false) {
  const finished = stagecast.generations.filter(isFinished);
  for (const id of tiles.keys()) if (!stagecast.get(id)) tiles.delete(id);
  const filter = currentFilter();
  const found = filter.set ? finished.filter(filter.accepts) : finished;
  const current = selected(stagecast);
  const shown = found.slice(0, limit).map((generation) => {
    const tile = renderTile(generation, force);
    const isCurrent = generation === current;
    if (tile.current !== isCurrent) tile.part("a").setAttribute("aria-current", String((tile.current = isCurrent)));
    return tile.root;
  });
  setChildren(byId("history").querySelector("ul"), shown);
  byId("history").hidden = !finished.length;
  byId("filters").hidden = !filter.set && finished.length < 2;
  const complete = !pages.mayHaveMore();
  byId("older").hidden = found.length <= limit && (filter.set ? !failed : !pages.hasNext());
  byId("clear-filters").hidden = !filter.set;
  setText(byId("found"), filter.set ? foundText(found.length, finished.length, complete) : "");
}

/** @param {number} found @param {number} known @param {boolean} complete whether all generations are known */
function foundText(found, known, complete) {
  if (complete) return found ? t("found")(found, known) : t("foundNothing")(known);
  return failed ? t("searchStopped")(found, known) : t("searching")(found, known);
}

/** Loads what a filter needs: everything. @param {Stagecast} stagecast */
async function loadForFilter(stagecast) {
  failed = false;
  const { userId } = stagecast;
  await pages.loadUntil(stagecast, () => !currentFilter().set).catch(() => (failed = true));
  if (stagecast.userId === userId) render(stagecast);
}

/** @param {Stagecast} stagecast */
async function showMore(stagecast) {
  limit += STEP;
  if (currentFilter().set) return loadForFilter(stagecast);
  const known = () => stagecast.generations.filter(isFinished).length >= limit;
  await pages.loadUntil(stagecast, known).catch(() => {});
  render(stagecast);
}

/** @param {Stagecast} stagecast */
export function init(stagecast) {
  // The client module already has the newest generations; the first page tells where the next one starts.
  const loadFirstPage = () => {
    pages.reset();
    const onLoaded = () => (currentFilter().set ? loadForFilter(stagecast) : render(stagecast));
    pages.load(stagecast, FIRST).then(onLoaded, () => {});
  };
  stagecast.on("state", (state) => {
    if (state === "connecting") [limit] = [FIRST, pages.reset()];
    if ((state === "live" || state === "polling") && pages.isUnknown()) loadFirstPage();
  });
  stagecast.on("caughtUp", ({ recovered }) => recovered || loadFirstPage());
  byId("older").addEventListener("click", () => showMore(stagecast));
  const onFilter = () => {
    limit = FIRST;
    render(stagecast);
    if (currentFilter().set) loadForFilter(stagecast);
  };
  let timer = /** @type {any} */ (undefined);
  byId("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(onFilter, 150);
  });
  byId("filters").addEventListener("submit", (/** @type {Event} */ event) => (event.preventDefault(), onFilter()));
  for (const id of ["filter-kind", "filter-state"]) byId(id).addEventListener("change", onFilter);
  byId("clear-filters").addEventListener("click", () => {
    byId("filters").reset();
    onFilter();
    byId("search").focus();
  });
}

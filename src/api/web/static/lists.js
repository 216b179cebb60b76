/**
 * The list of the generations that run beside the selected one.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./connection.js").Stagecast} Stagecast
 * @typedef {{root: HTMLElement, part: (selector: string) => any, rendered?: Generation}} Row
 */

import { byId, cloneTemplate, setChildren, setImage, setProgress, setText } from "./dom.js";
import { formatDuration, formatPercent, statusName, t, titleOf } from "./i18n.js";
import { latestOf, sheetOf } from "./pictures.js";
import { age, selected } from "./stage.js";
import { isFinished } from "./stagecast.js";

/** The rows on the page, by generation id. @type {Map<string, Row>} */
const rows = new Map();

/** @param {Stagecast} stagecast @param {Generation} generation */
function renderRow(stagecast, generation, force = false) {
  const { generationId: id, progress } = generation;
  const known = rows.get(id);
  const row = known ?? /** @type {Row} */ (cloneTemplate("row-template"));
  const { root, part } = row;
  if (!known) {
    rows.set(id, row);
    part("a").href = `#${id}`;
    part("button").addEventListener("click", () => stagecast.cancel(id).catch(() => {}));
  }
  if (row.rendered === generation && !force) return root;
  row.rendered = generation;
  const title = titleOf(generation);
  part(".title").textContent = title;
  const picture = latestOf(generation);
  setImage(part("img"), picture); // No thumbnail: one of each preview would be stored.
  part("img").classList.toggle("sheet", picture === sheetOf(generation));
  const text = t("stageOf")(statusName(generation), formatPercent(progress));
  setProgress(part(".bar"), { label: t("progressOf")(title), progress, text });
  setText(part("button"), t("cancel"));
  part("button").setAttribute("aria-label", t("cancelOne")(title));
  renderElapsed(row);
  return root;
}

/** @param {Row} row */
function renderElapsed({ part, rendered }) {
  if (!rendered) return;
  const stage = t("stageOf")(statusName(rendered), formatPercent(rendered.progress));
  setText(part(".meta"), `${stage} · ${formatDuration(age(rendered))}`);
}

/** Renders what changes with time. */
export const tick = () => rows.forEach(renderElapsed);

/** @param {Stagecast} stagecast @param {boolean} [force] */
export function render(stagecast, force) {
  const current = selected(stagecast);
  const running = stagecast.generations.filter((generation) => !isFinished(generation) && generation !== current);
  const ids = new Set(running.map(({ generationId }) => generationId));
  for (const id of rows.keys()) if (!ids.has(id)) rows.delete(id);
  byId("running").hidden = !running.length;
  setChildren(byId("running").querySelector("ul"), running.map((each) => renderRow(stagecast, each, force)));
}

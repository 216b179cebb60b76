/**
 * The other generations: rows of those that run, and tiles of those that are over.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./connection.js").Stagecast} Stagecast
 * @typedef {{root: HTMLElement, part: (selector: string) => any, drawn?: Generation}} View
 */

import { arrange, byId, setBar, show, stamp, write } from "./dom.js";
import { bestOf, sheetOf } from "./pictures.js";
import { age, selected } from "./stage.js";
import { isFinished } from "./stagecast.js";
import { moment, percent, seconds, standing, t, titleOf } from "./words.js";

const PAGE = 20;

/** By the id of the generation, and whether it is over. @type {Map<string, View>} */
const views = new Map();
/** Where the next page of the history begins; undefined: nothing has been asked for, null: there is none. */
let next = /** @type {string | null | undefined} */ (undefined);

/** @param {Stagecast} stagecast @param {Generation} generation */
function view(stagecast, generation, anew = false) {
  const { generationId: id, status } = generation;
  const over = isFinished(generation);
  const view = views.get(`${id} ${over}`) ?? /** @type {View} */ (stamp(over ? "tile-template" : "row-template"));
  if (!views.has(`${id} ${over}`)) {
    views.set(`${id} ${over}`, view);
    view.part("a").href = `#${id}`;
    if (!over) view.part("button").addEventListener("click", () => stagecast.cancel(id).catch(() => {}));
  }
  const { root, part, drawn } = view;
  if (drawn === generation && !anew) return root;
  view.drawn = generation;
  root.dataset.state = over ? status : "active";
  const title = titleOf(generation);
  part(".title").textContent = title;
  show(part("img"), bestOf(generation));
  part("img").classList.toggle("sheet", bestOf(generation) === sheetOf(generation));
  if (over) {
    const when = moment(generation.createdAt);
    write(part(".meta"), status === "completed" ? when : `${standing(generation)} · ${when}`);
  } else {
    const { progress } = generation;
    const text = t("stageOf")(standing(generation), percent(progress));
    setBar(part(".bar"), { label: t("progressOf")(title), progress, text });
    write(part("button"), t("cancel"));
    part("button").setAttribute("aria-label", t("cancelOne")(title));
    tickRow(view);
  }
  return root;
}

/** @param {View} view */
function tickRow({ part, drawn }) {
  if (!drawn || isFinished(drawn)) return;
  write(part(".meta"), `${t("stageOf")(standing(drawn), percent(drawn.progress))} · ${seconds(age(drawn))}`);
}

/** What changes with time alone. */
export const tick = () => views.forEach(tickRow);

/** @param {Stagecast} stagecast @param {boolean} [anew] */
export function draw(stagecast, anew) {
  const { generations } = stagecast;
  const keys = new Set(generations.map((generation) => `${generation.generationId} ${isFinished(generation)}`));
  for (const key of views.keys()) if (!keys.has(key)) views.delete(key);
  const large = selected(stagecast);
  const running = generations.filter((generation) => !isFinished(generation) && generation !== large);
  const over = generations.filter(isFinished);
  for (const [id, ones] of /** @type {[string, Generation[]][]} */ ([["running", running], ["history", over]])) {
    byId(id).hidden = !ones.length;
    arrange(byId(id).querySelector("ul"), ones.map((generation) => {
      const root = view(stagecast, generation, anew);
      root.querySelector("a")?.setAttribute("aria-current", String(generation === large));
      return root;
    }));
  }
  byId("older").hidden = !next;
}

/** Asks for the next page of the history. @param {Stagecast} stagecast */
async function older(stagecast) {
  const { userId } = stagecast;
  const page = await stagecast.older(next ?? undefined, PAGE);
  if (stagecast.userId !== userId) return;
  next = page.next ?? null;
  draw(stagecast);
}

/** @param {Stagecast} stagecast */
export function listen(stagecast) {
  // What comes by itself is the newest; where the list goes on from there is told with its first page.
  const begin = () => {
    next = undefined;
    older(stagecast).catch(() => {});
  };
  stagecast.on("state", (state) => {
    if (state === "connecting") next = undefined;
    if ((state === "live" || state === "polling") && next === undefined) begin();
  });
  stagecast.on("caughtUp", ({ recovered }) => recovered || begin());
  byId("older").addEventListener("click", () => older(stagecast).catch(() => {}));
}

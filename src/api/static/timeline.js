/**
 * A generation's history: its events, as far as they have happened, and the stages that the table has for it then.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./stagecast.js").StagecastEvent} StagecastEvent
 * @typedef {import("./connection.js").Stagecast} Stagecast
 * @typedef {{status: string, progress?: number, next: string[], terminal: boolean}} Stage As in `GET /stages`.
 */

import { arrange, byId, stamp } from "./dom.js";
import { isFinished } from "./stagecast.js";
import { clock, percent, quote, seconds, standing, stageName, t } from "./words.js";

/** From the first one on, without a gap. @type {Map<string, StagecastEvent[]>} */
const known = new Map();
/** Those that came in after the page had been away. @type {WeakSet<StagecastEvent>} */
const late = new WeakSet();
/** @type {Set<string>} */
const asked = new Set();
/** The rows that are shown, and whose they are. */
let shown = { id: "", rows: /** @type {HTMLElement[]} */ ([]) };

/** @param {StagecastEvent} event */
function take(event) {
  const events = known.get(event.generationId) ?? [];
  if (event.sequence === events.length + 1) known.set(event.generationId, [...events, event]);
}

/**
 * The stages to come, by the table. Where the way forks, a face swap that was asked for is the longer one.
 *
 * @param {Stage[]} table @param {Generation} generation
 */
export function ahead(table, { status, metadata, inputImage }) {
  const detour = metadata?.faceSwap ?? Boolean(inputImage);
  const ahead = /** @type {Stage[]} */ ([]);
  for (let at = table.find((stage) => stage.status === status); at && !at.terminal; ahead.push(at)) {
    const { next } = at;
    const onward = table.filter((stage) => next.includes(stage.status) && stage.progress !== undefined);
    onward.sort((one, other) => (one.progress ?? 0) - (other.progress ?? 0));
    at = onward.at(detour ? 0 : -1);
    if (!at) break;
  }
  return ahead;
}

/** @param {StagecastEvent} event @param {StagecastEvent | undefined} before @param {Generation} generation */
function happened(event, before, { createdAt }) {
  const { root, part } = stamp("moment-template");
  const again = event.status === before?.status;
  root.dataset.state = again ? "again" : event.status;
  part(".what").textContent = standing(event);
  part(".what").hidden = again;
  quote(part(".message"), event.error ?? event.message, event.code);
  part("time").dateTime = event.occurredAt;
  part("time").title = event.occurredAt;
  part("time").textContent = clock(event.occurredAt);
  const since = seconds(Date.parse(event.occurredAt) - Date.parse(createdAt), 1);
  part(".when span").textContent = [`+${since}`, percent(event.progress), late.has(event) ? t("late") : ""]
    .filter(Boolean).join(" · ");
  root.classList.toggle("late", late.has(event));
  return root;
}

/** @param {Stage} stage */
function toCome(stage) {
  const { root, part } = stamp("moment-template");
  root.dataset.state = "to-come";
  part(".what").textContent = stageName(stage.status);
  part(".message").remove();
  part("time").remove();
  part(".when span").textContent = percent(stage.progress ?? 0);
  return root;
}

/**
 * @param {Stagecast} stagecast @param {Generation} generation @param {Stage[]} table @param {boolean} [anew]
 */
export function draw(stagecast, generation, table, anew) {
  const { generationId: id, sequence } = generation;
  const events = known.get(id) ?? [];
  if (shown.id !== id || anew) shown = { id, rows: [] };
  const { rows } = shown;
  for (const event of events.slice(rows.length)) rows.push(happened(event, events[event.sequence - 2], generation));
  rows.forEach((row, index) => {
    if (index === rows.length - 1 && !isFinished(generation)) row.setAttribute("aria-current", "step");
    else row.removeAttribute("aria-current");
  });
  arrange(byId("timeline"), [...rows, ...ahead(table, generation).map(toCome)]);
  if (events.length < sequence && !asked.has(id)) complete(stagecast, id, events.length);
}

/** Asks for what has not come by itself. @param {Stagecast} stagecast @param {string} id @param {number} after */
async function complete(stagecast, id, after) {
  asked.add(id);
  const events = await stagecast.history(id, after).catch(() => []);
  asked.delete(id);
  events.forEach(take);
  if (events.length) redraw();
}

let redraw = () => {};

/** @param {Stagecast} stagecast @param {() => void} changed what is called when more is known */
export function listen(stagecast, changed) {
  redraw = changed;
  stagecast.on("event", (event) => {
    if (stagecast.state === "catching up") late.add(event);
    take(event);
  });
  stagecast.on("change", () => {
    for (const id of known.keys()) if (!stagecast.get(id)) known.delete(id);
  });
}

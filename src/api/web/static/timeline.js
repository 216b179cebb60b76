/**
 * The timeline of the selected generation: its events so far, then the stages to come.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./stagecast.js").StagecastEvent} StagecastEvent
 * @typedef {import("./connection.js").Stagecast} Stagecast
 * @typedef {{status: string, progress?: number, next: string[], terminal: boolean, typicalSeconds?: number}} Stage
 *   As in `GET /stages`.
 */

import { byId, cloneTemplate, setChildren } from "./dom.js";
import { formatDuration, formatPercent, formatTime, showMessage, stageName, statusName, t } from "./i18n.js";
import { isFinished } from "./stagecast.js";

/** The events of each generation, from the first on, without a gap. @type {Map<string, StagecastEvent[]>} */
const eventsOf = new Map();
/** Events that arrived while catching up. @type {WeakSet<StagecastEvent>} */
const late = new WeakSet();
/** Generations whose history is being requested. @type {Set<string>} */
const loading = new Set();
/** The rows on the page, and the generation they belong to. */
let rendered = { id: "", rows: /** @type {HTMLElement[]} */ ([]) };

/** Adds an event if it is the next one. @param {StagecastEvent} event */
function addEvent(event) {
  const events = eventsOf.get(event.generationId) ?? [];
  if (event.sequence === events.length + 1) eventsOf.set(event.generationId, [...events, event]);
}

/**
 * The stages to come. If one of several stages may be next, a requested face swap takes the one with the lowest
 * progress, as it is on the longer path.
 *
 * @param {Stage[]} table @param {Generation} generation
 */
export function upcomingStages(table, { status, input, metadata, inputImage }) {
  const faceSwap = input?.faceSwap ?? metadata?.faceSwap ?? Boolean(inputImage);
  const upcoming = /** @type {Stage[]} */ ([]);
  for (let stage = table.find((each) => each.status === status); stage && !stage.terminal; upcoming.push(stage)) {
    const { next } = stage;
    const candidates = table.filter((each) => next.includes(each.status) && each.progress !== undefined);
    candidates.sort((a, b) => (a.progress ?? 0) - (b.progress ?? 0));
    stage = candidates.at(faceSwap ? 0 : -1);
    if (!stage) break;
  }
  return upcoming;
}

/** @param {StagecastEvent} event @param {StagecastEvent | undefined} previous @param {Generation} generation */
function eventRow(event, previous, { createdAt }) {
  const { root, part } = cloneTemplate("moment-template");
  const repeated = event.status === previous?.status;
  root.dataset.state = repeated ? "again" : event.status;
  part(".event-name").textContent = statusName(event);
  part(".event-name").hidden = repeated;
  showMessage(part(".message"), event.error ?? event.message, event.code);
  part("time").dateTime = event.occurredAt;
  part("time").title = event.occurredAt;
  part("time").textContent = formatTime(event.occurredAt);
  const elapsed = formatDuration(Date.parse(event.occurredAt) - Date.parse(createdAt), 1);
  const notes = [`+${elapsed}`, formatPercent(event.progress), late.has(event) ? t("late") : ""];
  part(".event-time span").textContent = notes.filter(Boolean).join(" · ");
  root.classList.toggle("late", late.has(event));
  return root;
}

/** @param {Stage} stage */
function upcomingRow(stage) {
  const { root, part } = cloneTemplate("moment-template");
  root.dataset.state = "to-come";
  part(".event-name").textContent = stageName(stage.status);
  part(".message").remove();
  part("time").remove();
  part(".event-time span").textContent = formatPercent(stage.progress ?? 0);
  return root;
}

/**
 * @param {Stagecast} stagecast @param {Generation} generation @param {Stage[]} table
 * @param {boolean} [force] renders all rows again, after a change of language
 */
export function render(stagecast, generation, table, force) {
  const { generationId: id, sequence } = generation;
  const events = eventsOf.get(id) ?? [];
  if (rendered.id !== id || force) rendered = { id, rows: [] };
  const { rows } = rendered;
  for (const event of events.slice(rows.length)) rows.push(eventRow(event, events[event.sequence - 2], generation));
  rows.forEach((row, index) => {
    if (index === rows.length - 1 && !isFinished(generation)) row.setAttribute("aria-current", "step");
    else row.removeAttribute("aria-current");
  });
  setChildren(byId("timeline"), [...rows, ...upcomingStages(table, generation).map(upcomingRow)]);
  if (events.length < sequence && !loading.has(id)) loadHistory(stagecast, id, events.length);
}

/** When the generation entered its stage, in milliseconds. @param {Generation} generation */
export function enteredAt({ generationId, status, updatedAt }) {
  const first = eventsOf.get(generationId)?.find((event) => event.status === status);
  return Date.parse(first?.occurredAt ?? updatedAt);
}

/** Requests events that did not arrive live. @param {Stagecast} stagecast @param {string} id @param {number} after */
async function loadHistory(stagecast, id, after) {
  loading.add(id);
  const events = await stagecast.history(id, after).catch(() => []);
  loading.delete(id);
  events.forEach(addEvent);
  if (events.length) onLoaded();
}

let onLoaded = () => {};

/** @param {Stagecast} stagecast @param {() => void} loaded called when events have been loaded */
export function init(stagecast, loaded) {
  onLoaded = loaded;
  stagecast.on("event", (event) => {
    if (stagecast.state === "catching up") late.add(event);
    addEvent(event);
  });
  stagecast.on("change", () => {
    for (const id of eventsOf.keys()) if (!stagecast.get(id)) eventsOf.delete(id);
  });
}

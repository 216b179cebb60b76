/**
 * What tells of a generation while the page is not looked at: the title and the icon of the tab, and a notification.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./stagecast.js").StagecastEvent} StagecastEvent
 * @typedef {import("./connection.js").Stagecast} Stagecast
 * @typedef {{done?: boolean, failed?: boolean, progress?: number, stale?: boolean}} Icon
 */

import { byId, setText } from "./dom.js";
import { formatPercent, statusName, t, titleOf } from "./i18n.js";
import { linkTo } from "./link.js";
import { selected } from "./stage.js";
import { isFinished } from "./stagecast.js";

const STORAGE_KEY = "stagecast.notify";
/** Milliseconds for which the browser may load an icon after the next one has replaced it. */
const REVOKE_DELAY = 60_000;

/** The generation that ended last, until the page is used. @type {Generation | undefined} */
let ended;
/** The icon on the tab, as text; the page's own icon at first. */
let icon = "";
const ownIcon = /** @type {HTMLLinkElement} */ (document.querySelector("link[rel=icon]")).href;

const isWanted = () => {
  try { return localStorage.getItem(STORAGE_KEY) === "on"; } catch { return false; } // The browser denies access.
};
/** Older phones have none. */
const Native = /** @type {any} */ (globalThis)["Notification"];
const isAllowed = () => Native?.["permission"] === "granted";
const isOn = () => isAllowed() && isWanted();

/** A ring that fills with the progress, or a mark for the end. @param {Icon} state */
function iconOf({ done, failed, progress = 0, stale }) {
  const color = failed ? "#c0443b" : stale ? "#8b8f8d" : "#0d8484";
  const disc = `<circle cx="16" cy="16" r="15" fill="${color}"/>`;
  const mark = (/** @type {string} */ path) =>
    `${disc}<path d="${path}" fill="none" stroke="#fff" stroke-width="4" stroke-linecap="round"/>`;
  const ring = (/** @type {string} */ stroke, /** @type {number} */ percent) =>
    `<circle cx="16" cy="16" r="12" fill="none" stroke="${stroke}" stroke-width="7" pathLength="100"
      stroke-dasharray="${percent} 100" transform="rotate(-90 16 16)"/>`;
  const shape = done ? mark("m9 17 5 5 9-11") : failed ? mark("m11 11 10 10m0-10L11 21")
    : ring("#8b8f8d66", 100) + ring(color, progress);
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">${shape}</svg>`;
}

/** @param {Icon | undefined} state undefined: the page's own icon */
function setIcon(state) {
  const svg = state ? iconOf(state) : "";
  if (svg === icon) return;
  icon = svg;
  const link = /** @type {HTMLLinkElement} */ (document.querySelector("link[rel=icon]"));
  // Later: the browser may still be about to load it.
  if (link.href.startsWith("blob:")) setTimeout(URL.revokeObjectURL, REVOKE_DELAY, link.href);
  link.href = svg ? URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" })) : ownIcon;
}

/** @param {Stagecast} stagecast */
export function render(stagecast) {
  const { generations, state } = stagecast;
  const refused = state === "refused"; // Whoever signs in next may be another user.
  if (ended && (refused || !stagecast.get(ended.generationId))) ended = undefined;
  const unfinished = refused ? [] : generations.filter((it) => !isFinished(it));
  const running = unfinished.find((it) => it === selected(stagecast)) ?? unfinished[0];
  const end = document.hidden || !running ? ended : undefined;
  const stale = !["live", "polling"].includes(state);
  const words = /** @type {string[]} */ ([]);
  if (end) words.push(statusName(end), titleOf(end));
  else if (running) words.push(formatPercent(running.progress), statusName(running), titleOf(running));
  if (stale && (running || state === "offline")) words.unshift(t(state));
  const short = words.map((word) => (word.length > 60 ? `${word.slice(0, 59)}…` : word));
  document.title = [...short, "Stagecast"].join(" · ");
  if (end) setIcon(end.status === "completed" ? { done: true } : { failed: true });
  else setIcon(running && { progress: running.progress, stale });
  renderButton(Boolean(running));
}

/** Offers notifications while something runs: only then are they of use. @param {boolean} running */
function renderButton(running) {
  const button = byId("notify");
  button.hidden = !running || !Native || Native["permission"] === "denied";
  button.setAttribute("aria-pressed", String(isOn()));
  setText(button.querySelector("span"), t(isOn() ? "notifyOn" : "notify"));
}

/** @param {Generation} generation */
function notify(generation) {
  const { generationId } = generation;
  try {
    const options = { body: titleOf(generation), tag: generationId, icon: ownIcon };
    const notification = new Native(statusName(generation), options);
    notification.onclick = () => {
      focus();
      location.assign(linkTo(generationId));
      notification.close();
    };
  } catch {} // Chrome on Android has notifications for service workers only.
}

/** @param {Stagecast} stagecast */
export function init(stagecast) {
  stagecast.on("event", (/** @type {StagecastEvent} */ event, /** @type {Generation} */ generation) => {
    if (!isFinished(event) || event.sequence < generation.sequence) return;
    if (stagecast.state === "connecting") return; // It ended before the page was opened.
    ended = generation;
    if (document.hidden && isOn()) notify(generation);
  });
  const onSeen = () => {
    if (document.hidden || !ended) return;
    ended = undefined;
    render(stagecast);
  };
  document.addEventListener("visibilitychange", onSeen);
  for (const name of ["pointerdown", "keydown"]) addEventListener(name, onSeen);
  byId("notify").addEventListener("click", async () => {
    const on = !isOn() && (isAllowed() || (await Native["requestPermission"]()) === "granted");
    try { localStorage.setItem(STORAGE_KEY, on ? "on" : "off"); } catch {} // Not remembered, then.
    render(stagecast);
  });
}

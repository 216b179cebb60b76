/**
 * What the page says, in the user's language.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./stagecast.js").StagecastEvent} StagecastEvent
 * @typedef {typeof TEXTS.en} Texts
 * @typedef {keyof typeof TEXTS} Language
 */

import { TEXTS } from "./texts.js";

const KEY = "stagecast.language";

/** @type {Language} */
let language = "en";

/** @returns {Language} */
function preferred() {
  let chosen;
  try { chosen = localStorage.getItem(KEY); } catch {} // The browser keeps nothing for us.
  const wanted = [chosen, ...navigator.languages].map((tag) => tag?.slice(0, 2).toLowerCase());
  return /** @type {Language} */ (wanted.find((tag) => tag && tag in TEXTS) ?? "en");
}

/** The texts, in the language that is in use. @template {keyof Texts} K @param {K} key @returns {Texts[K]} */
export const t = (key) => TEXTS[language][key];

/** Uses the user's language, or from now on the other one; says everything that stands on the page in it. */
export function speak(other = false) {
  language = other ? (language === "en" ? "tr" : "en") : preferred();
  if (other) try { localStorage.setItem(KEY, language); } catch {} // Not kept, then.
  document.documentElement.lang = language;
  for (const [name, put] of Object.entries({
    text: (/** @type {Element} */ element, /** @type {string} */ text) => (element.textContent = text),
    label: (/** @type {Element} */ element, /** @type {string} */ text) => element.setAttribute("aria-label", text),
    placeholder: (/** @type {Element} */ element, /** @type {string} */ text) =>
      element.setAttribute("placeholder", text),
  })) {
    for (const element of document.querySelectorAll(`[data-${name}]`)) {
      put(element, /** @type {string} */ (t(/** @type {any} */ (element.getAttribute(`data-${name}`)))));
    }
  }
}

/** A stage as people call it; one that this page has never heard of by its own name. */
export const stageName = (/** @type {string} */ status) =>
  t("stages")[status] ?? (status[0].toUpperCase() + status.slice(1).replaceAll("_", " "));

/** Where a generation stands. */
export const standing = (/** @type {{status: string, code?: string}} */ { status, code }) =>
  stageName(code === "cancelled" ? code : status);

/** The service's own sentence, in our language where we know it. @param {string} sentence @param {string} [code] */
export function saying(sentence, code) {
  const known = t("sayings")[code ?? sentence];
  return { text: known ?? sentence, lang: known || language === "en" ? "" : "en" };
}

/**
 * Puts the service's own sentence there.
 *
 * @param {HTMLElement} element @param {string} sentence @param {string} [code]
 */
export function quote(element, sentence, code) {
  const { text, lang } = saying(sentence, code);
  element.textContent = text;
  element.lang = lang || language;
}

/** What it is called: what its owner has asked for. @param {Pick<Generation, "metadata" | "input">} generation */
export function titleOf({ metadata, input }) {
  const title = metadata?.title ?? metadata?.prompt ?? input?.prompt;
  return typeof title === "string" && title.trim() ? title.trim() : t("untitled");
}

export const percent = (/** @type {number} */ progress) =>
  new Intl.NumberFormat(language, { style: "percent" }).format(progress / 100);

/** A length of time. */
export function seconds(/** @type {number} */ ms, digits = 0) {
  const total = Math.max(0, ms) / 1000;
  /** @type {(value: number, unit: string, digits?: number) => string} */
  const unit = (value, name, fraction = 0) => new Intl.NumberFormat(language, {
    style: "unit", unit: name, unitDisplay: "narrow", minimumFractionDigits: fraction, maximumFractionDigits: fraction,
  }).format(value);
  if (total < 60) return unit(digits ? total : Math.floor(total), "second", digits);
  return `${unit(Math.floor(total / 60), "minute")} ${unit(Math.floor(total % 60), "second")}`;
}

const TIME = /** @type {const} */ ({ hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

/** A time of day. */
export const clock = (/** @type {string} */ iso) =>
  new Date(iso).toLocaleTimeString(language, { ...TIME, second: "2-digit" });

/** A day and a time of day. */
export const moment = (/** @type {string} */ iso) =>
  new Date(iso).toLocaleString(language, { day: "numeric", month: "short", ...TIME });

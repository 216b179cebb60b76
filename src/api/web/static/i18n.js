/**
 * The page's texts, numbers and dates in the user's language.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./stagecast.js").StagecastEvent} StagecastEvent
 * @typedef {typeof TEXTS.en} Texts
 * @typedef {keyof typeof TEXTS} Language
 */

import { TEXTS } from "./texts.js";

const STORAGE_KEY = "stagecast.language";

/** @type {Language} */
let language = "en";

/** @returns {Language} */
function preferredLanguage() {
  let chosen;
  try { chosen = localStorage.getItem(STORAGE_KEY); } catch {} // The browser denies access to its storage.
  const wanted = [chosen, ...navigator.languages].map((tag) => tag?.slice(0, 2).toLowerCase());
  return /** @type {Language} */ (wanted.find((tag) => tag && tag in TEXTS) ?? "en");
}

/** A text in the current language. @template {keyof Texts} K @param {K} key @returns {Texts[K]} */
export const t = (key) => TEXTS[language][key];

/** Translates the page into the user's preferred language. */
export function usePreferredLanguage() {
  language = preferredLanguage();
  translatePage();
}

/** Switches between the two languages, and remembers the choice. */
export function switchLanguage() {
  language = language === "en" ? "tr" : "en";
  try { localStorage.setItem(STORAGE_KEY, language); } catch {} // Not remembered, then.
  translatePage();
}

/** Fills in all elements with `data-text`, `data-label` or `data-placeholder`. */
function translatePage() {
  document.documentElement.lang = language;
  for (const [name, set] of Object.entries({
    text: (/** @type {Element} */ element, /** @type {string} */ text) => (element.textContent = text),
    label: (/** @type {Element} */ element, /** @type {string} */ text) => element.setAttribute("aria-label", text),
    placeholder: (/** @type {Element} */ element, /** @type {string} */ text) =>
      element.setAttribute("placeholder", text),
  })) {
    for (const element of document.querySelectorAll(`[data-${name}]`)) {
      set(element, /** @type {string} */ (t(/** @type {any} */ (element.getAttribute(`data-${name}`)))));
    }
  }
}

/** Whether the service's editor is OpenAI's, whom its stages and messages name. */
const usesOpenAi = document.documentElement.dataset.editor === "openai";

/** The text that does not name OpenAI, if another editor is in use and there is one. */
const neutral = (/** @type {string} */ key) => (usesOpenAi ? undefined : t("otherEditor")[key]);

/** A stage's name; for a stage that has no text here, its identifier in readable form. */
export const stageName = (/** @type {string} */ status) =>
  neutral(status) ?? t("stages")[status] ?? (status[0].toUpperCase() + status.slice(1).replaceAll("_", " "));

/**
 * The name of a generation's status, or its place in line. A cancelled generation has the status `failed` and the code
 * `cancelled`.
 *
 * @param {{status: string, code?: string, queuePosition?: number}} generation or an event
 */
export const statusName = ({ status, code, queuePosition }) =>
  (queuePosition ? t("inLine")(queuePosition) : stageName(code === "cancelled" ? code : status));

/**
 * A message of the service, translated by its code or its English text if a translation exists.
 *
 * @param {string} message @param {string} [code]
 * @returns {{text: string, lang: string}} `lang`: "en" if the text could not be translated, else empty
 */
export function translate(message, code) {
  const translated = neutral(message) ?? t("messages")[code ?? message];
  return { text: translated ?? message, lang: translated || language === "en" ? "" : "en" };
}

/** Shows a text in an element, and marks its language: it may stay after a change of language. */
export function showText(/** @type {HTMLElement} */ element, /** @type {string} */ text) {
  element.textContent = text;
  element.lang = language;
}

/**
 * Shows a message of the service in an element, and marks the language it is in.
 *
 * @param {HTMLElement} element @param {string} message @param {string} [code]
 */
export function showMessage(element, message, code) {
  const { text, lang } = translate(message, code);
  element.textContent = text;
  element.lang = lang || language;
}

/** A generation's title: from its metadata, else its prompt. @param {Pick<Generation, "metadata" | "input">} _ */
export function titleOf({ metadata, input }) {
  const title = metadata?.title ?? metadata?.prompt ?? input?.prompt;
  return typeof title === "string" && title.trim() ? title.trim() : t("untitled");
}

export const formatPercent = (/** @type {number} */ progress) =>
  new Intl.NumberFormat(language, { style: "percent" }).format(progress / 100);

/** A duration in seconds, or in minutes and seconds. `digits`: decimals below one minute. */
export function formatDuration(/** @type {number} */ ms, digits = 0) {
  const total = Math.max(0, ms) / 1000;
  /** @type {(value: number, unit: string, digits?: number) => string} */
  const format = (value, unit, fraction = 0) => new Intl.NumberFormat(language, {
    style: "unit", unit, unitDisplay: "narrow", minimumFractionDigits: fraction, maximumFractionDigits: fraction,
  }).format(value);
  if (total < 60) return format(digits ? total : Math.floor(total), "second", digits);
  return `${format(Math.floor(total / 60), "minute")} ${format(Math.floor(total % 60), "second")}`;
}

/** A range of times. @param {[number, number, "second" | "minute"]} range */
export function formatRange([low, high, unit]) {
  const highest = new Intl.NumberFormat(language, { style: "unit", unit, unitDisplay: "short" }).format(high);
  return low ? `${low}–${highest}` : t("upTo")(highest);
}

/** A long time in its largest unit, rounded down: days, hours or minutes. */
export function formatSpan(/** @type {number} */ ms) {
  const hours = Math.max(0, ms) / 3_600_000;
  const unit = hours < 1 ? "minute" : hours < 48 ? "hour" : "day";
  const value = Math.floor(hours * { minute: 60, hour: 1, day: 1 / 24 }[unit]);
  return new Intl.NumberFormat(language, { style: "unit", unit, unitDisplay: "short" }).format(value);
}

const TIME = /** @type {const} */ ({ hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

export const formatTime = (/** @type {string} */ iso) =>
  new Date(iso).toLocaleTimeString(language, { ...TIME, second: "2-digit" });

export const formatDate = (/** @type {string} */ iso) =>
  new Date(iso).toLocaleString(language, { day: "numeric", month: "short", ...TIME });

/**
 * The pictures chosen for the next start: files, and URLs.
 *
 * @typedef {({file: File, src: string} | {url: string}) & {refused?: boolean}} Item
 */

import { BASE, byId, cloneTemplate, parseUrl, setImage } from "./dom.js";
import { t } from "./i18n.js";

const MAX_IMAGES = 5;
const MAX_BYTES = 10 * 1024 * 1024;
/** The URL of the sample face. Its host may differ from the one in the browser's address bar. */
const { face: sampleFace } = document.documentElement.dataset;
const HTTP_URL = /^https?:\/\/[^\s/?#]+\S*$/i;

const items = /** @type {Item[]} */ ([]);
/** Called after every change, with a text about what could not be added. */
let onChange = (/** @type {string} */ problem) => {};

export const files = () => items.flatMap((item) => ("file" in item ? item.file : []));
export const urls = () => items.flatMap((item) => ("url" in item ? item.url : []));
const nameOf = (/** @type {Item} */ item) => ("file" in item ? item.file.name : new URL(item.url).host);

function add(/** @type {Item[]} */ added, /** @type {string[]} */ problems = []) {
  const room = MAX_IMAGES - items.length;
  items.push(...added.slice(0, room));
  if (added.length > room) problems.push(t("tooMany"));
  onChange([...new Set(problems)].join(" "));
}

export function addFiles(/** @type {Iterable<File>} */ added) {
  const problems = /** @type {string[]} */ ([]);
  const valid = [...added].filter((file) => {
    if (!byId("files").accept.split(",").includes(file.type)) problems.push(t("wrongType")(file.name));
    else if (file.size > MAX_BYTES) problems.push(t("tooLarge")(file.name));
    else return true;
  });
  add(valid.map((file) => ({ file, src: URL.createObjectURL(file) })), problems);
}

/** Adds the URLs in a text. Returns false, and adds nothing, if the text contains anything else. */
export function addUrls(/** @type {string} */ text) {
  const words = text.trim().split(/\s+/);
  if (!words.every((word) => HTTP_URL.test(word) && parseUrl(word))) return false;
  add(words.map((url) => ({ url })));
  return true;
}

function remove(/** @type {number} */ index, count = 1) {
  for (const item of items.splice(index, count)) if ("src" in item) URL.revokeObjectURL(item.src);
  onChange("");
}

export const clear = () => remove(0, MAX_IMAGES);

/**
 * Marks a picture that the service refused.
 *
 * @param {string} list the form field: "images" for files, "imageUrls" for URLs
 * @param {number} index in that field @returns {string | undefined} the picture's name
 */
export function mark(list, index) {
  const key = { images: "file", imageUrls: "url" }[list] ?? "";
  const item = items.filter((each) => key in each)[index];
  if (!item) return;
  item.refused = true;
  render();
  return nameOf(item);
}

export function unmark() {
  for (const item of items) item.refused = false;
  render();
}

export function render() {
  byId("tray").replaceChildren(...items.map((item, index) => {
    const { root, part } = cloneTemplate("tray-template");
    // A picture on another site is shown as its host only: the page makes no requests to other sites.
    let src = "src" in item ? item.src : undefined;
    if ("url" in item && item.url.startsWith(`${BASE}/static/`)) src = item.url;
    if ("url" in item && item.url === sampleFace) src = `${BASE}/static/samples/face.webp`;
    setImage(part("img"), src);
    part(".host").hidden = Boolean(src);
    part(".host").textContent = nameOf(item);
    root.classList.toggle("wrong", Boolean(item.refused));
    root.title = "url" in item ? item.url : item.file.name;
    part("button").setAttribute("aria-label", t("remove")(nameOf(item)));
    part("button").addEventListener("click", () => (remove(index), byId("files").focus()));
    return root;
  }));
}

/** @param {(problem: string) => void} changed called after every change, with a text about what could not be added */
export function init(changed) {
  onChange = changed;
  const input = byId("files");
  input.addEventListener("change", () => (addFiles(input.files), (input.value = "")));
  document.addEventListener("paste", (event) => {
    const { files: pasted, text } = { files: event.clipboardData?.files, text: event.clipboardData?.getData("text") };
    const typing = event.target instanceof Element && event.target.matches("input:not(#url), textarea");
    if (pasted?.length) event.preventDefault(), addFiles(pasted);
    else if (!typing && text && addUrls(text)) event.preventDefault();
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (/** @type {any} */ event) => {
      const { types, files: dropped } = event.dataTransfer;
      if (!types.includes("Files") && !types.includes("text/uri-list")) return;
      event.preventDefault(); // Anywhere on the page: otherwise the browser would open a file dropped beside the field.
      byId("drop").classList.toggle("over", name === "dragover");
      if (name !== "drop") return;
      if (dropped.length) addFiles(dropped);
      else if (!addUrls(event.dataTransfer.getData("text/uri-list"))) onChange(t("notUrl"));
    });
  }
}

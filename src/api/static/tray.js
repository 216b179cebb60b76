/**
 * The pictures that are chosen for the next start: files, and URLs.
 *
 * @typedef {({file: File, src: string} | {url: string}) & {wrong?: boolean}} Chosen
 */

import { BASE, byId, parseUrl, show, stamp } from "./dom.js";
import { t } from "./words.js";

const MAX_IMAGES = 5;
const MAX_BYTES = 10 * 1024 * 1024;
/** The sample face; the service may know itself by another name than the browser. */
const { face } = document.documentElement.dataset;
const WEB = /^https?:\/\/[^\s/?#]+\S*$/i;

const chosen = /** @type {Chosen[]} */ ([]);
/** What is called when others are chosen, with what could not be. */
let changed = (/** @type {string} */ problem) => {};

export const files = () => chosen.flatMap((one) => ("file" in one ? one.file : []));
export const urls = () => chosen.flatMap((one) => ("url" in one ? one.url : []));
const nameOf = (/** @type {Chosen} */ one) => ("file" in one ? one.file.name : new URL(one.url).host);

function add(/** @type {Chosen[]} */ ones, /** @type {string[]} */ problems = []) {
  const room = MAX_IMAGES - chosen.length;
  chosen.push(...ones.slice(0, room));
  if (ones.length > room) problems.push(t("tooMany"));
  changed([...new Set(problems)].join(" "));
}

export function addFiles(/** @type {Iterable<File>} */ some) {
  const problems = /** @type {string[]} */ ([]);
  const good = [...some].filter((file) => {
    if (!byId("files").accept.split(",").includes(file.type)) problems.push(t("wrongType")(file.name));
    else if (file.size > MAX_BYTES) problems.push(t("tooLarge")(file.name));
    else return true;
  });
  add(good.map((file) => ({ file, src: URL.createObjectURL(file) })), problems);
}

/** Adds what the text holds, if that is URLs and nothing else: then true. */
export function addUrls(/** @type {string} */ text) {
  const words = text.trim().split(/\s+/);
  if (!words.every((word) => WEB.test(word) && parseUrl(word))) return false;
  add(words.map((url) => ({ url })));
  return true;
}

function remove(/** @type {number} */ index, count = 1) {
  for (const one of chosen.splice(index, count)) if ("src" in one) URL.revokeObjectURL(one.src);
  changed("");
}

export const clear = () => remove(0, MAX_IMAGES);

/**
 * Marks what the service refuses: the one at this place of the files (`images`), or of the URLs (`imageUrls`).
 *
 * @param {string} list @param {number} index @returns {string | undefined} its name
 */
export function mark(list, index) {
  const kind = { images: "file", imageUrls: "url" }[list] ?? "";
  const one = chosen.filter((each) => kind in each)[index];
  if (!one) return;
  one.wrong = true;
  draw();
  return nameOf(one);
}

export function unmark() {
  for (const one of chosen) one.wrong = false;
  draw();
}

export function draw() {
  byId("tray").replaceChildren(...chosen.map((one, index) => {
    const { root, part } = stamp("tray-template");
    // Of what is elsewhere only the address is shown: the page fetches nothing from strangers.
    let src = "src" in one ? one.src : undefined;
    if ("url" in one && one.url.startsWith(`${BASE}/static/`)) src = one.url;
    if ("url" in one && one.url === face) src = `${BASE}/static/samples/face.webp`;
    show(part("img"), src);
    part(".where").hidden = Boolean(src);
    part(".where").textContent = nameOf(one);
    root.classList.toggle("wrong", Boolean(one.wrong));
    root.title = "url" in one ? one.url : one.file.name;
    part("button").setAttribute("aria-label", t("remove")(nameOf(one)));
    part("button").addEventListener("click", () => (remove(index), byId("files").focus()));
    return root;
  }));
}

/** @param {(problem: string) => void} whenChanged */
export function listen(whenChanged) {
  changed = whenChanged;
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
      event.preventDefault(); // Beside the field, too: the browser would leave the page to show the picture.
      byId("drop").classList.toggle("over", name === "dragover");
      if (name !== "drop") return;
      if (dropped.length) addFiles(dropped);
      else if (!addUrls(event.dataTransfer.getData("text/uri-list"))) changed(t("notUrl"));
    });
  }
}

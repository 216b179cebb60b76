/**
 * The pictures chosen for the next start, in the order of the request: files, stored pictures, URLs.
 *
 * @typedef {{problem?: string, root?: HTMLElement}} Shown `problem`: why the service refused it
 * @typedef {Shown & {list: "images", file: File, src: string, ready: Promise<unknown>, busy: boolean}} FileItem
 * @typedef {Shown & {list: "imageNames", value: string}} StoredItem `value`: the name of a picture in `/images`
 * @typedef {Shown & {list: "imageUrls", value: string}} UrlItem
 * @typedef {FileItem | StoredItem | UrlItem} Item `list`: the field of the request
 * @typedef {import("./stagecast.js").GenerationRequest} GenerationRequest
 */

import { BASE, byId, cloneTemplate, parseUrl, setChildren, setImage, setText } from "./dom.js";
import { UnusablePicture, fit, typeOf } from "./fitting.js";
import { t } from "./i18n.js";

const MAX_IMAGES = 5;
const LISTS = ["images", "imageNames", "imageUrls"];
/** The URL of the sample face. Its host may differ from the one in the browser's address bar. */
const { face: sampleFace } = document.documentElement.dataset;
/** How the URLs of stored pictures begin: below the page's own URL, and below the public one. */
const STORED = [BASE, sampleFace?.replace("/static/samples/face.webp", "")].map((base) => `${base}/images/`);
const HTTP_URL = /^https?:\/\/[^\s/?#]+\S*$/i;

let items = /** @type {Item[]} */ ([]);
/** The picture with the face; null: none is wanted; undefined: the first URL, if there is one. */
let chosenFace = /** @type {Item | null | undefined} */ (undefined);
/** Pictures are made smaller one at a time: each may take hundreds of megabytes of memory. */
let lastFit = Promise.resolve();
/** Called after every change, with a text about what could not be added. */
let onChange = (/** @type {string} */ problem) => {};

/** @param {Item} item */
function nameOf(item) {
  if (item.list === "images") return item.file.name;
  return item.list === "imageUrls" ? new URL(item.value).host : t("storedPicture");
}

export const count = () => items.length;
export const hasUrl = () => items.some(({ list }) => list === "imageUrls");

/** The picture with the face, if the face is to be swapped. */
const face = () => (chosenFace === undefined ? items.find(({ list }) => list === "imageUrls") : chosenFace ?? undefined);

/** The name of the picture with the face, if the face is to be swapped. */
export function faceName() {
  const item = face();
  return item && (item.list === "imageUrls" ? item.value.replace(/^.*\//, "") || item.value : nameOf(item));
}

/** Takes the face from the URL that comes first, else from the first picture; or from none. */
export function wantFace(/** @type {boolean} */ wanted) {
  chosenFace = wanted ? items.find(({ list }) => list === "imageUrls") ?? items[0] : null;
  onChange("");
}

/** The fields of the request that the pictures make up, once all of them are ready. @returns {GenerationRequest} */
export function fields() {
  const faceItem = face();
  const [names, urls] = ["imageNames", "imageUrls"].map((list) =>
    items.flatMap((item) => (item.list === list && "value" in item ? item.value : [])));
  return {
    images: items.flatMap((item) => (item.list === "images" ? item.file : [])),
    ...(names.length && { imageNames: names }),
    ...(urls.length && { imageUrls: urls }),
    ...(faceItem && { face: items.indexOf(faceItem) }),
  };
}

/** Waits until no picture is being made smaller. Returns a text about a file that has changed or gone since. */
export async function ready() {
  const filesOf = () => /** @type {FileItem[]} */ (items.filter(({ list }) => list === "images"));
  while (filesOf().some(({ busy }) => busy)) await Promise.all(filesOf().map((item) => item.ready));
  const readable = await Promise.all(filesOf().map(({ file }) => file.slice(0, 1).arrayBuffer().catch(() => null)));
  const gone = readable.indexOf(null);
  return gone < 0 ? "" : t("unreadable")(mark("images", gone, t("refused")) ?? "");
}

/** @param {Item[]} added @param {string[]} problems */
function add(added, problems = []) {
  const room = MAX_IMAGES - items.length;
  if (added.length > room) problems.push(t("tooMany"));
  items.push(...added.slice(0, room));
  items.sort((a, b) => LISTS.indexOf(a.list) - LISTS.indexOf(b.list));
  onChange([...new Set(problems)].join(" "));
}

/** @param {File} file @param {string} type @returns {FileItem} */
function fileItem(file, type) {
  const src = URL.createObjectURL(file);
  const item = /** @type {FileItem} */ ({ list: "images", file, src, busy: true });
  item.ready = lastFit = lastFit.then(() => makeFit(item, type));
  return item;
}

/** @param {FileItem} item @param {string} type */
async function makeFit(item, type) {
  try {
    const file = await fit(item.file, type, item.src);
    if (file !== item.file && items.includes(item)) {
      release(item);
      Object.assign(item, { file, src: URL.createObjectURL(file) });
    }
    item.busy = false;
    render();
  } catch (/** @type {any} */ error) {
    item.busy = false;
    // Any other error is one of the canvas, which has no memory for the picture.
    const reason = error instanceof UnusablePicture ? error.reason : "tooLarge";
    const problems = [byId("problem").textContent, t(reason)(item.file.name)]; // The first may be about another file.
    if (items.includes(item)) remove(item, problems.join(" ").trim());
  }
}

export async function addFiles(/** @type {Iterable<File>} */ added) {
  const files = [...added];
  const types = await Promise.all(files.map((file) => typeOf(file)));
  const refused = files.filter((_, index) => !types[index]);
  const problems = refused.map(({ name }) => t("wrongType")(name));
  const room = MAX_IMAGES - items.length;
  if (files.length - refused.length > room) problems.push(t("tooMany"));
  const usable = files.flatMap((file, index) => (types[index] ? { file, type: types[index] } : []));
  add(usable.slice(0, room).map(({ file, type }) => fileItem(file, type)), problems);
}

/** @param {string} name the name or the URL of a picture that the service has stored @returns {Item} */
const stored = (name) => ({ list: "imageNames", value: name.replace(/[?#].*$/, "").replace(/^.*\//, "") });

const isStored = (/** @type {string} */ url) => STORED.some((beginning) => url.startsWith(beginning));

/** Adds pictures that the service has stored, by name or by URL. */
export const addStored = (/** @type {string[]} */ names) => add(names.map(stored));

/** Adds the URLs in a text. Returns false, and adds nothing, if the text contains anything else. */
export function addUrls(/** @type {string} */ text) {
  const words = text.trim().split(/\s+/);
  if (!words.every((word) => HTTP_URL.test(word) && parseUrl(word))) return false;
  add(words.map((value) => (isStored(value) ? stored(value) : { list: "imageUrls", value })));
  return true;
}

const release = (/** @type {Item} */ item) => "src" in item && URL.revokeObjectURL(item.src);

function remove(/** @type {Item} */ item, problem = "") {
  release(item);
  items = items.filter((each) => each !== item);
  if (chosenFace === item) chosenFace = undefined;
  onChange(problem);
}

/** Removes all pictures. That no face is wanted is kept. */
export function clear() {
  items.forEach(release);
  items = [];
  chosenFace &&= undefined;
  onChange("");
}

/** Forgets everything, for another user. */
export function reset() {
  chosenFace = undefined;
  clear();
}

/** Replaces all pictures by those of an earlier request. @param {GenerationRequest} request */
export async function fill({ images = [], imageNames = [], imageUrls = [], face, faceSwap }) {
  clear();
  addUrls(imageUrls.join(" "));
  addStored(imageNames);
  await addFiles(/** @type {File[]} */ (images));
  chosenFace = faceSwap === false ? null : items[face ?? -1];
  onChange("");
}

/**
 * Marks a picture that the service refused.
 *
 * @param {string} list the form field @param {number} index in that field @param {string} problem
 * @returns {string | undefined} the picture's name
 */
export function mark(list, index, problem) {
  const item = items.filter((each) => each.list === list)[index];
  if (!item) return;
  item.problem = problem;
  render();
  return nameOf(item);
}

export function unmark() {
  for (const item of items) item.problem = undefined;
  render();
}

/** @param {Item} item @returns {string | undefined} */
function sourceOf(item) {
  if (item.list === "images") return item.src;
  if (item.list === "imageNames") return `${BASE}/images/${item.value}?width=320`;
  if (item.value === sampleFace) return new URL("samples/face.webp", import.meta.url).href;
  // A picture on another site is shown as its host only: the page makes no requests to other sites.
  return item.value.startsWith(`${BASE}/static/`) ? item.value : undefined;
}

/** @param {Item} item */
function renderItem(item) {
  const name = nameOf(item);
  const root = item.root ??= cloneTemplate("tray-template").root;
  const part = (/** @type {string} */ selector) => /** @type {any} */ (root.querySelector(selector));
  if (!root.dataset.list) {
    part(".remove").addEventListener("click", () => (remove(item), byId("files").focus()));
    part(".face").addEventListener("click", () => {
      chosenFace = face() === item ? null : item;
      onChange("");
    });
  }
  root.dataset.list = item.list;
  const src = sourceOf(item);
  setImage(part("img"), src);
  part(".host").hidden = Boolean(src);
  setText(part(".host"), name);
  root.classList.toggle("wrong", Boolean(item.problem));
  setText(part(".refusal"), item.problem ?? "");
  root.setAttribute("aria-busy", String("busy" in item && item.busy));
  root.title = item.list === "imageUrls" ? item.value : name;
  part(".remove").setAttribute("aria-label", t("remove")(name));
  part(".face").setAttribute("aria-label", t("useFace")(name));
  part(".face").setAttribute("aria-pressed", String(face() === item));
  setText(part(".face"), t("face"));
  return root;
}

export const render = () => setChildren(byId("tray"), items.map(renderItem));

/** @param {(problem: string) => void} changed called after every change, with a text about what could not be added */
export function init(changed) {
  onChange = changed;
  const take = (/** @type {File[]} */ files) => {
    byId("composer").open = true;
    return addFiles(files);
  };
  for (const input of [byId("files"), byId("camera-file")]) {
    const takeChosen = () => {
      const chosen = [...input.files];
      input.value = "";
      if (chosen.length) take(chosen);
    };
    input.addEventListener("change", takeChosen);
    takeChosen(); // What was chosen before this script ran.
  }
  document.addEventListener("paste", (event) => {
    const { files, text } = { files: event.clipboardData?.files, text: event.clipboardData?.getData("text") };
    const typing = event.target instanceof Element && event.target.matches("input:not(#url), textarea");
    // Office programs copy a picture of the text along with it.
    if (files?.length && !(typing && text)) event.preventDefault(), take([...files]);
    else if (!typing && text && addUrls(text)) event.preventDefault();
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (/** @type {any} */ event) => {
      const { types, files } = event.dataTransfer;
      if (!types.includes("Files") && !types.includes("text/uri-list")) return;
      event.preventDefault(); // Otherwise the browser would open a file that is dropped.
      if (byId("work").hidden) return;
      document.body.dataset.drop = t("dropHere");
      document.body.classList.toggle("dragging", name === "dragover" || (name === "dragleave" && event.relatedTarget));
      if (name !== "drop") return;
      const links = event.dataTransfer.getData("text/uri-list").replace(/^#.*$/gm, "");
      byId("composer").open = true;
      if (isStored(links)) addUrls(links); // The file that comes with it may be a thumbnail.
      else if (files.length) take([...files]);
      else if (!addUrls(links)) onChange(t("notUrl"));
    });
  }
}

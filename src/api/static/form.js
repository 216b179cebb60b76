/**
 * The form that starts a generation.
 *
 * @typedef {import("./stagecast.js").Wish} Wish
 * @typedef {"edit" | "generate"} Kind
 * @typedef {{kind: Kind, wish: Wish}} Order
 */

import { BASE, byId } from "./dom.js";
import * as tray from "./tray.js";
import { quote, t } from "./words.js";

/** @typedef {import("./stagecast.js").StagecastError} StagecastError */

const MAX_METADATA = 1_900;
const SAMPLES = ["portrait", "hat", "lake"];
const SHAPES = ["2:3", "1:1", "3:2"];

/** A face that the service can fetch. */
const face = document.documentElement.dataset.face;

/** Whether the user has said if the face is to be swapped. @type {boolean | undefined} */
let swap;
/** The same request sent again, because no answer came, starts nothing twice. */
let key = "";

const problem = (text = "") => (byId("problem").textContent = text);
const field = (/** @type {string} */ name) => byId("start-form").elements[name];

/** Fills the form with the sample pictures. Whether they could be had. */
async function takeSamples() {
  try {
    const files = await Promise.all(SAMPLES.map(async (name) => {
      const response = await fetch(`${BASE}/static/samples/${name}.webp`);
      return new File([await response.blob()], `${name}.webp`, { type: "image/webp" });
    }));
    tray.clear();
    tray.addFiles(files);
  } catch {
    quote(byId("problem"), "The service does not answer. Please try again.", "network");
    return false;
  }
  if (face) tray.addUrls(face);
  byId("composer").open = true;
  byId("prompt").value ||= t("samplePrompt");
  return true;
}

/** Where there is no room for both, what is made comes first. Whether there is. */
export function makeRoom() {
  const roomy = !matchMedia("(max-width: 62rem)").matches;
  if (!roomy) byId("composer").open = false;
  return roomy;
}

/** Shows what is chosen, and what can be done with it; also in another language. */
export function draw() {
  tray.draw();
  const [first] = tray.urls();
  byId("face").hidden = field("kind").value !== "edit";
  byId("face-swap").disabled = !first;
  byId("face-swap").checked = Boolean(first) && (swap ?? true);
  byId("face-hint").textContent = first ? t("faceIs")(first.replace(/^.*\//, "") || first) : t("faceNeeded");
  byId("sample-face").hidden = !face || Boolean(first);
}

/** What the page wants to know of a generation again, also in another tab: as much of it as may be. */
function metadataOf(/** @type {string} */ prompt, /** @type {Record<string, any>} */ rest) {
  const fits = (/** @type {object} */ data) => new TextEncoder().encode(JSON.stringify(data)).length <= MAX_METADATA;
  if (fits({ ...rest, prompt })) return { ...rest, prompt };
  const letters = [...prompt].slice(0, 200);
  while (!fits({ ...rest, title: letters.join("") })) letters.pop();
  return { ...rest, title: letters.join("") };
}

/** @returns {Order} */
function order() {
  const kind = field("kind").value;
  const prompt = field("prompt").value.trim();
  const [images, imageUrls] = [tray.files(), tray.urls()];
  const faceSwap = kind === "edit" && byId("face-swap").checked;
  const aspectRatio = field("aspectRatio").value;
  const links = imageUrls.length ? { imageUrls, ...(kind === "edit" && { faceSwap }) } : {};
  const metadata = metadataOf(prompt, { aspectRatio, faceSwap });
  return { kind, wish: { prompt, images, ...links, aspectRatio, metadata } };
}

function addTyped() {
  const good = tray.addUrls(byId("url").value);
  if (good) byId("url").value = "";
  else problem(t("notUrl")), byId("url").focus();
  return good;
}

/** Says why the form is refused, and marks the picture that it is about. @param {StagecastError} error */
function explain({ message, code, field = /^\w+\.\d+(?=: )/.exec(message)?.[0] ?? "" }) {
  quote(byId("problem"), message.startsWith(`${field}: `) ? message.slice(field.length + 2) : message, code);
  const [list, index] = field.split(".");
  const name = index && tray.mark(list, Number(index));
  if (name) byId("problem").prepend(`${name}: `);
  if (field === "prompt") byId("prompt").focus();
}

/** @param {(order: Order, key: string) => Promise<unknown>} start */
async function submit(start) {
  problem();
  tray.unmark();
  if (byId("url").value.trim() && !addTyped()) return;
  const wanted = order();
  const { images = [], imageUrls = [], prompt } = wanted.wish;
  if (!images.length && !imageUrls.length) return problem(t("noPictures")), byId("files").focus();
  if (!prompt) return problem(t("noPrompt")), byId("prompt").focus();
  const button = byId("start");
  key ||= [...crypto.getRandomValues(new Uint32Array(4))].join("-");
  button.setAttribute("aria-disabled", "true");
  button.textContent = t("starting");
  try {
    await start(wanted, key);
    key = "";
  } catch (/** @type {any} */ error) {
    byId("composer").open = true;
    explain(error);
  }
  button.setAttribute("aria-disabled", "false");
  button.textContent = t("start");
}

/** Fills the form with what is still known of a wish, to be changed. @param {Kind} kind @param {Wish} wish */
export function fill(kind, { prompt = "", imageUrls = [], images = [], ...rest }) {
  key = "";
  field("kind").value = kind;
  field("prompt").value = prompt;
  if (SHAPES.includes(rest.aspectRatio ?? "")) field("aspectRatio").value = rest.aspectRatio;
  swap = rest.faceSwap;
  if (images.length || imageUrls.length) tray.clear();
  if (images.length) tray.addFiles(/** @type {File[]} */ (images));
  if (imageUrls.length) tray.addUrls(imageUrls.join(" "));
  draw();
  byId("composer").open = true;
  byId("composer").scrollIntoView();
  const ready = tray.files().length > 0;
  problem(ready ? "" : t("chooseAgain"));
  byId(ready ? "prompt" : "files").focus({ preventScroll: true });
}

/** Forgets all that was filled in: it is another user's. */
export function clear() {
  byId("start-form").reset();
  [key, swap] = ["", undefined];
  tray.clear();
}

/** @param {(order: Order, key: string) => Promise<unknown>} start */
export function listen(start) {
  tray.listen((text) => {
    key = "";
    problem(text);
    draw();
  });
  const form = byId("start-form");
  const submitOnce = () => byId("start").getAttribute("aria-disabled") === "true" || submit(start);
  form.addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    submitOnce();
  });
  form.addEventListener("input", (/** @type {Event} */ event) => {
    key = "";
    if (event.target === byId("face-swap")) swap = byId("face-swap").checked;
    if (/** @type {any} */ (event.target).name === "kind") draw();
  });
  byId("samples").addEventListener("click", async () => (await takeSamples()) && byId("start").focus());
  byId("try-samples").addEventListener("click", async () => (await takeSamples()) && submitOnce());
  const composing = () => document.body.classList.toggle("composing", byId("composer").open);
  byId("composer").addEventListener("toggle", composing);
  composing();
  byId("sample-face").addEventListener("click", () => (tray.addUrls(face ?? ""), byId("face-swap").focus()));
  byId("add-url").addEventListener("click", () => (byId("url").value.trim() ? addTyped() : byId("url").focus()));
  byId("url").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Enter" && byId("url").value.trim()) event.preventDefault(), addTyped();
  });
  draw();
}

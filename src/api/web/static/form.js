/**
 * The form that starts a generation.
 *
 * @typedef {import("./stagecast.js").GenerationRequest} GenerationRequest
 * @typedef {"edit" | "generate"} Kind
 * @typedef {{kind: Kind, request: GenerationRequest}} Submission
 */

import { BASE, byId } from "./dom.js";
import { showMessage, t } from "./i18n.js";
import * as tray from "./tray.js";

/** @typedef {import("./stagecast.js").StagecastError} StagecastError */

/** Bytes of JSON; the service accepts 2,000. */
const MAX_METADATA = 1_900;
const SAMPLES = ["portrait", "hat", "lake"];
const SHAPES = ["2:3", "1:1", "3:2"];

/** The URL of the sample face, as the service can fetch it. */
const sampleFace = document.documentElement.dataset.face;

/** The user's own choice of whether to swap the face. @type {boolean | undefined} */
let swapChoice;
/** The idempotency key: kept for a retry of the same form, cleared when the form changes. */
let idempotencyKey = "";

const showProblem = (text = "") => (byId("problem").textContent = text);
const field = (/** @type {string} */ name) => byId("start-form").elements[name];

/** Fills the form with the sample pictures. Returns whether they could be loaded. */
async function useSamples() {
  try {
    const files = await Promise.all(SAMPLES.map(async (name) => {
      const response = await fetch(`${BASE}/static/samples/${name}.webp`);
      return new File([await response.blob()], `${name}.webp`, { type: "image/webp" });
    }));
    tray.clear();
    tray.addFiles(files);
  } catch {
    showMessage(byId("problem"), "The service does not answer. Please try again.", "network");
    return false;
  }
  if (sampleFace) tray.addUrls(sampleFace);
  byId("composer").open = true;
  byId("prompt").value ||= t("samplePrompt");
  return true;
}

/** Closes the form on narrow screens, where it would cover the result. Returns whether the screen is wide. */
export function collapseIfNarrow() {
  const wide = !matchMedia("(max-width: 62rem)").matches;
  if (!wide) byId("composer").open = false;
  return wide;
}

/** Renders what depends on the chosen pictures, the kind and the language. */
export function render() {
  tray.render();
  const [first] = tray.urls();
  byId("face").hidden = field("kind").value !== "edit";
  byId("face-swap").disabled = !first;
  byId("face-swap").checked = Boolean(first) && (swapChoice ?? true);
  byId("face-hint").textContent = first ? t("faceIs")(first.replace(/^.*\//, "") || first) : t("faceNeeded");
  byId("sample-face").hidden = !sampleFace || Boolean(first);
}

/** The metadata to start with, so that every tab can show a title. A prompt that does not fit is shortened. */
function metadataOf(/** @type {string} */ prompt, /** @type {Record<string, any>} */ rest) {
  const fits = (/** @type {object} */ data) => new TextEncoder().encode(JSON.stringify(data)).length <= MAX_METADATA;
  if (fits({ ...rest, prompt })) return { ...rest, prompt };
  const letters = [...prompt].slice(0, 200);
  while (!fits({ ...rest, title: letters.join("") })) letters.pop();
  return { ...rest, title: letters.join("") };
}

/** @returns {Submission} */
function readForm() {
  const kind = field("kind").value;
  const prompt = field("prompt").value.trim();
  const [images, imageUrls] = [tray.files(), tray.urls()];
  const faceSwap = kind === "edit" && byId("face-swap").checked;
  const aspectRatio = field("aspectRatio").value;
  const urlFields = imageUrls.length ? { imageUrls, ...(kind === "edit" && { faceSwap }) } : {};
  const metadata = metadataOf(prompt, { aspectRatio, faceSwap });
  return { kind, request: { prompt, images, ...urlFields, aspectRatio, metadata } };
}

function addTypedUrl() {
  const valid = tray.addUrls(byId("url").value);
  if (valid) byId("url").value = "";
  else showProblem(t("notUrl")), byId("url").focus();
  return valid;
}

/** Shows why the service refused the form, and marks the picture it is about. @param {StagecastError} error */
function showError({ message, code, field = /^\w+\.\d+(?=: )/.exec(message)?.[0] ?? "" }) {
  showMessage(byId("problem"), message.startsWith(`${field}: `) ? message.slice(field.length + 2) : message, code);
  const [list, index] = field.split(".");
  const name = index && tray.mark(list, Number(index));
  if (name) byId("problem").prepend(`${name}: `);
  if (field === "prompt") byId("prompt").focus();
}

/** @param {(submission: Submission, idempotencyKey: string) => Promise<unknown>} start */
async function submit(start) {
  showProblem();
  tray.unmark();
  if (byId("url").value.trim() && !addTypedUrl()) return;
  const submission = readForm();
  const { images = [], imageUrls = [], prompt } = submission.request;
  if (!images.length && !imageUrls.length) return showProblem(t("noPictures")), byId("files").focus();
  if (!prompt) return showProblem(t("noPrompt")), byId("prompt").focus();
  const button = byId("start");
  idempotencyKey ||= [...crypto.getRandomValues(new Uint32Array(4))].join("-");
  button.setAttribute("aria-disabled", "true");
  button.textContent = t("starting");
  try {
    await start(submission, idempotencyKey);
    idempotencyKey = "";
  } catch (/** @type {any} */ error) {
    byId("composer").open = true;
    showError(error);
  }
  button.setAttribute("aria-disabled", "false");
  button.textContent = t("start");
}

/** Fills the form with an earlier request, to be changed. @param {Kind} kind @param {GenerationRequest} request */
export function fill(kind, { prompt = "", imageUrls = [], images = [], ...rest }) {
  idempotencyKey = "";
  field("kind").value = kind;
  field("prompt").value = prompt;
  if (SHAPES.includes(rest.aspectRatio ?? "")) field("aspectRatio").value = rest.aspectRatio;
  swapChoice = rest.faceSwap;
  if (images.length || imageUrls.length) tray.clear();
  if (images.length) tray.addFiles(/** @type {File[]} */ (images));
  if (imageUrls.length) tray.addUrls(imageUrls.join(" "));
  render();
  byId("composer").open = true;
  byId("composer").scrollIntoView();
  const hasFiles = tray.files().length > 0;
  showProblem(hasFiles ? "" : t("chooseAgain"));
  byId(hasFiles ? "prompt" : "files").focus({ preventScroll: true });
}

/** Empties the form, for another user. */
export function clear() {
  byId("start-form").reset();
  [idempotencyKey, swapChoice] = ["", undefined];
  tray.clear();
}

/** @param {(submission: Submission, idempotencyKey: string) => Promise<unknown>} start */
export function init(start) {
  tray.init((problem) => {
    idempotencyKey = "";
    showProblem(problem);
    render();
  });
  const form = byId("start-form");
  const submitOnce = () => byId("start").getAttribute("aria-disabled") === "true" || submit(start);
  form.addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    submitOnce();
  });
  form.addEventListener("input", (/** @type {Event} */ event) => {
    idempotencyKey = "";
    if (event.target === byId("face-swap")) swapChoice = byId("face-swap").checked;
    if (/** @type {any} */ (event.target).name === "kind") render();
  });
  byId("samples").addEventListener("click", async () => (await useSamples()) && byId("start").focus());
  byId("try-samples").addEventListener("click", async () => (await useSamples()) && submitOnce());
  const onToggle = () => document.body.classList.toggle("composing", byId("composer").open);
  byId("composer").addEventListener("toggle", onToggle);
  onToggle();
  byId("sample-face").addEventListener("click", () => (tray.addUrls(sampleFace ?? ""), byId("face-swap").focus()));
  byId("add-url").addEventListener("click", () => (byId("url").value.trim() ? addTypedUrl() : byId("url").focus()));
  byId("url").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Enter" && byId("url").value.trim()) event.preventDefault(), addTypedUrl();
  });
  render();
}

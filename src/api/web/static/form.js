/**
 * The form that starts a generation.
 *
 * @typedef {import("./stagecast.js").GenerationRequest} GenerationRequest
 * @typedef {"edit" | "generate"} Kind
 * @typedef {{kind: Kind, request: GenerationRequest}} Submission
 * @typedef {import("./stagecast.js").StartOptions} StartOptions
 */

import { byId, setProgress } from "./dom.js";
import { formatPercent, showMessage, showText, t, translate } from "./i18n.js";
import * as tray from "./tray.js";
import { uploading } from "./upload.js";

/** @typedef {import("./stagecast.js").StagecastError} StagecastError */

/** Bytes of JSON; the service accepts 2,048. */
const MAX_METADATA = 1_900;
const SAMPLES = ["portrait", "hat", "lake"];
/** The fields below "More". */
const OPTIONS = ["quality", "background", "inputFidelity"];

/** The URL of the sample face, as the service can fetch it. */
const sampleFace = document.documentElement.dataset.face;

/** The idempotency key: kept for a retry of the same form, cleared when the form changes. */
let idempotencyKey = "";
/** Cancels the upload. @type {AbortController | undefined} */
let upload;

const showProblem = (text = "") => showText(byId("problem"), text);
const field = (/** @type {string} */ name) => byId("start-form").elements[name];

/** Fills the form with the sample pictures. Returns whether they could be loaded. */
async function useSamples() {
  try {
    const files = await Promise.all(SAMPLES.map(async (name) => {
      const response = await fetch(new URL(`samples/${name}.webp`, import.meta.url));
      return new File([await response.blob()], `${name}.webp`, { type: "image/webp" });
    }));
    tray.clear();
    await tray.addFiles(files);
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
  const [kind, face] = [field("kind").value, tray.faceName()];
  byId("tray").dataset.kind = kind;
  tray.render();
  byId("face").hidden = kind !== "edit";
  byId("face-swap").disabled = !tray.count();
  byId("face-swap").checked = Boolean(face);
  byId("face-hint").textContent = face ? t("faceIs")(face) : t("faceNeeded");
  byId("sample-face").hidden = !sampleFace || tray.hasUrl();
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
  const { face, ...pictures } = tray.fields();
  const faceSwap = kind === "edit" && face !== undefined;
  const aspectRatio = field("aspectRatio").value;
  const options = Object.fromEntries(OPTIONS.flatMap((name) => (field(name).value ? [[name, field(name).value]] : [])));
  const metadata = metadataOf(prompt, { aspectRatio, faceSwap });
  const swap = faceSwap ? { face } : kind === "edit" && { faceSwap };
  return { kind, request: { prompt, ...pictures, ...swap, ...options, aspectRatio, metadata } };
}

function addTypedUrl() {
  const valid = tray.addUrls(byId("url").value);
  if (valid) byId("url").value = "";
  else showProblem(t("notUrl")), byId("url").focus();
  return valid;
}

/** Shows why the service refused the form, and marks the picture it is about. @param {StagecastError} error */
function showError({ message, code, field = /^\w+\.\d+(?=: )/.exec(message)?.[0] ?? "" }) {
  const reason = message.startsWith(`${field}: `) ? message.slice(field.length + 2) : message;
  showMessage(byId("problem"), reason, code);
  const [list, index] = field.split(".");
  const name = index && tray.mark(list, Number(index), translate(reason, code).text);
  if (name) byId("problem").prepend(`${name}: `);
  if (field === "prompt") byId("prompt").focus();
}

/** Shows how much of the form was sent; nothing before and after that. */
function showUpload(/** @type {number} */ fraction) {
  byId("upload").hidden = fraction === 1;
  const progress = Math.floor(fraction * 100);
  setProgress(byId("upload").firstElementChild, { label: t("uploading"), progress, text: formatPercent(progress) });
}

/** @param {(submission: Submission, options: StartOptions) => Promise<unknown>} start */
async function submit(start) {
  showProblem();
  tray.unmark();
  if (byId("url").value.trim() && !addTypedUrl()) return;
  if (!tray.count()) return showProblem(t("noPictures")), byId("files").focus();
  if (!field("prompt").value.trim()) return showProblem(t("noPrompt")), byId("prompt").focus();
  const button = byId("start");
  button.setAttribute("aria-disabled", "true");
  button.textContent = t("starting");
  const { signal } = (upload = new AbortController());
  try {
    const unreadable = await tray.ready();
    if (unreadable) return showProblem(unreadable);
    if (!tray.count()) return; // The only picture could not be made smaller.
    idempotencyKey ||= [...crypto.getRandomValues(new Uint32Array(4))].join("-");
    await start(readForm(), { idempotencyKey, signal, fetch: uploading(showUpload) });
    idempotencyKey = "";
  } catch (/** @type {any} */ error) {
    byId("composer").open = true;
    if (signal.aborted) showProblem(t("uploadCancelled"));
    else showError(error);
  } finally {
    showUpload(1);
    button.setAttribute("aria-disabled", "false");
    button.textContent = t("start");
  }
}

/** Fills the form with an earlier request, to be changed. @param {Kind} kind @param {GenerationRequest} request */
export async function fill(kind, request) {
  idempotencyKey = "";
  byId("start-form").reset();
  for (const [name, value] of Object.entries({ ...request, kind })) {
    if (!value || !["kind", "prompt", "aspectRatio", ...OPTIONS].includes(name)) continue;
    const { value: initial } = field(name);
    field(name).value = value;
    field(name).value ||= initial; // Of a value that the form does not offer.
  }
  byId("more").open = OPTIONS.some((name) => field(name).value);
  await tray.fill(request);
  byId("composer").open = true;
  byId("composer").scrollIntoView();
  showProblem(tray.count() ? "" : t("chooseAgain"));
  byId(tray.count() ? "prompt" : "files").focus({ preventScroll: true });
}

/** Adds pictures that the service has stored, by name or by URL, to be used as input. */
export function useStored(/** @type {string[]} */ names) {
  tray.addStored(names);
  byId("composer").open = true;
  byId("composer").scrollIntoView();
  byId("prompt").focus({ preventScroll: true });
}

/** Empties the form, for another user. */
export function clear() {
  byId("start-form").reset();
  idempotencyKey = "";
  upload?.abort();
  tray.reset();
}

/** @param {(submission: Submission, options: StartOptions) => Promise<unknown>} start */
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
    if (event.target === byId("face-swap")) tray.wantFace(byId("face-swap").checked);
    if (/** @type {any} */ (event.target).name === "kind") render();
  });
  form.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    const repeats = event.repeat && event.target !== byId("prompt");
    if (event.key !== "Enter" || event.isComposing || !(event.ctrlKey || event.metaKey || repeats)) return;
    event.preventDefault();
    if (!event.repeat) submitOnce();
  });
  // The second click of a double click, which may come after the service has answered the first one.
  byId("start").addEventListener("click", (/** @type {MouseEvent} */ event) => event.detail > 1 && event.preventDefault());
  let loading = false;
  for (const id of ["samples", "try-samples"]) {
    byId(id).addEventListener("click", async () => {
      if (loading) return;
      loading = true;
      if (await useSamples()) submitOnce();
      loading = false;
    });
  }
  byId("cancel-upload").addEventListener("click", () => (upload?.abort(), byId("start").focus()));
  const onToggle = () => document.body.classList.toggle("composing", byId("composer").open);
  byId("composer").addEventListener("toggle", onToggle);
  onToggle();
  byId("sample-face").addEventListener("click", () => (tray.addUrls(sampleFace ?? ""), byId("face-swap").focus()));
  byId("add-url").addEventListener("click", () => (byId("url").value.trim() ? addTypedUrl() : byId("url").focus()));
  byId("url").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    const adds = event.key === "Enter" && !event.ctrlKey && !event.metaKey && byId("url").value.trim();
    if (adds) event.preventDefault(), addTypedUrl();
  });
  render();
}

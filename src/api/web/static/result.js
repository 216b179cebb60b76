/**
 * What can be done with the selected generation: download and copy its picture, open it large, copy a link to it, run it
 * again, change it, use its picture for the next one, cancel and delete it.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./connection.js").Stagecast} Stagecast
 * @typedef {import("./form.js").Submission} Submission
 */

import { canCopyPictures, copyPicture, copyText } from "./clipboard.js";
import { byId, setText } from "./dom.js";
import { expiryOf } from "./expiry.js";
import * as form from "./form.js";
import { formatDate, showMessage, t, titleOf } from "./i18n.js";
import { linkTo } from "./link.js";
import { latestOf, picturesOf, sheetOf } from "./pictures.js";
import { fileNameOf, requestOf } from "./snippets.js";
import { isFinished } from "./stagecast.js";
import * as viewer from "./viewer.js";

/** The generation on the page. @type {Generation | undefined} */
let shown;
/** The id of the generation whose "Delete" button was pressed once: a second press deletes it. */
let pendingDelete = "";

/** The pictures that the service stores. @param {Generation} generation */
const storedPictures = (generation) =>
  picturesOf(generation).flatMap((picture) => (picture.ownUrl ? [{ ...picture, ownUrl: picture.ownUrl }] : []));

/** The URL of the result; undefined while there is only the sheet. @param {Generation} generation */
const resultOf = (generation) => {
  const latest = latestOf(generation);
  return isFinished(generation) && latest !== sheetOf(generation) ? latest : undefined;
};

/** @param {Generation} generation */
const fileName = (generation, url = "") => fileNameOf(titleOf(generation), url, generation.generationId);

/** @param {Generation} generation */
export function render(generation) {
  if (generation.generationId !== shown?.generationId) pendingDelete = "";
  shown = generation;
  const { status, retryable } = generation;
  const [finished, result] = [isFinished(generation), resultOf(generation)];
  // A picture that is done comes before what can be done with it, on narrow screens and for the keyboard.
  const [head, figure, acts] = [".head", "figure", ".acts"].map((part) => byId("stage").querySelector(part));
  const before = status === "completed" ? figure : head;
  if (acts.previousElementSibling !== before) before.after(acts);
  const download = byId("download");
  download.hidden = !result;
  if (result) Object.assign(download, { href: result, download: fileName(generation, result) });
  byId("copy-picture").hidden = !result || !canCopyPictures();
  byId("use").hidden = !result;
  byId("large").hidden = !storedPictures(generation).length;
  byId("again").hidden = !finished;
  setText(byId("again").querySelector("span"), t(status === "failed" ? "tryAgain" : "runAgain"));
  byId("edit").hidden = !finished;
  // Where the same request would fail again, changing it comes first.
  const hopeless = status === "failed" && retryable === false;
  byId("again").classList.toggle("primary", !result && !hopeless);
  byId("edit").classList.toggle("primary", hopeless);
  byId("cancel").hidden = finished;
  byId("delete").hidden = !finished;
  setText(byId("delete"), t(pendingDelete ? "confirmDelete" : "delete"));
  const expiry = expiryOf(generation);
  setText(byId("kept"), expiry ? t("keptUntil")(formatDate(new Date(expiry).toISOString())) : "");
}

/** Fills the form with the request of a generation. @param {Generation} generation @param {Submission} [submission] */
function edit(generation, submission) {
  const { kind, inputImage, failedStage } = generation;
  const metadata = /** @type {Record<string, any>} */ (generation.metadata ?? {});
  const { faceSwap, aspectRatio } = metadata;
  /** @type {import("./stagecast.js").GenerationRequest} */
  const request = requestOf(generation) ?? {
    prompt: String(metadata.prompt ?? metadata.title ?? ""), imageUrls: inputImage ? [inputImage] : [],
    faceSwap, aspectRatio,
  };
  // One that ended while it waited has lost its pictures; this tab may still have them.
  const { imageNames, ...rest } = request;
  const kept = failedStage === "started" ? submission?.request ?? rest : request;
  return form.fill(kind, kept);
}

/**
 * @param {Stagecast} stagecast
 * @param {{start: (submission: Submission) => Promise<unknown>,
 *   submissionOf: (generation: Generation) => Submission | undefined}} page
 */
export function init(stagecast, { start, submissionOf }) {
  /** @param {string} id @param {(generation: Generation) => Promise<unknown> | void} act */
  const onClick = (id, act) => byId(id).addEventListener("click", async () => {
    const generation = shown;
    if (!generation || byId(id).getAttribute("aria-busy") === "true") return;
    setText(byId("note"), "");
    byId(id).setAttribute("aria-busy", "true");
    try {
      await act(generation);
    } catch (/** @type {any} */ error) {
      const text = error.code ? error.message : t("notLoaded");
      if (shown?.generationId === generation.generationId) showMessage(byId("note"), text, error.code);
    }
    byId(id).removeAttribute("aria-busy");
  });

  /** Starts the same request once more. If its pictures are gone, fills the form instead. */
  async function again(/** @type {Generation} */ generation) {
    const submission = submissionOf(generation);
    const request = await fullRequest(generation);
    if (!request?.imageNames && !request?.imageUrls) return submission ? start(submission) : edit(generation);
    try {
      await start({ kind: generation.kind, request });
    } catch (/** @type {any} */ error) {
      if (error.code !== "unknown_image") throw error;
      await (submission ? start(submission) : edit(generation));
    }
  }

  /** The request with all its pictures, also with those that a generation lost which ended while it waited. */
  async function fullRequest(/** @type {Generation} */ generation) {
    if (generation.failedStage !== "started") return requestOf(generation);
    const [{ input }] = await stagecast.history(generation.generationId);
    return requestOf({ ...generation, input });
  }

  viewer.init();
  onClick("again", again);
  onClick("edit", (generation) => edit(generation, submissionOf(generation)));
  onClick("use", (generation) => form.useStored([resultOf(generation) ?? ""]));
  onClick("copy-picture", (generation) => copyPicture(byId("copy-picture"), resultOf(generation) ?? ""));
  onClick("copy-link", ({ generationId }) => copyText(byId("copy-link"), linkTo(generationId)));
  onClick("large", (generation) => viewer.open(storedPictures(generation), titleOf(generation)));
  onClick("cancel", ({ generationId }) => stagecast.cancel(generationId).then(() => {}));
  onClick("delete", ({ generationId }) => {
    if (pendingDelete !== generationId) {
      pendingDelete = generationId;
      return setText(byId("delete"), t("confirmDelete"));
    }
    pendingDelete = "";
    return stagecast.remove(generationId).then(() => byId("stage-title").focus());
  });
  byId("delete").addEventListener("blur", () => {
    pendingDelete = "";
    setText(byId("delete"), t("delete"));
  });
}

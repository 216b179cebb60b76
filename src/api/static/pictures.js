/**
 * The pictures of a generation.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {{name: "sheet" | "edited" | "generated" | "faceSwapped", url: string, own?: string}} Picture
 *   `own`: the URL of one that the service keeps.
 */

import { BASE, parseUrl } from "./dom.js";

const NAMES = /** @type {const} */ ({
  compositionUrl: "sheet", editedImageUrl: "edited", generatedImageUrl: "generated", faceSwapUrl: "faceSwapped",
});

/**
 * The URL as the page has it, which may have another name than the service's public URL. Pictures from elsewhere (an
 * external pipeline's) have none: the page fetches nothing from strangers.
 *
 * @param {Generation} generation @param {string | undefined} url
 */
function ownPath({ generationId }, url) {
  const path = parseUrl(url)?.pathname ?? "";
  return path.includes(`/images/${generationId}-`) ? BASE + path.slice(path.lastIndexOf("/images/")) : undefined;
}

/** Those that are there, in the order in which they are made. @param {Generation} generation @returns {Picture[]} */
export const picturesOf = (generation) =>
  Object.entries(NAMES).flatMap(([key, name]) => {
    const url = generation[/** @type {keyof typeof NAMES} */ (key)];
    return url && /^https?:/i.test(url) && parseUrl(url) ? [{ name, url, own: ownPath(generation, url) }] : [];
  });

/** The sheet's URL. @param {Generation} generation */
export const sheetOf = (generation) => ownPath(generation, generation.compositionUrl);

/** The URL of the best picture there is so far. @param {Generation} generation */
export const bestOf = (generation) =>
  [generation.faceSwapUrl, generation.editedImageUrl, generation.generatedImageUrl, generation.previewUrl,
    generation.compositionUrl].map((url) => ownPath(generation, url)).find(Boolean);

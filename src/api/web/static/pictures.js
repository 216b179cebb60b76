/**
 * The pictures of a generation.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {{name: "sheet" | "edited" | "generated" | "faceSwapped", url: string, ownUrl?: string}} Picture
 *   `ownUrl`: only if the service stores the picture.
 */

import { BASE, parseUrl } from "./dom.js";

const NAMES = /** @type {const} */ ({
  compositionUrl: "sheet", editedImageUrl: "edited", generatedImageUrl: "generated", faceSwapUrl: "faceSwapped",
});

/**
 * The URL of a stored picture on the host that the page was loaded from, which may differ from the service's public
 * URL. Undefined for pictures on other sites (of an external pipeline): the page makes no requests to other sites.
 *
 * @param {Generation} generation @param {string | undefined} url
 */
export function ownUrlOf({ generationId }, url) {
  const path = parseUrl(url)?.pathname ?? "";
  return path.includes(`/images/${generationId}-`) ? BASE + path.slice(path.lastIndexOf("/images/")) : undefined;
}

const RATIOS = /** @type {Record<string, number>} */ ({ "2:3": 2 / 3, "1:1": 1, "3:2": 3 / 2 });

/** Width by height of the picture that was asked for. @param {Generation} generation */
export const ratioOf = ({ input, metadata }) => RATIOS[String(input?.aspectRatio ?? metadata?.aspectRatio)] ?? 2 / 3;

/** The pictures so far, in the order in which they are made. @param {Generation} generation @returns {Picture[]} */
export const picturesOf = (generation) =>
  Object.entries(NAMES).flatMap(([key, name]) => {
    const url = generation[/** @type {keyof typeof NAMES} */ (key)];
    return url && /^https?:/i.test(url) && parseUrl(url) ? [{ name, url, ownUrl: ownUrlOf(generation, url) }] : [];
  });

/** The URL of the composed sheet. @param {Generation} generation */
export const sheetOf = (generation) => ownUrlOf(generation, generation.compositionUrl);

/** The URL of the most advanced picture so far. @param {Generation} generation */
export const latestOf = (generation) =>
  [generation.faceSwapUrl, generation.editedImageUrl, generation.generatedImageUrl, generation.previewUrl,
    generation.compositionUrl].map((url) => ownUrlOf(generation, url)).find(Boolean);

/** Copies texts and pictures, and says so on the button. */

import { announce, setText } from "./dom.js";
import { t } from "./i18n.js";

/** Copies a text. Outside of secure contexts browsers have only the older way. @param {string} text */
async function writeText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = Object.assign(document.createElement("textarea"), { value: text, readOnly: true });
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("The browser does not allow it.");
}

/** The picture as PNG, the only type that all browsers can copy. @param {string} url @returns {Promise<Blob>} */
async function asPng(url) {
  const image = Object.assign(new Image(), { src: url });
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext("2d")?.drawImage(image, 0, 0);
  return new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject()), "image/png"));
}

/** Older browsers have none. */
const Item = /** @type {any} */ (globalThis)["ClipboardItem"];

/** Whether this browser can copy pictures from this page. */
export const canCopyPictures = () => Boolean(Item && navigator.clipboard);

/** @param {string} url */
function writePicture(url) {
  // A promise, because Safari wants the call in the same task as the click.
  return navigator.clipboard.write([new Item({ "image/png": asPng(url) })]);
}

/** Shows "Copied" on a button for a moment. */
async function confirmOn(/** @type {HTMLElement} */ button, /** @type {Promise<unknown>} */ copying) {
  const label = /** @type {any} */ (button.querySelector("[data-text]") ?? button);
  const key = await copying.then(() => /** @type {const} */ ("copied"), () => /** @type {const} */ ("notCopied"));
  setText(label, t(key));
  announce(t(key));
  setTimeout(() => setText(label, t(label.dataset.text)), 2_000);
}

/** @param {HTMLElement} button @param {string} text */
export const copyText = (button, text) => confirmOn(button, writeText(text));

/** @param {HTMLElement} button @param {string} url */
export const copyPicture = (button, url) => confirmOn(button, writePicture(url));

/** Makes chosen pictures fit the limits of the service, in the browser. */

const MAX_BYTES = 10 * 1024 * 1024;
const MAX_PIXELS = 25_000_000;
/** The longest side of a picture that was made smaller: some browsers have no larger canvas than 4096 by 4096. */
const MAX_SIDE = 4096;
const QUALITY = 0.92;

/** What the first bytes of a file say. The name and the type that the system gives may be wrong or missing. */
const SIGNATURES = /** @type {[string, RegExp][]} */ ([
  ["image/png", /^\x89PNG/],
  ["image/jpeg", /^\xff\xd8\xff/],
  ["image/webp", /^RIFF.{4}WEBP/s],
  ["image/heic", /^.{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)/s],
]);

/** A picture that cannot be used. `reason` is the key of a text. */
export class UnusablePicture extends Error {
  /** @param {"tooLarge" | "noHeic"} reason */
  constructor(reason) {
    super(reason);
    this.reason = reason;
  }
}

/** The type of a picture that may be usable; empty for any other file. @param {File} file */
export async function typeOf(file) {
  // A folder, or a file that was removed, cannot be read.
  const start = await file.slice(0, 32).arrayBuffer().catch(() => new ArrayBuffer(0));
  const text = String.fromCharCode(...new Uint8Array(start));
  return SIGNATURES.find(([, signature]) => signature.test(text))?.[0] ?? "";
}

/** @param {string} src @returns {Promise<HTMLImageElement | undefined>} undefined if the browser cannot read it */
const load = (src) => new Promise((resolve) => {
  const image = new Image();
  image.onload = () => resolve(image);
  image.onerror = () => resolve(undefined);
  image.src = src;
});

/**
 * Draws a picture upright, as the browser shows it, and keeps the colours that an sRGB canvas would lose.
 *
 * @param {HTMLImageElement} image @param {number} side its longest side afterwards, in pixels
 */
function draw(image, side) {
  const { naturalWidth: width, naturalHeight: height } = image;
  const scale = Math.min(1, side / Math.max(width, height));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height].map((length) => Math.max(1, Math.round(length * scale)));
  const context = canvas.getContext("2d", { colorSpace: "display-p3" });
  if (!context) throw new UnusablePicture("tooLarge");
  Object.assign(context, { imageSmoothingQuality: "high" });
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/**
 * The file itself if the service accepts it, else a smaller picture. Broken files are left to the service to refuse.
 *
 * @param {File} file @param {string} type as `typeOf` returns it @param {string} src an object URL of the file
 * @returns {Promise<File>}
 */
export async function fit(file, type, src) {
  const image = await load(src);
  const heic = type === "image/heic";
  if (heic && !image) throw new UnusablePicture("noHeic");
  const fits = file.size <= MAX_BYTES;
  if (fits && !heic && (!image || image.naturalWidth * image.naturalHeight <= MAX_PIXELS)) return file;
  // Drawing a picture that cannot be decoded draws nothing, without an error.
  if (!image || !(await image.decode().then(() => true, () => false))) throw new UnusablePicture("tooLarge");
  // WebP keeps transparency. Browsers that cannot write it write PNG, which takes more steps to fit.
  const target = type === "image/png" || type === "image/webp" ? "image/webp" : "image/jpeg";
  for (let side = MAX_SIDE; side >= 256; side *= 0.75) {
    const canvas = draw(image, side);
    const blob = /** @type {Blob | null} */ (await new Promise((done) => canvas.toBlob(done, target, QUALITY)));
    canvas.width = 0; // Safari keeps the memory of a canvas until it is collected.
    if (blob && blob.size <= MAX_BYTES) return new File([blob], file.name, { type: blob.type });
  }
  throw new UnusablePicture("tooLarge");
}

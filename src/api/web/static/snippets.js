/**
 * The request of a generation, and the code that sends it: with curl, JavaScript and Python.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./stagecast.js").GenerationRequest} GenerationRequest
 * @typedef {{url: string, userId?: string, tokenRequired: boolean}} Service
 */

/** Values that the service assumes if the field is missing. */
const DEFAULTS = /** @type {Record<string, unknown>} */ ({ quality: "auto", background: "auto" });
/** Characters that a terminal or an editor acts on, or does not show; and unpaired surrogates. */
const INVISIBLE =
  /[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202f\u205f-\u206f\ufeff\ud800-\udfff]/u;
const INVISIBLES = new RegExp(INVISIBLE, "gu");

/**
 * The request that starts the same generation once more, with the stored pictures. Undefined for generations of earlier
 * versions, which have no `input`.
 *
 * @param {Generation} generation @returns {GenerationRequest | undefined}
 */
export function requestOf({ input, metadata }) {
  if (!input) return undefined;
  const { prompt, images = [], imageUrls = [], ...options } = input;
  const imageNames = images.map((/** @type {string} */ url) => url.slice(url.lastIndexOf("/") + 1));
  return {
    prompt, ...imageNames.length && { imageNames }, ...imageUrls.length && { imageUrls }, ...options,
    ...metadata && { metadata },
  };
}

/** A string literal of JavaScript and Python, which may also be placed in HTML. */
const literal = (/** @type {string} */ text) =>
  JSON.stringify(text).replace(/</g, "\\u003c").replace(INVISIBLES, (character) =>
    [...Array(character.length).keys()].map((index) =>
      `\\u${character.charCodeAt(index).toString(16).padStart(4, "0")}`).join(""));

/** One word of a POSIX shell. Line breaks stay as they are; other invisible characters become octal escapes. */
function shellWord(/** @type {string} */ text) {
  if (!INVISIBLE.test(text.replace(/\n/g, ""))) return `'${text.replace(/'/g, "'\\''")}'`;
  const escaped = text.replace(/[\\'!]/g, octal).replace(INVISIBLES, (it) => (it === "\n" ? it : octal(it)));
  return `$'${escaped}'`;
}
const octal = (/** @type {string} */ text) =>
  [...new TextEncoder().encode(text)].map((byte) => `\\${byte.toString(8).padStart(3, "0")}`).join("");

const isAscii = (/** @type {string} */ text) => /^[ -~]*$/.test(text);

/**
 * @param {Generation} generation @param {Service} service
 * @returns {{curl: string, javascript: string, python: string}}
 */
export function snippetsOf(generation, { url, userId = "", tokenRequired }) {
  const request = requestOf(generation) ?? {};
  const fields = Object.entries(request).filter(([name, value]) => value !== undefined && value !== DEFAULTS[name]);
  const isLost = !request.imageNames && !request.imageUrls; // Its pictures are not stored any more.
  const target = `${url}/generations/${generation.kind}`;
  const text = (/** @type {unknown} */ value) => (typeof value === "string" ? value : JSON.stringify(value));
  const list = (/** @type {string[]} */ values) => `[${values.map(literal).join(", ")}]`;
  /** A value as code. @param {unknown} it @param {string} encode the function that makes JSON of a list */
  const code = (it, encode) => (Array.isArray(it) ? `${encode}(${list(it)})` : literal(text(it)));

  const curl = [
    `curl ${shellWord(target)}`,
    tokenRequired ? '-H "Authorization: Bearer $STAGECAST_TOKEN"' : `-H ${shellWord(`X-User-Id: ${userId}`)}`,
    ...fields.map(([name, it]) => `--form-string ${shellWord(`${name}=${text(it)}`)}`),
    ...isLost ? ["-F 'images=@picture.png'"] : [],
  ];

  // Headers are bytes.
  const user = literal(userId);
  const jsUser = isAscii(userId) ? user : `String.fromCharCode(...new TextEncoder().encode(${user}))`;
  const jsHeader = tokenRequired ? "Authorization: `Bearer ${process.env.STAGECAST_TOKEN}`" : `"X-User-Id": ${jsUser}`;
  const javascript = [
    "const body = new FormData();",
    ...fields.map(([name, it]) => `body.append("${name}", ${code(it, "JSON.stringify")});`),
    ...isLost ? ['body.append("images", picture); // A File or Blob.'] : [],
    "",
    `const response = await fetch(${literal(target)}, {`,
    '  method: "POST",',
    `  headers: { ${jsHeader} },`,
    "  body,",
    "});",
    "if (!response.ok) throw new Error(await response.text());",
    "console.log((await response.json()).generationId);",
  ];

  const pythonHeader = tokenRequired ? `"Authorization": f"Bearer {os.environ['STAGECAST_TOKEN']}"`
    : `"X-User-Id": ${isAscii(userId) ? user : `${user}.encode()`}`;
  const python = [
    "import json",
    ...tokenRequired ? ["import os"] : [],
    "",
    "import requests",
    "",
    "response = requests.post(",
    `    ${literal(target)},`,
    `    headers={${pythonHeader}},`,
    "    files={",
    ...fields.map(([name, it]) => `        "${name}": (None, ${code(it, "json.dumps")}),`),
    ...isLost ? ['        "images": open("picture.png", "rb"),'] : [],
    "    },",
    ")",
    "response.raise_for_status()",
    'print(response.json()["generationId"])',
  ];
  const usesJson = python.some((line) => line.includes("json.dumps"));
  return {
    curl: curl.join(" \\\n  "), javascript: javascript.join("\n"),
    python: (usesJson ? python : python.slice(tokenRequired ? 1 : 2)).join("\n"),
  };
}

/** Names that Windows reserves for devices. */
const RESERVED = /^(con|prn|aux|nul|(com|lpt)[\d¹²³])$/i;
/** They join the parts of emoji, and of words in Persian and the languages of India. */
const JOINERS = /[\u200c\u200d]/;

/**
 * A file name for a picture, made of its title. It is valid on all systems.
 *
 * @param {string} title @param {string} url that of the picture, for the suffix @param {string} fallback
 */
export function fileNameOf(title, url, fallback) {
  const suffix = /\.(png|jpe?g|webp)$/i.exec(url.split(/[?#]/)[0])?.[0] ?? ".png";
  const visible = title.replace(INVISIBLES, (it) => (JOINERS.test(it) ? it : " "));
  const words = visible.replace(/[\\/:*?"<>|%~#&]+/g, " ").trim().replace(/\s+/g, " ");
  const name = [...words].slice(0, 60).join("").replace(/^[.\s\u200c\u200d-]+|[.\s\u200c\u200d]+$/g, "");
  return `${!name || RESERVED.test(name.split(".")[0].trim()) ? fallback : name}${suffix.toLowerCase()}`;
}

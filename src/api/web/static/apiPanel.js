/**
 * The panel "Details and API" of the selected generation: what was asked for, its id, the code that asks for it again,
 * and its events.
 *
 * @typedef {import("./stagecast.js").Generation} Generation
 * @typedef {import("./connection.js").Stagecast} Stagecast
 */

import { copyText } from "./clipboard.js";
import { BASE, byId, parseUrl, setText } from "./dom.js";
import { t } from "./i18n.js";
import { tokenRequired } from "./identity.js";
import { ownUrlOf } from "./pictures.js";
import { snippetsOf } from "./snippets.js";

/** The generation in the panel. @type {Generation | undefined} */
let shown;
/** What the pictures are rendered of: they are not loaded again without need. */
let renderedInputs = "";

/** The options that were asked for, in words. @param {Generation} generation */
function optionsOf({ input }) {
  const { aspectRatio, quality, background, inputFidelity, faceSwap } = input ?? {};
  const named = /** @type {const} */ ({ quality, background, inputFidelity });
  return [
    aspectRatio && `${t("shape")}: ${aspectRatio}`, faceSwap && t("faceSwap"),
    ...Object.entries(named).map(([name, value]) =>
      value && value !== "auto" && `${t(/** @type {keyof typeof named} */ (name))}: ${t(value)}`),
  ].filter(Boolean).join(" · ");
}

/** One picture that was asked for: a thumbnail if the service stores it, else the host of its URL. */
function inputItem(/** @type {Generation} */ generation, /** @type {string} */ url, /** @type {number} */ index) {
  const item = document.createElement("li");
  const own = ownUrlOf(generation, url);
  const name = `${t("inputNumber")(index + 1)}${generation.input?.face === index ? `, ${t("isFace")}` : ""}`;
  const link = Object.assign(document.createElement("a"), {
    href: own ?? url, target: "_blank", rel: "noopener noreferrer", title: name,
  });
  const onerror = () => item.remove(); // The service stores it no longer.
  if (own) link.append(Object.assign(new Image(), { onerror, src: `${own}?width=320`, alt: name, loading: "lazy" }));
  else link.append(`${parseUrl(url)?.host ?? url} ↗`);
  item.classList.toggle("face", generation.input?.face === index);
  item.append(link);
  return item;
}

/** @param {Stagecast} stagecast */
async function renderCode(stagecast) {
  const generation = shown;
  if (!generation || !byId("details").open) return;
  const language = /** @type {any} */ (document.querySelector("[name=language]:checked")).value;
  byId("code").lang = "en";
  if (language !== "events") {
    const service = { url: BASE, userId: stagecast.userId, tokenRequired };
    setText(byId("code"), snippetsOf(generation, service)[/** @type {"curl"} */ (language)]);
    return setText(byId("api-hint"), tokenRequired ? t("tokenPlaceholder") : "");
  }
  setText(byId("api-hint"), t("eventsHint"));
  const path = `/generations/${generation.generationId}/events`;
  const events = await stagecast.http.call("GET", path).catch(() => undefined);
  const chosen = /** @type {any} */ (document.querySelector("[name=language]:checked")).value;
  if (shown !== generation || chosen !== "events") return;
  setText(byId("code"), events ? JSON.stringify(events, null, 2) : t("notLoaded"));
}

/** @param {Stagecast} stagecast @param {Generation | undefined} generation @param {boolean} [force] */
export function render(stagecast, generation, force) {
  if (!generation || (shown === generation && !force)) return;
  const moved = shown?.generationId !== generation.generationId;
  shown = generation;
  const { input, generationId } = generation;
  setText(byId("generation-id"), generationId);
  setText(byId("options"), optionsOf(generation));
  const urls = [...input?.images ?? [], ...input?.imageUrls ?? []];
  const inputs = `${generationId} ${urls} ${document.documentElement.lang}`;
  if (inputs !== renderedInputs) {
    renderedInputs = inputs;
    const item = (/** @type {string} */ url, /** @type {number} */ index) => inputItem(generation, url, index);
    byId("inputs").replaceChildren(...urls.map(item));
  }
  byId("inputs").hidden = !urls.length;
  if (moved && byId("details").open) setText(byId("code"), "");
  renderCode(stagecast);
}

/** @param {Stagecast} stagecast */
export function init(stagecast) {
  byId("details").addEventListener("toggle", () => renderCode(stagecast));
  byId("languages").addEventListener("change", () => renderCode(stagecast));
  byId("copy-id").addEventListener("click", () => copyText(byId("copy-id"), byId("generation-id").textContent));
  byId("copy-code").addEventListener("click", () => copyText(byId("copy-code"), byId("code").textContent));
}

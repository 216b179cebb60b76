/** Small hands for the page. Texts go in as text, never as HTML. */

/** The service's URL, as this page has it: with a path where the service is behind one. */
export const BASE = new URL("..", import.meta.url).href.slice(0, -1);

export const byId = (/** @type {string} */ id) => /** @type {any} */ (document.getElementById(id));

/** The URL that this is, if it is one. @param {string | undefined} text @returns {URL | undefined} */
export function parseUrl(text) {
  try { return text ? new URL(text) : undefined; } catch {} // It is not one.
}

/** A new copy of a template's element, and its parts. */
export function stamp(/** @type {string} */ template) {
  const root = byId(template).content.firstElementChild.cloneNode(true);
  return { root, part: (/** @type {string} */ selector) => root.querySelector(selector) };
}

/** Changes nothing where nothing is new: what is read out is not read out again. */
export function write(/** @type {HTMLElement} */ element, /** @type {string} */ text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A picture, or none. What is there stays until the next one has come in. */
export function show(/** @type {HTMLImageElement} */ img, /** @type {string | undefined} */ src, alt = "") {
  img.alt = alt;
  if (!src) {
    img.hidden = true;
    img.removeAttribute("src");
  } else if (img.getAttribute("src") !== src) {
    img.onerror = () => (img.hidden = true); // It was deleted meanwhile, or is none.
    img.hidden = false;
    img.src = src;
  }
}

/** Puts these elements there in this order, and moves none that stands right: it would lose its focus. */
export function arrange(/** @type {Element} */ list, /** @type {Element[]} */ roots) {
  for (const element of [...list.children]) if (!roots.includes(element)) element.remove();
  roots.forEach((root, index) => {
    if (list.children[index] !== root) list.insertBefore(root, list.children[index] ?? null);
  });
}

/** Sets a bar, and what is told of it to those who do not see it. */
export function setBar(
  /** @type {HTMLElement} */ bar,
  /** @type {{label: string, progress: number, text: string}} */ { label, progress, text },
) {
  bar.setAttribute("aria-label", label);
  bar.setAttribute("aria-valuenow", String(progress));
  bar.setAttribute("aria-valuetext", text);
  bar.style.setProperty("--progress", `${progress}%`);
}

/** For what has no place of its own on the page. Said once. */
export const announce = (/** @type {string} */ text) => (byId("announcer").textContent = text);

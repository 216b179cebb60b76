/** Helpers for the DOM. Texts are set as text, never as HTML. */

/** The URL of the service that the page was loaded from, with its path if it is served below one. */
export const BASE = import.meta.url.slice(0, import.meta.url.lastIndexOf("/static/"));

export const byId = (/** @type {string} */ id) => /** @type {any} */ (document.getElementById(id));

/** The parsed URL; undefined if the text is not a URL. @param {string | undefined} text @returns {URL | undefined} */
export function parseUrl(text) {
  try { return text ? new URL(text) : undefined; } catch {} // Not a URL.
}

/** The token in a text that was pasted, without `Bearer`; undefined if it is not a token. @param {string} text */
export function parseToken(text) {
  const token = text.trim().replace(/^Bearer\s+/i, "");
  return /^[\w.~+/-]+=*$/.test(token) ? token : undefined;
}

/** Clones the root element of a template. `part` finds an element in the clone. */
export function cloneTemplate(/** @type {string} */ template) {
  const root = byId(template).content.firstElementChild.cloneNode(true);
  return { root, part: (/** @type {string} */ selector) => root.querySelector(selector) };
}

/** Sets an element's text only if it differs, so that screen readers do not repeat a live region. */
export function setText(/** @type {HTMLElement} */ element, /** @type {string} */ text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Shows an image, or hides the element if there is none. The old image stays until the new one has loaded. */
export function setImage(/** @type {HTMLImageElement} */ img, /** @type {string | undefined} */ src, alt = "") {
  img.alt = alt;
  if (!src) {
    img.hidden = true;
    img.removeAttribute("src");
  } else if (img.getAttribute("src") !== src) {
    img.onerror = () => { // Deleted meanwhile, not an image, or the service does not answer: the next call tries again.
      img.hidden = true;
      img.removeAttribute("src");
    };
    img.hidden = false;
    img.src = src;
  }
}

/** Makes these elements the children of `list`. Does not move elements that are in place: they would lose focus. */
export function setChildren(/** @type {Element} */ list, /** @type {Element[]} */ children) {
  const kept = new Set(children);
  for (const element of [...list.children]) if (!kept.has(element)) element.remove();
  children.forEach((child, index) => {
    if (list.children[index] !== child) list.insertBefore(child, list.children[index] ?? null);
  });
}

/** Sets a progress bar, and its description for screen readers. */
export function setProgress(
  /** @type {HTMLElement} */ bar,
  /** @type {{label: string, progress: number, text: string}} */ { label, progress, text },
) {
  bar.setAttribute("aria-label", label);
  bar.setAttribute("aria-valuenow", String(progress));
  bar.setAttribute("aria-valuetext", text);
  bar.style.setProperty("--progress", `${progress}%`);
}

/** Has screen readers announce a text that is shown nowhere else. */
export const announce = (/** @type {string} */ text) => (byId("announcer").textContent = text);

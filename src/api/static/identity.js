/**
 * Who is using the page: anybody by name where the service asks for no token, else whom the token names.
 *
 * @typedef {import("./stagecast.js").Who} Who
 */

import { BASE, byId } from "./dom.js";
import { t } from "./words.js";

export const guarded = document.documentElement.dataset.callers === "token";

const USER = "stagecast.user";
const TOKEN = "stagecast.token";

/** What the browser keeps for us: this tab, and, for the user's name, those that are opened later. */
const kept = (/** @type {string} */ name) => {
  try { return sessionStorage.getItem(name) || localStorage.getItem(name) || undefined; } catch {} // It keeps nothing.
};
const keep = (/** @type {string} */ name, /** @type {string} */ value, everywhere = false) => {
  try {
    sessionStorage.setItem(name, value);
    if (everywhere) localStorage.setItem(name, value);
  } catch {} // Not kept, then.
};

function reveal(/** @type {boolean} */ inside) {
  byId("sign-in").hidden = inside;
  byId("work").hidden = !inside;
  byId("user-button").hidden = !inside;
  document.querySelector(".line")?.toggleAttribute("hidden", !inside);
}

/** Asks for a token until there is one. @returns {Promise<Who>} */
function askToken(problem = "") {
  reveal(false);
  byId("token-problem").textContent = problem;
  byId("token").focus();
  return new Promise((resolve) => {
    byId("token-form").onsubmit = (/** @type {Event} */ event) => {
      event.preventDefault();
      const token = byId("token").value.trim().replace(/^Bearer\s+/i, "");
      if (!/^[\w.~+/-]+=*$/.test(token)) return (byId("token-problem").textContent = t("notToken"));
      byId("token").value = "";
      keep(TOKEN, token);
      reveal(true);
      resolve({ token });
    };
  });
}

/** Who is there at first. @returns {Promise<Who>} */
export async function identify() {
  byId("user-form").hidden = guarded;
  byId("sign-out").hidden = !guarded;
  const token = kept(TOKEN);
  if (guarded && !token) return askToken();
  reveal(true);
  return guarded ? { token } : { userId: kept(USER) ?? "demo" };
}

/** Who is there instead of whom the service does not accept. @param {string} [code] */
export function identifyAnew(code) {
  return askToken(t(code === "token_expired" ? "tokenExpired" : "tokenRefused"));
}

function openPanel(/** @type {boolean} */ open) {
  byId("user-panel").hidden = !open;
  byId("user-button").setAttribute("aria-expanded", String(open));
  if (open && !guarded) byId("user").select();
}

/** @param {(who: Who) => void} become */
export function listen(become) {
  byId("user-form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    const userId = byId("user").value.trim();
    if (!userId) return;
    keep(USER, userId, true);
    openPanel(false);
    become({ userId });
  });
  byId("user-button").addEventListener("click", () => openPanel(byId("user-panel").hidden));
  document.addEventListener("click", ({ target }) => {
    if (!(/** @type {Element} */ (target).closest("#user-panel, #user-button"))) openPanel(false);
  });
  document.addEventListener("keydown", ({ key }) => {
    if (key !== "Escape" || byId("user-panel").hidden) return;
    openPanel(false);
    byId("user-button").focus();
  });
  byId("sign-out").addEventListener("click", () => {
    keep(TOKEN, "");
    location.assign(`${BASE}/`); // Nothing of the user's stays in this page.
  });
}

let drawn = "";

/** @param {string | undefined} userId */
export function draw(userId = "") {
  byId("user-button").textContent = userId || "…";
  byId("user-button").setAttribute("aria-label", t("userMenu")(userId));
  if (userId === drawn) return; // Somebody may be writing another name.
  byId("user").value = drawn = userId;
}

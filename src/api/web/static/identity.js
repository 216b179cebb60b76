/**
 * The user: any name if the service needs no token, otherwise the user that the token names.
 *
 * @typedef {import("./stagecast.js").Identity} Identity
 */

import { BASE, byId, parseToken } from "./dom.js";
import { showText, t } from "./i18n.js";

export const tokenRequired = document.documentElement.dataset.callers === "token";

const USER = "stagecast.user";
const TOKEN = "stagecast.token";

/** Reads a value that this tab, or any tab, has stored. */
const load = (/** @type {string} */ key) => {
  try { return sessionStorage.getItem(key) || localStorage.getItem(key) || undefined; } catch {} // Access denied.
};
/** Stores a value for this tab, and if `allTabs` for tabs that are opened later. */
const store = (/** @type {string} */ key, /** @type {string} */ value, allTabs = false) => {
  try {
    sessionStorage.setItem(key, value);
    if (allTabs) localStorage.setItem(key, value);
  } catch {} // Access denied: not remembered, then.
};

function showSignedIn(/** @type {boolean} */ signedIn) {
  document.documentElement.classList.toggle("signed-in", signedIn);
  byId("sign-in").hidden = signedIn;
  byId("work").hidden = !signedIn;
  byId("user-button").hidden = !signedIn;
  document.querySelector(".line")?.toggleAttribute("hidden", !signedIn);
}

/** Shows the sign-in form until a token is entered. @returns {Promise<Identity>} */
function askForToken(problem = "") {
  showSignedIn(false);
  showText(byId("token-problem"), problem);
  byId("token").focus();
  return new Promise((resolve) => {
    byId("token-form").onsubmit = (/** @type {Event} */ event) => {
      event.preventDefault();
      const token = parseToken(byId("token").value);
      if (!token) return showText(byId("token-problem"), t("notToken"));
      byId("token").value = "";
      store(TOKEN, token);
      showSignedIn(true);
      resolve({ token });
    };
  });
}

/** The stored user or token, or the one that the sign-in form asks for. @returns {Promise<Identity>} */
export async function identify() {
  byId("user-form").hidden = tokenRequired;
  byId("sign-out").hidden = !tokenRequired;
  const token = load(TOKEN);
  if (tokenRequired && !token) return askForToken();
  showSignedIn(true);
  return tokenRequired ? { token } : { userId: load(USER) ?? "demo" };
}

/** Asks for another token after the service has rejected one. @param {string} [code] the code of the rejection */
export function askForNewToken(code) {
  return askForToken(t(code === "token_expired" ? "tokenExpired" : "tokenRefused"));
}

function togglePanel(/** @type {boolean} */ open) {
  byId("user-panel").hidden = !open;
  byId("user-button").setAttribute("aria-expanded", String(open));
  if (open && !tokenRequired) byId("user").select();
}

/** @param {(identity: Identity) => void} switchUser */
export function init(switchUser) {
  byId("user-form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    const userId = byId("user").value.trim();
    if (!userId) return;
    store(USER, userId, true);
    togglePanel(false);
    switchUser({ userId });
  });
  byId("user-button").addEventListener("click", () => togglePanel(byId("user-panel").hidden));
  for (const name of ["click", "focusin"]) {
    document.addEventListener(name, ({ target }) => {
      if (!(/** @type {Element} */ (target).closest("#user-panel, #user-button"))) togglePanel(false);
    });
  }
  document.addEventListener("keydown", ({ key }) => {
    if (key !== "Escape" || byId("user-panel").hidden) return;
    togglePanel(false);
    byId("user-button").focus();
  });
  byId("sign-out").addEventListener("click", () => {
    store(TOKEN, "");
    location.assign(`${BASE}/`); // A reload, so that nothing of this user stays in memory.
  });
}

let renderedUser = "";

/** @param {string | undefined} userId */
export function render(userId = "") {
  byId("user-button").textContent = userId || "…";
  byId("user-button").title = userId; // A long name is cut off.
  byId("user-button").setAttribute("aria-label", t("userMenu")(userId));
  if (userId === renderedUser) return; // Keep what is being typed.
  byId("user").value = renderedUser = userId;
}

/**
 * How the page is connected: the line in the header, what is said when it breaks and comes back, and the button
 * that breaks it.
 *
 * @typedef {ReturnType<typeof import("./stagecast.js").connect>} Stagecast
 * @typedef {{tone: "offline" | "back" | "plain", text: string, action?: "retry" | "dismiss"}} Notice
 */

import { byId, stamp, write } from "./dom.js";
import { guarded } from "./identity.js";
import { t } from "./words.js";

/** What is told once, on coming back, until it is dismissed. @type {(() => string) | undefined} */
let told;
/** The user has cut it. */
let cut = false;
/** The user knows that it polls. */
let known = false;
/** @type {any} */
let passing;

/** @param {import("./stagecast.js").State} state @returns {Notice | undefined} */
function notice(state) {
  if (state === "refused") return guarded ? undefined : { tone: "offline", text: t("userRefused") };
  if (state === "offline" && cut) return { tone: "offline", text: t("cutNotice") };
  if (state === "offline") return { tone: "offline", text: t("offlineNotice"), action: "retry" };
  if (state === "catching up") return { tone: "plain", text: t("catching up") };
  if (told) return { tone: "back", text: told(), action: "dismiss" };
  if (state !== "polling" || known) return;
  return { tone: "plain", text: t("io" in globalThis ? "pollingMeanwhile" : "pollingNotice"), action: "dismiss" };
}

/** @param {Stagecast} stagecast @param {() => string} [text] */
function tell(stagecast, text) {
  clearTimeout(passing);
  told = text;
  if (told) passing = setTimeout(tell, 20_000, stagecast);
  draw(stagecast);
}

/** @param {Stagecast} stagecast */
function comeBack(stagecast) {
  cut = false;
  stagecast.cut(); // What is on its way is not waited for.
  stagecast.restore();
  draw(stagecast);
}

/** @param {Stagecast} stagecast */
export function draw(stagecast) {
  const { state } = stagecast;
  document.body.dataset.connection = state;
  write(byId("connection"), t(state));
  write(byId("cut"), t(cut ? "restore" : "cut"));
  byId("cut").hidden = state === "refused";
  const next = notice(state);
  const root = byId("notice");
  if (!next) return root.replaceChildren();
  if (root.dataset.said !== next.text || !root.firstChild) {
    const { root: shown, part } = stamp("notice-template");
    part("span").textContent = next.text;
    part("button").hidden = !next.action;
    part("button").textContent = next.action ? t(next.action) : "";
    part("button").addEventListener("click", () => {
      byId("cut").focus();
      if (next.action === "retry") return comeBack(stagecast);
      known ||= next.tone === "plain";
      tell(stagecast);
    });
    root.replaceChildren(shown);
    Object.assign(root.dataset, { said: next.text, tone: next.tone });
  }
}

/** @param {Stagecast} stagecast */
export function listen(stagecast) {
  byId("cut").addEventListener("click", () => {
    if (cut) return comeBack(stagecast);
    cut = true;
    stagecast.cut();
    draw(stagecast);
  });
  stagecast.on("state", (state) => {
    if (state === "live" || state === "polling" || state === "connecting") cut = false;
    if (state === "offline" || state === "connecting") told = undefined;
    draw(stagecast);
  });
  stagecast.on("caughtUp", ({ missed, recovered }) => {
    tell(stagecast, () => (recovered ? t("back")(missed) : t("backAnew")));
  });
}

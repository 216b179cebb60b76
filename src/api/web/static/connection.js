/**
 * The connection: its state in the header, the notice when it breaks and comes back, and the button that disconnects.
 *
 * @typedef {ReturnType<typeof import("./stagecast.js").connect>} Stagecast
 * @typedef {{tone: "offline" | "back" | "plain", text: string, action?: "retry" | "dismiss"}} Notice
 */

import { byId, cloneTemplate, setText } from "./dom.js";
import { t } from "./i18n.js";
import { tokenRequired } from "./identity.js";

/** The notice after a reconnect, until it is dismissed. @type {(() => string) | undefined} */
let backNotice;
/** Whether the user has pressed the button. */
let cut = false;
/** Whether the user has dismissed the notice about polling. */
let pollingDismissed = false;
/** Hides the notice after a while. @type {any} */
let hideTimer;
/** When the connection was checked last, and the timer of the next check. */
let [checkedAt, nextCheck] = [0, /** @type {any} */ (undefined)];

/** Has the client module check a connection that may have died without a close, once a second at most. */
function check(/** @type {Stagecast} */ stagecast) {
  nextCheck ??= setTimeout(() => {
    [checkedAt, nextCheck] = [Date.now(), undefined];
    if (stagecast.state === "live") document.dispatchEvent(new Event("resume"));
  }, checkedAt + 1_000 - Date.now());
}

/** Whether pictures use the network or the processor so much that the answer to a check may be late. */
const isBusy = () => Boolean(document.querySelector('#upload:not([hidden]), #tray [aria-busy="true"]')) ||
  [...document.images].some(({ complete, hidden, loading, src }) => src && !complete && !hidden && loading !== "lazy");

/** Checks the connection each second while the page is looked at. @param {Stagecast} stagecast */
export const tick = (stagecast) => document.hidden || isBusy() || check(stagecast);

/** @param {import("./stagecast.js").State} state @returns {Notice | undefined} */
function noticeFor(state) {
  if (state === "refused") return tokenRequired ? undefined : { tone: "offline", text: t("userRefused") };
  if (state === "offline" && cut) return { tone: "offline", text: t("cutNotice") };
  if (state === "offline") return { tone: "offline", text: t("offlineNotice"), action: "retry" };
  if (state === "catching up") return { tone: "plain", text: t("catching up") };
  if (backNotice) return { tone: "back", text: backNotice(), action: "dismiss" };
  if (state !== "polling" || pollingDismissed) return;
  return { tone: "plain", text: t("io" in globalThis ? "pollingMeanwhile" : "pollingNotice"), action: "dismiss" };
}

/** @param {Stagecast} stagecast @param {() => string} [text] */
function setBackNotice(stagecast, text) {
  clearTimeout(hideTimer);
  backNotice = text;
  if (text) hideTimer = setTimeout(setBackNotice, 20_000, stagecast);
  render(stagecast);
}

/** @param {Stagecast} stagecast */
function reconnect(stagecast) {
  cut = false;
  stagecast.cut(); // Abandon an attempt that is under way.
  stagecast.restore();
  render(stagecast);
}

/** @param {Stagecast} stagecast */
export function render(stagecast) {
  const { state } = stagecast;
  document.body.dataset.connection = state;
  setText(byId("connection"), t(state));
  setText(byId("cut"), t(cut ? "restore" : "cut"));
  byId("cut").hidden = state === "refused";
  const notice = noticeFor(state);
  const container = byId("notice");
  if (!notice) return container.replaceChildren();
  if (container.dataset.notice !== notice.text || !container.firstChild) {
    const { root, part } = cloneTemplate("notice-template");
    part("span").textContent = notice.text;
    part("button").hidden = !notice.action;
    part("button").textContent = notice.action ? t(notice.action) : "";
    part("button").addEventListener("click", () => {
      byId("cut").focus();
      if (notice.action === "retry") return reconnect(stagecast);
      pollingDismissed ||= notice.tone === "plain";
      setBackNotice(stagecast);
    });
    container.replaceChildren(root);
    Object.assign(container.dataset, { notice: notice.text, tone: notice.tone });
  }
}

/** @param {Stagecast} stagecast */
export function init(stagecast) {
  byId("cut").addEventListener("click", () => {
    if (cut) return reconnect(stagecast);
    cut = true;
    stagecast.cut();
    render(stagecast);
  });
  // Also while pictures are sent: whoever uses the page soon sees whether it is still connected.
  for (const name of ["pointerdown", "pointermove", "wheel", "keydown"]) {
    addEventListener(name, () => check(stagecast), { passive: true });
  }
  stagecast.on("state", (state) => {
    if (state === "live" || state === "polling" || state === "connecting") cut = false;
    if (state === "offline" || state === "connecting") backNotice = undefined;
    render(stagecast);
  });
  stagecast.on("caughtUp", ({ missed, recovered }) => {
    setBackNotice(stagecast, () => (recovered ? t("back")(missed) : t("backWithoutHistory")));
  });
}

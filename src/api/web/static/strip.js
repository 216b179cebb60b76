/**
 * The line at the top of the screen with connection, percent and stage, shown while the heading of the selected
 * generation is scrolled out of view.
 *
 * @typedef {import("./connection.js").Stagecast} Stagecast
 */

import { byId, setText } from "./dom.js";
import { formatPercent, statusName, t } from "./i18n.js";
import { selected } from "./stage.js";
import { isFinished } from "./stagecast.js";

/** Whether the heading is on the screen. */
let headingVisible = true;
/** The id of the generation in the line. It stays after the generation has finished, until the heading is visible. */
let followed = "";

/** @param {Stagecast} stagecast */
export function render(stagecast) {
  const strip = byId("strip");
  const generation = stagecast.state === "refused" ? undefined : selected(stagecast);
  if (headingVisible || followed !== generation?.generationId) followed = "";
  if (!headingVisible && generation && !isFinished(generation)) followed = generation.generationId;
  strip.classList.toggle("shown", followed !== "");
  if (!generation || !followed) return;
  setText(strip.querySelector(".connection"), t(stagecast.state));
  setText(strip.querySelector(".percent"), isFinished(generation) ? "" : formatPercent(generation.progress));
  setText(strip.querySelector(".stage-name"), statusName(generation));
  strip.dataset.state = generation.status;
  strip.style.setProperty("--progress", `${generation.progress}%`);
}

/** @param {Stagecast} stagecast */
export function init(stagecast) {
  new IntersectionObserver((entries) => {
    headingVisible = entries[entries.length - 1].isIntersecting;
    render(stagecast);
  }).observe(byId("standing"));
  byId("strip").addEventListener("click", () => {
    byId("stage").scrollIntoView();
    byId("stage-title").focus({ preventScroll: true });
  });
}

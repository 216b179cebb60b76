/**
 * The line at the top of the screen while the head of what is made has scrolled away: connection, percent and stage.
 *
 * @typedef {import("./connection.js").Stagecast} Stagecast
 */

import { byId, write } from "./dom.js";
import { selected } from "./stage.js";
import { isFinished } from "./stagecast.js";
import { percent, standing, t } from "./words.js";

/** The head is on the screen. */
let seen = true;
/** The generation whose progress the line shows; its end, too, until the head is seen again. */
let followed = "";

/** @param {Stagecast} stagecast */
export function draw(stagecast) {
  const strip = byId("strip");
  const generation = selected(stagecast);
  if (seen || followed !== generation?.generationId) followed = "";
  if (!seen && generation && !isFinished(generation)) followed = generation.generationId;
  strip.classList.toggle("shown", followed !== "");
  if (!generation || !followed) return;
  write(strip.querySelector(".connection"), t(stagecast.state));
  write(strip.querySelector(".percent"), isFinished(generation) ? "" : percent(generation.progress));
  write(strip.querySelector(".stage-name"), standing(generation));
  strip.dataset.state = generation.status;
  strip.style.setProperty("--progress", `${generation.progress}%`);
}

/** @param {Stagecast} stagecast */
export function listen(stagecast) {
  new IntersectionObserver((entries) => {
    seen = entries[entries.length - 1].isIntersecting;
    draw(stagecast);
  }).observe(byId("standing"));
  byId("strip").addEventListener("click", () => {
    byId("stage").scrollIntoView();
    byId("stage-title").focus({ preventScroll: true });
  });
}

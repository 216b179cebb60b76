/** When the service removes a generation. @typedef {import("./stagecast.js").Generation} Generation */

import { isFinished } from "./stagecast.js";

/** Milliseconds from the end of a generation to its removal. Events do not tell, only snapshots of the service do. */
let retention = /** @type {number | undefined} */ (undefined);

/** The time in milliseconds; undefined while it runs, or if it is not known. @param {Generation} generation */
export function expiryOf(generation) {
  const [ended, expires] = [Date.parse(generation.updatedAt), Date.parse(generation.expiresAt ?? "")];
  if (expires) retention = expires - ended;
  return isFinished(generation) && retention !== undefined ? ended + retention : undefined;
}

/** Loads a generation that ends while the time is not known. @param {import("./connection.js").Stagecast} stagecast */
export function init(stagecast) {
  stagecast.on("event", (event) => {
    if (isFinished(event) && retention === undefined) stagecast.load(event.generationId).catch(() => {});
  });
}

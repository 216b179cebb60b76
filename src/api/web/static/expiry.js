/** When the service removes a generation. @typedef {import("./stagecast.js").Generation} Generation */

import { isFinished } from "./stagecast.js";

/** Milliseconds from the end of a generation to its removal; only snapshots of the service tell. */
let retention = /** @type {number | undefined} */ (undefined);

/** The time in milliseconds; undefined while it runs, or if it is not known. @param {Generation} generation */
export function expiryOf(generation) {
  const [ended, expires] = [Date.parse(generation.updatedAt), Date.parse(generation.expiresAt ?? "")];
  if (expires) retention = expires - ended;
  return isFinished(generation) && retention !== undefined ? ended + retention : undefined;
}

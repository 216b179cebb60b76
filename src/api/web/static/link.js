/**
 * The links to generations: the part of the address after "#".
 *
 * @typedef {import("./connection.js").Stagecast} Stagecast
 */

import { BASE } from "./dom.js";
import * as pages from "./pages.js";

const ID = /^(?:edit|gen)_\d+_[a-z0-9]+$/;

/** The id in the address, which may be damaged; empty if there is none. */
export const linkedId = () => (/^#(?:edit|gen)_/i.test(location.hash) ? location.hash.slice(1) : "");

/** The address that opens a generation for its owner. */
export const linkTo = (/** @type {string} */ id) => `${BASE}/#${id}`;

/** @typedef {{id: string, userId?: string, state: "looking" | "missing" | "failed"}} Lookup */

/** What was found about the linked generation that the page does not have. @type {Lookup} */
let lookup = { id: "", state: "looking" };

/**
 * Whether the generation in the address is being looked up, does not exist for this user, or could not be loaded.
 * Undefined if there is nothing to look up.
 *
 * @param {Stagecast} stagecast
 */
export function lookupState(stagecast) {
  const id = linkedId();
  if (!id || stagecast.get(id)) return undefined;
  return lookup.id === id && lookup.userId === stagecast.userId ? lookup.state : "looking";
}

/** Loads the generation in the address, if the page does not have it. @param {Stagecast} stagecast */
async function lookUp(stagecast) {
  const [id, { userId, state }] = [linkedId(), stagecast];
  if (!id || stagecast.get(id) || !["live", "polling"].includes(state)) return;
  if (lookup.id === id && lookup.userId === userId && lookup.state !== "failed") return;
  /** @type {Lookup} */ const own = { id, userId, state: "looking" };
  lookup = own;
  try {
    if (ID.test(id)) {
      await stagecast.http.generation(id);
      await pages.loadUntil(stagecast, () => Boolean(stagecast.get(id)));
    }
    own.state = "missing"; // If the page has it now, nobody asks.
  } catch (/** @type {any} */ error) {
    own.state = error.code === "not_found" ? "missing" : "failed";
  }
  onFound();
}

let onFound = () => {};

/** @param {Stagecast} stagecast @param {() => void} found called when the answer is known */
export function init(stagecast, found) {
  onFound = found;
  const look = () => lookUp(stagecast);
  stagecast.on("state", look);
  for (const name of ["hashchange", "popstate"]) addEventListener(name, look);
}

/**
 * The pages of the list of generations, newest first. The client module adds what they contain to its generations.
 *
 * @typedef {import("./connection.js").Stagecast} Stagecast
 */

/** The largest page of the service. */
const LARGEST = 100;

/**
 * `next`: the start of the next page; undefined: the first one has not been requested yet, null: there is none.
 * `loading`: the request of a page. A new object for each user: the answers of an earlier one do not matter.
 */
let list = { next: /** @type {string | null | undefined} */ (undefined), loading: /** @type {any} */ (undefined) };

export const isUnknown = () => list.next === undefined && !list.loading;
/** Whether the service has more generations than the page; and whether it may have, as long as that is not known. */
export const hasNext = () => Boolean(list.next);
export const mayHaveMore = () => list.next !== null;
/** Begins with the first page again, for another user or after the history was lost. */
export const reset = () => void (list = { next: undefined, loading: undefined });

/** Loads the next page. @param {Stagecast} stagecast @param {number} [limit] */
export function load(stagecast, limit = LARGEST) {
  const own = list;
  return own.loading ??= stagecast.older(own.next ?? undefined, limit)
    .then((page) => (own.next = page.next ?? null))
    .finally(() => (own.loading = undefined));
}

/**
 * Loads pages until a condition holds, or there are no more.
 *
 * @param {Stagecast} stagecast @param {() => boolean} holds
 */
export async function loadUntil(stagecast, holds) {
  const own = list;
  while (own === list && !holds() && mayHaveMore()) await load(stagecast);
}

/** The reducer: a generation from its events and snapshots. Pure. */

/**
 * @typedef {import("../stagecast.js").Generation} Generation
 * @typedef {import("../stagecast.js").StagecastEvent} StagecastEvent
 */

/** Whether the generation has reached a terminal status. @param {{status: string}} generation */
export const isFinished = ({ status }) => status === "completed" || status === "failed";

/**
 * The generation after an event or a snapshot. An event that is old or arrives too early (`isGap`), and a snapshot that
 * is old, change nothing: the result is then `generation` itself.
 *
 * @param {Generation | undefined} generation as far as it is known
 * @param {StagecastEvent | Generation} update
 * @returns {Generation | undefined}
 */
export function reduce(generation, update) {
  if ("updatedAt" in update) {
    if (generation && update.sequence < generation.sequence) return generation;
    if (generation?.sequence !== update.sequence) return update;
    return Object.keys(update).every((key) => key in generation) ? generation : { ...generation, ...update };
  }
  if (generation && update.sequence <= generation.sequence) return generation;
  if (isGap(generation, update)) return generation;
  const { occurredAt, credit, ...fields } = update;
  return { ...generation, ...fields, createdAt: generation?.createdAt ?? occurredAt, updatedAt: occurredAt };
}

/**
 * Whether events are missing between the generation as it is known and this event.
 *
 * @param {Generation | undefined} generation @param {{sequence: number}} event
 */
export const isGap = (generation, event) => event.sequence > (generation?.sequence ?? 0) + 1;

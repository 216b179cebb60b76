/** One user's generations and credit, as events and snapshots report them. */

import { sleep } from "./http.js";
import { isFinished, isGap, reduce } from "./reduce.js";

/**
 * @typedef {import("../stagecast.js").Generation} Generation
 * @typedef {import("../stagecast.js").StagecastEvent} StagecastEvent
 * @typedef {import("./http.js").StagecastError} StagecastError
 */

/**
 * What is known of one generation. `generation` may be ahead of `delivered`: snapshots overtake events.
 *
 * @typedef {object} Entry
 * @property {Generation} [generation]
 * @property {number} [delivered] the sequence of the last event that was passed to `onEvent`
 * @property {number} snapshotSequence events up to this one precede the last snapshot: their `credit` is outdated
 * @property {number} fillTo the sequence up to which missing events are requested
 * @property {boolean} filling `fillGap` is running for this generation
 */

/** Milliseconds. */
const RETRY_DELAY = 2_000;

/**
 * @param {ReturnType<typeof import("./http.js").api>} http for missing events and the balance
 * @param {object} callbacks
 * @param {() => void} callbacks.onChange generations or credit have changed
 * @param {(event: StagecastEvent, generation?: Generation) => void} callbacks.onEvent each event once, in order
 * @param {(id: string, sequence: number) => void} callbacks.onReceived all events up to this sequence were received;
 *   `Infinity`: the generation is deleted, and no further events will come
 */
export function createStore(http, { onChange, onEvent, onReceived }) {
  /** @type {Map<string, Entry>} */ const entries = new Map();
  /** @type {Generation[] | undefined} */ let sorted;
  /** @type {number | undefined} */ let credit;
  let creditVersion = 0; // Incremented with each known balance: a response to an earlier request is outdated.
  let synced = false; // A first snapshot has been applied.
  let resumed = false; // The first cursor came from another process: events before it were not delivered here.
  let closed = false;

  function changed() {
    sorted = undefined;
    onChange();
  }

  /** @param {string} id @returns {Entry} */
  function getEntry(id) {
    const entry = entries.get(id) ?? { snapshotSequence: 0, fillTo: 0, filling: false };
    entries.set(id, entry);
    return entry;
  }

  /** Stores snapshots that are newer than what is known. @param {...Generation} snapshots */
  function mergeSnapshots(...snapshots) {
    for (const snapshot of snapshots) {
      const entry = getEntry(snapshot.generationId);
      entry.generation = reduce(entry.generation, snapshot);
    }
    changed();
  }

  /** Drops a deleted generation. @param {string} id */
  function removeGeneration(id) {
    if (entries.delete(id)) changed();
    onReceived(id, Infinity);
  }

  /** Adds a live or replayed event, in any order. @param {StagecastEvent} event */
  function addEvent(event) {
    const entry = getEntry(event.generationId);
    entry.delivered ??= resumed ? event.sequence - 1 : 0;
    if (event.sequence <= entry.delivered) return;
    if (event.sequence > entry.delivered + 1 || isGap(entry.generation, event)) {
      fillGap(event);
      return;
    }
    applyEvent(entry, event);
    if ("credit" in event && event.sequence > entry.snapshotSequence) setCredit(event.credit);
  }

  /** @param {Entry} entry @param {StagecastEvent} event the next one in order */
  function applyEvent(entry, event) {
    const before = entry.generation;
    entry.generation = reduce(before, event);
    if (event.sequence > (entry.delivered ?? 0)) {
      entry.delivered = event.sequence;
      onEvent(event, entry.generation);
    }
    if (entry.generation !== before) changed();
    onReceived(event.generationId, event.sequence);
  }

  /** Requests the events up to this one, until they have been delivered. @param {StagecastEvent} event */
  async function fillGap({ generationId, sequence }) {
    const entry = getEntry(generationId);
    entry.fillTo = Math.max(entry.fillTo, sequence);
    if (entry.filling) return;
    entry.filling = true;
    const incomplete = () => !closed && entries.get(generationId) === entry && (entry.delivered ?? 0) < entry.fillTo;
    while (incomplete()) {
      try {
        const after = Math.min(entry.delivered ?? 0, entry.generation?.sequence ?? 0);
        for (const event of await http.history(generationId, after)) if (!closed) applyEvent(entry, event);
      } catch (error) {
        if (/** @type {StagecastError} */ (error).code === "not_found") removeGeneration(generationId);
      }
      if (incomplete()) await sleep(RETRY_DELAY);
    }
    entry.filling = false;
    refreshCredit();
  }

  /** @param {number | undefined} balance */
  function setCredit(balance) {
    creditVersion++;
    if (balance === credit) return;
    credit = balance;
    onChange();
  }

  async function refreshCredit() {
    const version = creditVersion;
    const me = await http.me().catch(() => undefined);
    if (me && !closed && version === creditVersion) setCredit(me.credit);
  }

  /**
   * Applies the service's snapshot. If the feed was not recovered, generations that are not in it are gone. Returns the
   * generations of which events are still to come, each with the last sequence to expect.
   *
   * @param {{recovered: boolean, generations: Generation[]}} snapshot
   */
  function applySnapshot({ recovered, generations }) {
    if (!synced) resumed = recovered;
    if (!recovered) {
      const ids = new Set(generations.map(({ generationId }) => generationId));
      for (const id of entries.keys()) if (!ids.has(id)) entries.delete(id);
    }
    const expected = /** @type {[string, number][]} */ ([]);
    for (const latest of generations) {
      const { generationId: id, sequence } = latest;
      const { delivered, generation } = entries.get(id) ?? {};
      // The service replays nothing of generations that had finished before the cursor.
      const noReplay = recovered
        ? delivered === undefined && generation && isFinished(generation)
        : isFinished(latest);
      if (!noReplay && (delivered ?? 0) < sequence) expected.push([id, sequence]);
      if (!recovered) getEntry(id).snapshotSequence = sequence;
    }
    synced = true;
    mergeSnapshots(...generations);
    refreshCredit();
    return expected;
  }

  return {
    mergeSnapshots, removeGeneration, addEvent, applySnapshot,
    /** @returns {readonly Generation[]} */
    get generations() {
      return sorted ??= [...entries.values()].flatMap(({ generation }) => generation ?? []).sort(newestFirst);
    },
    get: (/** @type {string} */ id) => entries.get(id)?.generation,
    get credit() { return credit; },
    get synced() { return synced; },
    close: () => void (closed = true),
  };
}

/** @param {Generation} first @param {Generation} second */
function newestFirst(first, second) {
  const [a, b] = [first, second].map(({ createdAt, generationId }) => `${createdAt} ${generationId}`);
  return a < b ? 1 : -1;
}

/**
 * How long a running generation usually still takes, by the medians in `GET /stages`.
 *
 * @typedef {import("./timeline.js").Stage} Stage
 */

/** A stage usually takes between these multiples of its median. */
const [LOW, HIGH] = [0.75, 1.5];
/** Seconds: medians are rounded, and events take a moment. */
const SLACK = 1;

/**
 * The range of seconds that are left. Undefined if a stage has no median yet, or if the present stage has already taken
 * longer than usual: then nothing is known.
 *
 * @param {Stage | undefined} present undefined while it waits: counted from the first stage of work
 * @param {Stage[]} upcoming @param {number} elapsed seconds in the present stage
 * @returns {[number, number] | undefined}
 */
export function secondsLeft(present, upcoming, elapsed) {
  const ahead = upcoming.filter(({ terminal }) => !terminal).map(({ typicalSeconds }) => typicalSeconds);
  const own = present ? present.typicalSeconds : 0;
  if (own === undefined || elapsed > own * HIGH + SLACK) return undefined;
  let rest = 0;
  for (const seconds of ahead) {
    if (seconds === undefined) return undefined;
    rest += seconds;
  }
  const left = (/** @type {number} */ factor) => Math.max(0, own * factor - elapsed) + rest * factor;
  return [left(LOW), left(HIGH)];
}

/**
 * The range in whole steps that do not change each second: 5 seconds, or minutes from one minute on.
 *
 * @param {[number, number]} range in seconds @returns {[number, number, "second" | "minute"]}
 */
export function inSteps([low, high]) {
  if (high > 60) return [Math.floor(low / 60), Math.ceil(high / 60), "minute"];
  const step = high > 10 ? 5 : 1;
  return [Math.floor(low / step) * step, Math.max(1, Math.ceil(high / step) * step), "second"];
}

/** Detects that the page may have slept or changed networks. */

/** Milliseconds. A larger jump of the clock means that the machine has slept. */
const CLOCK_JUMP = 5_000;

/**
 * Calls `onSignal` when the page may have slept or changed networks, and `onOffline` when the browser loses its
 * network. Node has no such events.
 *
 * @param {() => void} onSignal @param {() => void} onOffline @returns {() => void} removes the listeners
 */
export function onWake(onSignal, onOffline) {
  const global = /** @type {any} */ (globalThis);
  if (!global.addEventListener) return () => {};
  const page = global.document ?? global;
  const onVisible = () => page.hidden || onSignal();
  let lastTick = Date.now();
  const clock = setInterval(() => {
    const [before, now] = [lastTick, (lastTick = Date.now())];
    if (Math.abs(now - before) > CLOCK_JUMP) onVisible();
  }, 1_000);
  const listeners = /** @type {[any, string, () => void][]} */ ([
    [page, "visibilitychange", onVisible], [page, "resume", onSignal], [global, "pageshow", onSignal],
    [global, "focus", onSignal], [global, "online", onSignal], [global, "offline", onOffline],
  ]);
  for (const [target, name, listener] of listeners) target.addEventListener(name, listener);
  return () => {
    clearInterval(clock);
    for (const [target, name, listener] of listeners) target.removeEventListener(name, listener);
  };
}

// The client on an event stream that dies without a close. A browser's signals are given to Node.
import assert from "node:assert/strict";
import { after, test } from "node:test";

const signals = new EventTarget();
for (const name of ["addEventListener", "removeEventListener"]) globalThis[name] = signals[name].bind(signals);
const { assertFullHistory, closeAll, gate, newUser, observe, openUrl, requestFields, startProxy, untilFinished, untilLive,
  untilMidway, waitFor } = await import("./client_support.mjs");

after(closeAll);

test("after a signal the client replaces its stream, silently if it works, and misses nothing", async () => {
  const proxy = await startProxy(openUrl);
  let streams = 0;
  proxy.dropsResponse = (head) => void (streams += head.includes("text/event-stream"));
  const userId = newUser();
  const [observer, safe] = [observe({ transport: "sse", url: proxy.url, userId }), observe({ url: openUrl, userId })];
  await untilLive(observer);
  const { prompt, release } = gate();
  const { generationId: id } = await observer.client.start("edit", requestFields({ prompt }));
  await untilMidway(observer, id);
  signals.dispatchEvent(new Event("focus"));
  while (streams < 2) await new Promise((later) => setTimeout(later, 20));
  assert.deepEqual(observer.states, ["connecting", "live"]);
  proxy.mute();
  await release();
  signals.dispatchEvent(new Event("focus"));
  await untilFinished(observer, id);
  await assertFullHistory(observer, id, safe);
  signals.dispatchEvent(new Event("offline"));
  await waitFor(observer, () => observer.states.includes("offline"));
  await waitFor(observer, () => observer.caughtUp.length > 0 && observer.client.state === "live");
  assert.ok(observer.caughtUp.every(({ recovered }) => recovered));
});

// The client on Server-Sent Events, over a network that fails.
import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import {
  assertFullHistory, closeAll, gate, keyedUrl, newUser, observe, openUrl, otherUrl, requestFields, startProxy, tokenOf,
  untilFinished, untilLive, untilMidway, waitFor,
} from "./client_support.mjs";

after(closeAll);

/** `observe` with streams, and without what Socket.IO needs. */
const follow = (options) => observe({ io: null, transport: "sse", ...options });

describe("by event stream, the client", { concurrency: true }, () => {
  test("is live, and emits the same events as by socket", async () => {
    const userId = newUser();
    const [stream, socket] = [follow({ url: openUrl, userId }), observe({ url: openUrl, userId })];
    await Promise.all([untilLive(stream), untilLive(socket)]);
    const { generationId: id } = await stream.client.start("edit", requestFields({ metadata: { title: "Ada" } }));
    await Promise.all([untilFinished(stream, id), untilFinished(socket, id)]);
    assert.deepEqual(stream.events, socket.events);
    await assertFullHistory(stream, id);
    assert.deepEqual(stream.states, ["connecting", "live"]);
    assert.deepEqual([stream.client.credit, stream.client.userId], [99, userId]);
    await stream.client.remove(id);
    await waitFor(socket, () => socket.removed.length === 1);
    const { generationId: next } = await socket.client.start("generate", requestFields());
    await Promise.all([untilFinished(stream, next), untilFinished(socket, next)]);
    await socket.client.remove(next);
    await waitFor(stream, () => stream.removed.length === 2);
    assert.deepEqual(stream.client.generations, []);
  });

  test("that was cut in mid-generation misses nothing, and reports how many events came late", async () => {
    const userId = newUser();
    const [here, there] = [follow({ url: openUrl, userId }), observe({ url: openUrl, userId })];
    await Promise.all([untilLive(here), untilLive(there)]);
    const { prompt, release } = gate();
    const { generationId: id } = await there.client.start("edit", requestFields({ prompt }));
    await untilMidway(here, id);
    here.client.cut();
    assert.equal(here.client.state, "offline");
    await release();
    await untilFinished(there, id);
    const before = here.events.length;
    here.client.restore();
    await waitFor(here, () => here.caughtUp.length > 0);
    await assertFullHistory(here, id);
    assert.deepEqual(here.caughtUp, [{ missed: here.events.length - before, recovered: true }]);
    assert.deepEqual(here.states, ["connecting", "live", "offline", "catching up", "live"]);
  });

  test("gets each event once and in order although the connection breaks after each event", async () => {
    const proxy = await startProxy(openUrl);
    const userId = newUser();
    const observer = follow({ url: proxy.url, userId });
    await untilLive(observer);
    observer.client.on("event", proxy.cut);
    const safe = follow({ url: openUrl, userId });
    const { http } = safe.client;
    const { generationId: id } = await http.start("generate", { prompt: "a red hat" }, { runner: "external" });
    const broken = () => observer.states.filter((state) => state === "offline").length;
    const steps = ["composition", "composition_completed", "ai_generation"].map((status) => ({ status }));
    steps.push({ status: "completed", generatedImageUrl: "https://example.org/a.png" });
    for (const [index, step] of steps.entries()) {
      await waitFor(observer, () => broken() > index);
      await http.transition(id, step);
    }
    await waitFor(observer, () => broken() > steps.length && observer.client.state === "live");
    await assertFullHistory(observer, id, safe);
    assert.ok(observer.caughtUp.length > 0 && observer.caughtUp.every(({ recovered }) => recovered));
  });

  test("shows what the service has now, and reports the loss, after the service has lost its log", async () => {
    const proxy = await startProxy(openUrl);
    const observer = follow({ url: proxy.url, userId: newUser() });
    const lost = await observer.client.start("edit", requestFields({ prompt: gate().prompt }));
    await untilMidway(observer, lost.generationId);
    proxy.target = otherUrl;
    proxy.cut();
    await waitFor(observer, () => observer.caughtUp.length > 0);
    assert.deepEqual(observer.caughtUp, [{ missed: 0, recovered: false }]);
    assert.deepEqual(observer.client.generations, []);
    const next = await observer.client.start("edit", requestFields());
    await untilFinished(observer, next.generationId);
    await assertFullHistory(observer, next.generationId);
  });

  test("polls while a proxy refuses streams, and is live once it does not", async () => {
    const proxy = await startProxy(openUrl);
    proxy.refuses = (head) => head.includes("text/event-stream");
    const observer = follow({ url: proxy.url, userId: newUser() });
    await waitFor(observer, () => observer.client.state === "polling");
    const { generationId: id } = await observer.client.start("generate", requestFields());
    await untilFinished(observer, id);
    proxy.refuses = () => false;
    await untilLive(observer);
    await assertFullHistory(observer, id);
  });

  test("reconnects at once on restore(), and ends with close()", async () => {
    const proxy = await startProxy(openUrl);
    const observer = follow({ url: proxy.url, userId: newUser() });
    await untilLive(observer);
    proxy.closed = true;
    proxy.cut();
    await waitFor(observer, () => observer.client.state === "offline");
    proxy.closed = false;
    observer.client.restore();
    await untilLive(observer);
    assert.deepEqual(observer.caughtUp, [{ missed: 0, recovered: true }]);
    observer.client.close();
    assert.equal(observer.client.state, "closed");
    const unopened = follow({ url: openUrl, userId: newUser() });
    unopened.client.close();
    await new Promise(setImmediate);
    assert.deepEqual(unopened.states, ["connecting", "closed"]);
  });

  test("renews its token before it expires, and stays live", async () => {
    const userId = newUser();
    const seconds = [4];
    const ends = Date.now() + 4_000;
    const observer = follow({ url: keyedUrl, token: () => tokenOf(userId, { seconds: seconds.pop() ?? 3_600 }) });
    await untilLive(observer);
    assert.equal(observer.client.userId, userId);
    await new Promise((later) => setTimeout(later, ends + 200 - Date.now()));
    const { generationId: id } = await observer.client.start("edit", requestFields());
    await untilFinished(observer, id);
    await assertFullHistory(observer, id);
    assert.deepEqual(observer.states, ["connecting", "live"]);
  });
});

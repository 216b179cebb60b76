// The client when no socket can be opened.
import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import {
  assertFullHistory, closeAll, gate, newUser, observe, openUrl, otherUrl, requestFields, startProxy, untilFinished,
  untilLive, untilMidway, waitFor,
} from "./client_support.mjs";

after(closeAll);

describe("without a socket, the client", { concurrency: true }, () => {
  test("polls, and emits the same events", async () => {
    const userId = newUser();
    const observer = observe({ io: null, url: openUrl, userId });
    await waitFor(observer, () => observer.client.state === "polling");
    const { generationId: id } = await observer.client.start("edit", requestFields());
    await untilFinished(observer, id);
    await assertFullHistory(observer, id);
    assert.deepEqual(observer.states, ["connecting", "polling"]);
    assert.equal(observer.client.credit, 99);
    observer.client.cut();
    const { generationId: missed } = await observer.client.start("generate", requestFields());
    const socket = observe({ url: openUrl, userId });
    await waitFor(socket, () => socket.client.get(missed)?.status === "completed");
    observer.client.restore();
    await waitFor(observer, () => observer.caughtUp.length > 0);
    await assertFullHistory(observer, missed);
    assert.deepEqual(observer.caughtUp, [{ missed: observer.of(missed).length, recovered: true }]);
    assert.deepEqual(observer.states.slice(2), ["offline", "catching up", "polling"]);
  });

  test("removes generations that the service has lost", async () => {
    const proxy = await startProxy(openUrl);
    const observer = observe({ io: null, url: proxy.url, userId: newUser() });
    await waitFor(observer, () => observer.client.state === "polling");
    const { generationId: lost } = await observer.client.start("edit", requestFields());
    await untilFinished(observer, lost);
    proxy.target = otherUrl;
    proxy.cut();
    await waitFor(observer, () => observer.client.generations.length === 0);
    const { generationId: id } = await observer.client.start("edit", requestFields());
    await untilFinished(observer, id);
    await assertFullHistory(observer, id);
  });

  test("polls while a proxy blocks Socket.IO, and is live once it does not", async () => {
    const proxy = await startProxy(openUrl);
    proxy.refuses = (head) => head.includes("/socket.io/");
    const observer = observe({ url: proxy.url, userId: newUser() });
    await waitFor(observer, () => observer.client.state === "polling");
    const { prompt, release } = gate();
    const { generationId: id } = await observer.client.start("edit", requestFields({ prompt }));
    await untilMidway(observer, id);
    assert.deepEqual(observer.states.slice(-2), ["offline", "polling"]);
    proxy.refuses = () => false;
    await untilLive(observer);
    await release();
    await untilFinished(observer, id);
    await assertFullHistory(observer, id);
    proxy.refuses = (head) => head.includes("/socket.io/");
    proxy.cut();
    await waitFor(observer, () => observer.client.state === "polling");
    const { generationId: next } = await observer.client.start("generate", requestFields());
    await untilFinished(observer, next);
    await assertFullHistory(observer, next);
  });

  test("is offline while nothing answers, and polls again afterwards", async () => {
    const proxy = await startProxy(openUrl);
    const observer = observe({ io: null, url: proxy.url, userId: newUser() });
    await waitFor(observer, () => observer.client.state === "polling");
    proxy.closed = true;
    proxy.cut();
    await waitFor(observer, () => observer.client.state === "offline");
    proxy.closed = false;
    await waitFor(observer, () => observer.caughtUp.length > 0);
    assert.deepEqual(observer.caughtUp, [{ missed: 0, recovered: true }]);
    assert.equal(observer.client.state, "polling");
  });
});

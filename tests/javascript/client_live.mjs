// The client on Socket.IO, over a network that fails.
import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import { io } from "socket.io-client";
import { isFinished, reduce } from "../../src/api/web/static/stagecast.js";
import {
  assertFullHistory, closeAll, gate, newUser, observe, openUrl, otherUrl, requestFields, startProxy, untilFinished,
  untilLive, untilMidway, waitFor,
} from "./client_support.mjs";

after(closeAll);

describe("the client", { concurrency: true }, () => {
  test("emits every event of an edit on two devices, and has its final state and the balance", async () => {
    const userId = newUser();
    const [phone, laptop] = [observe({ url: openUrl, userId }), observe({ url: openUrl, userId })];
    await Promise.all([untilLive(phone), untilLive(laptop)]);
    const { generationId: id } = await phone.client.start("edit", requestFields({ metadata: { title: "Ada" } }));
    await Promise.all([untilFinished(phone, id), untilFinished(laptop, id)]);
    await assertFullHistory(phone, id);
    assert.deepEqual(laptop.events, phone.events);
    assert.deepEqual(phone.states, ["connecting", "live"]);
    assert.deepEqual(phone.caughtUp, []);
    const { userId: owner, expiresAt, ...snapshot } = await phone.client.http.generation(id);
    assert.equal(owner, userId);
    assert.deepEqual(laptop.client.generations, [snapshot]);
    assert.deepEqual(phone.events.reduce(reduce, undefined), snapshot);
    assert.deepEqual([phone.client.credit, laptop.client.credit], [99, 99]);
    assert.deepEqual(await phone.client.me(), { userId, credit: 99 });
  });

  test("drops a generation that was removed on another device, also while it was offline", async () => {
    const userId = newUser();
    const [phone, laptop] = [observe({ url: openUrl, userId }), observe({ url: openUrl, userId })];
    await Promise.all([untilLive(phone), untilLive(laptop)]);
    const started = [];
    for (let count = 0; count < 3; count++) started.push(await phone.client.start("generate", requestFields()));
    const [first, second, third] = started.map(({ generationId }) => generationId);
    await Promise.all([first, second, third].flatMap((id) => [untilFinished(phone, id), untilFinished(laptop, id)]));
    await phone.client.remove(first);
    await waitFor(laptop, () => laptop.removed.length === 1);
    assert.deepEqual([phone.removed, laptop.removed], [[first], [first]]);
    laptop.client.cut();
    await phone.client.remove(second);
    laptop.client.restore();
    await waitFor(laptop, () => laptop.removed.length === 2);
    for (const { client, removed } of [phone, laptop]) {
      assert.deepEqual(removed, [first, second]);
      assert.deepEqual(client.generations.map(({ generationId }) => generationId), [third]);
    }
    await untilLive(laptop);
    assert.equal(laptop.events.length, 3 * laptop.of(third).length);
  });

  test("that connects late shows the current state at once, and gets the past events", async () => {
    const userId = newUser();
    const early = observe({ url: openUrl, userId });
    await untilLive(early);
    const { prompt, release } = gate();
    const { generationId: id } = await early.client.start("edit", requestFields({ prompt }));
    const done = await early.client.start("generate", requestFields());
    await untilFinished(early, done.generationId);
    await untilMidway(early, id);
    const late = observe({ url: openUrl, userId });
    await untilLive(late);
    assert.deepEqual(late.client.generations.map(({ generationId }) => generationId), [done.generationId, id]);
    assert.equal(late.client.get(id).sequence, 6);
    await untilMidway(late, id);
    await waitFor(late, () => late.client.credit !== undefined);
    assert.equal(late.client.credit, 98);
    await release();
    await untilFinished(late, id);
    await assertFullHistory(late, id);
    assert.deepEqual(late.of(done.generationId), []);
    assert.equal(late.client.credit, 98);
    assert.deepEqual(late.caughtUp, []);
  });

  /** A socket without connection state recovery, as in clients before 4.6. */
  function withoutRecovery(url, options) {
    const socket = io(url, options);
    return socket.on("disconnect", () => delete socket._pid);
  }

  const variants = { "": {}, ", without connection state recovery": { io: withoutRecovery } };
  for (const [suffix, options] of Object.entries(variants)) {
    test(`that was cut in mid-generation misses nothing, and reports how many events came late${suffix}`, async () => {
      const userId = newUser();
      const [here, there] = [observe({ url: openUrl, userId, ...options }), observe({ url: openUrl, userId })];
      await Promise.all([untilLive(here), untilLive(there)]);
      const { prompt, release } = gate();
      const { generationId: id } = await there.client.start("edit", requestFields({ prompt }));
      await untilMidway(here, id);
      here.client.cut();
      assert.equal(here.client.state, "offline");
      await release();
      await untilFinished(there, id);
      const second = await there.client.start("generate", requestFields());
      await untilFinished(there, second.generationId);
      assert.equal(here.events.length, 6);
      here.client.restore();
      await waitFor(here, () => here.caughtUp.length > 0);
      await assertFullHistory(here, id);
      await assertFullHistory(here, second.generationId);
      assert.deepEqual(here.caughtUp, [{ missed: here.events.length - 6, recovered: true }]);
      assert.deepEqual(here.states, ["connecting", "live", "offline", "catching up", "live"]);
      for (const each of [id, second.generationId]) {
        assert.deepEqual(here.client.get(each), await there.client.http.generation(each));
      }
      await waitFor(here, () => here.client.credit === 98);
    });
  }

  test("that was cut and missed nothing reports that", async () => {
    const observer = observe({ url: openUrl, userId: newUser() });
    await untilLive(observer);
    observer.client.cut();
    observer.client.cut();
    observer.client.restore();
    await waitFor(observer, () => observer.caughtUp.length > 0);
    assert.deepEqual(observer.caughtUp, [{ missed: 0, recovered: true }]);
  });

  test("waits while the service's log is unavailable", async () => {
    for (const options of [{}, { io: null }]) {
      const observer = observe({ url: otherUrl, userId: `shy-${newUser()}`, ...options });
      await waitFor(observer, () => ["live", "polling"].includes(observer.client.state));
      assert.ok(!observer.states.includes("refused"));
    }
  });

  test("reconnects at once on restore() while it waits for the next attempt", async () => {
    const proxy = await startProxy(openUrl);
    const slow = { reconnectionDelay: 60_000, reconnectionDelayMax: 60_000 };
    const observer = observe({ url: proxy.url, userId: newUser(), socket: slow });
    await untilLive(observer);
    observer.client.restore();
    assert.equal(observer.client.state, "live");
    proxy.cut();
    await waitFor(observer, () => observer.client.state === "offline");
    observer.client.restore();
    await untilLive(observer);
    assert.deepEqual(observer.caughtUp, [{ missed: 0, recovered: true }]);
  });

  test("gets each event once and in order although the connection breaks after each event", async () => {
    const proxy = await startProxy(openUrl);
    const userId = newUser();
    const observer = observe({ url: proxy.url, userId });
    await untilLive(observer);
    observer.client.on("event", proxy.cut);
    const safe = observe({ io: null, url: openUrl, userId });
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

  test("requests missing events, and restores the order, if a transport reorders, doubles and loses events", async () => {
    const faulty = (url, options) => {
      const socket = io(url, options);
      const on = socket.on.bind(socket);
      socket.on = (name, listener) => {
        if (name !== "continue") return on(name, listener);
        let kept;
        return on(name, (event, cursor) => {
          if (event.sequence === 2) kept = event; // Delivered after the next one.
          else if (event.sequence !== 4) listener(event, cursor); // The fourth is lost.
          if (event.sequence === 3) listener(kept, cursor), listener(event, cursor);
        });
      };
      return socket;
    };
    const observer = observe({ io: faulty, url: openUrl, userId: newUser() });
    await untilLive(observer);
    const { generationId: id } = await observer.client.start("edit", requestFields());
    await untilFinished(observer, id);
    await assertFullHistory(observer, id);
    await waitFor(observer, () => observer.client.credit === 99);
  });

  test("clears everything on switchUser(), and emits nothing more of the previous user", async () => {
    const [ada, bob] = [newUser(), newUser()];
    const observer = observe({ url: openUrl, userId: ada });
    await untilLive(observer);
    const { prompt, release } = gate();
    const mine = await observer.client.start("edit", requestFields({ prompt }));
    await untilMidway(observer, mine.generationId);
    observer.client.switchUser({ userId: bob });
    const { generations, credit, cursor } = observer.client;
    assert.deepEqual([generations, credit, cursor], [[], undefined, undefined]);
    const before = observer.events.length;
    const still = observe({ url: openUrl, userId: ada });
    await release();
    await waitFor(still, () => still.client.generations.some(isFinished));
    const ours = await observer.client.start("generate", requestFields());
    await untilFinished(observer, ours.generationId);
    assert.deepEqual(observer.events.slice(before), await observer.client.history(ours.generationId));
    assert.deepEqual(observer.client.generations.map(({ generationId }) => generationId), [ours.generationId]);
    assert.equal(observer.client.userId, bob);
    observer.client.switchUser({ userId: ada });
    await untilLive(observer);
    assert.deepEqual(observer.client.generations.map(({ generationId }) => generationId), [mine.generationId]);
  });

  test("shows what the service has now, and reports the loss, after the service has lost its log", async () => {
    const proxy = await startProxy(openUrl);
    const userId = newUser();
    const observer = observe({ url: proxy.url, userId });
    const lost = await observer.client.start("edit", requestFields({ prompt: gate().prompt }));
    await untilMidway(observer, lost.generationId);
    const direct = observe({ url: otherUrl, userId });
    await untilLive(direct);
    const kept = await direct.client.start("generate", requestFields());
    await untilFinished(direct, kept.generationId);
    proxy.target = otherUrl;
    proxy.cut();
    await waitFor(observer, () => observer.caughtUp.length > 0);
    assert.deepEqual(observer.caughtUp, [{ missed: 0, recovered: false }]);
    assert.deepEqual(observer.client.generations.map(({ generationId }) => generationId), [kept.generationId]);
    const next = await observer.client.start("edit", requestFields());
    await untilFinished(observer, next.generationId);
    await assertFullHistory(observer, next.generationId);
  });

  test("resumes from a cursor of another process", async () => {
    const userId = newUser();
    const former = observe({ url: openUrl, userId });
    await untilLive(former);
    const { prompt, release } = gate();
    const { generationId: id } = await former.client.start("edit", requestFields({ prompt }));
    await untilMidway(former, id);
    const { cursor } = former.client;
    former.client.close();
    assert.equal(former.client.state, "closed");
    await release();
    const { generationId: whole } = await former.client.start("generate", requestFields());
    for (const options of [{}, { io: null }]) {
      const later = observe({ url: openUrl, userId, cursor, ...options });
      await untilFinished(later, id);
      const history = await later.client.history(id);
      assert.deepEqual(later.of(id), history.slice(6));
      await untilFinished(later, whole);
      await assertFullHistory(later, whole);
      assert.equal(later.client.get(id).createdAt, history[0].occurredAt);
    }
    assert.equal(former.events.length, 6);
  });
});

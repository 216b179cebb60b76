// The client by sockets, through a network that fails.
import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import { io } from "socket.io-client";
import { isFinished, reduce } from "../src/api/static/stagecast.js";
import {
  closeAll, finished, gate, heardAll, live, midway, newUser, open, other, tunnel, until, watch, wish,
} from "./client_world.mjs";

after(closeAll);

describe("the client", { concurrency: true }, () => {
  test("tells the story of one edit on two devices, event by event, and knows its end and its price", async () => {
    const userId = newUser();
    const [phone, laptop] = [watch({ url: open, userId }), watch({ url: open, userId })];
    await Promise.all([live(phone), live(laptop)]);
    const { generationId: id } = await phone.client.start("edit", wish({ metadata: { title: "Ada" } }));
    await Promise.all([finished(phone, id), finished(laptop, id)]);
    await heardAll(phone, id);
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

  test("that comes late shows how things stand at once, and is told what led there", async () => {
    const userId = newUser();
    const early = watch({ url: open, userId });
    await live(early);
    const { prompt, letGo } = gate();
    const { generationId: id } = await early.client.start("edit", wish({ prompt }));
    const done = await early.client.start("generate", wish());
    await finished(early, done.generationId);
    await midway(early, id);
    const late = watch({ url: open, userId });
    await live(late);
    assert.deepEqual(late.client.generations.map(({ generationId }) => generationId), [done.generationId, id]);
    assert.equal(late.client.get(id).sequence, 6);
    await midway(late, id);
    await until(late, () => late.client.credit !== undefined);
    assert.equal(late.client.credit, 98);
    await letGo();
    await finished(late, id);
    await heardAll(late, id);
    assert.deepEqual(late.of(done.generationId), []);
    assert.equal(late.client.credit, 98);
    assert.deepEqual(late.caughtUp, []);
  });

  /** A socket of a client that cannot recover by itself, as those before 4.6. */
  function old(url, options) {
    const socket = io(url, options);
    return socket.on("disconnect", () => delete socket._pid);
  }

  for (const [can, how] of Object.entries({ "": {}, ", although its socket cannot recover": { io: old } })) {
    test(`that was cut in mid-generation misses nothing, and says what it caught up${can}`, async () => {
      const userId = newUser();
      const [here, there] = [watch({ url: open, userId, ...how }), watch({ url: open, userId })];
      await Promise.all([live(here), live(there)]);
      const { prompt, letGo } = gate();
      const { generationId: id } = await there.client.start("edit", wish({ prompt }));
      await midway(here, id);
      here.client.cut();
      assert.equal(here.client.state, "offline");
      await letGo();
      await finished(there, id);
      const second = await there.client.start("generate", wish());
      await finished(there, second.generationId);
      assert.equal(here.events.length, 6);
      here.client.restore();
      await until(here, () => here.caughtUp.length > 0);
      await heardAll(here, id);
      await heardAll(here, second.generationId);
      assert.deepEqual(here.caughtUp, [{ missed: here.events.length - 6, recovered: true }]);
      assert.deepEqual(here.states, ["connecting", "live", "offline", "catching up", "live"]);
      for (const each of [id, second.generationId]) {
        assert.deepEqual(here.client.get(each), await there.client.http.generation(each));
      }
      await until(here, () => here.client.credit === 98);
    });
  }

  test("that is cut and missed nothing says so", async () => {
    const heard = watch({ url: open, userId: newUser() });
    await live(heard);
    heard.client.cut();
    heard.client.cut();
    heard.client.restore();
    await until(heard, () => heard.caughtUp.length > 0);
    assert.deepEqual(heard.caughtUp, [{ missed: 0, recovered: true }]);
  });

  test("whose server's log does not answer waits until it does", async () => {
    for (const how of [{}, { io: null }]) {
      const heard = watch({ url: other, userId: `shy-${newUser()}`, ...how });
      await until(heard, () => ["live", "polling"].includes(heard.client.state));
      assert.ok(!heard.states.includes("refused"));
    }
  });

  test("that waits for its next try comes back at once when it is told to", async () => {
    const link = await tunnel(open);
    const slow = { reconnectionDelay: 60_000, reconnectionDelayMax: 60_000 };
    const heard = watch({ url: link.url, userId: newUser(), socket: slow });
    await live(heard);
    heard.client.restore();
    assert.equal(heard.client.state, "live");
    link.cut();
    await until(heard, () => heard.client.state === "offline");
    heard.client.restore();
    await live(heard);
    assert.deepEqual(heard.caughtUp, [{ missed: 0, recovered: true }]);
  });

  test("whose connection breaks after each event hears each event once, in order", async () => {
    const link = await tunnel(open);
    const userId = newUser();
    const heard = watch({ url: link.url, userId });
    await live(heard);
    heard.client.on("event", link.cut);
    const safe = watch({ io: null, url: open, userId });
    const { http } = safe.client;
    const { generationId: id } = await http.start("generate", { prompt: "a red hat" }, { runner: "external" });
    const broken = () => heard.states.filter((state) => state === "offline").length;
    const steps = ["composition", "composition_completed", "ai_generation"].map((status) => ({ status }));
    steps.push({ status: "completed", generatedImageUrl: "https://example.org/a.png" });
    for (const [index, step] of steps.entries()) {
      await until(heard, () => broken() > index);
      await http.transition(id, step);
    }
    await until(heard, () => broken() > steps.length && heard.client.state === "live");
    await heardAll(heard, id, safe);
    assert.ok(heard.caughtUp.length > 0 && heard.caughtUp.every(({ recovered }) => recovered));
  });

  test("puts in order what a faulty transport shuffles, doubles and loses, by asking for what is missing", async () => {
    const faulty = (url, options) => {
      const socket = io(url, options);
      const on = socket.on.bind(socket);
      socket.on = (name, listener) => {
        if (name !== "continue") return on(name, listener);
        let kept;
        return on(name, (event, cursor) => {
          if (event.sequence === 2) kept = event; // It comes after the next.
          else if (event.sequence !== 4) listener(event, cursor); // The fourth never comes.
          if (event.sequence === 3) listener(kept, cursor), listener(event, cursor);
        });
      };
      return socket;
    };
    const heard = watch({ io: faulty, url: open, userId: newUser() });
    await live(heard);
    const { generationId: id } = await heard.client.start("edit", wish());
    await finished(heard, id);
    await heardAll(heard, id);
    await until(heard, () => heard.client.credit === 99);
  });

  test("that changes hands forgets everything, and hears nothing more of the former user", async () => {
    const [ada, bob] = [newUser(), newUser()];
    const heard = watch({ url: open, userId: ada });
    await live(heard);
    const { prompt, letGo } = gate();
    const mine = await heard.client.start("edit", wish({ prompt }));
    await midway(heard, mine.generationId);
    heard.client.switchUser({ userId: bob });
    assert.deepEqual([heard.client.generations, heard.client.credit, heard.client.cursor], [[], undefined, undefined]);
    const before = heard.events.length;
    const still = watch({ url: open, userId: ada });
    await letGo();
    await until(still, () => still.client.generations.some(isFinished));
    const ours = await heard.client.start("generate", wish());
    await finished(heard, ours.generationId);
    assert.deepEqual(heard.events.slice(before), await heard.client.history(ours.generationId));
    assert.deepEqual(heard.client.generations.map(({ generationId }) => generationId), [ours.generationId]);
    assert.equal(heard.client.userId, bob);
    heard.client.switchUser({ userId: ada });
    await live(heard);
    assert.deepEqual(heard.client.generations.map(({ generationId }) => generationId), [mine.generationId]);
  });

  test("whose server has lost its memory shows what there is now, and says that the past is gone", async () => {
    const link = await tunnel(open);
    const userId = newUser();
    const heard = watch({ url: link.url, userId });
    const lost = await heard.client.start("edit", wish({ prompt: gate().prompt }));
    await midway(heard, lost.generationId);
    const direct = watch({ url: other, userId });
    await live(direct);
    const kept = await direct.client.start("generate", wish());
    await finished(direct, kept.generationId);
    link.target = other;
    link.cut();
    await until(heard, () => heard.caughtUp.length > 0);
    assert.deepEqual(heard.caughtUp, [{ missed: 0, recovered: false }]);
    assert.deepEqual(heard.client.generations.map(({ generationId }) => generationId), [kept.generationId]);
    const next = await heard.client.start("edit", wish());
    await finished(heard, next.generationId);
    await heardAll(heard, next.generationId);
  });

  test("goes on from a cursor that another process has left", async () => {
    const userId = newUser();
    const former = watch({ url: open, userId });
    await live(former);
    const { prompt, letGo } = gate();
    const { generationId: id } = await former.client.start("edit", wish({ prompt }));
    await midway(former, id);
    const { cursor } = former.client;
    former.client.close();
    assert.equal(former.client.state, "closed");
    await letGo();
    const { generationId: whole } = await former.client.start("generate", wish());
    for (const how of [{}, { io: null }]) {
      const later = watch({ url: open, userId, cursor, ...how });
      await finished(later, id);
      const history = await later.client.history(id);
      assert.deepEqual(later.of(id), history.slice(6));
      await finished(later, whole);
      await heardAll(later, whole);
      assert.equal(later.client.get(id).createdAt, history[0].occurredAt);
    }
    assert.equal(former.events.length, 6);
  });
});

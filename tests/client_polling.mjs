// The client where no socket can be had.
import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import {
  closeAll, finished, gate, heardAll, live, midway, newUser, open, other, tunnel, until, watch, wish,
} from "./client_world.mjs";

after(closeAll);

describe("where no socket can be had, the client", { concurrency: true }, () => {
  test("polls, and hears the same", async () => {
    const userId = newUser();
    const heard = watch({ io: null, url: open, userId });
    await until(heard, () => heard.client.state === "polling");
    const { generationId: id } = await heard.client.start("edit", wish());
    await finished(heard, id);
    await heardAll(heard, id);
    assert.deepEqual(heard.states, ["connecting", "polling"]);
    assert.equal(heard.client.credit, 99);
    heard.client.cut();
    const { generationId: missed } = await heard.client.start("generate", wish());
    const socket = watch({ url: open, userId });
    await until(socket, () => socket.client.get(missed)?.status === "completed");
    heard.client.restore();
    await until(heard, () => heard.caughtUp.length > 0);
    await heardAll(heard, missed);
    assert.deepEqual(heard.caughtUp, [{ missed: heard.of(missed).length, recovered: true }]);
    assert.deepEqual(heard.states.slice(2), ["offline", "catching up", "polling"]);
  });

  test("is told of what was lost with the server's memory", async () => {
    const link = await tunnel(open);
    const heard = watch({ io: null, url: link.url, userId: newUser() });
    await until(heard, () => heard.client.state === "polling");
    const { generationId: lost } = await heard.client.start("edit", wish());
    await finished(heard, lost);
    link.target = other;
    link.cut();
    await until(heard, () => heard.client.generations.length === 0);
    const { generationId: id } = await heard.client.start("edit", wish());
    await finished(heard, id);
    await heardAll(heard, id);
  });

  test("polls while a proxy lets no socket through, and is live once it does", async () => {
    const link = await tunnel(open);
    link.blocks = (head) => head.includes("/socket.io/");
    const heard = watch({ url: link.url, userId: newUser() });
    await until(heard, () => heard.client.state === "polling");
    const { prompt, letGo } = gate();
    const { generationId: id } = await heard.client.start("edit", wish({ prompt }));
    await midway(heard, id);
    assert.deepEqual(heard.states.slice(-2), ["offline", "polling"]);
    link.blocks = () => false;
    await live(heard);
    await letGo();
    await finished(heard, id);
    await heardAll(heard, id);
    link.blocks = (head) => head.includes("/socket.io/");
    link.cut();
    await until(heard, () => heard.client.state === "polling");
    const { generationId: next } = await heard.client.start("generate", wish());
    await finished(heard, next);
    await heardAll(heard, next);
  });

  test("is offline where nothing answers at all, and polls again when something does", async () => {
    const link = await tunnel(open);
    const heard = watch({ io: null, url: link.url, userId: newUser() });
    await until(heard, () => heard.client.state === "polling");
    link.closed = true;
    link.cut();
    await until(heard, () => heard.client.state === "offline");
    link.closed = false;
    await until(heard, () => heard.caughtUp.length > 0);
    assert.deepEqual(heard.caughtUp, [{ missed: 0, recovered: true }]);
    assert.equal(heard.client.state, "polling");
  });
});

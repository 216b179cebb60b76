// What the client asks for by HTTP.
import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import { StagecastError } from "../src/api/static/stagecast.js";
import {
  closeAll, finished, gate, keyed, live, newUser, open, other, tunnel, until, watch, wish,
} from "./client_world.mjs";

after(closeAll);

describe("by HTTP the client", { concurrency: true }, () => {
  test("starts one generation, though the answer was lost: it asks again with the same key", async () => {
    const link = await tunnel(open);
    const userId = newUser();
    const heard = watch({ url: link.url, userId });
    await live(heard);
    let lost = 0;
    link.swallows = (head) => head.startsWith("POST /generations/") && ++lost <= 2;
    const { generationId: id } = await heard.client.start("edit", wish());
    assert.equal(lost, 3);
    await finished(heard, id);
    const { generations } = await heard.client.http.list();
    assert.deepEqual(generations.map(({ generationId }) => generationId), [id]);
    assert.equal((await heard.client.me()).credit, 99);
  });

  test("gives up when asked to, and a key of one's own goes on from there", async () => {
    const link = await tunnel(open);
    const { client } = watch({ url: link.url, userId: newUser() });
    link.swallows = (head) => head.startsWith("POST /generations/");
    const key = { idempotencyKey: "my own", attempts: 1 };
    await assert.rejects(client.start("edit", wish(), key), { name: "StagecastError", code: "network", status: 0 });
    link.swallows = () => false;
    const begun = await client.start("edit", wish(), key);
    const again = await client.start("edit", wish(), key);
    assert.equal(again.generationId, begun.generationId);
    await assert.rejects(client.start("edit", wish({ prompt: "another" }), key), { code: "idempotency_mismatch" });
  });

  test("tells what was wrong: code, status, field and when to try again", async () => {
    const { client } = watch({ url: open, userId: newUser() });
    await assert.rejects(client.start("edit", wish({ prompt: "" })), (error) => {
      assert.ok(error instanceof StagecastError);
      const { code, status, field, detail, message } = error;
      assert.deepEqual({ code, status, field }, { code: "invalid_request", status: 422, field: "prompt" });
      assert.equal(detail, message);
      return true;
    });
    await assert.rejects(client.history("edit_1_aaaaaaaaaaaaaaaaaaaa"), { code: "not_found", status: 404 });
    await assert.rejects(watch({ url: keyed }).client.me(), { code: "unauthenticated", status: 401 });
    const { client: eager } = watch({ url: other, userId: newUser() });
    const { prompt, letGo } = gate(other);
    for (let fits = 0; fits < 2; fits++) await eager.start("edit", wish({ prompt }));
    const tooMany = { code: "too_many_generations", status: 429, retryAfter: 5 };
    await assert.rejects(eager.start("edit", wish({ prompt })), tooMany);
    await letGo();
  });

  test("cancels, removes, pages and names the stages", async () => {
    const heard = watch({ url: open, userId: newUser() });
    const { client } = heard;
    await live(heard);
    const { generationId: id } = await client.start("edit", wish({ prompt: gate().prompt }));
    await assert.rejects(client.remove(id), { code: "not_finished", status: 409 });
    assert.equal(await client.cancel(id), "cancelled");
    await finished(heard, id);
    assert.equal(client.get(id).code, "cancelled");
    assert.equal(await client.cancel(id), "already_finished");
    assert.equal(client.credit, 100);
    const { generationId: next } = await client.start("generate", wish({ aspectRatio: "1:1" }));
    await finished(heard, next);
    const page = await client.older(undefined, 1);
    assert.deepEqual(page.generations.map(({ generationId }) => generationId), [next]);
    const { generations: [last], next: end } = await client.older(page.next, 1);
    assert.deepEqual([last.generationId, end], [id, undefined]);
    const tablet = watch({ url: open, userId: client.userId });
    await live(tablet);
    assert.equal(tablet.client.get(id).status, "failed");
    await client.remove(id);
    await assert.rejects(tablet.client.history(id), { code: "not_found" });
    assert.equal(tablet.client.get(id), undefined);
    assert.deepEqual(client.generations.map(({ generationId }) => generationId), [next]);
    await assert.rejects(client.remove(id), { code: "not_found" });
    assert.deepEqual((await client.stages()).edit.map(({ status }) => status).slice(0, 2), ["started", "composition"]);
  });

  test("names any user there can be, in headers too", async () => {
    for (const userId of ["zoë", "小林", 123]) {
      const heard = watch({ url: open, userId });
      await live(heard);
      assert.equal(heard.client.userId, String(userId));
      assert.equal((await heard.client.me()).userId, String(userId));
    }
  });

  test("gives a new list after each change, and the same one until then", async () => {
    const heard = watch({ url: open, userId: newUser() });
    await until(heard, () => heard.client.credit === 100);
    const lists = new Set();
    heard.client.on("change", () => lists.add(heard.client.generations));
    const { generations } = heard.client;
    assert.equal(heard.client.generations, generations);
    const { generationId: id } = await heard.client.start("edit", wish());
    await finished(heard, id);
    assert.ok(lists.size >= heard.of(id).length);
    assert.ok(!lists.has(generations));
  });
});

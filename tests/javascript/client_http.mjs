// The client's HTTP requests.
import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import { StagecastError } from "../../src/api/web/static/stagecast.js";
import {
  closeAll, gate, keyedUrl, newUser, observe, openUrl, otherUrl, requestFields, startProxy, untilFinished, untilLive,
  waitFor,
} from "./client_support.mjs";

after(closeAll);

describe("over HTTP the client", { concurrency: true }, () => {
  test("starts one generation although responses are lost: it retries with the same key", async () => {
    const proxy = await startProxy(openUrl);
    const userId = newUser();
    const observer = observe({ url: proxy.url, userId });
    await untilLive(observer);
    let lost = 0;
    proxy.dropsResponse = (head) => head.startsWith("POST /generations/") && ++lost <= 2;
    const { generationId: id } = await observer.client.start("edit", requestFields());
    assert.equal(lost, 3);
    await untilFinished(observer, id);
    const { generations } = await observer.client.http.list();
    assert.deepEqual(generations.map(({ generationId }) => generationId), [id]);
    assert.equal((await observer.client.me()).credit, 99);
  });

  test("gives up after `attempts`, and the caller's own key makes a later retry safe", async () => {
    const proxy = await startProxy(openUrl);
    const { client } = observe({ url: proxy.url, userId: newUser() });
    proxy.dropsResponse = (head) => head.startsWith("POST /generations/");
    const key = { idempotencyKey: "my own", attempts: 1 };
    const networkError = { name: "StagecastError", code: "network", status: 0 };
    await assert.rejects(client.start("edit", requestFields(), key), networkError);
    proxy.dropsResponse = () => false;
    const started = await client.start("edit", requestFields(), key);
    const again = await client.start("edit", requestFields(), key);
    assert.equal(again.generationId, started.generationId);
    const other = requestFields({ prompt: "another" });
    await assert.rejects(client.start("edit", other, key), { code: "idempotency_mismatch" });
  });

  test("rejects with the code, status, field and Retry-After of the response", async () => {
    const { client } = observe({ url: openUrl, userId: newUser() });
    await assert.rejects(client.start("edit", requestFields({ prompt: "" })), (error) => {
      assert.ok(error instanceof StagecastError);
      const { code, status, field, detail, message } = error;
      assert.deepEqual({ code, status, field }, { code: "invalid_request", status: 422, field: "prompt" });
      assert.equal(detail, message);
      return true;
    });
    await assert.rejects(client.history("edit_1_aaaaaaaaaaaaaaaaaaaa"), { code: "not_found", status: 404 });
    await assert.rejects(observe({ url: keyedUrl }).client.me(), { code: "unauthenticated", status: 401 });
    const { client: eager } = observe({ url: otherUrl, userId: newUser() });
    const { prompt, release } = gate(otherUrl);
    for (let fits = 0; fits < 2; fits++) await eager.start("edit", requestFields({ prompt }));
    const tooMany = { code: "too_many_generations", status: 429, retryAfter: 5 };
    await assert.rejects(eager.start("edit", requestFields({ prompt })), tooMany);
    await release();
  });

  test("cancels, removes, pages, and lists the stages", async () => {
    const observer = observe({ url: openUrl, userId: newUser() });
    const { client } = observer;
    await untilLive(observer);
    const { generationId: id } = await client.start("edit", requestFields({ prompt: gate().prompt }));
    await assert.rejects(client.remove(id), { code: "not_finished", status: 409 });
    assert.equal(await client.cancel(id), "cancelled");
    await untilFinished(observer, id);
    assert.equal(client.get(id).code, "cancelled");
    assert.equal(await client.cancel(id), "already_finished");
    assert.equal(client.credit, 100);
    const { generationId: next } = await client.start("generate", requestFields({ aspectRatio: "1:1" }));
    await untilFinished(observer, next);
    const page = await client.older(undefined, 1);
    assert.deepEqual(page.generations.map(({ generationId }) => generationId), [next]);
    const { generations: [last], next: end } = await client.older(page.next, 1);
    assert.deepEqual([last.generationId, end], [id, undefined]);
    const tablet = observe({ url: openUrl, userId: client.userId });
    await untilLive(tablet);
    assert.equal(tablet.client.get(id).status, "failed");
    assert.equal((await tablet.client.load(id)).input.prompt, tablet.client.get(id).input.prompt);
    await client.remove(id);
    await assert.rejects(tablet.client.history(id), { code: "not_found" });
    assert.equal(tablet.client.get(id), undefined);
    assert.deepEqual(client.generations.map(({ generationId }) => generationId), [next]);
    await assert.rejects(client.remove(id), { code: "not_found" });
    assert.deepEqual((await client.stages()).edit.map(({ status }) => status).slice(0, 2), ["started", "composition"]);
  });

  test("accepts any user id, also in headers", async () => {
    for (const userId of ["zoë", "小林", 123]) {
      const observer = observe({ url: openUrl, userId });
      await untilLive(observer);
      assert.equal(observer.client.userId, String(userId));
      assert.equal((await observer.client.me()).userId, String(userId));
    }
  });

  test("returns a new list after each change, and the same one until then", async () => {
    const observer = observe({ url: openUrl, userId: newUser() });
    await waitFor(observer, () => observer.client.credit === 100);
    const lists = new Set();
    observer.client.on("change", () => lists.add(observer.client.generations));
    const { generations } = observer.client;
    assert.equal(observer.client.generations, generations);
    const { generationId: id } = await observer.client.start("edit", requestFields());
    await untilFinished(observer, id);
    assert.ok(lists.size >= observer.of(id).length);
    assert.ok(!lists.has(generations));
  });
});

// The examples, run against a real service.
import assert from "node:assert/strict";
import { after, test } from "node:test";
import { backend } from "../../examples/node-backend/server.js";
import { closeAll, keyedUrl, newUser, observe, openUrl, tokenOf, untilFinished, untilLive } from "./client_support.mjs";

after(closeAll);

/** Starts the backend; `post` requests a poster from it. */
async function startBackend(stagecast) {
  const server = backend(stagecast);
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  after(() => server.close());
  const url = `http://127.0.0.1:${server.address().port}`;
  const post = (body) => fetch(`${url}/posters`, { method: "POST", body: JSON.stringify(body) });
  return { url, post };
}

for (const mode of ["open", "keyed"]) {
  test(`the Node backend does the work, and the user's devices show it: ${mode}`, async () => {
    const userId = newUser();
    const [url, identity, token] = mode === "open"
      ? [openUrl, { userId }]
      : [keyedUrl, { token: tokenOf(userId) }, tokenOf("backend", { scope: "stagecast:service" })];
    const observer = observe({ url, ...identity });
    await untilLive(observer);
    const { post } = await startBackend({ url, token });
    const answer = await post({ userId, prompt: "A quiet <sea> & its hills" });
    assert.equal(answer.status, 202);
    const { generationId: id } = await answer.json();
    await untilFinished(observer, id);
    assert.deepEqual(observer.of(id).map(({ status }) => status), [
      "started", "composition", "composition_completed", "ai_generation", "ai_generation", "ai_generation", "completed",
    ]);
    const { generatedImageUrl, compositionUrl, metadata } = observer.client.get(id);
    assert.deepEqual(metadata, { title: "A quiet <sea> & its hills" });
    assert.notEqual(generatedImageUrl, compositionUrl);
    const picture = await fetch(generatedImageUrl);
    assert.equal(picture.headers.get("Content-Type"), "image/svg+xml");
    assert.match(await picture.text(), /A quiet &#60;sea&#62; &#38; its/);
  });
}

test("the Node backend passes on what Stagecast refuses", async () => {
  const { post, url } = await startBackend({ url: keyedUrl, token: tokenOf("backend") });
  const refused = await post({ userId: newUser(), prompt: "A quiet sea" });
  assert.deepEqual([refused.status, (await refused.json()).code], [403, "forbidden"]);
  assert.equal((await fetch(url)).status, 404);
  assert.equal((await fetch(`${url}/posters`, { method: "POST", body: "{" })).status, 400);
});

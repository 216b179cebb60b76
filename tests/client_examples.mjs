// The examples, against a real service.
import assert from "node:assert/strict";
import { after, test } from "node:test";
import { JSDOM } from "jsdom";
import { backend } from "../examples/node-backend/server.js";
import {
  closeAll, finished, gate, keyed, live, midway, newUser, open, tokenOf, until, watch, wish,
} from "./client_world.mjs";

after(closeAll);

test("the React hook shows what the client knows, as it changes, and lets go of it when it is unmounted", async () => {
  const { window } = new JSDOM('<div id="root"></div>');
  for (const [name, value] of Object.entries({ window, document: window.document, navigator: window.navigator })) {
    Object.defineProperty(globalThis, name, { value, configurable: true }); // What React asks a browser for.
  }
  globalThis.IS_REACT_ACT_ENVIRONMENT = true;
  const { act, createElement, StrictMode } = await import("react");
  const { createRoot } = await import("react-dom/client");
  const { useGenerations } = await import("../examples/react/useGenerations.js");
  let renders = 0;
  function Generations({ stagecast }) {
    const { generations, state, credit } = useGenerations(stagecast);
    renders++;
    const bars = generations.map((each) => createElement("li", { key: each.generationId }, `${each.progress} %`));
    return createElement("section", {}, createElement("p", {}, `${state}, ${credit}`), createElement("ul", {}, bars));
  }
  const shows = (selector) => window.document.querySelector(selector)?.textContent;
  const heard = watch({ url: open, userId: newUser() });
  const root = createRoot(window.document.getElementById("root"));
  const show = (stagecast) =>
    act(() => root.render(createElement(StrictMode, {}, createElement(Generations, { stagecast }))));
  await show(heard.client);
  assert.equal(shows("p"), "connecting, undefined");
  await act(() => until(heard, () => heard.client.credit === 100));
  assert.equal(shows("p"), "live, 100");
  const { prompt, letGo } = gate();
  const { generationId: id } = await act(() => heard.client.start("edit", wish({ prompt })));
  await act(() => midway(heard, id));
  assert.equal(shows("li"), `${heard.client.get(id).progress} %`);
  await act(async () => (await letGo(), await finished(heard, id)));
  assert.equal(shows("li"), "100 %");
  const nobody = watch({ url: open, userId: newUser() });
  await act(() => live(nobody));
  await show(nobody.client);
  assert.equal(shows("li"), undefined);
  await act(() => root.unmount());
  const before = renders;
  const { generationId: next } = await nobody.client.start("edit", wish());
  await finished(nobody, next);
  assert.equal(renders, before);
});

/** The backend, listening; `post` asks it for a poster. */
async function listening(stagecast) {
  const server = backend(stagecast);
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  after(() => server.close());
  const url = `http://127.0.0.1:${server.address().port}`;
  const post = (order) => fetch(`${url}/posters`, { method: "POST", body: JSON.stringify(order) });
  return { url, post };
}

for (const mode of ["open", "keyed"]) {
  test(`the Node backend does the work, and the user's devices see it: ${mode}`, async () => {
    const userId = newUser();
    const [place, who, token] = mode === "open"
      ? [open, { userId }]
      : [keyed, { token: tokenOf(userId) }, tokenOf("backend", { scope: "stagecast:service" })];
    const heard = watch({ url: place, ...who });
    await live(heard);
    const { post } = await listening({ url: place, token });
    const answer = await post({ userId, prompt: "A quiet <sea> & its hills" });
    assert.equal(answer.status, 202);
    const { generationId: id } = await answer.json();
    await finished(heard, id);
    assert.deepEqual(heard.of(id).map(({ status }) => status), [
      "started", "composition", "composition_completed", "ai_generation", "ai_generation", "ai_generation", "completed",
    ]);
    const { generatedImageUrl, compositionUrl, metadata } = heard.client.get(id);
    assert.deepEqual(metadata, { title: "A quiet <sea> & its hills" });
    assert.notEqual(generatedImageUrl, compositionUrl);
    const picture = await fetch(generatedImageUrl);
    assert.equal(picture.headers.get("Content-Type"), "image/svg+xml");
    assert.match(await picture.text(), /A quiet &#60;sea&#62; &#38; its/);
  });
}

test("the Node backend tells what Stagecast refuses", async () => {
  const { post, url } = await listening({ url: keyed, token: tokenOf("backend") });
  const refused = await post({ userId: newUser(), prompt: "A quiet sea" });
  assert.deepEqual([refused.status, (await refused.json()).code], [403, "forbidden"]);
  assert.equal((await fetch(url)).status, 404);
  assert.equal((await fetch(`${url}/posters`, { method: "POST", body: "{" })).status, 400);
});

// The examples, run against a real service.
import assert from "node:assert/strict";
import { after, test } from "node:test";
import { JSDOM } from "jsdom";
import { backend } from "../../examples/node-backend/server.js";
import {
  closeAll, gate, keyedUrl, newUser, observe, openUrl, requestFields, tokenOf, untilFinished, untilLive, untilMidway,
  waitFor,
} from "./client_support.mjs";

after(closeAll);

test("the React hook renders the client's state as it changes, and removes its listeners on unmount", async () => {
  const { window } = new JSDOM('<div id="root"></div>');
  for (const [name, value] of Object.entries({ window, document: window.document, navigator: window.navigator })) {
    Object.defineProperty(globalThis, name, { value, configurable: true }); // React needs these globals.
  }
  globalThis.IS_REACT_ACT_ENVIRONMENT = true;
  const { act, createElement, StrictMode } = await import("react");
  const { createRoot } = await import("react-dom/client");
  const { useGenerations } = await import("../../examples/react/useGenerations.js");
  let renders = 0;
  function Generations({ stagecast }) {
    const { generations, state, credit } = useGenerations(stagecast);
    renders++;
    const bars = generations.map((each) => createElement("li", { key: each.generationId }, `${each.progress} %`));
    return createElement("section", {}, createElement("p", {}, `${state}, ${credit}`), createElement("ul", {}, bars));
  }
  const shows = (selector) => window.document.querySelector(selector)?.textContent;
  const observer = observe({ url: openUrl, userId: newUser() });
  const root = createRoot(window.document.getElementById("root"));
  const show = (stagecast) =>
    act(() => root.render(createElement(StrictMode, {}, createElement(Generations, { stagecast }))));
  await show(observer.client);
  assert.equal(shows("p"), "connecting, undefined");
  await act(() => waitFor(observer, () => observer.client.credit === 100));
  assert.equal(shows("p"), "live, 100");
  const { prompt, release } = gate();
  const { generationId: id } = await act(() => observer.client.start("edit", requestFields({ prompt })));
  await act(() => untilMidway(observer, id));
  assert.equal(shows("li"), `${observer.client.get(id).progress} %`);
  await act(async () => (await release(), await untilFinished(observer, id)));
  assert.equal(shows("li"), "100 %");
  const another = observe({ url: openUrl, userId: newUser() });
  await act(() => untilLive(another));
  await show(another.client);
  assert.equal(shows("li"), undefined);
  await act(() => root.unmount());
  const before = renders;
  const { generationId: next } = await another.client.start("edit", requestFields());
  await untilFinished(another, next);
  assert.equal(renders, before);
});

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

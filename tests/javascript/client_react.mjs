// The React entry of the package: on a server, in StrictMode, and with a real service.
import assert from "node:assert/strict";
import { after, test } from "node:test";
import { createElement, StrictMode } from "react";
import { renderToString } from "react-dom/server";
import {
  closeAll, gate, newUser, observe, openUrl, otherUrl, requestFields, startProxy, untilFinished, untilLive, waitFor,
} from "./client_support.mjs";

const { STAGECAST_PACKAGE: folder } = process.env;
const { StagecastProvider, useGeneration, useGenerations } = await import(`${folder}/dist/react.js`);
const { api, connect } = await import(`${folder}/dist/stagecast.js`);

after(closeAll);

/** What the last render of `Bars` got. */
let shown;
let renders = 0;

function Bars() {
  shown = useGenerations();
  renders++;
  const bars = shown.generations.map((each) => createElement("li", { key: each.generationId }, `${each.progress} %`));
  return createElement("section", {}, createElement("p", {}, `${shown.state}, ${shown.credit}`), createElement("ul", {}, bars));
}

function One({ id }) {
  const generation = useGeneration(id);
  return createElement("b", {}, generation ? `${generation.status}` : "unknown");
}

const app = (props, ...children) =>
  createElement(StrictMode, {}, createElement(StagecastProvider, { transport: "sse", ...props }, ...children));
const bars = () => createElement(Bars, { key: "bars" });
const one = (id) => createElement(One, { key: "one", id });

// Before there is a window.
const html = renderToString(app({ url: "http://localhost:1", userId: "ada" }, bars(), one("edit_1")));

test("on a server the hooks render the initial state, and nothing is connected", async () => {
  assert.equal(html, "<section><p>connecting, <!-- -->undefined</p><ul></ul></section><b>unknown</b>".replace("<!-- -->", ""));
  assert.deepEqual(process.getActiveResourcesInfo().filter((name) => /TCP|TLS|Timeout|GetAddr/.test(name)), []);
});

test("in a browser", async (context) => {
  const { JSDOM } = await import("jsdom");
  const { window } = new JSDOM('<div id="root"></div>');
  for (const [name, value] of Object.entries({ window, document: window.document, navigator: window.navigator })) {
    Object.defineProperty(globalThis, name, { value, configurable: true }); // React needs these globals.
  }
  globalThis.IS_REACT_ACT_ENVIRONMENT = true;
  const { act } = await import("react");
  const { createRoot, hydrateRoot } = await import("react-dom/client");
  const container = window.document.getElementById("root");
  const text = (selector) => container.querySelector(selector)?.textContent;
  const until = async (condition) => {
    while (!condition()) await act(() => new Promise((later) => setTimeout(later, 10)));
  };

  /** Counts the streams that are requested of the service. */
  const counting = async (target) => {
    const proxy = await startProxy(target);
    const counter = { url: proxy.url, streams: 0, proxy };
    proxy.dropsResponse = (head) => void (counter.streams += head.includes("text/event-stream"));
    return counter;
  };

  await context.test("any number of hooks share one connection, also in StrictMode and after hydration", async () => {
    container.innerHTML = html;
    const counter = await counting(openUrl);
    const errors = [];
    const props = { url: counter.url, userId: newUser() };
    const root = await act(() => hydrateRoot(container, app(props, bars(), one("edit_1")), {
      onRecoverableError: (error) => errors.push(error),
    }));
    await until(() => text("p") === "live, 100");
    assert.equal(counter.streams, 1);
    assert.deepEqual(errors, []);
    const { prompt, release } = gate();
    const { generationId: id } = await act(() => shown.start("edit", requestFields({ prompt })));
    await until(() => text("li") === "70 %");
    await act(() => root.render(app(props, bars(), one(id))));
    assert.equal(text("b"), "openai_editing");
    counter.proxy.cut();
    await release();
    await until(() => text("li") === "100 %");
    assert.deepEqual([text("b"), text("p")], ["completed", "live, 99"]);
    const { start } = shown;
    const { generationId: second } = await act(() => start("edit", requestFields({ prompt: gate().prompt })));
    assert.equal(await act(() => shown.cancel(second)), "cancelled");
    await until(() => shown.generations[0].code === "cancelled");
    assert.equal(shown.start, start);
    await act(() => root.unmount());
    const before = renders;
    const streams = counter.streams;
    const there = observe({ url: openUrl, userId: props.userId });
    await untilLive(there);
    const { generationId: next } = await there.client.start("generate", requestFields());
    await untilFinished(there, next);
    assert.deepEqual([renders, counter.streams], [before, streams]);
  });

  await context.test("unmounting while it connects leaves nothing open", async () => {
    const counter = await counting(openUrl);
    const root = createRoot(container);
    await act(() => root.render(app({ url: counter.url, userId: newUser() }, bars())));
    assert.equal(text("p"), "connecting, undefined");
    await act(() => root.unmount());
    await act(() => new Promise((later) => setTimeout(later, 100)));
    assert.ok(counter.streams <= 1);
    counter.proxy.cut(); // A client that is still open would come back.
    const { streams } = counter;
    await new Promise((later) => setTimeout(later, 700));
    assert.equal(counter.streams, streams);
  });

  await context.test("another user, another service or another token is another connection", async () => {
    const root = createRoot(container);
    const [ada, bob] = [newUser(), newUser()];
    await act(() => root.render(app({ url: openUrl, userId: ada }, bars())));
    const { generationId: id } = await act(() => shown.start("edit", requestFields()));
    await until(() => text("li") === "100 %");
    await act(() => root.render(app({ url: openUrl, userId: bob }, bars())));
    assert.equal(text("li"), undefined);
    await until(() => text("p") === "live, 100");
    await act(() => root.render(app({ url: openUrl, userId: ada }, bars())));
    await until(() => text("li") === "100 %");
    await act(() => root.render(app({ url: otherUrl, userId: ada }, bars())));
    await until(() => text("p") === "live, 100");
    assert.equal(text("li"), undefined);
    await act(() => root.render(app({ url: openUrl, userId: ada, token: () => "" }, one(id))));
    await until(() => text("b") === "completed");
    await act(() => root.render(app({ url: openUrl, userId: ada, token: () => "" }, one("edit_1"))));
    assert.equal(text("b"), "unknown");
    await act(() => root.unmount());
  });

  await context.test("a generation that could not be requested is requested again when the connection is back", async () => {
    const [userId, counter] = [newUser(), await counting(openUrl)];
    const http = api({ url: openUrl, userId });
    const ids = [];
    while (ids.length < 22) { // More than the service names when a client connects.
      const { generationId } = await http.start("edit", requestFields(), { runner: "external" });
      await http.cancel(generationId);
      ids.push(generationId);
    }
    let requests = 0;
    counter.proxy.dropsResponse = (head) => head.includes(`GET /generations/${ids[0]}`) && ++requests <= 2;
    const root = createRoot(container);
    await act(() => root.render(app({ url: counter.url, userId }, bars(), one(ids[0]))));
    await until(() => requests >= 2 && text("p").startsWith("live"));
    counter.proxy.cut();
    await until(() => text("b") === "failed");
    let streams = 0;
    requests = 0;
    counter.proxy.dropsResponse = (head) => {
      requests += head.includes("GET /generations/edit_0");
      streams += head.includes("text/event-stream");
    };
    await act(() => root.render(app({ url: counter.url, userId }, bars(), one("edit_0_aaaaaaaaaaaaaaaa"))));
    await until(() => requests === 1);
    counter.proxy.cut();
    await until(() => streams === 1 && text("p").startsWith("live"));
    assert.deepEqual([text("b"), requests], ["unknown", 1]);
    await act(() => root.unmount());
  });

  await context.test("a client of `connect` is used, and stays open", async () => {
    const client = connect({ url: openUrl, userId: newUser(), transport: "sse" });
    const observer = { client, events: [], states: [] };
    await untilLive(observer);
    const root = createRoot(container);
    await act(() => root.render(app({ client }, bars())));
    assert.match(text("p"), /^live/);
    await act(() => root.unmount());
    const { generationId: id } = await client.start("generate", requestFields());
    await waitFor(observer, () => client.get(id)?.status === "completed");
    assert.equal(client.state, "live");
    client.close();
  });

  await context.test("without a provider the hooks say what is missing", async () => {
    const root = createRoot(container, { onUncaughtError() {} });
    await assert.rejects(async () => act(() => root.render(bars())), /<StagecastProvider>/);
  });
});

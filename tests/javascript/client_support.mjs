// Shared by the client's tests: the services they run against, a proxy that can fail, and a recorder of what a client
// emits.
import assert from "node:assert/strict";
import { createHmac } from "node:crypto";
import net from "node:net";
import { io } from "socket.io-client";
import { api, connect, isFinished } from "../../src/api/web/static/stagecast.js";

/** The URLs of the services, the key of the one that requires tokens (`secret`), and a `photo` in base64. */
const environment = JSON.parse(process.env.STAGECAST_SERVICES ?? "{}");
export const { open: openUrl, other: otherUrl, keyed: keyedUrl } = environment;

const toClose = [];

export const closeAll = () => toClose.splice(0).forEach((each) => each.close());

let users = 0;

/** A user id that no other test uses. */
export const newUser = () => `user-${process.pid}-${++users}`;

/** Connects a client, and records everything that it emits, in order. */
export function observe(options) {
  const socket = { reconnectionDelay: 20, reconnectionDelayMax: 50 };
  const client = connect({ io, socket, pollEvery: 50, ...options });
  const record = { events: [], states: [client.state], caughtUp: [], removed: [], changes: 0 };
  client.on("event", (event) => record.events.push(event));
  client.on("state", (state) => record.states.push(state));
  client.on("caughtUp", (result) => record.caughtUp.push(result));
  client.on("removed", (id) => record.removed.push(id));
  client.on("change", () => record.changes++);
  toClose.push(client);
  return Object.assign(record, { client, of: (id) => record.events.filter(({ generationId }) => generationId === id) });
}

/** Waits until `condition` holds; it is evaluated whenever the client emits something. */
export async function waitFor({ client, events, states }, condition) {
  if (condition()) return;
  await new Promise((resolve, reject) => {
    const listener = () => condition() && finish(resolve);
    const removers = ["change", "event", "removed", "state", "caughtUp"].map((name) => client.on(name, listener));
    const error = () => new Error(`never true: ${condition}\n${states} ${events.map(({ status }) => status)}`);
    const timer = setTimeout(() => finish(() => reject(error())), 30_000);
    function finish(settle) {
      clearTimeout(timer);
      removers.forEach((remove) => remove());
      settle();
    }
  });
}

export const untilLive = (observer) => waitFor(observer, () => observer.client.state === "live");

/** Waits for the generation's last event. */
export const untilFinished = (observer, id) => waitFor(observer, () => observer.of(id).some(isFinished));

export function requestFields(more = {}) {
  const image = new File([Buffer.from(environment.photo, "base64")], "ada.jpg", { type: "image/jpeg" });
  return { prompt: "a red hat", images: [image], ...more };
}

/** Asserts that the observer got every event of the generation's history once and in order. */
export async function assertFullHistory(observer, id, { client } = observer) {
  const history = await client.history(id);
  assert.deepEqual(observer.of(id), history);
  assert.deepEqual(history.map(({ sequence }) => sequence), history.map((_, index) => index + 1));
}

let gates = 0;

/** A prompt for which the editor waits in mid-generation until `release` is called. */
export function gate(url = openUrl) {
  const name = `${process.pid}-${++gates}`;
  const keeper = api({ url, userId: "gatekeeper" });
  const release = () => keeper.start("generate", requestFields({ prompt: `let go ${name}` }));
  return { prompt: `wait for ${name}`, release };
}

/** Waits until the editor has reported progress twice. */
export const untilMidway = (observer, id) => waitFor(observer, () => observer.of(id).length === 6);

/** A JWT, as a backend would issue it. */
export function tokenOf(sub, { seconds = 3600, key = environment.secret, ...claims } = {}) {
  const encode = (part) => Buffer.from(JSON.stringify(part)).toString("base64url");
  const payload = { sub, exp: Date.now() / 1000 + seconds, ...claims };
  const body = `${encode({ alg: "HS256", typ: "JWT" })}.${encode(payload)}`;
  return `${body}.${createHmac("sha256", key).update(body).digest("base64url")}`;
}

/** A TCP proxy between client and service, which can cut connections, refuse new ones, and change its target. */
export async function startProxy(target) {
  const sockets = new Set();
  let cutting = 0;
  const proxy = {
    target,
    closed: false,
    /** Whether to refuse a connection, given the first bytes that the client sends. */
    refuses: (_head) => false,
    /** Whether to break the connection instead of passing on the response, given bytes that the client sends. */
    dropsResponse: (_head) => false,
    /** Destroys all connections, including those that are accepted in the next turn of the event loop. */
    cut() {
      cutting++;
      for (const socket of sockets) socket.destroy();
      setImmediate(() => setImmediate(() => cutting--));
    },
    /** Passes nothing to the client any more on the present connections, which stay open. */
    mute() {
      for (const socket of sockets) socket.muted = true;
    },
    close() {
      proxy.cut();
      server.close();
    },
  };
  const server = net.createServer((client) => {
    client.on("error", () => {});
    if (proxy.closed || cutting) return client.destroy();
    sockets.add(client);
    client.on("close", () => sockets.delete(client));
    client.once("data", (head) => {
      if (proxy.refuses(String(head))) return client.destroy();
      const { hostname, port } = new URL(proxy.target);
      const upstream = net.connect(Number(port), hostname);
      sockets.add(upstream);
      upstream.on("error", () => {});
      upstream.on("close", () => (sockets.delete(upstream), client.destroy()));
      client.on("close", () => upstream.destroy());
      let dropping = false;
      const forward = (bytes) => {
        dropping ||= proxy.dropsResponse(String(bytes));
        upstream.write(bytes);
      };
      forward(head);
      client.on("data", forward);
      upstream.on("data", (bytes) => (dropping ? client.destroy() : client.muted || client.write(bytes)));
    });
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  proxy.url = `http://127.0.0.1:${server.address().port}`;
  toClose.push(proxy);
  return proxy;
}

// What the tests of the client share: the services that run beside them, a network that can fail, and what was heard.
import assert from "node:assert/strict";
import { createHmac } from "node:crypto";
import net from "node:net";
import { io } from "socket.io-client";
import { api, connect, isFinished } from "../src/api/static/stagecast.js";

/** By name, where the services are, and the key of the one that asks for tokens. */
export const { open, other, keyed, secret, photo } = JSON.parse(process.env.STAGECAST_WORLD ?? "{}");

const opened = [];

export const closeAll = () => opened.splice(0).forEach((one) => one.close());

let users = 0;

/** A user whom nobody has been before. */
export const newUser = () => `user-${process.pid}-${++users}`;

/** A client, and everything that it tells, in order. */
export function watch(options) {
  const socket = { reconnectionDelay: 20, reconnectionDelayMax: 50 };
  const client = connect({ io, socket, pollEvery: 50, ...options });
  const heard = { events: [], states: [client.state], caughtUp: [], changes: 0 };
  client.on("event", (event) => heard.events.push(event));
  client.on("state", (state) => heard.states.push(state));
  client.on("caughtUp", (told) => heard.caughtUp.push(told));
  client.on("change", () => heard.changes++);
  opened.push(client);
  return Object.assign(heard, { client, of: (id) => heard.events.filter(({ generationId }) => generationId === id) });
}

/** Waits until this holds; it is asked again whenever the client tells something. */
export async function until({ client, events, states }, holds) {
  if (holds()) return;
  await new Promise((resolve, reject) => {
    const listener = () => holds() && done(resolve);
    const stop = ["change", "event", "state", "caughtUp"].map((name) => client.on(name, listener));
    const why = () => new Error(`never held: ${holds}\n${states} ${events.map(({ status }) => status)}`);
    const timer = setTimeout(() => done(() => reject(why())), 30_000);
    function done(end) {
      clearTimeout(timer);
      stop.forEach((off) => off());
      end();
    }
  });
}

export const live = (heard) => until(heard, () => heard.client.state === "live");

/** Its last event has come. */
export const finished = (heard, id) => until(heard, () => heard.of(id).some(isFinished));

export function wish(more = {}) {
  const image = new File([Buffer.from(photo, "base64")], "ada.jpg", { type: "image/jpeg" });
  return { prompt: "a red hat", images: [image], ...more };
}

/** What was heard of this generation is its history: every event, once, in order. */
export async function heardAll(heard, id, { client } = heard) {
  const history = await client.history(id);
  assert.deepEqual(heard.of(id), history);
  assert.deepEqual(history.map(({ sequence }) => sequence), history.map((_, index) => index + 1));
}

let gates = 0;

/** A prompt at which the editor waits, in mid-generation, until it is let go. */
export function gate(url = open) {
  const name = `${process.pid}-${++gates}`;
  const letGo = () => api({ url, userId: "gatekeeper" }).start("generate", wish({ prompt: `let go ${name}` }));
  return { prompt: `wait for ${name}`, letGo };
}

/** Its editor has begun, and has told twice of its progress. */
export const midway = (heard, id) => until(heard, () => heard.of(id).length === 6);

/** A JWT, as a backend would issue it. */
export function tokenOf(sub, { seconds = 3600, key = secret, ...claims } = {}) {
  const text = (part) => Buffer.from(JSON.stringify(part)).toString("base64url");
  const body = `${text({ alg: "HS256", typ: "JWT" })}.${text({ sub, exp: Date.now() / 1000 + seconds, ...claims })}`;
  return `${body}.${createHmac("sha256", key).update(body).digest("base64url")}`;
}

/** A network between client and service, in which `link` can be cut, closed and led elsewhere. */
export async function tunnel(target) {
  const ends = new Set();
  let falling = 0;
  const link = {
    target,
    closed: false,
    /** Which connections nobody gets through, by the first bytes sent. */
    blocks: (_head) => false,
    /** Whether the connection breaks in place of the answer, by the first bytes of what is asked. */
    swallows: (_head) => false,
    /** All connections fall, also those that have begun and were not seen yet: these come in the loop's next turn. */
    cut() {
      falling++;
      for (const end of ends) end.destroy();
      setImmediate(() => setImmediate(() => falling--));
    },
    close() {
      link.cut();
      server.close();
    },
  };
  const server = net.createServer((near) => {
    near.on("error", () => {});
    if (link.closed || falling) return near.destroy();
    ends.add(near);
    near.on("close", () => ends.delete(near));
    near.once("data", (head) => {
      if (link.blocks(String(head))) return near.destroy();
      const { hostname, port } = new URL(link.target);
      const far = net.connect(Number(port), hostname);
      ends.add(far);
      far.on("error", () => {});
      far.on("close", () => (ends.delete(far), near.destroy()));
      near.on("close", () => far.destroy());
      let swallowed = false;
      const ask = (bytes) => {
        swallowed ||= link.swallows(String(bytes));
        far.write(bytes);
      };
      ask(head);
      near.on("data", ask);
      far.on("data", (bytes) => (swallowed ? near.destroy() : near.write(bytes)));
    });
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  link.url = `http://127.0.0.1:${server.address().port}`;
  opened.push(link);
  return link;
}

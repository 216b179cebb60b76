// The reducer: pure, so that no service is needed.
import assert from "node:assert/strict";
import { test } from "node:test";
import { isFinished, isGap, reduce } from "../../src/api/web/static/stagecast.js";

const FLOWS = {
  edit: ["started", "composition", "composition_completed", "openai_editing", "openai_editing_completed", "completed"],
  generate: ["started", "composition", "composition_completed", "ai_generation", "completed"],
};

/** A pseudo-random generator (mulberry32): the same numbers for the same seed. */
function seededRandom(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** The events of one generation: stages may repeat, and it may fail or still be running. */
function history(random, generationId = "edit_1_a") {
  const kind = random() < 0.5 ? "edit" : "generate";
  const times = (status) => (/ing$|^ai/.test(status) && random() < 0.3 ? 3 : 1);
  const statuses = FLOWS[kind].flatMap((status) => Array(times(status)).fill(status));
  const count = 1 + Math.floor(random() * statuses.length);
  const failed = count < statuses.length && random() < 0.3 ? ["failed"] : [];
  return [...statuses.slice(0, count), ...failed].map((status, index) => ({
    generationId, kind, sequence: index + 1, status, message: `${status}!`, progress: index * 10,
    occurredAt: new Date(1_763_829_000_000 + index).toISOString(),
    ...(index === 0 && { inputImage: "https://example.org/a.png", input: { prompt: "a hat" }, credit: 9 }),
    ...(index === 2 && { compositionUrl: "http://localhost/images/sheet" }),
    ...(status === "failed" && { error: "No.", code: "internal", retryable: false, credit: 10 }),
  }));
}

const reduceAll = (events) => events.reduce(reduce, undefined);

function shuffled(items, random) {
  const all = [...items];
  for (let last = all.length - 1; last > 0; last--) {
    const other = Math.floor(random() * (last + 1));
    [all[last], all[other]] = [all[other], all[last]];
  }
  return all;
}

test("a generation is the result of its events: fields stay, and credit is not one of them", () => {
  const [started, composition] = [
    { generationId: "edit_1_a", kind: "edit", sequence: 1, status: "started", message: "Begun", progress: 0,
      occurredAt: "2026-11-22T17:30:00.000Z", inputImage: "https://example.org/a.png", metadata: { a: 1 }, credit: 9 },
    { generationId: "edit_1_a", kind: "edit", sequence: 2, status: "composition", message: "On", progress: 20,
      occurredAt: "2026-11-22T17:30:01.000Z", metadata: { a: 1 } },
  ];
  assert.deepEqual(reduceAll([started, composition]), {
    generationId: "edit_1_a", kind: "edit", sequence: 2, status: "composition", message: "On", progress: 20,
    createdAt: "2026-11-22T17:30:00.000Z", updatedAt: "2026-11-22T17:30:01.000Z",
    inputImage: "https://example.org/a.png", metadata: { a: 1 },
  });
});

test("an old or repeated event changes nothing, and the result is the same object", () => {
  const events = history(seededRandom(7));
  const whole = reduceAll(events);
  for (const event of events) assert.equal(reduce(whole, event), whole);
});

test("an event that arrives too early is a gap, and changes nothing", () => {
  const [first, , third] = history(() => 0.9);
  const generation = reduce(undefined, first);
  assert.equal(isGap(generation, third), true);
  assert.equal(reduce(generation, third), generation);
  assert.equal(isGap(undefined, third), true);
  assert.equal(reduce(undefined, third), undefined);
});

test("however events are shuffled and doubled, requesting the missing ones leads to the same generation", () => {
  for (let seed = 1; seed <= 500; seed++) {
    const random = seededRandom(seed);
    const events = history(random);
    const delivered = shuffled([...events, ...events.filter(() => random() < 0.5)], random);
    let generation;
    for (const event of delivered) {
      const known = generation?.sequence ?? 0;
      if (isGap(generation, event)) generation = events.slice(known, event.sequence - 1).reduce(reduce, generation);
      const before = generation?.sequence ?? 0;
      generation = reduce(generation, event);
      assert.ok(generation.sequence === before || generation.sequence === before + 1);
    }
    assert.deepEqual(generation, reduceAll(events), `seed ${seed}`);
  }
});

test("reduce does not change its arguments", () => {
  const events = history(seededRandom(3)).map(Object.freeze);
  let generation;
  for (const event of events) generation = Object.freeze(reduce(generation, event));
  assert.equal(generation.sequence, events.length);
});

test("snapshots and events may arrive in any order: the newest state wins", () => {
  for (let seed = 1; seed <= 300; seed++) {
    const random = seededRandom(seed);
    const events = history(random);
    const at = 1 + Math.floor(random() * events.length);
    const { input, ...shown } = reduceAll(events.slice(0, at)); // Acks omit the input.
    const snapshot = { ...shown, ...(random() < 0.5 && { input }), userId: "ada" };
    const when = Math.floor(random() * (events.length + 1));
    const known = [...events.slice(0, when), snapshot, ...events.slice(when)].reduce(reduce, undefined);
    const { userId, ...rest } = known;
    assert.deepEqual(rest, reduceAll(events), `seed ${seed}`);
  }
});

test("a snapshot of the same sequence adds the fields that events do not have", () => {
  const generation = reduceAll(history(seededRandom(5)));
  const snapshot = { ...generation, expiresAt: "2026-11-23T17:30:00.000Z" };
  assert.deepEqual(reduce(generation, snapshot), snapshot);
  assert.equal(reduce(snapshot, generation), snapshot);
});

test("a generation that was removed is undefined, and stays so for late events", () => {
  const events = history(() => 0.9);
  const removed = reduce(reduceAll(events), { generationId: "edit_1_a" });
  assert.equal(removed, undefined);
  assert.equal(reduce(removed, events.at(-1)), undefined);
});

test("the place in line is that of a generation that has only been started", () => {
  const [started, second] = history(() => 0.9);
  const position = (queuePosition) => ({ generationId: "edit_1_a", queuePosition });
  assert.equal(reduce(undefined, position(3)), undefined);
  const generation = reduce(undefined, started);
  const waiting = reduce(generation, position(3));
  assert.deepEqual(waiting, { ...generation, queuePosition: 3 });
  assert.equal(reduce(waiting, position(3)), waiting);
  assert.equal(reduce(waiting, position(2)).queuePosition, 2);
  const begun = reduce(waiting, second);
  assert.deepEqual(begun, reduceAll([started, second]));
  assert.equal(reduce(begun, position(1)), begun);
});

test("the newest snapshot of a generation that has only been started has its place in line, or none", () => {
  const [started] = history(() => 0.9);
  const generation = reduce(undefined, started);
  const waiting = reduce(generation, { ...generation, queuePosition: 2 });
  assert.equal(waiting.queuePosition, 2);
  assert.equal(reduce(waiting, { ...generation, queuePosition: 1 }).queuePosition, 1);
  assert.deepEqual(reduce(waiting, generation), generation);
});

test("completed and failed are terminal", () => {
  const ends = ["completed", "failed"];
  for (const status of new Set([...Object.values(FLOWS).flat(), "failed"])) {
    assert.equal(isFinished({ status }), ends.includes(status));
  }
});

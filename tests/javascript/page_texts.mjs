// The texts of the page are complete in both languages.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";

const FOLDER = new URL("../../src/api/web/static/", import.meta.url);
const { TEXTS } = await import(new URL("texts.js", FOLDER));
const read = (name) => readFileSync(new URL(name, FOLDER), "utf8");
const { stages, codes } = JSON.parse(process.env.STAGECAST_SERVICES);

/** The keys of all texts, with the number of parameters of those that are functions. */
const shape = (texts) => Object.fromEntries(Object.entries(texts).map(([key, text]) =>
  [key, typeof text === "object" ? Object.keys(text).sort() : typeof text === "function" ? text.length : typeof text]));

test("both languages have the same texts", () => {
  const [{ messages: _, ...en }, { messages: __, ...tr }] = [TEXTS.en, TEXTS.tr];
  assert.deepEqual(shape(tr), shape(en));
  assert.deepEqual(Object.keys(TEXTS.tr), Object.keys(TEXTS.en), "the same order, too");
});

test("no text is left in the other language", () => {
  const same = new Set(["token", "docs"]); // Words that are the same in both.
  const texts = ({ messages: _, ...rest }) => Object.entries(rest).filter(([, text]) => typeof text === "string");
  const tr = Object.fromEntries(texts(TEXTS.tr));
  for (const [key, text] of texts(TEXTS.en)) if (!same.has(key)) assert.notEqual(tr[key], text, key);
});

test("every message of a stage and every code that a user may meet is translated", () => {
  const missing = [...stages, ...codes].filter((key) => !(key in TEXTS.tr.messages));
  assert.deepEqual(missing, []);
});

test("every text of the page is used, and every text that is used exists", () => {
  const page = read("index.html");
  const scripts = readdirSync(FOLDER).filter((name) => name.endsWith(".js") && name !== "texts.js").map(read).join();
  const named = [...page.matchAll(/data-(?:text|label|placeholder)="(\w+)"/g), ...scripts.matchAll(/\bt\("([\w ]+)"\)/g)];
  for (const [, key] of named) assert.ok(key in TEXTS.en, key);
  const words = new Set(`${page}${scripts}`.match(/\w+/g));
  assert.deepEqual(Object.keys(TEXTS.en).filter((key) => !key.split(" ").every((word) => words.has(word))), []);
});

test("the page itself has no text of its own", () => {
  const body = read("index.html").replace(/^[^]*<body[^>]*>/, "").replace(/<noscript>.*?<\/noscript>/s, "");
  const texts = body.replace(/<!--.*?-->/gs, "").replace(/<[^>]*>/g, "\n").split("\n").map((text) => text.trim());
  const names = new Set(["Stagecast", "curl", "JavaScript", "Python", "stagecast token ada", "2:3", "1:1", "3:2", "×", "−", "+"]);
  assert.deepEqual(texts.filter((text) => text && !names.has(text)), []);
  assert.deepEqual(body.match(/\s(?:title|aria-label|placeholder|alt)="[^"]*[a-z][^"]*"/gi)?.filter((it) => !it.includes("https://")) ?? [], []);
});

// File names and the estimate of the time left; the code samples are run by test_page_result.py.
import assert from "node:assert/strict";
import { test } from "node:test";

const FOLDER = new URL("../../src/api/web/static/", import.meta.url);
const { fileNameOf, snippetsOf } = await import(new URL("snippets.js", FOLDER));
const { inSteps, secondsLeft } = await import(new URL("estimate.js", FOLDER));
const { expiryOf } = await import(new URL("expiry.js", FOLDER));

test("a file is named after the prompt, and the name is valid on every system", () => {
  const names = {
    "A red hat, by the lake": "A red hat, by the lake.png",
    "../../etc/passwd": "etc passwd.png",
    'a\\b:c*d?e"f<g>h|i': "a b c d e f g h i.png",
    "CON": "gen_1.png", "nul.txt": "gen_1.png", "...": "gen_1.png", "": "gen_1.png", " \n\t ": "gen_1.png",
    "two\nlines\r\nand a\u0000nul": "two lines and a nul.png",
    "gnp.\u202Eexe": "gnp. exe.png",
    "Ağaç 🌳 ve şapka": "Ağaç 🌳 ve şapka.png",
    "COM¹": "gen_1.png", "aux .x": "gen_1.png", "\u200d.\u200c": "gen_1.png",
    "👨\u200d👩\u200d👧 می\u200cخواهم": "👨\u200d👩\u200d👧 می\u200cخواهم.png",
    ".hidden": "hidden.png", "-rf": "rf.png", "trailing dot.": "trailing dot.png",
  };
  for (const [title, name] of Object.entries(names)) assert.equal(fileNameOf(title, "/images/a-b.png", "gen_1"), name);
  assert.equal(fileNameOf("hat", "/images/a-b.JPEG?width=320", "x"), "hat.jpeg");
  assert.equal(fileNameOf("hat", "/images/a-b", "x"), "hat.png");
  const long = fileNameOf("🌳".repeat(4000), "/images/a-b.webp", "x");
  assert.ok(new TextEncoder().encode(long).length <= 255, long);
});

test("a code sample never contains a token, and shows invisible characters as escapes", () => {
  const input = { prompt: "a\u202e\u200b\u0007b", images: ["http://x/images/gen_1-a.png"], imageUrls: [], aspectRatio: "2:3" };
  for (const tokenRequired of [true, false]) {
    const snippets = snippetsOf({ kind: "generate", input }, { url: "http://x", userId: "ada", tokenRequired });
    for (const code of Object.values(snippets)) {
      assert.doesNotMatch(code, /[\u0000-\u0009\u000b-\u001f\u200b\u202e]/);
      assert.equal(code.includes("STAGECAST_TOKEN"), tokenRequired);
      assert.equal(code.includes("X-User-Id"), !tokenRequired);
    }
  }
});

test("a sample of a generation whose pictures are gone has a file in their place", () => {
  const input = { prompt: "a hat", images: [], imageUrls: [], aspectRatio: "2:3" };
  const { curl, javascript, python } = snippetsOf({ kind: "generate", input }, { url: "http://x", tokenRequired: true });
  assert.match(curl, /-F 'images=@picture\.png'$/);
  assert.match(javascript, /body\.append\("images", picture\)/);
  assert.match(python, /"images": open\("picture\.png", "rb"\)/);
});

test("the time left is a range that shrinks, and is gone when the stage takes longer than usual", () => {
  const [present, done] = [{ typicalSeconds: 10 }, { terminal: true }];
  assert.deepEqual(secondsLeft(present, [{ typicalSeconds: 4 }, done], 0), [10.5, 21]);
  assert.deepEqual(secondsLeft(present, [{ typicalSeconds: 4 }, done], 9), [3, 12]);
  assert.equal(secondsLeft(present, [done], 16.5), undefined);
  assert.equal(secondsLeft(present, [{}, done], 0), undefined);
  assert.equal(secondsLeft({}, [done], 0), undefined);
  assert.deepEqual(secondsLeft(undefined, [present, done], 0), [7.5, 15]);
});

test("the range has steps that people can read", () => {
  assert.deepEqual(inSteps([7.5, 15]), [5, 15, "second"]);
  assert.deepEqual(inSteps([3.2, 6.4]), [3, 7, "second"]);
  assert.deepEqual(inSteps([0, 0.2]), [0, 1, "second"]);
  assert.deepEqual(inSteps([50, 100]), [0, 2, "minute"]);
  assert.deepEqual(inSteps([90, 180]), [1, 3, "minute"]);
});

test("a generation that ended live expires as one of which the service has told", () => {
  const ended = "2026-11-22T17:30:00.000Z";
  assert.equal(expiryOf({ status: "completed", updatedAt: ended }), undefined);
  assert.equal(expiryOf({ status: "failed", updatedAt: ended, expiresAt: "2026-11-23T17:30:00.000Z" }), Date.parse(ended) + 86_400_000);
  assert.equal(expiryOf({ status: "completed", updatedAt: "2026-11-22T18:30:00.000Z" }), Date.parse(ended) + 90_000_000);
  assert.equal(expiryOf({ status: "composition", updatedAt: ended }), undefined);
});

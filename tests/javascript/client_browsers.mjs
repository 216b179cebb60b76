// The page uses nothing that is newer than the oldest browsers in docs/browsers.md.
import assert from "node:assert/strict";
import { readdirSync } from "node:fs";
import { describe, test } from "node:test";
import { newInPage, newInScript, newInStyle, number, OLDEST, read } from "./oldest_browsers.mjs";

const FOLDER = "src/api/web/static";
const CHECKS = { js: newInScript, css: newInStyle, html: newInPage };

describe("the oldest supported browsers", () => {
  test("are listed", () => {
    for (const version of Object.values(OLDEST)) assert.ok(number(version).every(Number.isInteger));
  });

  for (const name of readdirSync(new URL(`../../${FOLDER}`, import.meta.url))) {
    const check = CHECKS[name.split(".").pop()];
    if (check) test(`support everything in ${name}`, () => assert.deepEqual(check(read(`${FOLDER}/${name}`)), []));
  }

  for (const [kind, samples] of Object.entries({
    js: [
      "URL.canParse(x)", "const b = [1].toSorted()", "Promise.withResolvers()", "AbortSignal.timeout(3)",
      "x.hidePopover()", "button.ariaDisabled = 'true'", "class A { static { a(); } }", "/(?<=a)b/.test(c)",
      "new EditContext()", "Iterator.from(a)", "Object.groupBy(a, b)", "navigator.userActivation",
    ],
    css: [
      "a { color: light-dark(#fff, #000); }", "a:has(b) { color: red; }", "@container (width > 1px) { a { top: 0; } }",
      "a { field-sizing: content; }", "a { & b { top: 0; } }", "@starting-style { a { top: 0; } }",
    ],
    html: ['<div popover id="a">', '<button popovertarget="a">', "<search>"],
  })) {
    for (const sample of samples) {
      test(`do not all support ${sample}`, () => assert.notDeepEqual(CHECKS[kind](sample), []));
    }
  }

  test("may lack a method that is called only if it exists", () => {
    assert.deepEqual(newInScript("AbortSignal.timeout?.(3)"), []);
  });
});

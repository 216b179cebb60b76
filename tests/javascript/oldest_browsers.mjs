// Finds features that the oldest browsers in docs/browsers.md lack, according to MDN's compatibility data.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { parse } from "acorn";

const bcd = createRequire(import.meta.url)("@mdn/browser-compat-data");
export const read = (path) => readFileSync(new URL(`../../${path}`, import.meta.url), "utf8");

/** Features that may be missing or incomplete: the page works without them. */
const OPTIONAL = new Set([
  "text-wrap", "text-size-adjust", "@property", "outline", "resize", "cursor", "@media (forced-colors)",
  "align-content: start", "<input autocapitalize>", "<input capture>",
]);
/** Names in the page's code that happen to be names of newer APIs too. */
const OWN = new Set(["connection", "aspectRatio"]);

const rows = read("docs/browsers.md").matchAll(/^\| \w.*? \| ([\d.]+) \|/gm);
const [chrome, firefox, safari] = [...rows].map(([, version]) => version);
export const OLDEST = {
  chrome, chrome_android: chrome, edge: chrome, firefox, firefox_android: firefox, safari, safari_ios: safari,
};

export const number = (version) => version.replace("≤", "").split(".").map(Number);

function isAtMost(added, oldest) {
  if (typeof added !== "string" || added === "preview") return false;
  const [a, b] = [number(added), number(oldest)];
  return a[0] < b[0] || (a[0] === b[0] && (a[1] ?? 0) <= (b[1] ?? 0));
}

/** The browsers that lack this feature. @param {any} feature an entry of the data */
const missingIn = (feature) => Object.entries(OLDEST).filter(([browser, oldest]) => {
  const supports = [feature.__compat?.support[browser] ?? []].flat();
  const has = (it) => !it.flags && !it.version_removed && isAtMost(it.version_added, oldest);
  return feature.__compat && !supports.some(has);
}).map(([browser]) => browser);

const isNew = (feature) => Boolean(feature) && missingIn(feature).length > 0;

/** All entries below this one, by the last part of their path. */
function byName(root, index = new Map()) {
  for (const [key, feature] of Object.entries(root)) {
    if (key === "__compat" || typeof feature !== "object") continue;
    const name = key.replace(/_(static|event)$/, "");
    if (feature.__compat) index.set(name, [...(index.get(name) ?? []), feature]);
    byName(feature, index);
  }
  return index;
}

const MEMBERS = byName({ api: bcd.api, builtins: bcd.javascript.builtins });
const CSS_TYPES = byName(bcd.css.types);
const isNewName = (index, name) => index.has(name) && index.get(name).every(isNew);

// ---- JavaScript ----------------------------------------------------------------------------------------------------

function* nodesOf(node) {
  if (typeof node?.type === "string") yield node;
  for (const child of Object.values(node ?? {})) if (child && typeof child === "object") yield* nodesOf(child);
}

/** The features used in this script that one of the oldest browsers lacks. */
export function newInScript(text) {
  const found = new Set();
  const nodes = [...nodesOf(parse(text, { ecmaVersion: 2022, sourceType: "module" }))];
  // Methods that are called only if they exist: `a.b?.()`.
  const guarded = new Set(nodes.filter((it) => it.type === "CallExpression" && it.optional).map((it) => it.callee));
  const declared = new Set(nodes.flatMap((it) => (it.type === "VariableDeclarator" && it.id.name) || []));
  for (const node of nodes) {
    if (node.type === "StaticBlock") found.add("static {}");
    if (node.regex && /\(\?<[=!]/.test(node.regex.pattern)) found.add("(?<=)");
    if (node.type === "Identifier" && !declared.has(node.name)) {
      const top = Object.hasOwn(bcd.api, node.name) ? bcd.api[node.name] : bcd.javascript.builtins[node.name];
      if (/^[A-Z]/.test(node.name) && isNew(top)) found.add(node.name);
    }
    if (node.type !== "MemberExpression" || node.computed || guarded.has(node)) continue;
    const [owner, name] = [node.object.name, node.property.name];
    const type = bcd.api[owner] ?? bcd.javascript.builtins[owner];
    const exact = type?.[`${name}_static`] ?? type?.[name];
    if (OWN.has(name)) continue;
    if (exact ? isNew(exact) : isNewName(MEMBERS, name)) found.add(`${owner ?? ""}.${name}`);
  }
  return [...found];
}

// ---- CSS and HTML --------------------------------------------------------------------------------------------------

export function newInStyle(source) {
  const found = new Set();
  const text = source.replace(/\/\*.*?\*\/|"[^"]*"/gs, '""');
  const check = (name, feature) => !OPTIONAL.has(name) && isNew(feature) && found.add(name);
  for (const [, name, value] of text.matchAll(/[{;]\s*([a-z-]+)\s*:\s*([^;{}]+)/g)) {
    const property = bcd.css.properties[name.replace(/^-webkit-/, "")];
    if (!name.startsWith("-webkit-")) check(name, property);
    for (const word of value.split(/[\s,()]+/)) if (!OPTIONAL.has(name)) check(`${name}: ${word}`, property?.[word]);
  }
  for (const [, name] of text.matchAll(/([a-z-]+)\(/g)) if (isNewName(CSS_TYPES, name)) found.add(`${name}()`);
  for (const [, name] of text.matchAll(/::?([a-z-]+)/g)) {
    if (!name.startsWith("-")) check(`:${name}`, bcd.css.selectors[name]);
  }
  for (const [, name] of text.matchAll(/@([a-z-]+)/g)) check(`@${name}`, bcd.css["at-rules"][name]);
  for (const [, name] of text.matchAll(/\(([a-z-]+):/g)) check(`@media (${name})`, bcd.css["at-rules"].media[name]);
  if (text.includes("&")) found.add("&");
  return [...found];
}

export function newInPage(text) {
  const found = new Set();
  for (const [, tag, rest] of text.matchAll(/<([a-z]\w*)([^>]*)>/g)) {
    const element = bcd.html.elements[tag] ?? bcd.svg.elements[tag];
    if (isNew(element)) found.add(`<${tag}>`);
    for (const [, name] of rest.matchAll(/\s([a-z-]+)(?==|\s|$)/g)) {
      const attribute = `<${tag} ${name}>`;
      if (!OPTIONAL.has(attribute) && isNew(element?.[name] ?? bcd.html.global_attributes[name])) found.add(attribute);
    }
  }
  return [...found];
}

// ---- A browser reduced to the oldest --------------------------------------------------------------------------------

/** What a newer browser must delete to resemble the oldest: `[type]`, or `[type, member, static]`. */
export function newerThanOldest() {
  return Object.entries({ ...bcd.api, ...bcd.javascript.builtins }).flatMap(([type, feature]) => {
    if (isNew(feature)) return [[type]];
    const members = Object.entries(feature).filter(([name, member]) => /^[a-z]\w*$/i.test(name) && isNew(member));
    return members.map(([name]) => [type, name.replace(/_static$/, ""), name.endsWith("_static")]);
  });
}

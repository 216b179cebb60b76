/** The operator's page: it reads the service every two seconds, shows the timeline of a generation, and can cancel it. */

import { BASE, byId, parseToken, setChildren, setText } from "./dom.js";

const EVERY = 2000;
const TOKEN = "stagecast.service-token";
const TERMINAL = ["completed", "failed"];
const CODES = [
  "invalid_image", "image_fetch_failed", "provider_rejected", "provider_rate_limited", "provider_unavailable",
  "provider_timeout", "storage_failed", "cancelled", "interrupted", "deadline_exceeded", "internal",
];

/** The last generations that were read, by id, and the one whose timeline is open. */
let known = new Map();
let open;
let before;
let next;
let timer;
/** The request that fills the filter. */
let stages;

/** The answer's JSON. Throws its problem. `user`: on behalf of this user. */
async function call(path, { method = "GET", user } = {}) {
  const headers = new Headers();
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.set("Authorization", `Bearer ${token}`);
  // A header takes bytes only: the service reads them as UTF-8.
  if (user !== undefined) headers.set("X-User-Id", String.fromCharCode(...new TextEncoder().encode(user)));
  const answer = await fetch(BASE + path, { method, headers, cache: "no-store" });
  const body = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(body.detail), { status: answer.status });
  return body;
}

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function button(text, label, onClick) {
  const made = element("button", text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.addEventListener("click", onClick);
  return made;
}

function row(...cells) {
  const made = document.createElement("tr");
  made.append(...cells.map((cell) => {
    if (cell instanceof HTMLTableCellElement) return cell;
    const td = document.createElement("td");
    td.append(cell);
    return td;
  }));
  return made;
}

const seconds = (from, to) => `${((new Date(to) - new Date(from)) / 1000).toFixed(1)} s`;
const time = (text) => new Date(text).toLocaleString(undefined, { dateStyle: "short", timeStyle: "medium" });

function showOverview({ nodes, failures, ...numbers }) {
  byId("numbers").replaceChildren(...["running", "waiting", "sockets", "streams"].map((name) => {
    const group = document.createElement("div");
    group.append(element("dt", name[0].toUpperCase() + name.slice(1)), element("dd", numbers[name]));
    return group;
  }));
  byId("nodes").replaceChildren(...nodes.map((node) => row(element("code", node.id), node.sockets, node.streams)));
  const failed = Object.entries(failures).sort(([, one], [, other]) => other - one);
  byId("failures").replaceChildren(...failed.map(([code, count]) => row(code, count)));
  if (!failed.length) byId("failures").append(row("none"));
}

/** Rows are kept as long as nothing in them has changed, so that a focused button keeps the focus. */
function showGenerations(generations) {
  const rows = new Map([...byId("generations").children].map((each) => [each.dataset.version, each]));
  known = new Map(generations.map((each) => [each.generationId, each]));
  setChildren(byId("generations"), generations.map((each) => {
    const version = `${each.generationId} ${each.sequence}`;
    return rows.get(version) ?? generationRow(each, version);
  }));
  byId("none").hidden = generations.length > 0;
}

function generationRow(generation, version) {
  const { generationId: id, status } = generation;
  const finished = TERMINAL.includes(status);
  const label = finished ? generation.code ?? status : `${status} ${generation.progress} %`;
  const actions = element("td", "");
  actions.append(button("Timeline", `Timeline of ${id}`, () => openTimeline(id)));
  if (!finished) actions.append(" ", button("Cancel", `Cancel ${id}`, () => cancel(generation, byId("list-problem"))));
  const made = row(
    time(generation.createdAt), generation.userId, element("code", id),
    element("td", label, finished ? status : "active"),
    seconds(generation.createdAt, generation.updatedAt), actions,
  );
  made.dataset.version = version;
  return made;
}

async function openTimeline(id) {
  open = known.get(id);
  byId("events").replaceChildren();
  byId("timeline").showModal();
  await showTimeline().catch(showTimelineProblem);
}

const showTimelineProblem = (problem) => setText(byId("timeline-problem"), problem.message);

async function showTimeline() {
  if (!open) return;
  const { generationId: id, userId: user, kind } = open;
  const path = `/generations/${id}`;
  const [generation, { events }] = await Promise.all([call(path, { user }), call(`${path}/events`, { user })]);
  if (open?.generationId !== id) return;
  setText(byId("timeline-title"), id);
  setText(byId("timeline-facts"), `${kind} of ${user}, started ${time(generation.createdAt)}`);
  setText(byId("timeline-problem"), generation.error ? `${generation.error} (${generation.code})` : "");
  byId("events").replaceChildren(...events.map(({ data }) =>
    row(seconds(generation.createdAt, data.occurredAt), `${data.progress} %`, data.status, data.message)));
  byId("cancel").hidden = TERMINAL.includes(generation.status);
}

async function cancel(generation, problem) {
  if (!confirm(`Cancel ${generation.generationId} of ${generation.userId}? Its credit is refunded.`)) return;
  try {
    await call(`/generations/${generation.generationId}/cancel`, { method: "POST", user: generation.userId });
    setText(problem, "");
    await refresh();
  } catch (error) {
    setText(problem, error.message);
  }
}

async function refresh() {
  const query = new URLSearchParams([...new FormData(byId("filter"))].filter(([, value]) => value !== ""));
  query.set("limit", "50");
  if (before) query.set("before", before);
  const [overview, page] = await Promise.all([call("/admin/overview"), call(`/admin/generations?${query}`)]);
  showOverview(overview);
  showGenerations(page.generations);
  next = page.next;
  byId("older").hidden = !next;
  byId("newest").hidden = !before;
  if (byId("timeline").open) await showTimeline().catch(showTimelineProblem);
}

/** Offers the kinds and statuses in the filter. */
async function loadStages() {
  const sequences = await call("/stages");
  for (const kind of Object.keys(sequences)) select("kind").append(element("option", kind));
  for (const status of new Set(Object.values(sequences).flat().map((stage) => stage.status))) {
    select("status").append(element("option", status));
  }
}

/** Reads everything now, and again every two seconds while the page is visible. */
async function poll() {
  clearTimeout(timer);
  try {
    if (document.hidden) return;
    await refresh();
    setText(byId("state"), `as of ${new Date().toLocaleTimeString()}`);
    byId("state").className = "";
    setText(byId("list-problem"), "");
    showSignIn(false);
    await (stages ??= loadStages().catch((error) => {
      stages = undefined;
      throw error;
    }));
  } catch (error) {
    if (error.status === 401 || error.status === 403) {
      return showSignIn(true, sessionStorage.getItem(TOKEN) ? error.message : "");
    }
    if (error.status === 422) setText(byId("list-problem"), error.message);
    setText(byId("state"), error.status ? error.message : "The service does not answer.");
    byId("state").className = "stale";
  }
  timer = setTimeout(poll, EVERY);
}

function showSignIn(needed, problem = "") {
  byId("sign-in").hidden = !needed;
  byId("main").hidden = needed;
  byId("sign-out").hidden = needed || !sessionStorage.getItem(TOKEN);
  setText(byId("token-problem"), problem);
  if (needed) {
    setText(byId("state"), "");
    byId("generations").replaceChildren();
    byId("timeline").close();
    byId("token").focus();
  }
}

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = parseToken(byId("token").value);
  if (!token) return setText(byId("token-problem"), "This is not a token.");
  sessionStorage.setItem(TOKEN, token);
  byId("token").value = "";
  poll();
});
byId("sign-out").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  poll();
});
byId("filter").addEventListener("submit", (event) => {
  event.preventDefault();
  before = undefined;
  poll();
});
byId("filter").addEventListener("change", () => byId("filter").dispatchEvent(new Event("submit", { cancelable: true })));
byId("older").addEventListener("click", () => { before = next; poll(); });
byId("newest").addEventListener("click", () => { before = undefined; poll(); });
byId("close").addEventListener("click", () => byId("timeline").close());
byId("timeline").addEventListener("close", () => (open = undefined));
byId("cancel").addEventListener("click", () => cancel(open, byId("timeline-problem")));
document.addEventListener("visibilitychange", poll);

const select = (name) => byId("filter").elements[name];
for (const code of CODES) select("code").append(element("option", code));
poll();

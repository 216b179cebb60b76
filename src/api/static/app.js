/**
 * The page: starts generations, and shows the user's, live.
 *
 * What is shown is a fold of events: `take` merges an event or a snapshot into `state` unless something at least as
 * new is known, and `render` draws the state. Texts go in as text, never as HTML.
 *
 * @typedef {{generationId: string, kind: "edit" | "generate", sequence: number, status: string, message: string,
 *   progress: number, createdAt: string, updatedAt: string, metadata?: {title?: unknown}, inputImage?: string,
 *   compositionUrl?: string, previewUrl?: string, editedImageUrl?: string, generatedImageUrl?: string,
 *   faceSwapUrl?: string, faceSwapError?: {message: string}, error?: string, code?: string}} Generation
 * @typedef {{status: string, progress?: number, conditions?: Record<string, string>, terminal: boolean}} Stage
 * @typedef {{root: HTMLElement, part: (selector: string) => any}} View
 */

const CDN = {
  src: "https://cdn.socket.io/4.8.3/socket.io.min.js",
  integrity: "sha384-kzavj5fiMwLKzzD1f8S7TeoVIEi7uKHvbTA3ueZkrzYq75pNQUiUi6Dy98Q3fxb0",
  crossOrigin: "anonymous",
};
const EVENTS = ["generation_started", "continue", "generation_completed", "generation_failed"];
const MAX_IMAGES = 5;
const MAX_BYTES = 10 * 1024 * 1024;
const USER_KEY = "stagecast.user";
const TIME = /** @type {const} */ ({ month: "short", day: "numeric", hour: "numeric", minute: "2-digit" });

const state = {
  user: "demo",
  moving: false, // The user was changed, and the socket may still bring events of the one before.
  /** @type {string | undefined} */ cursor: undefined,
  /** @type {number | undefined} */ credit: undefined,
  tidings: 0, // How often an event told the balance: an answer that was asked for before that is out of date.
  /** @type {Record<string, Stage[]>} */ stages: {},
  /** @type {Map<string, Generation>} */ generations: new Map(),
};

const byId = (/** @type {string} */ id) => /** @type {any} */ (document.getElementById(id));

// ---- The fold ------------------------------------------------------------------------------------------------------

/** Merges an event or a snapshot, unless something at least as new is known. Whether it was news. */
function take(/** @type {any} */ news) {
  const known = state.generations.get(news.generationId);
  if (known && news.sequence <= known.sequence) return false;
  const updatedAt = news.occurredAt ?? news.updatedAt;
  const createdAt = known?.createdAt ?? news.createdAt ?? updatedAt;
  state.generations.set(news.generationId, { ...known, ...news, createdAt, updatedAt });
  return true;
}

/** One event, live or replayed, and the cursor behind it. */
function onEvent(/** @type {any} */ event, /** @type {unknown} */ cursor) {
  if (state.moving) return;
  if (typeof cursor === "string") state.cursor = cursor;
  const before = state.generations.get(event.generationId)?.status;
  if (!take(event)) return;
  if ("credit" in event) Object.assign(state, { credit: event.credit, tidings: state.tidings + 1 });
  if (event.status !== before) byId("announcer").textContent = `${titleOf(event)}: ${event.error ?? event.message}`;
  render();
}

// ---- The socket ----------------------------------------------------------------------------------------------------

let socket = /** @type {any} */ (undefined);

async function connect() {
  if (!globalThis.io) await new Promise((onload, onerror) => { // This service has no copy of the client library.
    document.head.append(Object.assign(document.createElement("script"), CDN, { onload, onerror }));
  });
  socket = globalThis.io();
  socket.on("connect", authenticate);
  for (const trouble of ["connect_error", "disconnect"]) socket.on(trouble, () => showConnection("offline"));
  for (const name of EVENTS) socket.on(name, onEvent);
}

/** Says who is watching, and from where on. The answer comes before any event that it brings about. */
function authenticate() {
  if (!socket?.connected) return;
  const { user, cursor } = state;
  const answered = (/** @type {Error | null} */ lost, /** @type {any} */ ack) => {
    if (user !== state.user) return;
    if (lost || ack.code === "unavailable") return setTimeout(authenticate, 2_000);
    if (!ack.ok) return showConnection("refused");
    if (!ack.recovered) state.generations.clear(); // What is known may be of a log that is gone.
    Object.assign(state, { moving: false, cursor: ack.cursor });
    ack.generations.forEach(take);
    showConnection("live");
    refresh();
  };
  socket.timeout(10_000).emit("authenticate", { userId: user, cursor }, answered);
}

// ---- HTTP ----------------------------------------------------------------------------------------------------------

/** The JSON that the service answers with. Throws an `Error` with a sentence to show. */
async function call(/** @type {string} */ path, /** @type {RequestInit} */ { headers, ...options } = {}) {
  // A header takes bytes, not characters: the user id goes as UTF-8.
  const userId = String.fromCharCode(...new TextEncoder().encode(state.user));
  const response = await fetch(path, { ...options, headers: { ...headers, "X-User-Id": userId } }).catch(() => {
    throw new Error("The service does not answer. Please try again.");
  });
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.detail ?? `The service answered ${response.status}.`);
  return body;
}

/** Asks for what events do not tell: the declared stages, and the balance. */
async function refresh() {
  render();
  const { user, tidings } = state;
  const [stages, me] = await Promise.allSettled([call("/stages"), call("/me")]);
  if (stages.status === "fulfilled") state.stages = stages.value;
  if (me.status === "fulfilled" && user === state.user && tidings === state.tidings) state.credit = me.value.credit;
  render();
}

/** The same request sent again, because no answer came, starts nothing twice. */
let idempotencyKey = "";

async function start() {
  const body = new FormData(byId("start-form"));
  const kind = body.get("kind");
  body.delete("kind");
  const title = [...String(body.get("prompt")).trim()].slice(0, 120).join("");
  body.set("metadata", JSON.stringify({ title }));
  for (const { file } of pictures) body.append("images", file);
  idempotencyKey ||= crypto.getRandomValues(new Uint32Array(4)).join("-");
  const headers = { "Idempotency-Key": idempotencyKey };
  const snapshot = await call(`/generations/${kind}`, { method: "POST", headers, body });
  idempotencyKey = "";
  if (snapshot.userId !== state.user) return;
  take(snapshot);
  render();
  views.get(snapshot.generationId)?.root.scrollIntoView({ block: "nearest" });
}

// ---- The forms -----------------------------------------------------------------------------------------------------

const pictures = /** @type {{file: File, url: string}[]} */ ([]);

const showProblem = (/** @type {string} */ text) => (byId("problem").textContent = text);

function addPictures(/** @type {Iterable<File>} */ files) {
  const problems = new Set();
  for (const file of files) {
    if (!byId("files").accept.split(",").includes(file.type)) problems.add(`${file.name} is no PNG, JPEG or WebP.`);
    else if (file.size > MAX_BYTES) problems.add(`${file.name} has more than 10 MB.`);
    else if (pictures.length >= MAX_IMAGES) problems.add(`There may be ${MAX_IMAGES} photographs at most.`);
    else pictures.push({ file, url: URL.createObjectURL(file) });
  }
  showProblem([...problems].join(" "));
  showPictures();
}

function removePictures(/** @type {number} */ index, count = MAX_IMAGES) {
  for (const { url } of pictures.splice(index, count)) URL.revokeObjectURL(url);
  showPictures();
}

function showPictures() {
  idempotencyKey = "";
  byId("thumbnails").replaceChildren(...pictures.map(({ file, url }, index) => {
    const { root, part } = stamp("thumbnail-template");
    part("img").src = url;
    part("button").setAttribute("aria-label", `Remove ${file.name}`);
    part("button").addEventListener("click", () => (removePictures(index, 1), byId("files").focus()));
    return root;
  }));
}

async function chooseSamples() {
  const files = await Promise.all(Object.entries(SAMPLES).map(drawSample));
  removePictures(0);
  addPictures(files);
  byId("prompt").value ||= "Make it a watercolour, in the light of a late afternoon";
  byId("start").focus();
}

async function submit() {
  showProblem(pictures.length ? "" : "Please choose a photograph, or use the sample pictures.");
  if (!pictures.length) return byId("files").focus();
  byId("start").disabled = true;
  await start().catch((/** @type {Error} */ error) => showProblem(error.message));
  byId("start").disabled = false;
}

function switchUser() {
  const user = byId("user").value.trim();
  if (!user || user === state.user) return;
  try { localStorage.setItem(USER_KEY, user); } catch {} // Not kept, then.
  Object.assign(state, { user, moving: true, cursor: undefined, credit: undefined });
  state.generations.clear();
  idempotencyKey = "";
  showConnection(socket?.connected ? "connecting" : "offline");
  render();
  authenticate();
}

function listen() {
  const files = byId("files");
  for (const [id, action] of Object.entries({ "start-form": submit, "user-form": switchUser })) {
    byId(id).addEventListener("submit", (/** @type {Event} */ event) => (event.preventDefault(), action()));
  }
  byId("start-form").addEventListener("input", () => (idempotencyKey = ""));
  byId("samples").addEventListener("click", chooseSamples);
  files.addEventListener("change", () => (addPictures(files.files), (files.value = "")));
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (/** @type {any} */ event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault(); // Beside the field, too: the browser would leave the page to show the picture.
      byId("drop").classList.toggle("over", name === "dragover");
      if (name === "drop") addPictures(event.dataTransfer.files);
    });
  }
}

/** Landscapes: the sky, the sun and where it stands; from far to near the land or the sea, and its waves' height. */
const SAMPLES = {
  hills: { sky: ["#f3b98a", "#fbeedb"], sun: ["#fff3d6", 610, 340], land: ["#c3aebb", "#8f90b0", "#3f5b7c"], wave: 85 },
  sea: { sky: ["#7fbcd6", "#f4f7ef"], sun: ["#fffbe3", 280, 300], land: ["#6fbac4", "#4699aa", "#26697f"], wave: 22 },
  wood: { sky: ["#dfe8cf", "#f7f3e2"], sun: ["#fbe3a4", 450, 420], land: ["#a8bf8f", "#6d9670", "#2f5d4c"], wave: 60 },
};

async function drawSample(/** @type {[string, typeof SAMPLES.hills]} */ [name, { sky, sun, land, wave }]) {
  const canvas = new OffscreenCanvas(900, 1200);
  const paint = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const air = paint.createLinearGradient(0, 0, 0, 800);
  sky.forEach((colour, stop) => air.addColorStop(stop, colour));
  /** @type {any[][]} */
  const layers = [[air, "M0 0h900v1200h-900Z"], [sun[0], `M${sun[1]} ${sun[2]}a110 110 0 1 1-1 0Z`]];
  land.forEach((shade, near) => {
    const crest = (/** @type {number} */ x) => 640 + near * 170 + wave * Math.sin(x / (90 + 25 * near) + near * 2);
    layers.push([shade, `M0 1200${Array.from({ length: 91 }, (_, i) => `L${i * 10} ${crest(i * 10)}`).join("")}V1200`]);
  });
  for (const [colour, outline] of layers) (paint.fillStyle = colour), paint.fill(new Path2D(outline));
  return new File([await canvas.convertToBlob({ type: "image/jpeg" })], `${name}.jpg`, { type: "image/jpeg" });
}

// ---- The view ------------------------------------------------------------------------------------------------------

const CONNECTIONS = {
  connecting: "Connecting…",
  live: "Live",
  offline: "Offline, reconnecting…",
  refused: "User refused",
  missing: "No live updates: the Socket.IO client is missing",
};

function showConnection(/** @type {keyof typeof CONNECTIONS} */ now) {
  byId("connection").dataset.state = now;
  byId("connection").textContent = CONNECTIONS[now];
}

/** A new copy of a template's element, and its parts. */
function stamp(/** @type {string} */ template) {
  const root = byId(template).content.firstElementChild.cloneNode(true);
  return { root, part: (/** @type {string} */ selector) => root.querySelector(selector) };
}

const views = /** @type {Map<string, View>} */ (new Map());

function render() {
  byId("credit").hidden = state.credit === undefined;
  byId("credit").textContent = `${state.credit} ${state.credit === 1 ? "credit" : "credits"}`;
  for (const [id, { root }] of views) if (!state.generations.has(id)) root.remove(), views.delete(id);
  const newestFirst = [...state.generations.values()].sort((a, b) => (a.createdAt < b.createdAt ? 1 : -1));
  // What has just finished moves first, so that nothing else has to.
  for (const [list, finished] of [[byId("finished"), true], [byId("active"), false]]) {
    newestFirst.filter((generation) => isFinished(generation) === finished).map(draw).forEach((root, index) => {
      const focused = root.contains(document.activeElement);
      if (list.children[index] !== root) list.insertBefore(root, list.children[index] ?? null);
      if (focused && !root.contains(document.activeElement)) root.focus();
    });
  }
}

const isFinished = (/** @type {Generation} */ { status }) => status === "completed" || status === "failed";

const titleOf = (/** @type {Generation} */ { kind, metadata }) =>
  typeof metadata?.title === "string" && metadata.title ? metadata.title : kind === "edit" ? "Edit" : "Generation";

/** `openai_editing` as people write it. */
const stageName = (/** @type {string} */ status) =>
  (status[0].toUpperCase() + status.slice(1).replaceAll("_", " ")).replace(/^openai/i, "OpenAI").replace(/^ai/i, "AI");

/** The element of this generation, up to date. */
function draw(/** @type {Generation} */ generation) {
  const { generationId, status, progress, updatedAt } = generation;
  const { root, part } = views.get(generationId) ?? makeView(generationId);
  const stage = stageName(generation.code === "cancelled" ? "cancelled" : status);
  root.dataset.state = isFinished(generation) ? status : "active";
  part(".title").textContent = titleOf(generation);
  part(".stage").textContent = stage;
  part(".percent").textContent = `${progress} %`;
  part(".message").textContent = generation.error ?? generation.message;
  part(".note").textContent = generation.faceSwapError?.message ?? "";
  part("time").dateTime = updatedAt;
  part("time").textContent = new Date(updatedAt).toLocaleString([], TIME);
  const aria = { ariaLabel: titleOf(generation), ariaValueNow: progress, ariaValueText: `${progress} %, ${stage}` };
  Object.assign(part(".track"), aria).style.setProperty("--progress", progress);
  part(".steps").replaceChildren(...stepsOf(generation));
  drawPicture(generation, part);
  return root;
}

function makeView(/** @type {string} */ generationId) {
  const view = stamp("generation-template");
  const showError = (/** @type {Error} */ error) => (view.part(".note").textContent = error.message);
  view.part(".cancel").addEventListener("click", () => {
    call(`/generations/${generationId}/cancel`, { method: "POST" }).catch(showError);
  });
  view.part("img").addEventListener("error", () => (view.part("img").hidden = true));
  views.set(generationId, view);
  return view;
}

/** The declared stages: all of the kind's, but those that another one leads to on a condition only where they apply. */
function stepsOf(/** @type {Generation} */ { kind, status, progress, inputImage }) {
  const declared = (state.stages[kind] ?? []).filter((stage) => stage.progress !== undefined);
  const applies = (/** @type {Stage} */ { status: name, terminal }) => terminal || inputImage || name === status ||
    !declared.some((before) => before.status !== name && before.conditions?.[name]);
  return declared.filter(applies).map((stage) => {
    const step = Object.assign(document.createElement("li"), { textContent: stageName(stage.status) });
    step.style.setProperty("--at", String(stage.progress));
    step.classList.toggle("reached", progress >= stage.progress);
    if (stage.status === status) step.setAttribute("aria-current", "step");
    return step;
  });
}

/** The best picture so far: the result, a preview, the sheet. */
function drawPicture(/** @type {Generation} */ generation, /** @type {View["part"]} */ part) {
  const { faceSwapUrl, editedImageUrl, generatedImageUrl, previewUrl, compositionUrl } = generation;
  const url = pagePath(faceSwapUrl ?? editedImageUrl ?? generatedImageUrl ?? previewUrl ?? compositionUrl);
  if (!url || part("img").getAttribute("src") === url) return;
  Object.assign(part("img"), { src: url, alt: `Picture: ${titleOf(generation)}`, hidden: false });
  part(".frame").href = url;
}

/** Our own pictures by their path alone: the page may have come by another name than the public URL has. */
function pagePath(/** @type {string | undefined} */ url) {
  if (!url || !URL.canParse(url) || !/^https?:/i.test(url)) return "";
  const { pathname, href } = new URL(url);
  return pathname.startsWith("/images/") ? pathname : href;
}

try { state.user = localStorage.getItem(USER_KEY) || state.user; } catch {} // The browser keeps nothing for us.
byId("user").value = state.user;
listen();
connect().catch(() => (showConnection("missing"), refresh()));

/**
 * Stagecast's client: a user's generations, live, in a browser or in Node.
 *
 *     import { connect } from "/static/stagecast.js";
 *     const stagecast = connect({ io });                    // `io` of socket.io-client; without it: polling
 *     stagecast.on("change", () => render(stagecast.generations));
 *     await stagecast.start("edit", { prompt: "a red hat", images: [file] });
 *
 * What it tells of itself; all of it is read, never written:
 *
 *     generations   the user's, newest first: a new array after each change, and a new object for what has changed
 *     get(id)       one of them
 *     credit        the balance; undefined while it is not known, or where no balances are kept
 *     userId        whose generations these are; with a token: once the service has said so
 *     state         "connecting"   for the first time
 *                   "live"         events come as they happen
 *                   "catching up"  connected again: what was missed is coming in
 *                   "polling"      no socket can be had: events come, up to `pollEvery` late
 *                   "offline"      nothing can be had; it keeps trying, unless it was `cut`
 *                   "refused"      the user or the token is not accepted, `reason` tells the code; see `restore`
 *                   "closed"
 *     reason        the code of the refusal
 *     cursor        the place reached in the user's feed: `connect({cursor})` goes on from there, also elsewhere
 *
 * What it tells as it happens: `on(name, listener)`, which returns what ends it, and `off(name, listener)`:
 *
 *     "change"      ()                     generations or credit are others than before
 *     "event"       (event, generation)    each event once, in the order of `sequence`; first those so far of what
 *                                          still runs. An event is old news where `event.sequence` is below
 *                                          `generation.sequence`: a snapshot was faster
 *     "state"       (state, reason)
 *     "caughtUp"    ({missed, recovered})  back from being offline: how many events came late; `recovered: false`:
 *                                          the past is gone (a restart, retention), `generations` are what there is
 *
 * What it does. All of these reject with a `StagecastError` when the service says no, or does not answer:
 *
 *     start(kind, wish, {idempotencyKey, attempts, runner})
 *                           the generation; if the network fails it is sent again with the same key, which starts
 *                           nothing twice. Give your own key to try again later yourself
 *     cancel(id)            "cancelled" or "already_finished"
 *     remove(id)            a finished one, for good
 *     history(id, after)    its events
 *     older(before, limit)  `{generations, next}`: a page of the list, which also joins `generations`. Begin without
 *                           `before`; then it is the `next` of the page before, until there is none
 *     me(), stages()        as `GET /me` and `GET /stages` answer
 *     switchUser({userId, token, cursor})   forgets everything, and is another's from then on
 *     cut(), restore()      drop the transport as a tunnel would, and stay away; come back, also after "refused". While
 *                           it is offline by itself, `restore` tries at once instead of in a moment
 *     close()               for good
 *
 * In a browser it checks the connection whenever the page may have slept or changed networks (`visibilitychange`,
 * `pageshow`, `focus`, `online`, `resume`, a jump of the clock): a connection that does not answer within two seconds
 * is replaced. `offline` counts at once. So `state` is right within three seconds.
 *
 * It needs what `docs/browsers.md` lists, or Node 20.
 *
 * `api(options)` is the HTTP part alone, with `call`, `list`, `feed` and `transition` besides.
 * `reduce(generation, news)` is the fold alone, pure.
 *
 * @typedef {{generationId: string, kind: "edit" | "generate", sequence: number, status: string, message: string,
 *   progress: number, metadata?: Record<string, any>, inputImage?: string, compositionUrl?: string,
 *   previewUrl?: string, editedImageUrl?: string, generatedImageUrl?: string, faceSwapUrl?: string,
 *   faceSwapError?: {code: string, message: string}, error?: string, code?: string, failedStage?: string,
 *   input?: {prompt: string, [field: string]: any},
 *   retryable?: boolean}} Facts
 * @typedef {Facts & {occurredAt: string, credit?: number}} StagecastEvent One fact, as the log has it.
 * @typedef {Facts & {createdAt: string, updatedAt: string, expiresAt?: string, userId?: string}} Generation
 *   What its events have made of it. `userId` and `expiresAt` only where the service has told them.
 *
 * @typedef {"connecting" | "live" | "catching up" | "polling" | "offline" | "refused" | "closed"} State
 * @typedef {string | (() => string | Promise<string>)} Token A function is asked for a fresh one when it is needed.
 * @typedef {{userId?: string | number, token?: Token, cursor?: string}} Who
 *   `token` where the service has a key. Without it `userId`, by default "demo".
 * @typedef {{url?: string, userId?: string | number, token?: Token, service?: boolean}} ApiOptions
 *   `url`: the service's URL, with its path if it has one; by default the page's own origin. `service`: the token is a
 *   service's, and acts for `userId`.
 * @typedef {{io?: any, socket?: Record<string, any>, pollEvery?: number}} LiveOptions
 *   `io`: by default the global one; null: polling. `socket`: further options for it. `pollEvery`: milliseconds.
 * @typedef {{prompt?: string, images?: Blob[], imageUrls?: string[], faceSwap?: boolean,
 *   metadata?: Record<string, any>, quality?: string, background?: string, aspectRatio?: string,
 *   inputFidelity?: string}} Wish
 * @typedef {{idempotencyKey?: string, attempts?: number, runner?: "external"}} StartOptions
 * @typedef {{generations: Generation[], next?: string}} Page
 * @typedef {{missed: number, recovered: boolean}} CaughtUp
 */

const EVENTS = ["generation_started", "continue", "generation_completed", "generation_failed"];
/** Codes after which another token may do. */
const STALE = ["unauthenticated", "invalid_token", "token_expired"];
/** Statuses of gateways that have no answer of the service's own. */
const GATEWAY = [502, 504];
/** So many connections in a row have to fail before it polls meanwhile. */
const PATIENCE = 3;
const ATTEMPTS = 6;
const PAGE = 200;
const AGAIN = 2_000;
const ACK = 10_000;
const ANSWER = 30_000;
/** A connection that has not answered a check for so long is dead. */
const CHECK_TIMEOUT = 2_000;
/** Checks are at least this far apart. */
const CHECK_EVERY = 500;
/** A clock that jumps by more than this: the machine has slept. */
const SLEPT = 5_000;
/** Longer than a long poll of the service; an XHR that hangs longer holds one of the browser's few connections. */
const XHR_TIMEOUT = 35_000;

// ---- The fold ------------------------------------------------------------------------------------------------------

/** Whether nothing follows any more. @param {{status: string}} generation */
export const isFinished = ({ status }) => status === "completed" || status === "failed";

/**
 * The generation after this event, or as this snapshot shows it. What is old, or comes too early (`isGap`), changes
 * nothing: then the answer is `generation` itself.
 *
 * @param {Generation | undefined} generation as far as it is known
 * @param {StagecastEvent | Generation} news
 * @returns {Generation | undefined}
 */
export function reduce(generation, news) {
  if ("updatedAt" in news) {
    if (generation && news.sequence < generation.sequence) return generation;
    if (generation?.sequence !== news.sequence) return news;
    return Object.keys(news).every((key) => key in generation) ? generation : { ...generation, ...news };
  }
  if (generation && news.sequence <= generation.sequence) return generation;
  if (isGap(generation, news)) return generation;
  const { occurredAt, credit, ...facts } = news;
  return { ...generation, ...facts, createdAt: generation?.createdAt ?? occurredAt, updatedAt: occurredAt };
}

/**
 * Whether events are missing between the generation as it is known and this one.
 *
 * @param {Generation | undefined} generation @param {{sequence: number}} event
 */
export const isGap = (generation, event) => event.sequence > (generation?.sequence ?? 0) + 1;

// ---- HTTP ----------------------------------------------------------------------------------------------------------

/** The service said no (`status` is HTTP's), or did not answer (`code` is "network", `status` 0). */
export class StagecastError extends Error {
  name = "StagecastError";

  /**
   * @param {string} code stable, for programs
   * @param {string} detail a sentence for people
   * @param {{status?: number, field?: string, retryAfter?: number, cause?: unknown}} [more]
   */
  constructor(code, detail, { status = 0, field, retryAfter, cause } = {}) {
    super(detail, { cause });
    this.code = code;
    this.detail = detail;
    this.status = status;
    /** The form field that was refused. */
    this.field = field;
    /** Seconds. */
    this.retryAfter = retryAfter;
  }
}

/** The present token; `drop` it, and the next is asked for. @param {Token | undefined} source */
function wallet(source) {
  /** @type {Promise<string> | undefined} */ let kept;
  return {
    renewable: typeof source === "function",
    /** @returns {Promise<string | undefined>} */
    get() {
      if (typeof source !== "function") return Promise.resolve(source);
      if (kept) return kept;
      const asked = Promise.resolve().then(source);
      asked.catch(() => (kept = undefined));
      return (kept = asked);
    },
    drop: () => (kept = undefined),
  };
}

const sleep = (/** @type {number} */ ms) => new Promise((wake) => setTimeout(wake, ms));

const newKey = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** @param {Wish} wish */
function form({ images = [], ...fields }) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value === undefined || value === null) continue;
    body.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  for (const image of images) body.append("images", image, /** @type {File} */ (image).name || "image");
  return body;
}

/** What the service said no with. @param {Response} response @param {any} problem */
function refusal(response, problem) {
  const { status, headers } = response;
  const retryAfter = Number(headers.get("Retry-After")) || undefined;
  const detail = problem?.detail ?? `The service answered ${status}.`;
  return new StagecastError(problem?.code ?? `http_${status}`, detail, {
    status, retryAfter, field: problem?.errors?.[0]?.field,
  });
}

/**
 * The service by HTTP.
 *
 * @param {ApiOptions} [options]
 */
export function api({ url = "", userId, token, service = false } = {}) {
  const origin = url.replace(/\/+$/, "");
  const tokens = wallet(token);

  async function identity() {
    const bearer = await tokens.get();
    /** @type {Record<string, string>} */ const headers = bearer ? { Authorization: `Bearer ${bearer}` } : {};
    if (userId !== undefined && (!bearer || service)) {
      // A header takes bytes, not characters: the user id goes as UTF-8.
      headers["X-User-Id"] = String.fromCharCode(...new TextEncoder().encode(String(userId)));
    }
    return headers;
  }

  /**
   * The JSON that the service answers with; undefined where it has none.
   *
   * @param {string} method @param {string} path @param {RequestInit} [options] @returns {Promise<any>}
   */
  async function call(method, path, options = {}) {
    for (let renewed = false; ; renewed = true) {
      const headers = { .../** @type {Record<string, string>} */ (options.headers), ...(await identity()) };
      let response, text;
      try {
        response = await fetch(origin + path, { ...options, method, headers });
        text = await response.text();
      } catch (cause) {
        throw new StagecastError("network", "The service does not answer. Please try again.", { cause });
      }
      let answer;
      try { answer = text ? JSON.parse(text) : undefined; } catch {} // No answer of the service's own.
      if (response.ok && (answer || !text)) return answer;
      const problem = refusal(response, answer);
      if (renewed || !tokens.renewable || !STALE.includes(problem.code)) throw problem;
      tokens.drop();
    }
  }

  /** @param {number} attempts @param {string} path @param {RequestInit} options @returns {Promise<any>} */
  async function insist(attempts, path, options) {
    for (let attempt = 1; ; attempt++) {
      try {
        return await call("POST", path, options);
      } catch (error) {
        const lost = error instanceof StagecastError && (error.code === "network" || GATEWAY.includes(error.status));
        if (!lost || attempt >= attempts) throw error;
      }
      await sleep(125 * 2 ** attempt);
    }
  }

  const quick = (/** @type {string} */ method, /** @type {string} */ path, /** @type {RequestInit} */ options = {}) =>
    call(method, path, { signal: AbortSignal.timeout?.(ANSWER), ...options });
  const one = (/** @type {string} */ id) => `/generations/${encodeURIComponent(id)}`;
  const query = (/** @type {Record<string, any>} */ values) =>
    new URLSearchParams(Object.entries(values).filter(([, value]) => value !== undefined)).toString();

  return {
    call,
    tokens,

    /**
     * @param {"edit" | "generate"} kind @param {Wish} wish @param {StartOptions} [options]
     * @returns {Promise<Generation>}
     */
    async start(kind, wish, { idempotencyKey = newKey(), attempts = ATTEMPTS, runner } = {}) {
      const path = `/generations/${kind}${runner ? `?${query({ runner })}` : ""}`;
      return insist(attempts, path, { body: form(wish), headers: { "Idempotency-Key": idempotencyKey } });
    },

    /** @param {string} id @returns {Promise<"cancelled" | "already_finished">} */
    cancel: async (id) => (await quick("POST", `${one(id)}/cancel`)).outcome,

    /** @param {string} id @returns {Promise<void>} */
    remove: (id) => quick("DELETE", one(id)),

    /** @param {string} id @returns {Promise<Generation>} */
    generation: (id) => quick("GET", one(id)),

    /** @param {string} id @param {number} [after] a sequence @returns {Promise<StagecastEvent[]>} */
    async history(id, after = 0) {
      const { events } = await quick("GET", `${one(id)}/events?${query({ after })}`);
      return events.map((/** @type {any} */ { data }) => data);
    },

    /** @param {{status?: "active" | "finished", before?: string, limit?: number}} [which] @returns {Promise<Page>} */
    list: (which = {}) => quick("GET", `/generations?${query(which)}`),

    /**
     * A page of the user's feed; where the cursor is of no use, `generations` instead of events.
     *
     * @param {string} [after] a cursor @param {number} [limit] @param {AbortSignal} [signal]
     * @returns {Promise<{recovered: boolean, cursor: string, events?: {event: string, data: StagecastEvent}[],
     *   generations?: Generation[]}>}
     */
    feed: (after, limit, signal) => quick("GET", `/events?${query({ after, limit })}`, signal && { signal }),

    /** @returns {Promise<{userId: string, credit?: number}>} */
    me: () => quick("GET", "/me"),

    /** @returns {Promise<Record<"edit" | "generate", any[]>>} */
    stages: () => quick("GET", "/stages"),

    /**
     * For services: moves a generation that was started with `runner: "external"`. If the network fails it is sent
     * again, which moves nothing twice.
     *
     * @param {string} id @param {{status: string, [fact: string]: any}} transition @returns {Promise<StagecastEvent>}
     */
    transition: (id, transition) => insist(ATTEMPTS, `${one(id)}/transitions`, {
      body: JSON.stringify(transition), headers: { "Content-Type": "application/json" },
    }),
  };
}

// ---- One user ------------------------------------------------------------------------------------------------------

/**
 * What is known of a generation, and the sequence of the last event told of it: a snapshot may be ahead of that.
 * Events up to `past` had happened when the service told how things stand, and say nothing of the balance now.
 *
 * @typedef {{generation?: Generation, heard?: number, past: number, wanted: number, filling: boolean}} Known
 */

/**
 * Watches one user's feed, until `end`.
 *
 * @param {ApiOptions & LiveOptions & Who} options
 * @param {(name: string, ...values: any[]) => void} tellAll
 */
function watch(options, tellAll) {
  const { io, url, socket: socketOptions, pollEvery = AGAIN } = options;
  const http = api(options);
  const { tokens } = http;
  /** @type {Map<string, Known>} */ const known = new Map();
  /** What has to come in before it is caught up: sequences. @type {Map<string, number>} */ const awaited = new Map();
  /** @type {any} */ let socket;
  /** @type {State} */ let state = "connecting";
  /** @type {string | undefined} */ let reason;
  /** @type {Generation[] | undefined} */ let sorted;
  /** @type {number | undefined} */ let credit;
  let userId = options.userId === undefined ? undefined : String(options.userId);
  let cursor = options.cursor;
  let first = true; // The service has not yet told how things stand.
  let elsewhere = false; // The cursor is from another process: what came before it is not known here.
  let away = false; // Events that come now come late.
  let missed = 0;
  let whole = true; // Nothing was lost while away.
  let tidings = 0; // How often the balance was told: an answer that was asked for before that is out of date.
  let failures = 0;
  let halted = false; // By `cut` or a refusal: nothing is tried.
  let over = false;
  /** @type {any} */ let renewal;
  /** @type {any} */ let retrial;
  /** @type {{timer?: any, request?: AbortController} | undefined} */ let polling;
  /** @type {any} */ let checking; // The timer or the answer that a check waits for.
  let checked = -CHECK_EVERY; // When the last check began.

  const tell = (/** @type {string} */ name, /** @type {any[]} */ ...values) => over || tellAll(name, ...values);

  /** @param {State} to @param {string} [why] */
  function move(to, why) {
    if (over || (state === to && reason === why)) return;
    [state, reason] = [to, why];
    tell("state", to, why);
  }

  function changed() {
    sorted = undefined;
    tell("change");
  }

  // -- What is known

  /** @param {string} id @returns {Known} */
  function entryOf(id) {
    const entry = known.get(id) ?? { past: 0, wanted: 0, filling: false };
    known.set(id, entry);
    return entry;
  }

  /** Takes snapshots, unless more is known. @param {...Generation} snapshots */
  function take(...snapshots) {
    for (const snapshot of snapshots) {
      const entry = entryOf(snapshot.generationId);
      entry.generation = reduce(entry.generation, snapshot);
    }
    changed();
  }

  /** @param {string} id */
  function forget(id) {
    if (known.delete(id)) changed();
    reached(id, Infinity);
  }

  /** An event came in, live or replayed. @param {StagecastEvent} event @param {unknown} [place] the cursor behind it */
  function hear(event, place) {
    if (over) return;
    if (typeof place === "string") cursor = place;
    const entry = entryOf(event.generationId);
    entry.heard ??= elsewhere ? event.sequence - 1 : 0;
    if (event.sequence <= entry.heard) return;
    if (event.sequence > entry.heard + 1 || isGap(entry.generation, event)) return fill(event);
    apply(entry, event);
    if ("credit" in event && event.sequence > entry.past) setCredit(event.credit);
  }

  /** @param {Known} entry @param {StagecastEvent} event the next one */
  function apply(entry, event) {
    const before = entry.generation;
    entry.generation = reduce(before, event);
    if (event.sequence > (entry.heard ?? 0)) {
      entry.heard = event.sequence;
      if (away) missed++;
      tell("event", event, entry.generation);
    }
    if (entry.generation !== before) changed();
    reached(event.generationId, event.sequence);
  }

  /** Asks for the events that are missing before this one, until they are there. @param {StagecastEvent} event */
  async function fill({ generationId, sequence }) {
    const entry = entryOf(generationId);
    entry.wanted = Math.max(entry.wanted, sequence);
    if (entry.filling) return;
    entry.filling = true;
    const missing = () => !over && known.get(generationId) === entry && (entry.heard ?? 0) < entry.wanted;
    while (missing()) {
      try {
        const after = Math.min(entry.heard ?? 0, entry.generation?.sequence ?? 0);
        for (const event of await http.history(generationId, after)) if (!over) apply(entry, event);
      } catch (error) {
        if (/** @type {StagecastError} */ (error).code === "not_found") forget(generationId);
      }
      if (missing()) await sleep(AGAIN);
    }
    entry.filling = false;
    refreshCredit();
  }

  /** @param {number | undefined} balance */
  function setCredit(balance) {
    tidings++;
    if (balance === credit) return;
    credit = balance;
    tell("change");
  }

  async function refreshCredit() {
    const asked = tidings;
    const me = await http.me().catch(() => undefined);
    if (me && !over && asked === tidings) setCredit(me.credit);
  }

  // -- Being away, and being back

  /**
   * The service has told how things stand: what is not among that is gone, unless it goes on from the cursor.
   * Returns up to which sequences events are on their way.
   *
   * @param {{recovered: boolean, cursor: string, generations: Generation[]}} answer
   */
  function stand({ recovered, cursor: place, generations }) {
    if (first) elsewhere = recovered;
    if (!recovered) {
      const ids = new Set(generations.map(({ generationId }) => generationId));
      for (const id of known.keys()) if (!ids.has(id)) known.delete(id);
    }
    whole &&= recovered;
    cursor = place;
    const coming = /** @type {[string, number][]} */ ([]);
    for (const snapshot of generations) {
      const { generationId: id, sequence } = snapshot;
      const { heard, generation } = known.get(id) ?? {};
      // Of what had finished before, no events come.
      const ended = recovered ? heard === undefined && generation && isFinished(generation) : isFinished(snapshot);
      if (!ended && (heard ?? 0) < sequence) coming.push([id, sequence]);
      if (!recovered) entryOf(id).past = sequence;
    }
    first = false;
    take(...generations);
    refreshCredit();
    return coming;
  }

  /** This generation's events up to this one are here. @param {string} id @param {number} sequence */
  function reached(id, sequence) {
    if (sequence >= (awaited.get(id) ?? Infinity) && awaited.delete(id) && !awaited.size) current("live");
  }

  /** Nothing is missing any more. @param {"live" | "polling"} how */
  function current(how) {
    const caughtUp = away && { missed, recovered: whole };
    [away, missed, whole] = [false, 0, true];
    awaited.clear();
    clearTimeout(retrial);
    move(how);
    if (caughtUp) tell("caughtUp", caughtUp);
  }

  function lost() {
    if (state === "live" || state === "polling") away = true;
    awaited.clear();
    clearTimeout(retrial);
    move("offline");
  }

  /** @param {string} code */
  function refuse(code) {
    halt();
    socket?.disconnect();
    move("refused", code);
  }

  function halt() {
    halted = true;
    clearTimeout(retrial);
    stopPolling();
  }

  // -- By socket

  function plug() {
    const [, origin, path] = /** @type {RegExpExecArray} */ (/^(\w+:\/\/[^/]*)?(.*?)\/*$/.exec(url ?? ""));
    // It comes back by WebSocket, if it had one: a request could be put on an idle connection that is dead as well.
    const defaults = { path: `${path}/socket.io`, rememberUpgrade: true, requestTimeout: XHR_TIMEOUT };
    socket = io(origin || undefined, { ...defaults, ...socketOptions, forceNew: true });
    socket.on("connect", () => {
      failures = 0;
      stopPolling();
      if (away) move("catching up");
      else if (state !== "polling") move("connecting");
      authenticate();
    });
    socket.on("disconnect", () => halted || over || lost());
    socket.on("connect_error", (/** @type {any} */ error) => {
      if (halted || over) return;
      if (error.data?.code) return refuse(error.data.code);
      if (!polling) lost();
      if (++failures >= PATIENCE) poll();
    });
    // Who is to authenticate, because the token has ended, is cut off, comes back, and is asked then.
    for (const name of EVENTS) socket.on(name, hear);
  }

  /** Says who is watching, and from where on; to the user it has already it proves itself anew. */
  async function authenticate({ renewing = false, renewed = false } = {}) {
    const { id } = socket;
    const stale = () => over || halted || !socket.connected || socket.id !== id;
    const again = () => {
      clearTimeout(retrial);
      retrial = setTimeout(() => stale() || authenticate({ renewing }), AGAIN);
    };
    let token;
    try { token = await tokens.get(); } catch { return stale() || again(); }
    if (stale()) return;
    const who = { userId, token, cursor };
    socket.timeout(ACK).emit("authenticate", who, (/** @type {unknown} */ silence, /** @type {any} */ ack) => {
      if (stale()) return;
      if (silence) return socket.io.engine.close(); // It comes back by itself.
      if (ack.code === "unavailable") return again();
      if (STALE.includes(ack.code) && tokens.renewable && !renewed) {
        tokens.drop();
        return authenticate({ renewing, renewed: true });
      }
      if (ack.ok) renewBefore(ack.expiresAt);
      if (renewing) return; // Refused or not: it is heard until its time is over.
      if (!ack.ok) return refuse(ack.code);
      userId = ack.userId;
      const coming = stand(ack);
      if (stale()) return;
      if (!away || !coming.length) return current("live");
      for (const [generation, sequence] of coming) awaited.set(generation, sequence);
      move("catching up");
      // What was deleted in this very moment never comes in.
      retrial = setTimeout(() => current("live"), ACK);
    });
  }

  function renewBefore(/** @type {string | undefined} */ expiresAt) {
    clearTimeout(renewal);
    const left = Date.parse(expiresAt ?? "") - Date.now();
    if (!tokens.renewable || !(left > 0)) return; // By a clock that is wrong nothing is timed: the service tells.
    renewal = setTimeout(() => {
      tokens.drop();
      if (socket.connected) authenticate({ renewing: true });
    }, Math.min(left - Math.min(60_000, left / 2), 2 ** 31 - 1));
  }

  // -- By polling

  function poll() {
    if (!polling) look((polling = {}));
  }

  function stopPolling() {
    clearTimeout(polling?.timer);
    polling?.request?.abort();
    polling = undefined;
  }

  async function look(/** @type {NonNullable<typeof polling>} */ mine) {
    const given = () => over || polling !== mine;
    const request = (mine.request = new AbortController());
    mine.timer = setTimeout(() => request.abort(), ANSWER);
    let wait = pollEvery;
    try {
      const page = await http.feed(cursor, PAGE, request.signal);
      // A cursor tells what is new, but not what there was.
      const snapshots = page.generations ?? (first ? (await http.list()).generations : undefined);
      if (given()) return;
      if (snapshots) stand({ ...page, generations: snapshots });
      if (away && page.events?.length) move("catching up");
      for (const { data } of page.events ?? []) hear(data);
      if (given()) return;
      cursor = page.cursor;
      if (page.events?.length === PAGE) wait = 0;
      else current("polling");
    } catch (error) {
      if (given()) return;
      const { status, code } = /** @type {StagecastError} */ (error);
      if ([401, 403, 422].includes(status)) return refuse(code);
      lost();
    }
    if (given()) return;
    clearTimeout(mine.timer);
    mine.timer = setTimeout(look, wait, mine);
  }

  function cut() {
    if (halted || over) return;
    halt();
    socket?.io.disconnect(); // The transport; not `socket.disconnect()`, which says goodbye.
    lost();
  }

  const resume = () => (socket ? socket.connect() : io ? plug() : poll());

  /** Replaces the transport; the new connection recovers what the old one missed. */
  function restart() {
    if (over) return;
    cut();
    halted = false;
    failures = 0;
    move(away ? "offline" : "connecting");
    resume();
  }

  // -- Checking a connection that may have died unnoticed

  /** Checks the connection soon. Signals that come together cause one check. */
  function check() {
    if (over || halted || checking !== undefined) return;
    checking = setTimeout(checkNow, Math.max(0, checked + CHECK_EVERY - performance.now()));
  }

  function checkNow() {
    checked = performance.now();
    const { id } = socket ?? {};
    const done = (/** @type {unknown} */ dead, same = socket?.id === id) => {
      checking = undefined;
      if (dead && same && !halted) restart();
    };
    if (over || halted) return done(false);
    if (socket?.connected) {
      // The service answers an event that it does not know with "bad_request": a check costs it nothing.
      return socket.timeout(CHECK_TIMEOUT).emit("probe", (/** @type {unknown} */ silence) => done(silence));
    }
    if (state === "offline") return done(true);
    if (!polling) return done(false); // The first connection is on its way.
    stopPolling();
    const mine = (polling = {});
    Promise.race([look(mine), sleep(CHECK_TIMEOUT).then(() => true)]).then((late) => done(late, polling === mine));
  }

  const stopListening = onWake(check, () => halted || restart());

  // A listener that is added right behind `connect` hears of everything.
  queueMicrotask(() => over || halted || resume());

  return {
    http, take, forget,
    /** @returns {readonly Generation[]} */
    get generations() {
      return sorted ??= [...known.values()].flatMap(({ generation }) => generation ?? []).sort(newestFirst);
    },
    get: (/** @type {string} */ id) => known.get(id)?.generation,
    get state() { return state; },
    get reason() { return reason; },
    get credit() { return credit; },
    get cursor() { return cursor; },
    get userId() { return userId; },
    cut,
    restore() {
      if (halted || state === "offline") restart();
    },
    end() {
      over = true;
      state = "closed";
      for (const timer of [renewal, retrial, checking]) clearTimeout(timer);
      stopListening();
      stopPolling();
      socket?.disconnect();
    },
  };
}

/**
 * Calls `check` when the page may have slept or changed networks, and `drop` when the network is gone. In Node there
 * is nothing to listen to.
 *
 * @param {() => void} check @param {() => void} drop @returns {() => void} ends it
 */
function onWake(check, drop) {
  const world = /** @type {any} */ (globalThis);
  if (!world.addEventListener) return () => {};
  const page = world.document ?? world;
  const shown = () => page.hidden || check();
  let ticked = Date.now();
  const clock = setInterval(() => {
    const [before, now] = [ticked, (ticked = Date.now())];
    if (Math.abs(now - before) > SLEPT) shown();
  }, 1_000);
  const signals = /** @type {[any, string, () => void][]} */ ([
    [page, "visibilitychange", shown], [page, "resume", check], [world, "pageshow", check], [world, "focus", check],
    [world, "online", check], [world, "offline", drop],
  ]);
  for (const [target, name, listener] of signals) target.addEventListener(name, listener);
  return () => {
    clearInterval(clock);
    for (const [target, name, listener] of signals) target.removeEventListener(name, listener);
  };
}

/** @param {Generation} one @param {Generation} other */
function newestFirst(one, other) {
  const [a, b] = [one, other].map(({ createdAt, generationId }) => `${createdAt} ${generationId}`);
  return a < b ? 1 : -1;
}

// ---- The client ----------------------------------------------------------------------------------------------------

/**
 * @param {ApiOptions & LiveOptions & Who} [options]
 */
export function connect(options = {}) {
  /** @type {Map<string, Set<Function>>} */ const listeners = new Map();
  const tell = (/** @type {string} */ name, /** @type {any[]} */ ...values) => {
    for (const listener of [...(listeners.get(name) ?? [])]) {
      // A listener that throws is its author's affair, and stops nothing here.
      try { listener(...values); } catch (error) { queueMicrotask(() => { throw error; }); }
    }
  };
  const { io = /** @type {any} */ (globalThis).io } = options;
  const begin = (/** @type {Who} */ { token, userId = token === undefined ? "demo" : undefined, cursor }) =>
    watch({ ...options, io, token, userId, cursor }, tell);
  let session = begin(options);

  /**
   * What has answered "not found" is no longer shown.
   *
   * @template T @param {string} id @param {(http: ReturnType<typeof api>) => Promise<T>} ask @returns {Promise<T>}
   */
  async function about(id, ask) {
    const { http, forget } = session;
    try {
      return await ask(http);
    } catch (error) {
      if (error instanceof StagecastError && error.code === "not_found") forget(id);
      throw error;
    }
  }

  /** @type {(name: string, listener: Function) => void} */
  const off = (name, listener) => void listeners.get(name)?.delete(listener);

  return {
    get generations() { return session.generations; },
    get state() { return session.state; },
    get reason() { return session.reason; },
    get credit() { return session.credit; },
    get cursor() { return session.cursor; },
    get userId() { return session.userId; },
    /** The HTTP part, as the present user. */
    get http() { return session.http; },
    get: (/** @type {string} */ id) => session.get(id),

    /** @type {{(name: "change", listener: () => void): () => void;
     *   (name: "event", listener: (event: StagecastEvent, generation: Generation) => void): () => void;
     *   (name: "state", listener: (state: State, reason?: string) => void): () => void;
     *   (name: "caughtUp", listener: (told: CaughtUp) => void): () => void}} */
    on(/** @type {string} */ name, /** @type {Function} */ listener) {
      listeners.set(name, (listeners.get(name) ?? new Set()).add(listener));
      return () => off(name, listener);
    },
    off,

    /** @param {"edit" | "generate"} kind @param {Wish} wish @param {StartOptions} [how] */
    async start(kind, wish, how) {
      const { http, take } = session;
      const snapshot = await http.start(kind, wish, how);
      take(snapshot);
      return snapshot;
    },
    cancel: (/** @type {string} */ id) => about(id, (http) => http.cancel(id)),
    /** @param {string} id */
    async remove(id) {
      const { forget } = session;
      await about(id, (http) => http.remove(id));
      forget(id);
    },
    history: (/** @type {string} */ id, after = 0) => about(id, (http) => http.history(id, after)),
    /** @param {string} [before] @param {number} [limit] @returns {Promise<Page>} */
    async older(before, limit) {
      const { http, take } = session;
      const page = await http.list({ before, limit });
      take(...page.generations);
      return page;
    },
    me: () => session.http.me(),
    stages: () => session.http.stages(),

    /** @param {Who} who */
    switchUser(who) {
      session.end();
      session = begin(who);
      tell("state", session.state);
      tell("change");
    },
    cut: () => session.cut(),
    restore: () => session.restore(),
    close() {
      session.end();
      tell("state", session.state);
    },
  };
}

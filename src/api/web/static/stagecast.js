/**
 * Stagecast's client: shows one user's generations live, in a browser or in Node.
 *
 *     import { connect } from "/static/stagecast.js";
 *     const stagecast = connect({ io });                    // `io` of socket.io-client; without it the client polls
 *     stagecast.on("change", () => render(stagecast.generations));
 *     await stagecast.start("edit", { prompt: "a red hat", images: [file] });
 *
 * Properties, all read-only:
 *
 *     generations   the user's generations, newest first: a new array after each change, and a new object for each
 *                   generation that changed
 *     get(id)       one generation
 *     credit        the balance; undefined while it is not known, or if the service keeps no balances
 *     userId        the user; with a token: known once the service has confirmed it
 *     state         "connecting"   the first connection is being made
 *                   "live"         events arrive as they happen
 *                   "catching up"  connected again; missed events are arriving
 *                   "polling"      no socket can be opened; events arrive up to `pollEvery` late
 *                   "offline"      the service cannot be reached; the client keeps trying, except after `cut`
 *                   "refused"      the user or the token was rejected, `reason` is the code; see `restore`
 *                   "closed"
 *     reason        the code of the rejection
 *     cursor        the position in the user's feed: `connect({cursor})` resumes from it, also in another process
 *
 * Events. `on(name, listener)` returns a function that removes the listener, as `off(name, listener)` does:
 *
 *     "change"      ()                     generations or credit have changed
 *     "event"       (event, generation)    each event once, in the order of `sequence`, beginning with the past events
 *                                          of running generations. If `event.sequence` is below
 *                                          `generation.sequence`, a snapshot with a newer state came first
 *     "removed"     (generationId)         deleted, here or on another device, or by the end of retention
 *     "state"       (state, reason)
 *     "caughtUp"    ({missed, recovered})  connected again after being offline: the number of events that came late.
 *                                          `recovered: false`: the history is gone (a restart, retention), and
 *                                          `generations` is what the service has now
 *
 * Methods. Those that send a request reject with a `StagecastError` if the service refuses it or does not answer:
 *
 *     start(kind, request, {idempotencyKey, attempts, runner})
 *                           returns the generation. After a network error the request is sent again with the same
 *                           key, so that it starts only one generation. Pass your own key to retry later yourself
 *     cancel(id)            "cancelled" or "already_finished"
 *     remove(id)            deletes a finished generation permanently
 *     history(id, after)    its events
 *     older(before, limit)  `{generations, next}`: a page of the list, which is also added to `generations`. Omit
 *                           `before` for the first page, then pass the previous page's `next` until there is none
 *     me(), stages()        the responses of `GET /me` and `GET /stages`
 *     switchUser({userId, token, cursor})   clears everything and continues as another user
 *     cut(), restore()      drops the transport, as a lost network does, and stays offline; reconnects, also after
 *                           "refused". If the client is offline because of the network, `restore` tries at once
 *     close()               ends the client
 *
 * In a browser the client checks the connection whenever the page may have slept or changed networks
 * (`visibilitychange`, `pageshow`, `focus`, `online`, `resume`, a jump of the clock), and replaces a connection that
 * does not answer within two seconds. `offline` takes effect at once. `state` is therefore right within three seconds.
 *
 * It runs in the browsers that `docs/browsers.md` lists, and in Node 20 or later.
 *
 * `api(options)` is the HTTP part alone, and also has `call`, `list`, `feed` and `transition`.
 * `reduce(generation, update)` is the pure reducer.
 *
 * @typedef {{generationId: string, kind: "edit" | "generate", sequence: number, status: string, message: string,
 *   progress: number, metadata?: Record<string, any>, inputImage?: string, compositionUrl?: string,
 *   previewUrl?: string, editedImageUrl?: string, generatedImageUrl?: string, faceSwapUrl?: string,
 *   faceSwapError?: {code: string, message: string}, error?: string, code?: string, failedStage?: string,
 *   input?: {prompt: string, [field: string]: any},
 *   retryable?: boolean}} CommonFields The fields that events and generations share.
 * @typedef {CommonFields & {occurredAt: string, credit?: number}} StagecastEvent One event of the log.
 * @typedef {CommonFields & {createdAt: string, updatedAt: string, expiresAt?: string, userId?: string,
 *   queuePosition?: number}} Generation
 *   The state after its events. `userId` and `expiresAt` are only in snapshots from the service. `queuePosition` is its
 *   place in line while it waits for a worker: 1 is next.
 *
 * @typedef {"connecting" | "live" | "catching up" | "polling" | "offline" | "refused" | "closed"} State
 * @typedef {string | (() => string | Promise<string>)} Token A function is called whenever a new token is needed.
 * @typedef {{userId?: string | number, token?: Token, cursor?: string}} Identity
 *   `token` if the service has a key configured. Otherwise `userId`, by default "demo".
 * @typedef {{url?: string, userId?: string | number, token?: Token, service?: boolean}} ApiOptions
 *   `url`: the service's URL, including its path if it has one; by default the page's own origin. `service`: the token
 *   is a service token, and acts for `userId`.
 * @typedef {{io?: any, socket?: Record<string, any>, pollEvery?: number}} LiveOptions
 *   `io`: by default the global `io`; null: poll. `socket`: further options for `io`. `pollEvery`: milliseconds.
 * @typedef {{prompt?: string, images?: Blob[], imageNames?: string[], imageUrls?: string[], faceSwap?: boolean, face?: number,
 *   metadata?: Record<string, any>, quality?: string, background?: string, aspectRatio?: string,
 *   inputFidelity?: string}} GenerationRequest
 * @typedef {{idempotencyKey?: string, attempts?: number, runner?: "external"}} StartOptions
 * @typedef {{generations: Generation[], next?: string}} Page
 * @typedef {{missed: number, recovered: boolean}} CaughtUp
 */

const EVENTS = ["generation_started", "continue", "generation_completed", "generation_failed"];
/** How many finished generations a snapshot of the service contains: the newest ones. */
const RECENT = 20;
/** Error codes for which a new token is requested, once. */
const TOKEN_ERRORS = ["unauthenticated", "invalid_token", "token_expired"];
/** Statuses that a gateway sends when it gets no response from the service. */
const GATEWAY_ERRORS = [502, 504];
/** Consecutive failed connections after which the client polls until a socket opens. */
const FAILURES_BEFORE_POLLING = 3;
/** Attempts of a POST that gets no response. */
const MAX_ATTEMPTS = 6;
/** Events per page while polling. */
const PAGE_SIZE = 200;
/** Generations per page of the list. */
const MAX_LISTED = 100;
// Milliseconds from here on.
const RETRY_DELAY = 2_000;
const ACK_TIMEOUT = 10_000;
const RESPONSE_TIMEOUT = 30_000;
/** A connection that has not answered a check after this time is dead. */
const CHECK_TIMEOUT = 2_000;
/** The shortest time between two checks. */
const CHECK_INTERVAL = 500;
/** A larger jump of the clock means that the machine has slept. */
const CLOCK_JUMP = 5_000;
/** Longer than the service's long poll; a stalled XHR occupies one of the browser's few connections. */
const XHR_TIMEOUT = 35_000;

// ---- The reducer ---------------------------------------------------------------------------------------------------

/** Whether the generation has reached a terminal status. @param {{status: string}} generation */
export const isFinished = ({ status }) => status === "completed" || status === "failed";

/**
 * The generation after an event or a snapshot. An event that is old or arrives too early (`isGap`), and a snapshot that
 * is old, change nothing: the result is then `generation` itself. After `generation_removed` it is undefined, and
 * `queue_position` changes only a generation that has not left its first stage.
 *
 * @param {Generation | undefined} generation as far as it is known
 * @param {StagecastEvent | Generation | {generationId: string, queuePosition?: number}} update
 * @returns {Generation | undefined}
 */
export function reduce(generation, update) {
  const { queuePosition, ...known } = generation ?? {};
  if (!("sequence" in update)) {
    if (update.queuePosition === undefined) return undefined;
    const moved = generation?.sequence === 1 && update.queuePosition !== queuePosition;
    return moved ? { ...generation, queuePosition: update.queuePosition } : generation;
  }
  if ("updatedAt" in update) {
    if (generation && update.sequence < generation.sequence) return generation;
    // Acks and the feed omit the input.
    if (generation?.sequence !== update.sequence) return { ...generation?.input && { input: generation.input }, ...update };
    const same = update.queuePosition === queuePosition && Object.keys(update).every((key) => key in generation);
    return same ? generation : { ...known, ...update };
  }
  if (generation && update.sequence <= generation.sequence) {
    return generation.input || !update.input ? generation : { ...generation, input: update.input };
  }
  if (isGap(generation, update)) return generation;
  const { occurredAt, credit, ...fields } = update;
  return { ...known, ...fields, createdAt: generation?.createdAt ?? occurredAt, updatedAt: occurredAt };
}

/**
 * Whether events are missing between the generation as it is known and this event.
 *
 * @param {Generation | undefined} generation @param {{sequence: number}} event
 */
export const isGap = (generation, event) => event.sequence > (generation?.sequence ?? 0) + 1;

// ---- HTTP ----------------------------------------------------------------------------------------------------------

/** The service refused a request (`status` is HTTP's), or did not answer (`code` is "network", `status` 0). */
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

/** Keeps the current token. After `clear` the next `get` asks for a new one. @param {Token | undefined} source */
function tokenCache(source) {
  /** @type {Promise<string> | undefined} */ let cached;
  return {
    renewable: typeof source === "function",
    /** @returns {Promise<string | undefined>} */
    get() {
      if (typeof source !== "function") return Promise.resolve(source);
      if (cached) return cached;
      const pending = Promise.resolve().then(source);
      pending.catch(() => (cached = undefined));
      return (cached = pending);
    },
    clear: () => (cached = undefined),
  };
}

const sleep = (/** @type {number} */ ms) => new Promise((resolve) => setTimeout(resolve, ms));

const newKey = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** @param {GenerationRequest} request */
function toFormData({ images = [], ...fields }) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value === undefined || value === null) continue;
    body.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  for (const image of images) body.append("images", image, /** @type {File} */ (image).name || "image");
  return body;
}

/** The error for a response. @param {Response} response @param {any} problem its JSON body, if it has one */
function toError(response, problem) {
  const { status, headers } = response;
  const retryAfter = Number(headers.get("Retry-After")) || undefined;
  const detail = problem?.detail ?? `The service answered ${status}.`;
  return new StagecastError(problem?.code ?? `http_${status}`, detail, {
    status, retryAfter, field: problem?.errors?.[0]?.field,
  });
}

/**
 * The service's HTTP API.
 *
 * @param {ApiOptions} [options]
 */
export function api({ url = "", userId, token, service = false } = {}) {
  const origin = url.replace(/\/+$/, "");
  const tokens = tokenCache(token);

  async function authHeaders() {
    const bearer = await tokens.get();
    /** @type {Record<string, string>} */ const headers = bearer ? { Authorization: `Bearer ${bearer}` } : {};
    if (userId !== undefined && (!bearer || service)) {
      // `fetch` takes header values as one character per byte: encode the user id as UTF-8.
      headers["X-User-Id"] = String.fromCharCode(...new TextEncoder().encode(String(userId)));
    }
    return headers;
  }

  /**
   * Sends a request and returns the JSON body of the response; undefined if it has none.
   *
   * @param {string} method @param {string} path @param {RequestInit} [options] @returns {Promise<any>}
   */
  async function call(method, path, options = {}) {
    for (let renewed = false; ; renewed = true) {
      const headers = { .../** @type {Record<string, string>} */ (options.headers), ...(await authHeaders()) };
      let response, text;
      try {
        response = await fetch(origin + path, { ...options, method, headers });
        text = await response.text();
      } catch (cause) {
        throw new StagecastError("network", "The service does not answer. Please try again.", { cause });
      }
      let body;
      try { body = text ? JSON.parse(text) : undefined; } catch {} // Not a response of Stagecast.
      if (response.ok && (body || !text)) return body;
      const error = toError(response, body);
      if (renewed || !tokens.renewable || !TOKEN_ERRORS.includes(error.code)) throw error;
      tokens.clear();
    }
  }

  /**
   * Sends a POST, and sends it again after network errors. The request must be idempotent.
   *
   * @param {number} attempts @param {string} path @param {RequestInit} options @returns {Promise<any>}
   */
  async function retryPost(attempts, path, options) {
    for (let attempt = 1; ; attempt++) {
      try {
        return await call("POST", path, options);
      } catch (error) {
        if (!(error instanceof StagecastError) || attempt >= attempts) throw error;
        if (error.code !== "network" && !GATEWAY_ERRORS.includes(error.status)) throw error;
      }
      await sleep(125 * 2 ** attempt);
    }
  }

  /** `call` with a timeout. */
  const request = (/** @type {string} */ method, /** @type {string} */ path, /** @type {RequestInit} */ options = {}) =>
    call(method, path, { signal: AbortSignal.timeout?.(RESPONSE_TIMEOUT), ...options });
  const pathOf = (/** @type {string} */ id) => `/generations/${encodeURIComponent(id)}`;
  const query = (/** @type {Record<string, any>} */ values) =>
    new URLSearchParams(Object.entries(values).filter(([, value]) => value !== undefined)).toString();

  return {
    call,
    tokens,

    /**
     * @param {"edit" | "generate"} kind @param {GenerationRequest} fields @param {StartOptions} [options]
     * @returns {Promise<Generation>}
     */
    async start(kind, fields, { idempotencyKey = newKey(), attempts = MAX_ATTEMPTS, runner } = {}) {
      const path = `/generations/${kind}${runner ? `?${query({ runner })}` : ""}`;
      return retryPost(attempts, path, { body: toFormData(fields), headers: { "Idempotency-Key": idempotencyKey } });
    },

    /** @param {string} id @returns {Promise<"cancelled" | "already_finished">} */
    cancel: async (id) => (await request("POST", `${pathOf(id)}/cancel`)).outcome,

    /** @param {string} id @returns {Promise<void>} */
    remove: (id) => request("DELETE", pathOf(id)),

    /** @param {string} id @returns {Promise<Generation>} */
    generation: (id) => request("GET", pathOf(id)),

    /** @param {string} id @param {number} [after] a sequence @returns {Promise<StagecastEvent[]>} */
    async history(id, after = 0) {
      const { events } = await request("GET", `${pathOf(id)}/events?${query({ after })}`);
      return events.map((/** @type {any} */ { data }) => data);
    },

    /** @param {{status?: "active" | "finished", before?: string, limit?: number}} [filter] @returns {Promise<Page>} */
    list: (filter = {}) => request("GET", `/generations?${query(filter)}`),

    /**
     * A page of the user's feed; if the cursor is missing or unusable, `generations` instead of `events`.
     *
     * @param {string} [after] a cursor @param {number} [limit] @param {AbortSignal} [signal]
     * @returns {Promise<{recovered: boolean, cursor: string, events?: {event: string, data: StagecastEvent}[],
     *   generations?: Generation[]}>}
     */
    feed: (after, limit, signal) => request("GET", `/events?${query({ after, limit })}`, signal && { signal }),

    /** @returns {Promise<{userId: string, credit?: number}>} */
    me: () => request("GET", "/me"),

    /** @returns {Promise<Record<"edit" | "generate", any[]>>} */
    stages: () => request("GET", "/stages"),

    /**
     * For services: reports a stage of a generation that was started with `runner: "external"`. After a network error
     * the request is sent again; the stage is entered only once.
     *
     * @param {string} id @param {{status: string, [field: string]: any}} transition @returns {Promise<StagecastEvent>}
     */
    transition: (id, transition) => retryPost(MAX_ATTEMPTS, `${pathOf(id)}/transitions`, {
      body: JSON.stringify(transition), headers: { "Content-Type": "application/json" },
    }),
  };
}

// ---- A user's session ----------------------------------------------------------------------------------------------

/**
 * What the session knows of one generation. `generation` may be ahead of `delivered`: snapshots overtake events.
 *
 * @typedef {object} Entry
 * @property {Generation} [generation]
 * @property {number} [delivered] the sequence of the last event that listeners got
 * @property {number} snapshotSequence events up to this one precede the last snapshot: their `credit` is outdated
 * @property {number} fillTo the sequence up to which missing events are requested
 * @property {boolean} filling `fillGap` is running for this generation
 */

/**
 * Follows one user's feed, by socket or by polling, until `close`.
 *
 * @param {ApiOptions & LiveOptions & Identity} options
 * @param {(name: string, ...values: any[]) => void} emit
 */
function openSession(options, emit) {
  const { io, url, socket: socketOptions, pollEvery = RETRY_DELAY } = options;
  const http = api(options);
  const { tokens } = http;
  /** @type {Map<string, Entry>} */ const entries = new Map();
  /** Removed generations: responses to earlier requests may still contain them. @type {Set<string>} */
  const removed = new Set();
  /** By generation, the sequence to receive before catching up is done. @type {Map<string, number>} */
  const pending = new Map();
  /** @type {any} */ let socket;
  /** @type {State} */ let state = "connecting";
  /** @type {string | undefined} */ let reason;
  /** @type {Generation[] | undefined} */ let sorted;
  /** @type {number | undefined} */ let credit;
  let userId = options.userId === undefined ? undefined : String(options.userId);
  let cursor = options.cursor;
  let synced = false; // A first snapshot has been applied.
  let resumed = false; // The cursor came from another process: events before it were not delivered here.
  let interrupted = false; // The connection was lost: events that arrive now count as missed.
  let missed = 0;
  let recovered = true; // No events were lost during the interruption.
  let creditVersion = 0; // Incremented with each known balance: a response to an earlier request is outdated.
  let failures = 0; // Consecutive failed connections.
  let stopped = false; // By `cut` or a rejection: do not reconnect.
  let closed = false;
  /** @type {any} */ let renewalTimer;
  /** Retries `authenticate`, or ends catching up. @type {any} */ let authTimer;
  /** The current polling loop. @type {{timer?: any, request?: AbortController} | undefined} */ let poller;
  /** The timer of a scheduled or running check. @type {any} */ let checkTimer;
  let lastCheck = -CHECK_INTERVAL;

  const notify = (/** @type {string} */ name, /** @type {any[]} */ ...values) => closed || emit(name, ...values);

  /** @param {State} newState @param {string} [newReason] */
  function setState(newState, newReason) {
    if (closed || (state === newState && reason === newReason)) return;
    [state, reason] = [newState, newReason];
    notify("state", state, reason);
  }

  function notifyChange() {
    sorted = undefined;
    notify("change");
  }

  // -- Generations and credit

  /** @param {string} id @returns {Entry} */
  function getEntry(id) {
    const entry = entries.get(id) ?? { snapshotSequence: 0, fillTo: 0, filling: false };
    entries.set(id, entry);
    return entry;
  }

  /** Stores snapshots that are newer than what is known. @param {...Generation} snapshots */
  function mergeSnapshots(...snapshots) {
    for (const snapshot of snapshots) {
      if (removed.has(snapshot.generationId)) continue;
      const entry = getEntry(snapshot.generationId);
      entry.generation = reduce(entry.generation, snapshot);
    }
    notifyChange();
  }

  /** Drops a removed generation. @param {string} id */
  function forget(id) {
    removed.add(id);
    if (entries.delete(id)) {
      notify("removed", id);
      notifyChange();
    }
    markReceived(id, Infinity);
  }

  /** Handles `queue_position`. @param {{generationId: string, queuePosition: number}} update */
  function onPosition(update) {
    const entry = entries.get(update.generationId);
    const before = entry?.generation;
    if (closed || !entry || !before) return;
    entry.generation = reduce(before, update);
    if (entry.generation !== before) notifyChange();
  }

  /** Handles a live or replayed event. @param {StagecastEvent} event @param {unknown} [newCursor] */
  function onEvent(event, newCursor) {
    if (closed) return;
    if (typeof newCursor === "string") cursor = newCursor;
    const entry = getEntry(event.generationId);
    entry.delivered ??= resumed ? event.sequence - 1 : 0;
    if (event.sequence <= entry.delivered) return;
    if (event.sequence > entry.delivered + 1 || isGap(entry.generation, event)) return fillGap(event);
    applyEvent(entry, event);
    if ("credit" in event && event.sequence > entry.snapshotSequence) setCredit(event.credit);
  }

  /** @param {Entry} entry @param {StagecastEvent} event the next one in order */
  function applyEvent(entry, event) {
    const before = entry.generation;
    entry.generation = reduce(before, event);
    if (event.sequence > (entry.delivered ?? 0)) {
      entry.delivered = event.sequence;
      if (interrupted) missed++;
      notify("event", event, entry.generation);
    }
    if (entry.generation !== before) notifyChange();
    markReceived(event.generationId, event.sequence);
  }

  /** Requests the events up to this one, until they have been delivered. @param {StagecastEvent} event */
  async function fillGap({ generationId, sequence }) {
    const entry = getEntry(generationId);
    entry.fillTo = Math.max(entry.fillTo, sequence);
    if (entry.filling) return;
    entry.filling = true;
    const incomplete = () =>
      !closed && entries.get(generationId) === entry && (entry.delivered ?? 0) < entry.fillTo;
    while (incomplete()) {
      try {
        const after = Math.min(entry.delivered ?? 0, entry.generation?.sequence ?? 0);
        for (const event of await http.history(generationId, after)) if (!closed) applyEvent(entry, event);
      } catch (error) {
        if (/** @type {StagecastError} */ (error).code === "not_found") forget(generationId);
      }
      if (incomplete()) await sleep(RETRY_DELAY);
    }
    entry.filling = false;
    refreshCredit();
  }

  /** @param {number | undefined} balance */
  function setCredit(balance) {
    creditVersion++;
    if (balance === credit) return;
    credit = balance;
    notify("change");
  }

  async function refreshCredit() {
    const version = creditVersion;
    const me = await http.me().catch(() => undefined);
    if (me && !closed && version === creditVersion) setCredit(me.credit);
  }

  // -- Connection state

  /**
   * Applies the service's snapshot. If the feed was not recovered, generations that are not in it are gone. Returns the
   * generations of which events are still to come, each with the last sequence to expect.
   *
   * @param {{recovered: boolean, cursor: string, generations: Generation[]}} snapshot
   */
  function applySnapshot(snapshot) {
    const { generations } = snapshot;
    if (!synced) resumed = snapshot.recovered;
    if (!snapshot.recovered) {
      const ids = new Set(generations.map(({ generationId }) => generationId));
      for (const id of entries.keys()) if (!ids.has(id)) entries.delete(id);
    } else if (synced) {
      for (const id of missingFrom(generations)) forget(id);
    }
    recovered &&= snapshot.recovered;
    cursor = snapshot.cursor;
    const expected = /** @type {[string, number][]} */ ([]);
    for (const latest of generations) {
      const { generationId: id, sequence } = latest;
      const { delivered, generation } = entries.get(id) ?? {};
      // The service replays nothing of generations that had finished before the cursor.
      const noReplay = snapshot.recovered
        ? delivered === undefined && generation && isFinished(generation)
        : isFinished(latest);
      if (!noReplay && (delivered ?? 0) < sequence) expected.push([id, sequence]);
      if (!snapshot.recovered) getEntry(id).snapshotSequence = sequence;
    }
    synced = true;
    mergeSnapshots(...generations);
    refreshCredit();
    return expected;
  }

  /** The finished generations that the service would list if it still had them. @param {Generation[]} listed */
  function missingFrom(listed) {
    const ids = new Set(listed.map(({ generationId }) => generationId));
    const finished = listed.filter(isFinished).map(({ createdAt }) => createdAt).sort();
    const oldest = finished.length < RECENT ? "" : finished[0];
    return [...entries.values()].flatMap(({ generation }) =>
      generation && isFinished(generation) && generation.createdAt > oldest && !ids.has(generation.generationId)
        ? generation.generationId : []);
  }

  /** Notes that events up to this sequence were received. @param {string} id @param {number} sequence */
  function markReceived(id, sequence) {
    if (sequence >= (pending.get(id) ?? Infinity) && pending.delete(id) && !pending.size) setUpToDate("live");
  }

  /** Ends catching up: no event is missing. @param {"live" | "polling"} newState */
  function setUpToDate(newState) {
    const caughtUp = interrupted && { missed, recovered };
    [interrupted, missed, recovered] = [false, 0, true];
    pending.clear();
    clearTimeout(authTimer);
    setState(newState);
    if (caughtUp) notify("caughtUp", caughtUp);
  }

  function setOffline() {
    if (state === "live" || state === "polling") interrupted = true;
    pending.clear();
    clearTimeout(authTimer);
    setState("offline");
  }

  /** @param {string} code */
  function setRefused(code) {
    stop();
    socket?.disconnect();
    setState("refused", code);
  }

  /** Stops all attempts to connect. */
  function stop() {
    stopped = true;
    clearTimeout(authTimer);
    stopPolling();
  }

  // -- Socket

  function openSocket() {
    const [, origin, path] = /** @type {RegExpExecArray} */ (/^(\w+:\/\/[^/]*)?(.*?)\/*$/.exec(url ?? ""));
    // After an upgrade, reconnect by WebSocket: a polling request might go out on an idle connection that is dead too.
    const defaults = { path: `${path}/socket.io`, rememberUpgrade: true, requestTimeout: XHR_TIMEOUT };
    socket = io(origin || undefined, { ...defaults, ...socketOptions, forceNew: true });
    socket.on("connect", () => {
      failures = 0;
      stopPolling();
      if (interrupted) setState("catching up");
      else if (state !== "polling") setState("connecting");
      authenticate();
    });
    socket.on("disconnect", () => stopped || closed || setOffline());
    socket.on("connect_error", (/** @type {any} */ error) => {
      if (stopped || closed) return;
      if (error.data?.code) return setRefused(error.data.code);
      if (!poller) setOffline();
      if (++failures >= FAILURES_BEFORE_POLLING) startPolling();
    });
    // `authentication_expired` needs no listener: the service closes the transport, and `connect` authenticates again.
    for (const name of EVENTS) socket.on(name, onEvent);
    socket.on("queue_position", onPosition);
    socket.on("generation_removed", ({ generationId }) => closed || forget(generationId));
  }

  /**
   * Authenticates the socket from `cursor` on. `renewing`: only presents a new token for the same user. `renewed`: a
   * new token has already been requested after a rejection.
   */
  async function authenticate({ renewing = false, renewed = false } = {}) {
    const { id } = socket;
    const outdated = () => closed || stopped || !socket.connected || socket.id !== id;
    const retryLater = () => {
      clearTimeout(authTimer);
      authTimer = setTimeout(() => outdated() || authenticate({ renewing }), RETRY_DELAY);
    };
    let token;
    try { token = await tokens.get(); } catch { return outdated() || retryLater(); }
    if (outdated()) return;
    const payload = { userId, token, cursor };
    socket.timeout(ACK_TIMEOUT).emit("authenticate", payload, (/** @type {any} */ timeout, /** @type {any} */ ack) => {
      if (outdated()) return;
      if (timeout) return socket.io.engine.close(); // Socket.IO reconnects.
      if (ack.code === "unavailable") return retryLater();
      if (TOKEN_ERRORS.includes(ack.code) && tokens.renewable && !renewed) {
        tokens.clear();
        return authenticate({ renewing, renewed: true });
      }
      if (ack.ok) scheduleRenewal(ack.expiresAt);
      if (renewing) return; // Even after a rejection the socket stays authenticated until its token expires.
      if (!ack.ok) return setRefused(ack.code);
      userId = ack.userId;
      const expected = applySnapshot(ack);
      if (outdated()) return;
      if (!interrupted || !expected.length) return setUpToDate("live");
      for (const [generation, sequence] of expected) pending.set(generation, sequence);
      setState("catching up");
      // A generation that was deleted just now sends no events: do not wait for them forever.
      authTimer = setTimeout(() => setUpToDate("live"), ACK_TIMEOUT);
    });
  }

  function scheduleRenewal(/** @type {string | undefined} */ expiresAt) {
    clearTimeout(renewalTimer);
    const remaining = Date.parse(expiresAt ?? "") - Date.now();
    if (!tokens.renewable || !(remaining > 0)) return; // If this clock is wrong, the service reports the expiry.
    renewalTimer = setTimeout(() => {
      tokens.clear();
      if (socket.connected) authenticate({ renewing: true });
    }, Math.min(remaining - Math.min(60_000, remaining / 2), 2 ** 31 - 1));
  }

  // -- Polling

  function startPolling() {
    if (!poller) poll((poller = {}));
  }

  function stopPolling() {
    clearTimeout(poller?.timer);
    poller?.request?.abort();
    poller = undefined;
  }

  /** Requests the next page of the feed, and schedules the request after it. */
  async function poll(/** @type {NonNullable<typeof poller>} */ own) {
    const cancelled = () => closed || poller !== own;
    const request = (own.request = new AbortController());
    own.timer = setTimeout(() => request.abort(), RESPONSE_TIMEOUT);
    let delay = pollEvery;
    try {
      const page = await http.feed(cursor, PAGE_SIZE, request.signal);
      // With a usable cursor the feed has only new events: the generations so far come from the list.
      const generations = page.generations ?? (synced ? undefined : (await http.list()).generations);
      if (cancelled()) return;
      if (generations) applySnapshot({ ...page, generations });
      if (interrupted && page.events?.length) setState("catching up");
      for (const { data } of page.events ?? []) onEvent(data);
      if (cancelled()) return;
      cursor = page.cursor;
      if ([...entries.values()].some(({ generation }) => generation?.sequence === 1)) {
        const { generations: active } = await http.list({ status: "active", limit: MAX_LISTED });
        if (cancelled()) return;
        mergeSnapshots(...active); // The feed has no places in line.
      }
      if (page.events?.length === PAGE_SIZE) delay = 0;
      else setUpToDate("polling");
    } catch (error) {
      if (cancelled()) return;
      const { status, code } = /** @type {StagecastError} */ (error);
      if ([401, 403, 422].includes(status)) return setRefused(code);
      setOffline();
    }
    if (cancelled()) return;
    clearTimeout(own.timer);
    own.timer = setTimeout(poll, delay, own);
  }

  function cut() {
    if (stopped || closed) return;
    stop();
    socket?.io.disconnect(); // Closes the transport only; `socket.disconnect()` would end the session on the server.
    setOffline();
  }

  const open = () => (socket ? socket.connect() : io ? openSocket() : startPolling());

  /** Replaces the transport; the new connection recovers what the old one missed. */
  function reconnect() {
    if (closed) return;
    cut();
    stopped = false;
    failures = 0;
    setState(interrupted ? "offline" : "connecting");
    open();
  }

  // -- Checking a connection that may have died without a close

  /** Checks the connection soon. Signals in quick succession cause one check. */
  function scheduleCheck() {
    if (closed || stopped || checkTimer !== undefined) return;
    checkTimer = setTimeout(runCheck, Math.max(0, lastCheck + CHECK_INTERVAL - performance.now()));
  }

  function runCheck() {
    lastCheck = performance.now();
    const { id } = socket ?? {};
    const finish = (/** @type {unknown} */ dead, current = socket?.id === id) => {
      checkTimer = undefined;
      if (dead && current && !stopped) reconnect();
    };
    if (closed || stopped) return finish(false);
    if (socket?.connected) {
      // The service acknowledges an unknown event with "bad_request", which costs it next to nothing.
      return socket.timeout(CHECK_TIMEOUT).emit("probe", (/** @type {unknown} */ timeout) => finish(timeout));
    }
    if (state === "offline") return finish(true);
    if (!poller) return finish(false); // The first connection is being made.
    stopPolling();
    const own = (poller = {});
    Promise.race([poll(own), sleep(CHECK_TIMEOUT).then(() => true)]).then((late) => finish(late, poller === own));
  }

  const stopListening = onWake(scheduleCheck, () => stopped || reconnect());

  // In a microtask, so that listeners added directly after `connect` get everything.
  queueMicrotask(() => closed || stopped || open());

  return {
    http, mergeSnapshots, forget,
    /** @returns {readonly Generation[]} */
    get generations() {
      return sorted ??= [...entries.values()].flatMap(({ generation }) => generation ?? []).sort(newestFirst);
    },
    get: (/** @type {string} */ id) => entries.get(id)?.generation,
    get state() { return state; },
    get reason() { return reason; },
    get credit() { return credit; },
    get cursor() { return cursor; },
    get userId() { return userId; },
    cut,
    restore() {
      if (stopped || state === "offline") reconnect();
    },
    close() {
      closed = true;
      state = "closed";
      for (const timer of [renewalTimer, authTimer, checkTimer]) clearTimeout(timer);
      stopListening();
      stopPolling();
      socket?.disconnect();
    },
  };
}

/**
 * Calls `onSignal` when the page may have slept or changed networks, and `onOffline` when the browser loses its
 * network. Node has no such events.
 *
 * @param {() => void} onSignal @param {() => void} onOffline @returns {() => void} removes the listeners
 */
function onWake(onSignal, onOffline) {
  const global = /** @type {any} */ (globalThis);
  if (!global.addEventListener) return () => {};
  const page = global.document ?? global;
  const onVisible = () => page.hidden || onSignal();
  let lastTick = Date.now();
  const clock = setInterval(() => {
    const [before, now] = [lastTick, (lastTick = Date.now())];
    if (Math.abs(now - before) > CLOCK_JUMP) onVisible();
  }, 1_000);
  const listeners = /** @type {[any, string, () => void][]} */ ([
    [page, "visibilitychange", onVisible], [page, "resume", onSignal], [global, "pageshow", onSignal],
    [global, "focus", onSignal], [global, "online", onSignal], [global, "offline", onOffline],
  ]);
  for (const [target, name, listener] of listeners) target.addEventListener(name, listener);
  return () => {
    clearInterval(clock);
    for (const [target, name, listener] of listeners) target.removeEventListener(name, listener);
  };
}

/** @param {Generation} first @param {Generation} second */
function newestFirst(first, second) {
  const [a, b] = [first, second].map(({ createdAt, generationId }) => `${createdAt} ${generationId}`);
  return a < b ? 1 : -1;
}

// ---- The client ----------------------------------------------------------------------------------------------------

/**
 * @param {ApiOptions & LiveOptions & Identity} [options]
 */
export function connect(options = {}) {
  /** @type {Map<string, Set<Function>>} */ const listeners = new Map();
  const emit = (/** @type {string} */ name, /** @type {any[]} */ ...values) => {
    for (const listener of [...(listeners.get(name) ?? [])]) {
      // Report an exception of a listener as uncaught, and call the other listeners.
      try { listener(...values); } catch (error) { queueMicrotask(() => { throw error; }); }
    }
  };
  const { io = /** @type {any} */ (globalThis).io } = options;
  const open = (/** @type {Identity} */ { token, userId = token === undefined ? "demo" : undefined, cursor }) =>
    openSession({ ...options, io, token, userId, cursor }, emit);
  let session = open(options);

  /**
   * Makes a request about one generation, and drops the generation if the service no longer has it.
   *
   * @template T @param {string} id @param {(http: ReturnType<typeof api>) => Promise<T>} send @returns {Promise<T>}
   */
  async function requestFor(id, send) {
    const { http, forget } = session;
    try {
      return await send(http);
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
    /** The HTTP API, as the current user. */
    get http() { return session.http; },
    get: (/** @type {string} */ id) => session.get(id),

    /** @type {{(name: "change", listener: () => void): () => void;
     *   (name: "event", listener: (event: StagecastEvent, generation: Generation) => void): () => void;
     *   (name: "removed", listener: (generationId: string) => void): () => void;
   *   (name: "state", listener: (state: State, reason?: string) => void): () => void;
     *   (name: "caughtUp", listener: (result: CaughtUp) => void): () => void}} */
    on(/** @type {string} */ name, /** @type {Function} */ listener) {
      listeners.set(name, (listeners.get(name) ?? new Set()).add(listener));
      return () => off(name, listener);
    },
    off,

    /** @param {"edit" | "generate"} kind @param {GenerationRequest} request @param {StartOptions} [startOptions] */
    async start(kind, request, startOptions) {
      const { http, mergeSnapshots } = session;
      const snapshot = await http.start(kind, request, startOptions);
      mergeSnapshots(snapshot);
      return snapshot;
    },
    cancel: (/** @type {string} */ id) => requestFor(id, (http) => http.cancel(id)),
    /** @param {string} id */
    async remove(id) {
      const { forget } = session;
      await requestFor(id, (http) => http.remove(id));
      forget(id);
    },
    history: (/** @type {string} */ id, after = 0) => requestFor(id, (http) => http.history(id, after)),
    /** @param {string} [before] @param {number} [limit] @returns {Promise<Page>} */
    async older(before, limit) {
      const { http, mergeSnapshots } = session;
      const page = await http.list({ before, limit });
      mergeSnapshots(...page.generations);
      return page;
    },
    me: () => session.http.me(),
    stages: () => session.http.stages(),

    /** @param {Identity} identity */
    switchUser(identity) {
      session.close();
      session = open(identity);
      emit("state", session.state);
      emit("change");
    },
    cut: () => session.cut(),
    restore: () => session.restore(),
    close() {
      session.close();
      emit("state", session.state);
    },
  };
}

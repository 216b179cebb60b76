/**
 * Stagecast's client: shows one user's generations live, in a browser or in Node.
 *
 *     import { connect } from "/static/stagecast.js";       // in a project with npm: from "stagecast-client"
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
 *                   "polling"      no socket or stream can be opened; events arrive up to `pollEvery` late
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
 *     start(kind, request, {idempotencyKey, attempts, runner, signal, fetch})
 *                           returns the generation. After a network error the request is sent again with the same
 *                           key, so that it starts only one generation. Pass your own key to retry later yourself.
 *                           `fetch` sends the request instead of the global one, to report the progress of the upload
 *     cancel(id)            "cancelled" or "already_finished"
 *     remove(id)            deletes a finished generation permanently
 *     history(id, after)    its events
 *     load(id)              one generation from the service, which is also added to `generations`
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
 * With `transport: "sse"` events arrive as Server-Sent Events: nothing but `fetch` is needed.
 *
 * `api(options)` is the HTTP part alone, and also has `call`, `list`, `feed`, `stream` and `transition`.
 * `reduce(generation, update)` is the pure reducer.
 *
 * @typedef {"edit" | "generate"} Kind
 * @typedef {"started" | "composition" | "composition_completed" | "completed" | "failed"} CommonStatus
 * @typedef {"openai_editing" | "openai_editing_completed" | "face_swap" | "face_swap_completed"} EditStatus
 * @typedef {CommonStatus | EditStatus | "ai_generation"} Status
 * @typedef {"provider_rejected" | "provider_rate_limited" | "provider_unavailable" | "provider_timeout"} ProviderFailure
 * @typedef {"cancelled" | "interrupted" | "deadline_exceeded" | "storage_failed" | "internal"} ServiceFailure
 * @typedef {"invalid_image" | "image_fetch_failed" | ProviderFailure | ServiceFailure} FailureCode
 * @typedef {"generation_started" | "continue" | "generation_completed" | "generation_failed"} EventName
 * @typedef {Record<string, unknown>} Metadata A JSON object.
 * @typedef {{quality?: "auto" | "low" | "medium" | "high", background?: "auto" | "opaque" | "transparent",
 *   aspectRatio?: "2:3" | "1:1" | "3:2", inputFidelity?: "low" | "high", faceSwap?: boolean, face?: number}} Options
 *   How the picture is made.
 * @typedef {Options & {prompt: string, images: string[], imageUrls: string[]}} Input What was asked for. `images`: URLs.
 * @typedef {{compositionUrl?: string, previewUrl?: string, editedImageUrl?: string, generatedImageUrl?: string,
 *   faceSwapUrl?: string}} Pictures
 * @typedef {Pictures & {generationId: string, kind: Kind, sequence: number, status: Status, message: string,
 *   progress: number, metadata?: Metadata, input?: Input, inputImage?: string,
 *   faceSwapError?: {code: FailureCode, message: string}, error?: string, code?: FailureCode, failedStage?: Status,
 *   retryable?: boolean}} CommonFields The fields that events and generations share.
 * @typedef {CommonFields & {occurredAt: string, credit?: number}} StagecastEvent One event of the log.
 * @typedef {CommonFields & {createdAt: string, updatedAt: string, expiresAt?: string, userId?: string,
 *   queuePosition?: number}} Generation
 *   The state after its events. `userId` and `expiresAt` are only in snapshots from the service. `queuePosition` is its
 *   place in line while it waits for a worker: 1 is next.
 * @typedef {{event: EventName, data: StagecastEvent}} NamedEvent
 * @typedef {{status: Status, progress?: number, message: string, event: EventName, next: Status[],
 *   conditions?: Partial<Record<Status, string>>, messages?: Partial<Record<Status, string>>, repeats: boolean,
 *   terminal: boolean, typicalSeconds?: number}} Stage
 * @typedef {Pictures & {status: Status, sequence?: number, progress?: number, message?: string,
 *   faceSwapError?: {code: FailureCode, message: string}, error?: string, code?: FailureCode}} StageTransition
 *
 * @typedef {"connecting" | "live" | "catching up" | "polling" | "offline" | "refused" | "closed"} State
 * @typedef {{change: [], event: [event: StagecastEvent, generation: Generation], removed: [generationId: string],
 *   state: [state: State, reason?: string], caughtUp: [result: CaughtUp]}} Events The arguments of listeners, by name.
 * @typedef {string | (() => string | Promise<string>)} Token A function is called whenever a new token is needed.
 * @typedef {{userId?: string | number, token?: Token, cursor?: string}} Identity
 *   `token` if the service has a key configured. Otherwise `userId`, by default "demo".
 * @typedef {{url?: string, userId?: string | number, token?: Token, service?: boolean}} ApiOptions
 *   `url`: the service's URL, including its path if it has one; by default the page's own origin. `service`: the token
 *   is a service token, and acts for `userId`.
 * @typedef {{transport?: "socket.io" | "sse", io?: ((url: string, options: object) => object) | null, socket?: object,
 *   pollEvery?: number}} LiveOptions
 *   `io`: by default the global `io`; null: poll. `socket`: further options for `io`. `pollEvery`: milliseconds.
 * @typedef {ApiOptions & LiveOptions & Identity} ConnectOptions
 * @typedef {Options & {prompt?: string, images?: Iterable<Blob>, imageNames?: readonly string[], imageUrls?: readonly string[],
 *   metadata?: Metadata}} GenerationRequest
 * @typedef {(url: string, options: RequestInit) => Promise<Response>} Fetch
 * @typedef {{idempotencyKey?: string, attempts?: number, runner?: "external", signal?: AbortSignal,
 *   fetch?: Fetch}} StartOptions
 * @typedef {{generations: Generation[], next?: string}} Page
 * @typedef {{missed: number, recovered: boolean}} CaughtUp
 * @typedef {{name: string, id?: string, data?: unknown}} Block
 *   A block of an event stream; one without data is a comment, or the service's `retry`.
 * @typedef {ReturnType<typeof api>} Api
 * @typedef {ReturnType<typeof connect>} Stagecast
 */

const EVENTS = ["generation_started", "continue", "generation_completed", "generation_failed"];
/** How many finished generations a snapshot of the service contains: the newest ones. */
const RECENT = 20;
/** Error codes for which a new token is requested, once. */
const TOKEN_ERRORS = ["unauthenticated", "invalid_token", "token_expired"];
/** Statuses that a gateway sends when it gets no response from the service. */
const GATEWAY_ERRORS = [502, 504];
/** Statuses with which the user or the token is refused. */
const REFUSALS = [401, 403, 422];
/** Consecutive failed connections after which the client polls until a socket or a stream opens. */
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
/** The longest silence of a stream: the service sends a comment every 15 seconds. */
const STREAM_TIMEOUT = 40_000;
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

/** A block of an event stream. @param {string} text @returns {Block} */
function parseBlock(text) {
  const fields = Object.fromEntries(text.split("\n").map((line) => line.split(/: (.*)/s)));
  return { name: fields.event ?? "", id: fields.id, data: fields.data && JSON.parse(fields.data) };
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
   * Sends a request, again with a new token if the service rejects the first one. Returns what `read` makes of the
   * response.
   *
   * @template T @param {string} path @param {RequestInit & {fetch?: Fetch}} options
   * @param {(response: Response) => Promise<T>} read @returns {Promise<T>}
   */
  async function send(path, { fetch: fetchIt = fetch, ...options }, read) {
    for (let renewed = false; ; renewed = true) {
      const headers = { .../** @type {Record<string, string>} */ (options.headers), ...(await authHeaders()) };
      try {
        return await read(await fetchIt(origin + path, { ...options, headers }));
      } catch (cause) {
        if (!(cause instanceof StagecastError)) {
          throw new StagecastError("network", "The service does not answer. Please try again.", { cause });
        }
        if (renewed || !tokens.renewable || !TOKEN_ERRORS.includes(cause.code)) throw cause;
        tokens.clear();
      }
    }
  }

  /** Returns the JSON body of a response; undefined if it has none. @param {Response} response */
  async function readJson(response) {
    const text = await response.text();
    let body;
    try { body = text ? JSON.parse(text) : undefined; } catch {} // Not a response of Stagecast.
    if (response.ok && (body || !text)) return body;
    throw toError(response, body);
  }

  /**
   * Sends a request and returns the JSON body of the response; undefined if it has none.
   *
   * @param {string} method @param {string} path @param {RequestInit & {fetch?: Fetch}} [options]
   * @returns {Promise<unknown>}
   */
  const call = (method, path, options) => send(path, { ...options, method }, readJson);

  /**
   * Sends a POST, and sends it again after network errors. The request must be idempotent.
   *
   * @param {number} attempts @param {string} path @param {RequestInit & {fetch?: Fetch}} options
   * @returns {Promise<any>} its JSON body
   */
  async function retryPost(attempts, path, options) {
    for (let attempt = 1; ; attempt++) {
      try {
        return await call("POST", path, options);
      } catch (error) {
        if (!(error instanceof StagecastError) || attempt >= attempts || options.signal?.aborted) throw error;
        if (error.code !== "network" && !GATEWAY_ERRORS.includes(error.status)) throw error;
      }
      await new Promise((resolve) => {
        setTimeout(resolve, 125 * 2 ** attempt);
        options.signal?.addEventListener("abort", resolve);
      });
    }
  }

  /**
   * `call` with a timeout.
   *
   * @param {string} method @param {string} path @param {RequestInit} [options] @returns {Promise<any>}
   */
  const request = (method, path, options) =>
    call(method, path, { signal: AbortSignal.timeout?.(RESPONSE_TIMEOUT), ...options });
  const pathOf = (/** @type {string} */ id) => `/generations/${encodeURIComponent(id)}`;
  const query = (/** @type {Record<string, any>} */ values) =>
    new URLSearchParams(Object.entries(values).filter(([, value]) => value !== undefined)).toString();

  /** Checks that a response is an event stream. @param {Response} response */
  async function readStream(response) {
    if (response.ok && response.headers.get("Content-Type")?.startsWith("text/event-stream")) return response;
    await readJson(response);
    throw toError(response, undefined);
  }

  return {
    call,
    tokens,

    /**
     * @param {Kind} kind @param {GenerationRequest} fields @param {StartOptions} [options]
     * @returns {Promise<Generation>}
     */
    async start(kind, fields, { idempotencyKey = newKey(), attempts = MAX_ATTEMPTS, runner, signal, fetch } = {}) {
      const path = `/generations/${kind}${runner ? `?${query({ runner })}` : ""}`;
      const headers = { "Idempotency-Key": idempotencyKey };
      return retryPost(attempts, path, { body: toFormData(fields), headers, signal, fetch });
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
     * @returns {Promise<{recovered: boolean, cursor: string, events?: NamedEvent[], generations?: Generation[]}>}
     */
    feed: (after, limit, signal) => request("GET", `/events?${query({ after, limit })}`, signal && { signal }),

    /**
     * The user's feed as an event stream: its blocks, until it ends. Comments are blocks too.
     *
     * @param {string} [after] a cursor @param {AbortSignal} [signal] @returns {AsyncGenerator<Block, void>}
     */
    async *stream(after, signal) {
      const options = { signal, headers: { Accept: "text/event-stream" } };
      const { body } = await send(`/events?${query({ after })}`, options, readStream);
      const reader = /** @type {ReadableStream<Uint8Array>} */ (body).getReader();
      const decoder = new TextDecoder();
      let rest = "";
      try {
        for (;;) {
          const { done, value } = await reader.read();
          if (done) return;
          const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
          rest = /** @type {string} */ (blocks.pop());
          yield* blocks.map(parseBlock);
        }
      } finally {
        reader.cancel().catch(() => {}); // It fails if the stream is broken.
      }
    },

    /** @returns {Promise<{userId: string, credit?: number}>} */
    me: () => request("GET", "/me"),

    /** @returns {Promise<Record<Kind, Stage[]>>} */
    stages: () => request("GET", "/stages"),

    /**
     * For services: reports a stage of a generation that was started with `runner: "external"`. After a network error
     * the request is sent again; the stage is entered only once.
     *
     * @param {string} id @param {StageTransition} transition @returns {Promise<StagecastEvent>}
     */
    transition: (id, transition) => retryPost(MAX_ATTEMPTS, `${pathOf(id)}/transitions`, {
      body: JSON.stringify(transition), headers: { "Content-Type": "application/json" },
    }),
  };
}

// ---- A user's session ----------------------------------------------------------------------------------------------

/**
 * Follows one user's feed, by socket, by stream or by polling, until `close`.
 *
 * @param {ConnectOptions} options
 * @param {(name: string, ...values: any[]) => void} emit
 */
function openSession(options, emit) {
  /**
   * What is known of one generation. `generation` may be ahead of `delivered`: snapshots overtake events.
   *
   * @typedef {object} Entry
   * @property {Generation} [generation]
   * @property {number} [delivered] the sequence of the last event that listeners got
   * @property {number} snapshotSequence events up to this one precede the last snapshot: their `credit` is outdated
   * @property {number} fillTo the sequence up to which missing events are requested
   * @property {boolean} filling `fillGap` is running for this generation
   *
   * @typedef {{timer?: any, request?: AbortController}} Loop A loop of requests: the timer and the request to stop.
   */
  const { transport, url, socket: socketOptions, pollEvery = RETRY_DELAY } = options;
  const io = /** @type {any} */ (options.io);
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
  /** The current polling loop. @type {Loop | undefined} */ let poller;
  /** The current event stream, or the wait before the next one. @type {Loop | undefined} */ let stream;
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
      for (const id of missingFrom(generations)) {
        http.generation(id).catch(({ code }) => code === "not_found" && forget(id));
      }
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

  /**
   * The finished generations that the service may have removed: newer than those that it lists. It lists by position in
   * the feed, which may differ from `createdAt`.
   *
   * @param {Generation[]} listed
   */
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

  /** @param {Loop | undefined} loop */
  function stopLoop(loop) {
    clearTimeout(loop?.timer);
    loop?.request?.abort();
  }

  /** Stops all attempts to connect. */
  function stop() {
    stopped = true;
    clearTimeout(authTimer);
    stopPolling();
    stopStream();
  }

  /**
   * The user is authenticated; the missed events follow.
   *
   * @param {any} welcome the ack, or a stream's first event @param {() => boolean} outdated whether its connection is
   */
  function onWelcome(welcome, outdated) {
    userId = welcome.userId;
    const expected = applySnapshot(welcome);
    if (outdated()) return;
    if (!interrupted || !expected.length) return setUpToDate("live");
    for (const [generation, sequence] of expected) pending.set(generation, sequence);
    setState("catching up");
    // A generation that was deleted just now sends no events: do not wait for them forever.
    authTimer = setTimeout(() => setUpToDate("live"), ACK_TIMEOUT);
  }

  function onConnectionFailed() {
    if (!poller) setOffline();
    if (++failures >= FAILURES_BEFORE_POLLING) startPolling();
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
      onConnectionFailed();
    });
    // `authentication_expired` needs no listener: the service closes the transport, and `connect` authenticates again.
    for (const name of [...EVENTS, "queue_position", "generation_removed"]) {
      socket.on(name, (/** @type {any} */ data, /** @type {unknown} */ newCursor) => onNamed(name, data, newCursor));
    }
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
      onWelcome(ack, outdated);
    });
  }

  function scheduleRenewal(/** @type {string | undefined} */ expiresAt) {
    clearTimeout(renewalTimer);
    const remaining = Date.parse(expiresAt ?? "") - Date.now();
    if (!tokens.renewable || !(remaining > 0)) return; // If this clock is wrong, the service reports the expiry.
    renewalTimer = setTimeout(() => {
      tokens.clear();
      if (stream) startStream();
      else if (socket.connected) authenticate({ renewing: true });
    }, Math.min(remaining - Math.min(60_000, remaining / 2), 2 ** 31 - 1));
  }

  // -- Event stream

  /** Opens a stream that continues after the last event, in place of the current one. Resolves when it has begun. */
  function startStream() {
    stopStream();
    const own = (stream = /** @type {Loop} */ ({}));
    return new Promise((resolve) => followStream(own, resolve));
  }

  function stopStream() {
    stopLoop(stream);
    stream = undefined;
  }

  /** @param {Loop} own @param {(value?: unknown) => void} onBegun */
  async function followStream(own, onBegun) {
    const cancelled = () => closed || stream !== own;
    const request = (own.request = new AbortController());
    const abortIn = (/** @type {number} */ ms) => {
      clearTimeout(own.timer);
      own.timer = setTimeout(() => request.abort(), ms);
    };
    abortIn(ACK_TIMEOUT);
    let error, begun = false;
    try {
      for await (const { name, id, data } of http.stream(cursor, request.signal)) {
        if (cancelled()) return;
        if (begun) abortIn(STREAM_TIMEOUT);
        if (name === "authenticated") {
          begun = true;
          failures = 0;
          stopPolling();
          clearTimeout(authTimer);
          scheduleRenewal(/** @type {any} */ (data).expiresAt);
          onWelcome(data, cancelled);
          onBegun();
        } else if (name === "authentication_expired") tokens.clear();
        else if (name) onNamed(name, data, id);
      }
    } catch (cause) { error = /** @type {StagecastError} */ (cause); }
    if (cancelled()) return;
    clearTimeout(own.timer);
    if (error && REFUSALS.includes(error.status)) return setRefused(error.code);
    if (begun) setOffline();
    else onConnectionFailed();
    if (cancelled()) return;
    // At random, so that the clients of a service that was restarted do not all return at once.
    const delay = begun ? 500 * Math.random() : RETRY_DELAY * (0.5 + Math.random());
    own.timer = setTimeout(followStream, delay, own, onBegun);
  }

  /** Handles an event that is not about the connection. @param {string} name @param {any} data @param {unknown} [newCursor] */
  function onNamed(name, data, newCursor) {
    if (EVENTS.includes(name)) onEvent(data, newCursor);
    else if (name === "queue_position") onPosition(data);
    else if (name === "generation_removed" && !closed) forget(data.generationId);
  }

  // -- Polling

  function startPolling() {
    if (!poller) poll((poller = {}));
  }

  function stopPolling() {
    stopLoop(poller);
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
      if (REFUSALS.includes(status)) return setRefused(code);
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

  function open() {
    if (transport === "sse") startStream();
    else if (socket) socket.connect();
    else if (io) openSocket();
    else startPolling();
  }

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
    if (stream && !poller && state !== "connecting") {
      const replaced = startStream();
      const own = stream;
      return Promise.race([replaced, sleep(CHECK_TIMEOUT).then(() => true)]).then((late) => finish(late, stream === own));
    }
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
      stopStream();
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
 * Opens a client. Without `transport`, by Socket.IO if there is `io`, else by polling.
 *
 * @param {ConnectOptions} [options]
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

  /** @template {keyof Events} Name @param {Name} name @param {(...values: Events[Name]) => void} listener */
  const off = (name, listener) => void listeners.get(name)?.delete(listener);

  return {
    get generations() { return session.generations; },
    get state() { return session.state; },
    get reason() { return session.reason; },
    get credit() { return session.credit; },
    get cursor() { return session.cursor; },
    get userId() { return session.userId; },
    /** The HTTP API, as the current user. @returns {Api} */
    get http() { return session.http; },
    get: (/** @type {string} */ id) => session.get(id),

    /**
     * @template {keyof Events} Name @param {Name} name @param {(...values: Events[Name]) => void} listener
     * @returns {() => void} removes the listener
     */
    on(name, listener) {
      listeners.set(name, (listeners.get(name) ?? new Set()).add(listener));
      return () => off(name, listener);
    },
    off,

    /** @param {Kind} kind @param {GenerationRequest} request @param {StartOptions} [startOptions] */
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
    /** @param {string} id */
    async load(id) {
      const { mergeSnapshots } = session;
      const snapshot = await requestFor(id, (http) => http.generation(id));
      mergeSnapshots(snapshot);
      return snapshot;
    },
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

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
 * It runs in the browsers that `docs/browsers.md` lists, and in Node 20 or later. It imports the modules in the folder
 * `stagecast` next to it.
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
 * @typedef {CommonFields & {createdAt: string, updatedAt: string, expiresAt?: string, userId?: string}} Generation
 *   The state after its events. `userId` and `expiresAt` are only in snapshots from the service.
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
 * @typedef {{prompt?: string, images?: Blob[], imageUrls?: string[], faceSwap?: boolean,
 *   metadata?: Record<string, any>, quality?: string, background?: string, aspectRatio?: string,
 *   inputFidelity?: string}} GenerationRequest
 * @typedef {{idempotencyKey?: string, attempts?: number, runner?: "external"}} StartOptions
 * @typedef {{generations: Generation[], next?: string}} Page
 * @typedef {{missed: number, recovered: boolean}} CaughtUp
 */

import { StagecastError } from "./stagecast/http.js";
import { openSession } from "./stagecast/session.js";

export { api, StagecastError } from "./stagecast/http.js";
export { isFinished, isGap, reduce } from "./stagecast/reduce.js";

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
   * @template T @param {string} id @param {(http: typeof session.http) => Promise<T>} send @returns {Promise<T>}
   */
  async function requestFor(id, send) {
    const { http, store } = session;
    try {
      return await send(http);
    } catch (error) {
      if (error instanceof StagecastError && error.code === "not_found") store.removeGeneration(id);
      throw error;
    }
  }

  /** @type {(name: string, listener: Function) => void} */
  const off = (name, listener) => void listeners.get(name)?.delete(listener);

  return {
    get generations() { return session.store.generations; },
    get state() { return session.state; },
    get reason() { return session.reason; },
    get credit() { return session.store.credit; },
    get cursor() { return session.cursor; },
    get userId() { return session.userId; },
    /** The HTTP API, as the current user. */
    get http() { return session.http; },
    get: (/** @type {string} */ id) => session.store.get(id),

    /** @type {{(name: "change", listener: () => void): () => void;
     *   (name: "event", listener: (event: StagecastEvent, generation: Generation) => void): () => void;
     *   (name: "state", listener: (state: State, reason?: string) => void): () => void;
     *   (name: "caughtUp", listener: (result: CaughtUp) => void): () => void}} */
    on(/** @type {string} */ name, /** @type {Function} */ listener) {
      listeners.set(name, (listeners.get(name) ?? new Set()).add(listener));
      return () => off(name, listener);
    },
    off,

    /** @param {"edit" | "generate"} kind @param {GenerationRequest} request @param {StartOptions} [startOptions] */
    async start(kind, request, startOptions) {
      const { http, store } = session;
      const snapshot = await http.start(kind, request, startOptions);
      store.mergeSnapshots(snapshot);
      return snapshot;
    },
    cancel: (/** @type {string} */ id) => requestFor(id, (http) => http.cancel(id)),
    /** @param {string} id */
    async remove(id) {
      const { store } = session;
      await requestFor(id, (http) => http.remove(id));
      store.removeGeneration(id);
    },
    history: (/** @type {string} */ id, after = 0) => requestFor(id, (http) => http.history(id, after)),
    /** @param {string} [before] @param {number} [limit] @returns {Promise<Page>} */
    async older(before, limit) {
      const { http, store } = session;
      const page = await http.list({ before, limit });
      store.mergeSnapshots(...page.generations);
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

/** A session: follows one user's feed by Socket.IO or by polling. */

import { api, RESPONSE_TIMEOUT, sleep, TOKEN_ERRORS } from "./http.js";
import { createStore } from "./store.js";
import { onWake } from "./wake.js";

/**
 * @typedef {import("../stagecast.js").ApiOptions} ApiOptions
 * @typedef {import("../stagecast.js").Generation} Generation
 * @typedef {import("../stagecast.js").Identity} Identity
 * @typedef {import("../stagecast.js").LiveOptions} LiveOptions
 * @typedef {import("../stagecast.js").StagecastEvent} StagecastEvent
 * @typedef {import("../stagecast.js").State} State
 * @typedef {import("./http.js").StagecastError} StagecastError
 */

const EVENTS = ["generation_started", "continue", "generation_completed", "generation_failed"];
/** Consecutive failed connections after which the client polls until a socket opens. */
const FAILURES_BEFORE_POLLING = 3;
/** Events per page while polling. */
const PAGE_SIZE = 200;
// Milliseconds:
const RETRY_DELAY = 2_000;
const ACK_TIMEOUT = 10_000;
/** A connection that has not answered a check after this time is dead. */
const CHECK_TIMEOUT = 2_000;
/** The shortest time between two checks. */
const CHECK_INTERVAL = 500;
/** Longer than the service's long poll; a stalled XHR occupies one of the browser's few connections. */
const XHR_TIMEOUT = 35_000;

/**
 * Follows one user's feed, by socket or by polling, until `close`.
 *
 * @param {ApiOptions & LiveOptions & Identity} options
 * @param {(name: string, ...values: any[]) => void} emit
 */
export function openSession(options, emit) {
  const { io, url, socket: socketOptions, pollEvery = RETRY_DELAY } = options;
  const http = api(options);
  const { tokens } = http;
  /** By generation, the sequence to receive before catching up is done. @type {Map<string, number>} */
  const pending = new Map();
  /** @type {any} */ let socket;
  /** @type {State} */ let state = "connecting";
  /** @type {string | undefined} */ let reason;
  let userId = options.userId === undefined ? undefined : String(options.userId);
  let cursor = options.cursor;
  let interrupted = false; // The connection was lost: events that arrive now count as missed.
  let missed = 0;
  let recovered = true; // No events were lost during the interruption.
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

  const store = createStore(http, {
    onChange: () => notify("change"),
    onEvent(event, generation) {
      if (interrupted) missed++;
      notify("event", event, generation);
    },
    onReceived: markReceived,
  });

  /** Handles an event of the feed. @param {StagecastEvent} event @param {unknown} [newCursor] */
  function onEvent(event, newCursor) {
    if (closed) return;
    if (typeof newCursor === "string") cursor = newCursor;
    store.addEvent(event);
  }

  /**
   * Applies the service's snapshot. Returns the generations of which events are still to come.
   *
   * @param {{recovered: boolean, cursor: string, generations: Generation[]}} snapshot
   */
  function applySnapshot(snapshot) {
    recovered &&= snapshot.recovered;
    cursor = snapshot.cursor;
    return store.applySnapshot(snapshot);
  }

  // -- Connection state

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
      const generations = page.generations ?? (store.synced ? undefined : (await http.list()).generations);
      if (cancelled()) return;
      if (generations) applySnapshot({ ...page, generations });
      if (interrupted && page.events?.length) setState("catching up");
      for (const { data } of page.events ?? []) onEvent(data);
      if (cancelled()) return;
      cursor = page.cursor;
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
    http, store,
    get state() { return state; },
    get reason() { return reason; },
    get cursor() { return cursor; },
    get userId() { return userId; },
    cut,
    restore() {
      if (stopped || state === "offline") reconnect();
    },
    close() {
      closed = true;
      store.close();
      state = "closed";
      for (const timer of [renewalTimer, authTimer, checkTimer]) clearTimeout(timer);
      stopListening();
      stopPolling();
      socket?.disconnect();
    },
  };
}

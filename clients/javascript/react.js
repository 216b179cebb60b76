"use client";
/**
 * A user's generations in React: on a server, in StrictMode and with any number of hooks there is at most one connection.
 *
 *     import { StagecastProvider, useGenerations } from "stagecast-client/react";
 *
 *     function Bars() {
 *       const { generations, start, cancel } = useGenerations();
 *       return generations.map((each) => <progress key={each.generationId} value={each.progress} max={100} />);
 *     }
 *
 *     <StagecastProvider url="http://localhost:3000" transport="sse"><Bars /></StagecastProvider>
 *
 * @import { ReactNode } from "react"
 * @import { ConnectOptions, Generation, Stagecast, State } from "./stagecast.js"
 */
import {
  createContext, createElement, useContext, useEffect, useInsertionEffect, useMemo, useRef, useSyncExternalStore,
} from "react";
import { connect } from "./stagecast.js";

/**
 * What the hooks return besides the state: the methods of the client, as stable functions.
 *
 * @typedef {Pick<Stagecast, "start" | "cancel" | "remove" | "load" | "older">} Actions
 */

/**
 * The client of a provider, which is connected while hooks use it.
 *
 * @typedef {object} Store
 * @property {(onChange: () => void) => () => void} subscribe
 * @property {() => Stagecast | undefined} current the client, if it is connected
 * @property {Actions} actions
 */

/** @type {readonly Generation[]} */ const NONE = [];
/** @type {State} */ const CONNECTING = "connecting";
const Context = createContext(/** @type {Store | undefined} */ (undefined));

/** @param {() => Stagecast} open @param {boolean} owned whether the client is closed after its last use @returns {Store} */
function createStore(open, owned) {
  /** @type {Stagecast | undefined} */ let client;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ let closing;
  let users = 0;
  function use() {
    clearTimeout(closing);
    users++;
    return (client ??= open());
  }
  function release() {
    // Later, because StrictMode unmounts and mounts again, and so does a change of page.
    if (--users === 0 && owned) closing = setTimeout(() => (client?.close(), (client = undefined)));
  }
  /** @template T @param {(client: Stagecast) => Promise<T>} act @returns {Promise<T>} */
  async function during(act) {
    try { return await act(use()); } finally { release(); }
  }
  return {
    subscribe(onChange) {
      const used = use();
      const removers = [used.on("change", onChange), used.on("state", onChange)];
      return () => {
        for (const remove of removers) remove();
        release();
      };
    },
    current: () => client,
    actions: {
      start: (kind, request, options) => during((it) => it.start(kind, request, options)),
      cancel: (id) => during((it) => it.cancel(id)),
      remove: (id) => during((it) => it.remove(id)),
      load: (id) => during((it) => it.load(id)),
      older: (before, limit) => during((it) => it.older(before, limit)),
    },
  };
}

/**
 * Connects the hooks below it as one user: with the options of `connect`, or with a `client` that `connect` has made,
 * which stays open. Another `url`, `userId`, `transport` or token makes another connection.
 *
 * @param {ConnectOptions & {client?: Stagecast, children?: ReactNode}} props
 */
export function StagecastProvider({ client, children, ...options }) {
  const { url, userId, token, service, transport, io } = options;
  const latest = useRef(options);
  useInsertionEffect(() => { latest.current = options; }); // Before the effects in which hooks subscribe.
  const fixedToken = typeof token === "function" ? undefined : token;
  const store = useMemo(() => {
    const renew = async () => {
      const current = latest.current.token;
      return typeof current === "function" ? current() : current ?? "";
    };
    const open = () => {
      const { current } = latest;
      return connect({ ...current, token: typeof current.token === "function" ? renew : current.token });
    };
    return client ? createStore(() => client, false) : createStore(open, true);
  }, [client, url, userId, fixedToken, service, transport, io]);
  return createElement(Context.Provider, { value: store }, children);
}

/** @returns {Store} */
function useStore() {
  const store = useContext(Context);
  if (!store) throw new Error("useGenerations and useGeneration need a <StagecastProvider> around them.");
  return store;
}

/**
 * The user's generations, newest first, the state of the connection with the reason of a refusal, the balance, and the
 * client's methods.
 *
 * @returns {{generations: readonly Generation[], state: State, reason: string | undefined, credit: number | undefined}
 *   & Actions}
 */
export function useGenerations() {
  const { subscribe, current, actions } = useStore();
  // Each getter returns the same value until it changes, as useSyncExternalStore requires.
  const generations = useSyncExternalStore(subscribe, () => current()?.generations ?? NONE, () => NONE);
  const state = useSyncExternalStore(subscribe, () => current()?.state ?? CONNECTING, () => CONNECTING);
  const reason = useSyncExternalStore(subscribe, () => current()?.reason, () => undefined);
  const credit = useSyncExternalStore(subscribe, () => current()?.credit, () => undefined);
  return { generations, state, reason, credit, ...actions };
}

/**
 * One generation, which is requested if it is not among those of the client; undefined while it is not known, or if
 * there is none. The component renders only when this generation changes.
 *
 * @param {string | undefined} id
 * @returns {Generation | undefined}
 */
export function useGeneration(id) {
  const { subscribe, current, actions } = useStore();
  const get = () => (id === undefined ? undefined : current()?.get(id));
  const generation = useSyncExternalStore(subscribe, get, () => undefined);
  useEffect(() => {
    if (id === undefined) return;
    let idle = true; // False during a request, and after the answer that the generation does not exist.
    const load = () => {
      if (!idle || get()) return;
      idle = false;
      actions.load(id).then(() => true, ({ code }) => code !== "not_found").then((again) => { idle = again; });
    };
    load();
    return subscribe(load); // Again when the connection is back, and when its first snapshot has replaced the list.
  }, [id, actions, subscribe]);
  return generation;
}

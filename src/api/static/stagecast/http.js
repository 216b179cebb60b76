/** The HTTP API: requests, errors, tokens and retries. */

/**
 * @typedef {import("../stagecast.js").ApiOptions} ApiOptions
 * @typedef {import("../stagecast.js").Generation} Generation
 * @typedef {import("../stagecast.js").GenerationRequest} GenerationRequest
 * @typedef {import("../stagecast.js").Page} Page
 * @typedef {import("../stagecast.js").StagecastEvent} StagecastEvent
 * @typedef {import("../stagecast.js").StartOptions} StartOptions
 * @typedef {import("../stagecast.js").Token} Token
 */

/** Error codes for which a new token is requested, once. */
export const TOKEN_ERRORS = ["unauthenticated", "invalid_token", "token_expired"];
/** Statuses that a gateway sends when it gets no response from the service. */
const GATEWAY_ERRORS = [502, 504];
/** Attempts of a POST that gets no response. */
const MAX_ATTEMPTS = 6;
/** Milliseconds. */
export const RESPONSE_TIMEOUT = 30_000;

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

export const sleep = (/** @type {number} */ ms) => new Promise((resolve) => setTimeout(resolve, ms));

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

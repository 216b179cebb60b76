// The client and its tokens.
import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import {
  assertFullHistory, closeAll, keyedUrl, newUser, observe, requestFields, tokenOf, untilFinished, untilLive, waitFor,
} from "./client_support.mjs";

after(closeAll);

describe("with tokens the client", { concurrency: true }, () => {
  test("renews its token before it expires, and stays live", async () => {
    const userId = newUser();
    const seconds = [6]; // Half of it is left for the renewal, even on a slow machine.
    const ends = Date.now() + 6_000;
    const observer = observe({ url: keyedUrl, token: () => tokenOf(userId, { seconds: seconds.pop() ?? 3_600 }) });
    await untilLive(observer);
    assert.equal(observer.client.userId, userId);
    await new Promise((later) => setTimeout(later, ends + 200 - Date.now()));
    const { generationId: id } = await observer.client.start("edit", requestFields());
    await untilFinished(observer, id);
    await assertFullHistory(observer, id);
    assert.deepEqual(observer.states, ["connecting", "live"]);
  });

  test("is refused when its only token has expired, and is live again with another", async () => {
    const userId = newUser();
    for (const options of [{}, { transport: "sse" }]) {
      const observer = observe({ url: keyedUrl, token: tokenOf(userId, { seconds: 1 }), ...options });
      await waitFor(observer, () => observer.client.state === "refused");
      assert.equal(observer.client.reason, "token_expired");
      observer.client.switchUser({ token: tokenOf(userId) });
      await untilLive(observer);
      assert.equal(observer.client.userId, userId);
    }
  });

  test("requests one new token after a rejected one, and is refused if that is rejected too", async () => {
    const userId = newUser();
    for (const options of [{}, { io: null }, { transport: "sse" }]) {
      const tokens = [tokenOf(userId, { seconds: -5 }), tokenOf(userId)];
      const renewing = observe({ url: keyedUrl, ...options, token: async () => tokens.shift() });
      await waitFor(renewing, () => ["live", "polling"].includes(renewing.client.state));
      assert.deepEqual(tokens, []);
      let good = false;
      const token = () => tokenOf(userId, good ? {} : { key: "not the key" });
      const observer = observe({ url: keyedUrl, ...options, token });
      await waitFor(observer, () => observer.client.state === "refused");
      assert.equal(observer.client.reason, "invalid_token");
      good = true;
      observer.client.restore();
      await waitFor(observer, () => ["live", "polling"].includes(observer.client.state));
    }
  });

  test("is refused without a token, and with another user's", async () => {
    const nobody = observe({ url: keyedUrl });
    await waitFor(nobody, () => nobody.client.state === "refused");
    assert.equal(nobody.client.reason, "unauthenticated");
    const thief = observe({ url: keyedUrl, userId: newUser(), token: tokenOf(newUser()) });
    await waitFor(thief, () => thief.client.state === "refused");
    assert.equal(thief.client.reason, "user_mismatch");
  });

  test("tries again while its token cannot be obtained", async () => {
    const userId = newUser();
    let asked = 0;
    const token = () => {
      if (++asked === 1) throw new Error("The sign-in service is down.");
      return tokenOf(userId);
    };
    const observer = observe({ url: keyedUrl, token });
    await untilLive(observer);
    assert.equal(asked, 2);
  });
});

// The client and its tokens.
import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import { closeAll, finished, heardAll, keyed, live, newUser, tokenOf, until, watch, wish } from "./client_world.mjs";

after(closeAll);

describe("with tokens the client", { concurrency: true }, () => {
  test("renews its token before it ends, and stays live beyond", async () => {
    const userId = newUser();
    const seconds = [6]; // Half of it is left for the renewal, however slow the machine.
    const ends = Date.now() + 6_000;
    const heard = watch({ url: keyed, token: () => tokenOf(userId, { seconds: seconds.pop() ?? 3_600 }) });
    await live(heard);
    assert.equal(heard.client.userId, userId);
    await new Promise((later) => setTimeout(later, ends + 200 - Date.now()));
    const { generationId: id } = await heard.client.start("edit", wish());
    await finished(heard, id);
    await heardAll(heard, id);
    assert.deepEqual(heard.states, ["connecting", "live"]);
  });

  test("is refused where its only token has ended, and comes back with another", async () => {
    const userId = newUser();
    const heard = watch({ url: keyed, token: tokenOf(userId, { seconds: 1 }) });
    await until(heard, () => heard.client.state === "refused");
    assert.equal(heard.client.reason, "token_expired");
    heard.client.switchUser({ token: tokenOf(userId) });
    await live(heard);
    assert.equal(heard.client.userId, userId);
  });

  test("asks once for another token where the first is not good, and tells when that is not good either", async () => {
    const userId = newUser();
    for (const how of [{}, { io: null }]) {
      const tokens = [tokenOf(userId, { seconds: -5 }), tokenOf(userId)];
      const lucky = watch({ url: keyed, ...how, token: async () => tokens.shift() });
      await until(lucky, () => ["live", "polling"].includes(lucky.client.state));
      assert.deepEqual(tokens, []);
      let good = false;
      const heard = watch({ url: keyed, ...how, token: () => tokenOf(userId, good ? {} : { key: "not the key" }) });
      await until(heard, () => heard.client.state === "refused");
      assert.equal(heard.client.reason, "invalid_token");
      good = true;
      heard.client.restore();
      await until(heard, () => ["live", "polling"].includes(heard.client.state));
    }
  });

  test("is refused where it has none, or another user's", async () => {
    const nobody = watch({ url: keyed });
    await until(nobody, () => nobody.client.state === "refused");
    assert.equal(nobody.client.reason, "unauthenticated");
    const thief = watch({ url: keyed, userId: newUser(), token: tokenOf(newUser()) });
    await until(thief, () => thief.client.state === "refused");
    assert.equal(thief.client.reason, "user_mismatch");
  });

  test("tries again while its token cannot be had", async () => {
    const userId = newUser();
    let asked = 0;
    const token = () => {
      if (++asked === 1) throw new Error("The sign-in service is down.");
      return tokenOf(userId);
    };
    const heard = watch({ url: keyed, token });
    await live(heard);
    assert.equal(asked, 2);
  });
});

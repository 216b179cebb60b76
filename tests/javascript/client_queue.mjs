// The place in line, on a service with one worker. The prompt "hold" keeps the worker busy until it is cancelled.
import assert from "node:assert/strict";
import { after, test } from "node:test";
import { closeAll, newUser, observe, openUrl, requestFields, untilFinished, untilLive, waitFor } from "./client_support.mjs";

after(closeAll);

test("every client has the place in line, also one that polls, until the work begins", async () => {
  const userId = newUser();
  const [phone, laptop] = [observe({ url: openUrl, userId }), observe({ url: openUrl, userId })];
  const [poller, stream] = [{ io: null }, { transport: "sse" }].map((how) => observe({ url: openUrl, userId, ...how }));
  await Promise.all([untilLive(phone), untilLive(laptop), untilLive(stream), waitFor(poller, () => poller.client.state === "polling")]);
  const { generationId: held } = await phone.client.start("edit", requestFields({ prompt: "hold" }));
  await waitFor(phone, () => phone.client.get(held)?.status === "openai_editing");
  const started = [];
  for (let count = 0; count < 2; count++) started.push(await phone.client.start("edit", requestFields()));
  assert.deepEqual(started.map(({ queuePosition }) => queuePosition), [1, 2]);
  const [first, second] = started.map(({ generationId }) => generationId);
  const placeOf = ({ client }, id) => client.get(id)?.queuePosition;
  const observers = [phone, laptop, poller, stream];
  for (const each of observers) {
    await waitFor(each, () => placeOf(each, first) === 1 && placeOf(each, second) === 2);
    assert.equal(placeOf(each, held), undefined);
  }
  const late = observe({ url: openUrl, userId });
  await untilLive(late);
  assert.equal(placeOf(late, second), 2);
  await phone.client.cancel(first);
  for (const each of [...observers, late]) {
    await waitFor(each, () => placeOf(each, second) === 1 && placeOf(each, first) === undefined);
  }
  await phone.client.cancel(held);
  for (const each of [...observers, late]) {
    await untilFinished(each, second);
    assert.ok(each.client.generations.every((generation) => !("queuePosition" in generation)));
    assert.ok(each.events.every((event) => !("queuePosition" in event)));
  }
});

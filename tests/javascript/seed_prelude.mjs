// The environment of the seed's snippet: a page, a user, and the two functions that it leaves to the application.
// Prints each event that the snippet handles as a line of JSON, with the bars on the page afterwards.
import { JSDOM } from "jsdom";
import { Socket } from "socket.io-client";

const { document } = new JSDOM('<div id="active-generations"></div>').window;
globalThis.document = document;
globalThis.user = { id: Number(process.env.SEED_USER) };
globalThis.showCompletionMessage = () => {};
globalThis.showErrorMessage = () => {};

const bars = () =>
  [...document.querySelectorAll(".progress-bar")].map((bar) => ({
    generationId: bar.getAttribute("data-generation-id"),
    width: bar.querySelector(".progress").style.width,
    message: bar.querySelector(".message").textContent,
    status: bar.querySelector(".status").textContent,
  }));

const print = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);

const on = Socket.prototype.on;
Socket.prototype.on = function (event, handle) {
  return on.call(this, event, (...values) => {
    handle(...values);
    print({ event, data: values[0], further: values.slice(1), bars: bars(), recovered: this.recovered });
  });
};
const connected = Socket.prototype.onconnect;
Socket.prototype.onconnect = function (...values) {
  connected.apply(this, values);
  print({ event: "connect", recovered: this.recovered });
};

// Drives the official client: executes commands from stdin and prints what happens, both as lines of JSON.
// One process hosts any number of sockets; `open` gives each its id.
import { Agent } from "node:http";
import { createInterface } from "node:readline";
import { io } from "socket.io-client";

const print = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
const sockets = new Map();

const emit = (id, ref, name, args) =>
  sockets.get(id).socket.emit(name, ...args, (ack) => print({ id, on: "ack", ref, ack }));

const commands = {
  // `first`: the payload of an `authenticate` that is emitted at once. `always`: the same in each `connect` handler.
  open({ id, url, options, first, always }) {
    const agent = new Agent();
    const settings = { forceNew: true, reconnectionDelay: 20, reconnectionDelayMax: 50, agent, ...options };
    const socket = io(url, settings);
    sockets.set(id, { socket, agent });
    // Printed from a `connect` handler, to show whether `recovered` is already set when an app's handler runs.
    socket.on("connect", () => {
      const { recovered, _pid: pid, id: sid } = socket;
      print({ id, on: "connect", recovered: recovered === true, pid, sid, transport: socket.io.engine.transport.name });
      if (always) emit(id, "always", "authenticate", [always]);
    });
    socket.on("disconnect", (reason) => print({ id, on: "disconnect", reason }));
    socket.on("connect_error", ({ message, data }) => print({ id, on: "refused", message, data }));
    socket.onAny((name, ...args) => print({ id, on: "event", name, args }));
    socket.io.on("open", () => {
      socket.io.engine.on("upgrade", ({ name }) => print({ id, on: "upgrade", name }));
      socket.io.engine.on("upgradeError", () => print({ id, on: "upgrade_failed" }));
    });
    if (first) emit(id, "first", "authenticate", [first]);
  },
  emit: ({ id, ref, name, args }) => emit(id, ref, name, args),
  connect: ({ id }) => sockets.get(id).socket.connect(),
  // Sends a Socket.IO DISCONNECT: the client does not reconnect.
  disconnect: ({ id }) => sockets.get(id).socket.disconnect(),
  // Closes the transport only.
  close: ({ id }) => sockets.get(id).socket.io.engine.close(),
  // Destroys the connections without a close, as a pulled cable does.
  cut({ id }) {
    const { socket, agent } = sockets.get(id);
    socket.io.engine?.transport.ws?.terminate();
    for (const connection of Object.values(agent.sockets).flat()) connection.destroy();
  },
  pause({ id }) {
    sockets.get(id).socket.io.engine.transport.ws.pause();
    print({ id, on: "paused" });
  },
  resume: ({ id }) => sockets.get(id).socket.io.engine.transport.ws.resume(),
  // Disconnects, and releases the socket.
  forget({ id }) {
    sockets.get(id).socket.disconnect();
    sockets.delete(id);
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { do: command, ...rest } = JSON.parse(line);
  commands[command](rest);
}
process.exit();

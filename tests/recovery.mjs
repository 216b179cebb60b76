// The official client on strings: it does what lines of JSON on stdin say, and prints what it sees as lines of JSON.
// One process hosts any number of sockets, each by the name that `open` gave it.
import { Agent } from "node:http";
import { createInterface } from "node:readline";
import { io } from "socket.io-client";

const print = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
const sockets = new Map();

const emit = (id, ref, name, args) =>
  sockets.get(id).socket.emit(name, ...args, (ack) => print({ id, on: "ack", ref, ack }));

const commands = {
  // `first`: emitted once, at once, as the seed does. `always`: emitted by each `connect` handler.
  open({ id, url, options, first, always }) {
    const agent = new Agent();
    const settings = { forceNew: true, reconnectionDelay: 20, reconnectionDelayMax: 50, agent, ...options };
    const socket = io(url, settings);
    sockets.set(id, { socket, agent });
    // Not first, so that it is seen whether an app's handler runs while `recovered` already says so.
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
    });
    if (first) emit(id, "first", "authenticate", [first]);
  },
  emit: ({ id, ref, name, args }) => emit(id, ref, name, args),
  connect: ({ id }) => sockets.get(id).socket.connect(),
  // A Socket.IO DISCONNECT: it does not come back.
  disconnect: ({ id }) => sockets.get(id).socket.disconnect(),
  // The transport alone says goodbye.
  close: ({ id }) => sockets.get(id).socket.io.engine.close(),
  // The cable is pulled: nobody says goodbye.
  cut({ id }) {
    const { socket, agent } = sockets.get(id);
    socket.io.engine?.transport.ws?.terminate();
    for (const line of Object.values(agent.sockets).flat()) line.destroy();
  },
  pause({ id }) {
    sockets.get(id).socket.io.engine.transport.ws.pause();
    print({ id, on: "paused" });
  },
  resume: ({ id }) => sockets.get(id).socket.io.engine.transport.ws.resume(),
  // It is no longer of interest.
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

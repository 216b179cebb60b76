// A bare Node socket.io server: a user's sockets are in a room. Obeys the commands of control.py.
// node socketio_peer.cjs NODE_MODULES USERS
const [modules, users] = [process.argv[2], Number(process.argv[3])];
const { Server } = require(`${modules}/socket.io`);
const http = require("node:http").createServer((request, response) => response.writeHead(404).end());
const io = new Server(http, { cors: { origin: "*" } });
io.on("connection", (socket) => socket.join(socket.handshake.auth.userId));

const say = (answer) => console.log(JSON.stringify(answer));
const emit = (user, message) =>
  io.to(`u${user}`).emit("continue", {
    generationId: "edit_1763829000123_k3v9x2ab4",
    status: "openai_editing",
    message,
    progress: 60,
  });

const commands = {
  flood(mode, seconds) {
    const end = performance.now() + seconds * 1e3;
    let sent = 0;
    const next = () => {
      emit(sent++ % users, "OpenAI image editing started...");
      if (performance.now() < end) setImmediate(next);
      else say({ sent });
    };
    next();
  },
  rate(mode, perSecond, seconds) {
    const begin = performance.now();
    const total = Math.floor(perSecond * seconds);
    let sent = 0;
    const next = () => {
      const due = Math.min(Math.floor(((performance.now() - begin) / 1e3) * perSecond), total);
      while (sent < due) emit(sent++ % users, `@${process.hrtime.bigint()}`);
      if (sent < total) setTimeout(next, 1);
      else say({ sent });
    };
    next();
  },
};

require("node:readline")
  .createInterface({ input: process.stdin })
  .on("line", (line) => {
    const [command, ...rest] = line.split(" ");
    commands[command](...rest);
  })
  .on("close", () => process.exit(0));
http.listen({ port: 0, host: "127.0.0.1", backlog: 4096 }, () => say({ port: http.address().port }));

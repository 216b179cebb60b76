// Composes three pictures below each other with sharp on one thread, and tells the seconds of CPU.
// node compose_peer.cjs NODE_MODULES PICTURE PICTURE PICTURE
const [modules, ...paths] = process.argv.slice(2);
const sharp = require(`${modules}/sharp`);
sharp.concurrency(1);
sharp.cache(false);
const [width, height] = [2480, 3508];
const room = Math.floor(height / paths.length);

(async () => {
  const began = process.cpuUsage();
  const parts = [];
  for (const [row, path] of paths.entries()) {
    const { data, info } = await sharp(path)
      .resize(width, room, { fit: "inside" })
      .raw()
      .toBuffer({ resolveWithObject: true });
    const raw = { width: info.width, height: info.height, channels: info.channels };
    parts.push({ input: data, raw, left: (width - info.width) >> 1, top: row * room });
  }
  await sharp({ create: { width, height, channels: 3, background: "white" } })
    .composite(parts)
    .jpeg({ quality: 90 })
    .toBuffer();
  const { user, system } = process.cpuUsage(began);
  console.log(JSON.stringify({ seconds: (user + system) / 1e6 }));
})();

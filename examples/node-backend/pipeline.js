// An external pipeline: paints a poster and reports its progress to Stagecast, which shows it on the user's devices.
import { randomUUID } from "node:crypto";
import { api, StagecastError } from "../../src/api/web/static/stagecast.js";

/** Pictures by name, for the server to serve. */
export const pictures = new Map();

/**
 * Starts a poster for a user. Returns its generation at once, and `done`, a promise that settles when the work ends.
 *
 * `stagecast`: `url`, and a service `token` if the service has a key. `base`: the URL at which `pictures` are served.
 */
export async function startPoster({ stagecast, base, userId, prompt }) {
  const service = api({ ...stagecast, service: true, userId });
  const generation = await service.start("generate", { prompt, metadata: { title: prompt } }, { runner: "external" });
  const report = (status, fields) => service.transition(generation.generationId, { status, ...fields });
  return { generation, done: paint({ report, base, prompt }) };
}

async function paint({ report, base, prompt }) {
  const store = (svg) => {
    const name = `${randomUUID()}.svg`;
    pictures.set(name, svg);
    return `${base}/pictures/${name}`;
  };
  try {
    await report("composition");
    const lines = wrap(prompt);
    await report("composition_completed", { compositionUrl: store(poster(lines, [])) });
    await report("ai_generation");
    const hills = [];
    for (const [progress, message] of [[70, "Painting the far hills..."], [80, "…and the near ones..."]]) {
      hills.push(hillRow(prompt, progress));
      await report("ai_generation", { progress, message, previewUrl: store(poster(lines, hills)) });
    }
    return await report("completed", { generatedImageUrl: store(poster(lines, hills)) });
  } catch (error) {
    if (error.code === "illegal_transition") return undefined; // For example, the user has cancelled it.
    if (error instanceof StagecastError) throw error;
    return report("failed", { error: "The poster could not be painted.", code: "internal" });
  }
}

/** Breaks the prompt into lines of about 22 characters. */
function wrap(prompt) {
  const lines = [""];
  for (const word of prompt.split(/\s+/)) {
    if ((lines.at(-1) + word).length > 22) lines.push("");
    lines.push(`${lines.pop()} ${word}`.trim());
  }
  return lines;
}

/** A row of hills; the same prompt gives the same hills. */
function hillRow(prompt, height) {
  const seed = [...prompt].reduce((sum, letter) => sum + letter.codePointAt(0), height);
  const points = Array.from({ length: 41 }, (_, x) => `${x * 15},${height * 9 + 60 * Math.sin(seed + x / 4)}`);
  return `<polygon fill="hsl(${seed % 360} 40% ${120 - height}%)" points="0,900 ${points.join(" ")} 600,900"/>`;
}

function poster(lines, hills) {
  const escape = (text) => text.replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`);
  const text = lines.map((line, index) => `<text x="300" y="${140 + index * 52}">${escape(line)}</text>`);
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 900"
 font-family="serif" font-size="44" text-anchor="middle">
<rect width="600" height="900" fill="#fbf3e4"/>${hills.join("")}${text.join("")}</svg>`;
}

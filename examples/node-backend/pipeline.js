// A pipeline of one's own: it paints a poster. Stagecast knows how far it is, and tells the user's devices.
import { randomUUID } from "node:crypto";
import { api, StagecastError } from "../../src/api/static/stagecast.js";

/** Finished pictures by name; the server serves them. */
export const pictures = new Map();

/**
 * Starts a poster for this user. Returns its generation at once; `done` is there when the work is.
 *
 * `stagecast`: `url`, and where the service has a key the `token` of a service. `base`: where `pictures` are served.
 */
export async function startPoster({ stagecast, base, userId, prompt }) {
  const service = api({ ...stagecast, service: true, userId });
  const generation = await service.start("generate", { prompt, metadata: { title: prompt } }, { runner: "external" });
  const tell = (status, facts) => service.transition(generation.generationId, { status, ...facts });
  return { generation, done: work({ tell, base, prompt }) };
}

async function work({ tell, base, prompt }) {
  const keep = (svg) => {
    const name = `${randomUUID()}.svg`;
    pictures.set(name, svg);
    return `${base}/pictures/${name}`;
  };
  try {
    await tell("composition");
    const lines = broken(prompt);
    await tell("composition_completed", { compositionUrl: keep(poster(lines, [])) });
    await tell("ai_generation");
    const hills = [];
    for (const [progress, message] of [[70, "Painting the far hills..."], [80, "…and the near ones..."]]) {
      hills.push(ridge(prompt, progress));
      await tell("ai_generation", { progress, message, previewUrl: keep(poster(lines, hills)) });
    }
    return await tell("completed", { generatedImageUrl: keep(poster(lines, hills)) });
  } catch (error) {
    if (error.code === "illegal_transition") return undefined; // The user has cancelled it.
    if (error instanceof StagecastError) throw error;
    return tell("failed", { error: "The poster could not be painted.", code: "internal" });
  }
}

/** The prompt in lines that fit. */
function broken(prompt) {
  const lines = [""];
  for (const word of prompt.split(/\s+/)) {
    if ((lines.at(-1) + word).length > 22) lines.push("");
    lines.push(`${lines.pop()} ${word}`.trim());
  }
  return lines;
}

/** A line of hills that is the same for the same prompt. */
function ridge(prompt, height) {
  const seed = [...prompt].reduce((sum, letter) => sum + letter.codePointAt(0), height);
  const points = Array.from({ length: 41 }, (_, x) => `${x * 15},${height * 9 + 60 * Math.sin(seed + x / 4)}`);
  return `<polygon fill="hsl(${seed % 360} 40% ${120 - height}%)" points="0,900 ${points.join(" ")} 600,900"/>`;
}

function poster(lines, hills) {
  const escape = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const text = lines.map((line, index) => `<text x="300" y="${140 + index * 52}">${escape(line)}</text>`);
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 900"
 font-family="serif" font-size="44" text-anchor="middle">
<rect width="600" height="900" fill="#fbf3e4"/>${hills.join("")}${text.join("")}</svg>`;
}

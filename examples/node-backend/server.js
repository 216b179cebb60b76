// A backend: POST /posters {"userId", "prompt"} answers 202 with the generation's id. The user's devices show its
// progress.
import { createServer } from "node:http";
import { fileURLToPath } from "node:url";
import { pictures, startPoster } from "./pipeline.js";

/** Creates the server; the caller calls `listen`. `stagecast`: `{url, token?}`. */
export function backend(stagecast) {
  const send = (response, status, body, type = "application/json") =>
    response.writeHead(status, { "Content-Type": type }).end(type === "application/json" ? JSON.stringify(body) : body);

  return createServer(async (request, response) => {
    const base = `http://${request.headers.host}`;
    const { pathname } = new URL(request.url, base);
    try {
      const picture = pictures.get(pathname.replace(/^\/pictures\//, ""));
      if (request.method === "GET" && picture) return send(response, 200, picture, "image/svg+xml");
      if (request.method !== "POST" || pathname !== "/posters") return send(response, 404, {});
      // A real backend takes the user from its own session.
      const chunks = [];
      for await (const chunk of request) chunks.push(chunk);
      const { userId, prompt } = JSON.parse(Buffer.concat(chunks).toString());
      const { generation, done } = await startPoster({ stagecast, base, userId, prompt });
      done.catch((error) => console.error(error.message)); // Stagecast ends an abandoned generation after its deadline.
      return send(response, 202, { generationId: generation.generationId });
    } catch (error) {
      const { code = "bad_request", status = 400, message } = error;
      return send(response, status || 503, { code, message });
    }
  });
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { STAGECAST_URL: url = "http://localhost:3000", STAGECAST_TOKEN: token, PORT = 4000 } = process.env;
  backend({ url, token }).listen(PORT, "127.0.0.1", () => console.log(`http://localhost:${PORT}`));
}

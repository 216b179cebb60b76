/**
 * `fetch` for uploads: reports the part of the body that was sent, which `fetch` cannot.
 *
 * @param {(fraction: number) => void} onProgress
 * @returns {(url: string, options: Record<string, any>) => Promise<Response>}
 */
export const uploading = (onProgress) => (url, { method, headers, body, signal }) => new Promise((resolve, reject) => {
  const request = new XMLHttpRequest();
  const fail = () => reject(new TypeError("The request was not answered."));
  request.open(method, url);
  for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
  request.upload.onprogress = ({ loaded, total }) => onProgress(loaded / total);
  request.onload = () => {
    const lines = request.getAllResponseHeaders().trim().split("\r\n");
    const pairs = lines.map((line) => /** @type {[string, string]} */ (line.split(/:\s*(.*)/s, 2)));
    resolve(new Response(request.responseText, { status: request.status, headers: pairs }));
  };
  request.onerror = request.onabort = fail;
  if (signal?.aborted) return fail();
  signal?.addEventListener("abort", () => request.abort());
  request.send(body);
});

// Reads an event stream with fetch, as a Node program does, and prints each event as a line of JSON.
const [url, last] = process.argv.slice(2);
const headers = { Accept: "text/event-stream", ...(last && { "Last-Event-ID": last }) };
let text = "";
for await (const chunk of (await fetch(url, { headers })).body.pipeThrough(new TextDecoderStream())) {
  text += chunk;
  for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
    const block = Object.fromEntries(text.slice(0, end).split("\n").map((line) => line.split(/: (.*)/s)));
    if (block.event) console.log(JSON.stringify({ event: block.event, id: block.id, data: JSON.parse(block.data) }));
  }
}

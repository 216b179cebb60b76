// What users write with the types of the package. It is only type-checked: each wrong line has to be an error.
import { api, connect, isFinished, reduce, StagecastError, type Generation, type Stagecast, type State } from "stagecast-client";
import { StagecastProvider, useGeneration, useGenerations } from "stagecast-client/react";
import { io } from "socket.io-client";

type Equal<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false;
/** Neither `any` nor anything else than this type. */
function exactly<Expected>() {
  return <Actual,>(_value: Actual, _same: Equal<Actual, Expected>) => {};
}

const stagecast: Stagecast = connect({ url: "http://localhost:3000", io, token: async () => "a.b.c" });
connect({ transport: "sse", userId: 123, cursor: stagecast.cursor });
connect({ io: null, pollEvery: 500, socket: { transports: ["websocket"] } });
// @ts-expect-error an unknown transport
connect({ transport: "smoke" });
// @ts-expect-error a token that is none
connect({ token: 3 });

exactly<readonly Generation[]>()(stagecast.generations, true);
exactly<State>()(stagecast.state, true);
exactly<number | undefined>()(stagecast.credit, true);
exactly<Generation | undefined>()(stagecast.get("edit_1"), true);

const remove: () => void = stagecast.on("event", (event, generation) => {
  exactly<number>()(event.progress, true);
  exactly<string | undefined>()(event.compositionUrl, true);
  exactly<Generation>()(generation, true);
  // @ts-expect-error events have no such key
  event.percentage;
  if (event.status === "ai_generation") remove();
  // @ts-expect-error there is no such status
  if (event.status === "done") remove();
});
stagecast.on("change", () => {});
stagecast.on("removed", (generationId) => exactly<string>()(generationId, true));
stagecast.on("state", (state, reason) => (exactly<State>()(state, true), exactly<string | undefined>()(reason, true)));
stagecast.on("caughtUp", ({ missed, recovered }) => [missed + 1, !recovered]);
// @ts-expect-error there is no such event
stagecast.on("progress", () => {});
// @ts-expect-error a listener with an argument of another type
stagecast.on("removed", (generationId: number) => generationId);
// @ts-expect-error a listener with too many arguments
stagecast.on("change", (generations: Generation[]) => generations);
stagecast.off("change", () => {});

async function use() {
  const generation = await stagecast.start("edit", { prompt: "a hat", images: [new Blob()], quality: "low", face: 0 });
  exactly<Generation>()(generation, true);
  exactly<unknown>()(generation.metadata?.title, true);
  exactly<string[] | undefined>()(generation.input?.images, true);
  await stagecast.start("edit", { images: new DataTransfer().files, imageNames: ["a"] as readonly string[] });
  // @ts-expect-error names are no files
  await stagecast.start("edit", { images: ["photo.jpg"] });
  // @ts-expect-error an unknown kind
  await stagecast.start("paint", { prompt: "a hat" });
  // @ts-expect-error an unknown field
  await stagecast.start("generate", { prompt: "a hat", size: "big" });
  exactly<"cancelled" | "already_finished">()(await stagecast.cancel("edit_1"), true);
  exactly<Generation | undefined>()(reduce(generation, (await stagecast.history("edit_1"))[0]!), true);
  const http = api({ url: "http://localhost:3000", token: "a.b.c", service: true, userId: "ada" });
  await http.transition(generation.generationId, { status: "composition", sequence: 2 });
  exactly<unknown>()(await http.call("GET", "/me"), true);
  for await (const { name, data } of http.stream()) exactly<unknown>()([name, data][1], true);
  const { edit } = await stagecast.stages();
  exactly<number | undefined>()(edit[0]?.typicalSeconds, true);
  try {
    if (isFinished(generation)) await stagecast.remove(generation.generationId);
  } catch (error) {
    if (error instanceof StagecastError) exactly<number | undefined>()(error.retryAfter, true);
  }
}

function Bar({ id }: { id: string }) {
  const generation = useGeneration(id);
  exactly<Generation | undefined>()(generation, true);
  return <progress value={generation?.progress ?? 0} max={100} />;
}

function Bars() {
  const { generations, state, credit, start, cancel } = useGenerations();
  exactly<State>()(state, true);
  exactly<number | undefined>()(credit, true);
  exactly<Stagecast["start"]>()(start, true);
  return generations.map(({ generationId }) => <Bar key={generationId} id={generationId} />).concat(
    <button key="cancel" onClick={() => void cancel("edit_1")} />,
  );
}

export const App = () => (
  <StagecastProvider url="http://localhost:3000" transport="sse" token={use as unknown as () => Promise<string>}>
    <Bars />
  </StagecastProvider>
);
export const Given = () => <StagecastProvider client={stagecast}><Bars /></StagecastProvider>;
// @ts-expect-error an unknown option
export const Wrong = () => <StagecastProvider address="http://localhost:3000" />;

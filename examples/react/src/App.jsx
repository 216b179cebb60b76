import { useState } from "react";
import { isFinished } from "stagecast-client";
import { StagecastProvider, useGeneration, useGenerations } from "stagecast-client/react";

export function App({ url }) {
  return (
    <StagecastProvider url={url} transport="sse">
      <h1>Generations</h1>
      <Connection />
      <Form />
      <List />
    </StagecastProvider>
  );
}

function Connection() {
  const { state, credit } = useGenerations();
  return <p role="status">{state}{credit !== undefined && `, ${credit} credits`}</p>;
}

function Form() {
  const { start } = useGenerations();
  const [problem, setProblem] = useState("");
  const submit = async (event) => {
    event.preventDefault();
    const { images, prompt } = event.target.elements;
    setProblem("");
    await start("edit", { prompt: prompt.value, images: [...images.files] }).catch((error) => setProblem(error.message));
  };
  return (
    <form onSubmit={submit}>
      <p><label>Photographs <input name="images" type="file" accept="image/png,image/jpeg,image/webp" multiple required /></label></p>
      <p><label>Prompt <input name="prompt" required maxLength={4000} /></label></p>
      <p><button>Start</button> <span role="alert">{problem}</span></p>
    </form>
  );
}

function List() {
  const { generations, cancel } = useGenerations();
  return <ul>{generations.map(({ generationId: id }) => <Row key={id} id={id} onCancel={() => cancel(id)} />)}</ul>;
}

function Row({ id, onCancel }) {
  const generation = useGeneration(id);
  if (!generation) return null;
  const { progress, message, error, faceSwapUrl, editedImageUrl, generatedImageUrl } = generation;
  const picture = faceSwapUrl ?? editedImageUrl ?? generatedImageUrl;
  return (
    <li>
      {error ?? message} <progress max={100} value={progress} />
      {picture && <a href={picture} target="_blank">Picture</a>}
      {!isFinished(generation) && <button onClick={onCancel}>Cancel</button>}
    </li>
  );
}

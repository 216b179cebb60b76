// A user's generations in React. The client is made once, outside of the components:
//
//     const stagecast = connect({ io, url, token });
//
//     function Generations() {
//       const { generations, state, credit } = useGenerations(stagecast);
//       return <ul>{generations.map((each) => <li key={each.generationId}>{each.message} {each.progress} %</li>)}</ul>;
//     }
import { useCallback, useSyncExternalStore } from "react";

export function useGenerations(stagecast) {
  const subscribe = useCallback(
    (changed) => {
      const ends = ["change", "state"].map((name) => stagecast.on(name, changed));
      return () => ends.forEach((end) => end());
    },
    [stagecast],
  );
  // Each is the same value until it changes, as React asks for.
  const generations = useSyncExternalStore(subscribe, () => stagecast.generations);
  const state = useSyncExternalStore(subscribe, () => stagecast.state);
  const credit = useSyncExternalStore(subscribe, () => stagecast.credit);
  return { generations, state, credit };
}

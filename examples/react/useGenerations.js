// A user's generations in React. Create the client once, outside of the components:
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
    (onChange) => {
      const removers = ["change", "state"].map((name) => stagecast.on(name, onChange));
      return () => removers.forEach((remove) => remove());
    },
    [stagecast],
  );
  // Each getter returns the same value until it changes, as useSyncExternalStore requires.
  const generations = useSyncExternalStore(subscribe, () => stagecast.generations);
  const state = useSyncExternalStore(subscribe, () => stagecast.state);
  const credit = useSyncExternalStore(subscribe, () => stagecast.credit);
  return { generations, state, credit };
}

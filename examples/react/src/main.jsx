import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { App } from "./App.jsx";

const url = import.meta.env.VITE_STAGECAST_URL ?? "http://localhost:3000";

createRoot(document.getElementById("root")).render(
  <StrictMode>
    <App url={url} />
  </StrictMode>,
);

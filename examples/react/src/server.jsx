// The same application rendered on a server: it shows no generations yet, and opens no connection.
import { renderToString } from "react-dom/server";
import { App } from "./App.jsx";

export const render = (url) => renderToString(<App url={url} />);

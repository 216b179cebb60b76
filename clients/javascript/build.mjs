// Builds `dist`: the module that the service serves, the React entry, and the types that their JSDoc declares.
import { execFileSync } from "node:child_process";
import { copyFileSync, mkdirSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = dirname(fileURLToPath(import.meta.url));
const dist = join(root, "dist");
rmSync(dist, { recursive: true, force: true });
mkdirSync(dist);
copyFileSync(join(root, "../../src/api/web/static/stagecast.js"), join(dist, "stagecast.js"));
copyFileSync(join(root, "react.js"), join(dist, "react.js"));
copyFileSync(join(root, "../../LICENSE"), join(root, "LICENSE"));

const require = createRequire(import.meta.url);
const typescript = dirname(require.resolve("typescript/package.json"));
execFileSync(process.execPath, [join(typescript, "bin/tsc"), "--project", join(root, "tsconfig.json")], { stdio: "inherit" });

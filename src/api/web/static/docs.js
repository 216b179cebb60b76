// Shows the OpenAPI description with Swagger UI, or as a plain list of the operations where npm has not installed that.
const { openapi } = document.querySelector("#docs").dataset;
if (globalThis.SwaggerUIBundle) {
  SwaggerUIBundle({ url: openapi, dom_id: "#docs", validatorUrl: null, deepLinking: true });
} else {
  const { paths } = await (await fetch(openapi)).json();
  for (const [path, operations] of Object.entries(paths)) {
    for (const [method, { description }] of Object.entries(operations)) {
      const code = document.createElement("code");
      code.textContent = `${method.toUpperCase()} ${path}`;
      const item = document.createElement("li");
      item.append(code, ` ${description.split("\n")[0]}`);
      document.querySelector("#docs ul").append(item);
    }
  }
}

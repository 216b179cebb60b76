// Shows the OpenAPI description with Swagger UI, in place of the plain list.
const { openapi } = document.querySelector("#docs").dataset;
SwaggerUIBundle({ url: openapi, dom_id: "#docs", validatorUrl: null, deepLinking: true });

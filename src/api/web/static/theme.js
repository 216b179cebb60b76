// What the first paint depends on, therefore a classic script in the head: the colours, which are light, dark, or as the
// system has them, and whether this tab has a token and does not ask for one.
{
  const KEY = "stagecast.theme";
  const root = document.documentElement;
  const inputs = () => /** @type {NodeListOf<HTMLInputElement>} */ (document.querySelectorAll("[name=theme]"));
  const use = (/** @type {string | null} */ theme) => {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    else delete root.dataset.theme;
    for (const input of inputs()) input.checked = input.value === (root.dataset.theme ?? "system");
  };
  try {
    use(localStorage.getItem(KEY));
    root.classList.toggle("signed-in", Boolean(sessionStorage.getItem("stagecast.token")));
  } catch {} // The browser denies access to its storage.
  addEventListener("storage", ({ key, newValue }) => key === KEY && use(newValue)); // Chosen in another tab.
  document.addEventListener("DOMContentLoaded", () => {
    use(root.dataset.theme ?? null);
    for (const input of inputs()) {
      input.addEventListener("change", () => {
        use(input.value);
        try { localStorage.setItem(KEY, input.value); } catch {} // Not remembered, then.
      });
    }
  });
}

// The colours: light, dark, or as the system has them. A classic script in the head, so that the first paint has them.
{
  const KEY = "stagecast.theme";
  const root = document.documentElement;
  const use = (/** @type {string | null} */ theme) => {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    else delete root.dataset.theme;
  };
  try { use(localStorage.getItem(KEY)); } catch {} // The browser denies access to its storage.
  addEventListener("storage", ({ key, newValue }) => key === KEY && use(newValue)); // Chosen in another tab.
  document.addEventListener("DOMContentLoaded", () => {
    for (const input of /** @type {NodeListOf<HTMLInputElement>} */ (document.querySelectorAll("[name=theme]"))) {
      input.checked = input.value === (root.dataset.theme ?? "system");
      input.addEventListener("change", () => {
        use(input.value);
        try { localStorage.setItem(KEY, input.value); } catch {} // Not remembered, then.
      });
    }
  });
}

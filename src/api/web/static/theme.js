// What the first paint depends on, therefore a classic script in the head: the colours, which are light, dark, or as the
// system has them, and whether this tab has a token and does not ask for one.
{
  const KEY = "stagecast.theme";
  const root = document.documentElement;
  const use = (/** @type {string | null} */ theme) => {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    else delete root.dataset.theme;
  };
  try {
    use(localStorage.getItem(KEY));
    root.classList.toggle("signed-in", Boolean(sessionStorage.getItem("stagecast.token")));
  } catch {} // The browser denies access to its storage.
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

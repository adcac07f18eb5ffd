// Times in the reader's own zone, told as an age while they are fresh; and the choice of theme.
(() => {
  const tell = (time) => {
    const then = Number(time.dataset.ms);
    const age = Math.max(0, (Date.now() - then) / 1000);
    const clock = new Date(then);
    const text =
      age < 60 ? `${Math.round(age)} s ago`
      : age < 3600 ? `${Math.round(age / 60)} min ago`
      : age < 86400 ? clock.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
      : clock.toLocaleDateString([], { day: "numeric", month: "short" });
    if (time.textContent !== text) time.textContent = text;
    time.title = clock.toLocaleString();
  };
  const tellAll = () => document.querySelectorAll("time[data-ms]").forEach(tell);
  new MutationObserver(tellAll).observe(document.documentElement, { childList: true, subtree: true });
  setInterval(tellAll, 1000);

  const KEY = "starcast-theme";
  window.starcastToggleTheme = () => {
    const dark = !document.body.classList.contains("body--dark");
    localStorage.setItem(KEY, dark ? "dark" : "light");
    setDark(dark);
  };
  const saved = localStorage.getItem(KEY);
  if (saved) {
    const apply = () =>
      typeof darkSetter === "function" ? setDark(saved === "dark") : setTimeout(apply, 20);
    apply();
  }
})();

"use strict";
// What pages share: their theme, and that they are drawn anew with it and with the window's width.
function live(draw, resized = draw) {
  const root = document.documentElement, button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; name(); draw(); };
  system.addEventListener("change", () => { name(); draw(); });
  let before = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth === before) return;
    before = document.body.clientWidth;
    resized();
  }).observe(document.body);
  name();
}

const THEMES = { auto: "Colours: as the system", light: "Colours: light", dark: "Colours: dark" };

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = THEMES[theme];
  try {
    localStorage.setItem("dit_sparse theme", theme);
  } catch {} // a page from a file may have no storage
  if (maps.trace) drawBlocks();
}

function storedTheme() {
  try {
    const theme = localStorage.getItem("dit_sparse theme");
    return Object.hasOwn(THEMES, theme) ? theme : "auto";
  } catch {
    return "auto";
  }
}

function nextOf(names, name) {
  return names[(names.indexOf(name) + 1) % names.length];
}

function among(select, by) {
  const options = [...select.options];
  const index = options.findIndex((option) => option.value === select.value) + by;
  return options[Math.min(options.length - 1, Math.max(0, index))].value;
}

const KEYS = [
  [" ", "space", "play or pause", () => setPlaying(!player.playing)],
  ["ArrowLeft", "←", "previous frame", () => stepBy(-1)],
  ["ArrowRight", "→", "next frame", () => stepBy(1)],
  ["Home", "home", "first frame", () => seek(0)],
  ["End", "end", "last frame", () => seek(player.frames - 1)],
  ["1", "1", "side by side", () => setView("side")],
  ["2", "2", "wipe", () => setView("wipe")],
  ["3", "3", "difference", () => setView("difference")],
  ["-", "−", "less amplification", () => setGain(Number(among($("gain"), -1)))],
  ["+", "+", "more amplification", () => setGain(Number(among($("gain"), 1)))],
  ["[", "[", "slower", () => setSpeed(among($("speed"), -1))],
  ["]", "]", "faster", () => setSpeed(among($("speed"), 1))],
  ["p", "p", "previous clip", () => showCell(player.index - 1)],
  ["n", "n", "next clip", () => showCell(player.index + 1)],
  [
    "t",
    "t",
    "light, dark or as the system",
    () => setTheme(nextOf(Object.keys(THEMES), document.documentElement.dataset.theme)),
  ],
  ["?", "?", "these keys", () => $("keys").showModal()],
];

// Selects and sliders keep the keys that they understand themselves.
function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const on = event.target.closest?.("select, input, button, dialog");
  if (on?.tagName === "SELECT" || (on?.tagName === "BUTTON" && event.key === " ")) return;
  const found = KEYS.find(([key]) => key === event.key);
  if (!found || !player.cell) return;
  event.preventDefault();
  found[3]();
}

function startKeys() {
  for (const [, shown, what] of KEYS)
    $("keys-list").append(make("dt", {}, make("kbd", {}, shown)), make("dd", {}, what));
  document.addEventListener("keydown", pressed);
  $("keys-button").addEventListener("click", () => $("keys").showModal());
  $("keys-close").addEventListener("click", () => $("keys").close());
  $("theme").addEventListener("click", () =>
    setTheme(nextOf(Object.keys(THEMES), document.documentElement.dataset.theme)),
  );
  matchMedia("(prefers-color-scheme: dark)").addEventListener(
    "change",
    () => maps.trace && drawBlocks(),
  );
}

function drawAgain() {
  if (player.cell) {
    fit();
    drawCurve();
    moveCursor(player.frame);
  }
  drawTradeoff();
  if (maps.trace) {
    drawHeat();
    inspect(maps.step, maps.layer);
  }
}

function start() {
  setTheme(storedTheme());
  startKeys();
  startPlayer();
  startCurve();
  buildTable();
  startTradeoff();
  $("origin").append(...data.reports.map(origin));
  setView("side");
  setGain(4);
  let waiting = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawAgain);
  });
  showCell(0);
  startMaps();
  const first = data.cells[0];
  if (first) document.title = `${titleOf(first)} – dit_sparse`;
}

start();

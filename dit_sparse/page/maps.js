// Where attention goes: layers against steps, the heads of one place, the blocks of one head.
const UNKNOWN = 65535;
const SCALE = 10000;
const KIND_WORDS = {
  d: "dense",
  s: "search: dense attention, and the mask for the steps after it",
  r: "sparse, by the mask that was found before",
};
const maps = {
  run: null,
  trace: null,
  branch: 0,
  step: 0,
  layer: 0,
  head: 0,
  quantity: "kept_mass",
  blocks: [],
  cells: [],
};

function tracedRuns() {
  return data.cells
    .flatMap((cell, index) => cell.runs.map((run) => ({ run, index })))
    .filter(({ run }) => run.trace);
}

async function startMaps() {
  const traced = tracedRuns();
  if (!traced.length) return;
  $("attention").hidden = false;
  $("map-run").append(
    ...traced.map(({ run, index }, i) =>
      make(
        "option",
        { value: i },
        data.cells.length > 1 ? `${whose(run)}, clip ${index + 1}` : whose(run),
      ),
    ),
  );
  $("map-run").addEventListener("change", () => chooseRun(traced[$("map-run").value].run));
  $("map-quantity").addEventListener(
    "click",
    (event) => event.target.dataset.quantity && chooseQuantity(event.target.dataset.quantity),
  );
  $("map-branch").addEventListener(
    "click",
    (event) => event.target.dataset.branch && chooseBranch(Number(event.target.dataset.branch)),
  );
  $("block-layer").addEventListener("change", () =>
    choosePlace(maps.step, Number($("block-layer").value)),
  );
  $("block-head").addEventListener("change", () => chooseHead(Number($("block-head").value)));
  startHeat();
  await chooseRun(traced[0].run);
}

async function chooseRun(run) {
  const trace = run.trace;
  const mapped = run.trace.maps
    ? run
    : tracedRuns()
        .map((entry) => entry.run)
        .find((other) => other.tint === run.tint && other.label === run.label && other.trace.maps);
  const [density, keptMass, blocks] = await Promise.all([
    inflate(trace.density),
    inflate(trace.kept_mass),
    mapped ? inflate(mapped.trace.maps) : null,
  ]);
  Object.assign(maps, {
    run,
    trace,
    density: new Uint16Array(density),
    kept_mass: new Uint16Array(keptMass),
  });
  maps.blocks = blocks ? JSON.parse(new TextDecoder().decode(blocks)) : [];
  maps.blocksOfFirstClip = mapped !== run;
  maps.branch = Math.min(maps.branch, trace.branches.length - 1);
  maps.layer = Math.min(maps.layer, trace.layers.length - 1);
  maps.head = Math.min(maps.head, trace.heads - 1);
  maps.step = trace.steps.length - 1;
  $("map-branch").replaceChildren(
    ...trace.branches.map((name, i) => make("button", { type: "button", "data-branch": i }, name)),
  );
  $("block-layer").replaceChildren(
    ...trace.layers.map((layer, i) => make("option", { value: i }, String(layer))),
  );
  const measured = maps.kept_mass.some((value) => value !== UNKNOWN);
  chooseQuantity(measured ? maps.quantity : "density");
}

function chooseQuantity(quantity) {
  maps.quantity = quantity;
  press($("map-quantity"), "quantity", quantity);
  chooseBranch(maps.branch);
}

function chooseBranch(branch) {
  maps.branch = branch;
  press($("map-branch"), "branch", branch);
  drawHeat();
  choosePlace(maps.step, maps.layer);
}

function placeIndex(step, layer) {
  const { steps, layers } = maps.trace;
  return (maps.branch * steps.length + step) * layers.length + layer;
}

function headValues(quantity, step, layer) {
  const start = placeIndex(step, layer) * maps.trace.heads;
  return Array.from(maps[quantity].subarray(start, start + maps.trace.heads), (n) =>
    n === UNKNOWN ? null : n / SCALE,
  );
}

function meanOf(values) {
  const known = values.filter(isNumber);
  return known.length ? known.reduce((a, b) => a + b) / known.length : null;
}

// A mixture of three colours of the theme, so that light and dark need no second drawing.
function heatColor(share) {
  const s = Math.min(1, Math.max(0, share));
  const [low, high, part] = s < 0.5 ? ["low", "mid", s * 2] : ["mid", "high", s * 2 - 1];
  return `color-mix(in oklab, var(--heat-${high}) ${(part * 100).toFixed(1)}%, var(--heat-${low}))`;
}

function drawHeat() {
  const { trace, quantity } = maps;
  const svg = $("heat");
  const [left, top, bottom] = [30, 4, 34];
  const width = svg.clientWidth || 600;
  const column = (width - left - 4) / trace.steps.length;
  const row = Math.min(48, Math.max(8, 420 / trace.layers.length));
  const height = top + row * trace.layers.length + bottom;
  const means = trace.steps.map((_, step) =>
    trace.layers.map((_, layer) => meanOf(headValues(quantity, step, layer))),
  );
  const known = means.flat().filter(isNumber);
  maps.low = quantity === "density" ? 0 : Math.floor(Math.min(0.95, ...known) * 20) / 20;
  maps.geometry = { left, top, column, row };
  const cells = [];
  trace.steps.forEach((_, step) =>
    trace.layers.forEach((_, layer) => cells.push(...heatCell(means[step][layer], step, layer))),
  );
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  const hatch = {
    id: "hatch",
    width: 6,
    height: 6,
    patternUnits: "userSpaceOnUse",
    patternTransform: "rotate(45)",
  };
  svg.replaceChildren(
    draw("pattern", hatch, draw("path", { class: "hatch", d: "M0 0V6" })),
    ...cells,
    ...labelled(trace.layers, row, 14).map(([text, at]) =>
      draw("text", { class: "tick end", x: left - 8, y: top + at + 4 }, text),
    ),
    ...labelled(trace.steps, column, 26).map(([text, at]) =>
      draw("text", { class: "tick middle", x: left + at, y: height - bottom + 14 }, text),
    ),
    draw("text", { class: "tick end", x: width - 4, y: height - 4 }, "step →"),
    draw("text", { class: "tick", x: 0, y: height - 4 }, "↑ layer"),
    draw("rect", { id: "here", class: "here", width: column, height: row }),
  );
  drawLegend();
}

function labelled(names, size, room) {
  const every = Math.ceil(room / size);
  return names.map((name, i) => [String(name), (i + 0.5) * size]).filter((_, i) => i % every === 0);
}

function heatCell(mean, step, layer) {
  const kind = maps.trace.kinds[placeIndex(step, layer)];
  if (kind === " ") return [];
  const { left, top, column, row } = maps.geometry;
  const gap = column > 5 && row > 5 ? 1 : 0;
  const [x, y] = [left + step * column, top + layer * row];
  const cell = draw("rect", {
    class: mean === null ? "cell dense" : "cell",
    x,
    y,
    width: column - gap,
    height: row - gap,
    "data-step": step,
    "data-layer": layer,
  });
  if (mean !== null) cell.style.fill = heatColor((mean - maps.low) / (1 - maps.low || 1));
  const dot =
    kind === "s"
      ? draw("circle", {
          class: "search",
          cx: x + column / 2 - gap / 2,
          cy: y + row / 2 - gap / 2,
          r: Math.min(2.5, row / 4),
        })
      : null;
  return dot ? [cell, dot] : [cell];
}

function drawLegend() {
  const bar = make("span", { class: "ramp" });
  for (let i = 0; i < 24; i++) {
    const part = make("i");
    part.style.background = heatColor(i / 23);
    bar.append(part);
  }
  const name =
    maps.quantity === "density"
      ? "share of key blocks that is read"
      : "share of softmax mass that is kept";
  $("legend").replaceChildren(
    make("span", {}, fixed(maps.low, 2)),
    bar,
    make("span", {}, "1"),
    make("span", {}, `${name}, mean over heads`),
    make("span", { class: "key" }, make("i", { class: "dense" }), "dense"),
    make("span", { class: "key" }, make("i", { class: "search" }), "search"),
  );
}

function startHeat() {
  const svg = $("heat");
  const placeAt = (event) => {
    const box = svg.getBoundingClientRect();
    const { left, top, column, row } = maps.geometry;
    const step = Math.floor((event.clientX - box.left - left) / column);
    const layer = Math.floor((event.clientY - box.top - top) / row);
    const { steps, layers } = maps.trace;
    return step >= 0 && step < steps.length && layer >= 0 && layer < layers.length
      ? [step, layer]
      : null;
  };
  svg.addEventListener("pointermove", (event) => {
    const place = placeAt(event);
    if (place) inspect(...place);
  });
  svg.addEventListener("pointerleave", () => inspect(maps.step, maps.layer));
  svg.addEventListener("click", (event) => {
    const place = placeAt(event);
    if (place) choosePlace(...place);
  });
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[
      event.key
    ];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    choosePlace(maps.step + move[0], maps.layer + move[1]);
  });
}

function choosePlace(step, layer) {
  maps.step = Math.min(maps.trace.steps.length - 1, Math.max(0, step));
  maps.layer = Math.min(maps.trace.layers.length - 1, Math.max(0, layer));
  $("block-layer").value = String(maps.layer);
  inspect(maps.step, maps.layer);
  drawBlocks();
}

function inspect(step, layer) {
  const { trace, geometry } = maps;
  const kind = trace.kinds[placeIndex(step, layer)];
  const here = $("here");
  here.setAttribute("x", geometry.left + step * geometry.column - 0.5);
  here.setAttribute("y", geometry.top + layer * geometry.row - 0.5);
  $("place").textContent =
    `Step ${trace.steps[step]}, layer ${trace.layers[layer]}, ${trace.branches[maps.branch]}`;
  const density = headValues("density", step, layer);
  const mass = headValues("kept_mass", step, layer);
  // A search may run sparse itself, where it needs no dense attention.
  $("kind").textContent =
    kind === "s" && density.some(isNumber)
      ? "search, and sparse by its mask"
      : KIND_WORDS[kind] || "did not run";
  const rows = density.map((value, head) => headRow(head, value, mass[head]));
  $("heads").replaceChildren(
    make(
      "div",
      { class: "head names" },
      make("span", {}, "head"),
      make("span", {}, "density"),
      make("span", {}, "kept mass"),
    ),
    ...rows,
  );
}

function headRow(head, density, mass) {
  const row = make(
    "button",
    {
      type: "button",
      class: "head",
      "data-head": head,
      "aria-pressed": String(head === maps.head),
    },
    make("span", {}, String(head)),
    bar(density),
    bar(mass),
  );
  row.addEventListener("click", () => chooseHead(head));
  return row;
}

function bar(value) {
  const inner = make("i");
  inner.style.width = `${(value ?? 0) * 100}%`;
  return make(
    "span",
    { class: "measure" },
    make("span", { class: "track" }, inner),
    make("b", {}, fixed(value, 3)),
  );
}

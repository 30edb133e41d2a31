const INSET = 8; // half the thumb of the scrubber, so that curve and scrubber agree
const CURVE = { height: 190, top: 34, bottom: 20 };
const SAME_Y = 12; // where frames that equal dense are marked
const PSNR_MARKS = [
  ["noise_floor", "noise floor"],
  ["chance", "chance"],
];
let curve = null; // what the cursor needs: frame -> x, PSNR -> y

function bounds(report) {
  return PSNR_MARKS.map(([key, name]) => ({ name, value: report[key]?.psnr })).filter((mark) =>
    isNumber(mark.value),
  );
}

function buildReadout() {
  const items = player.rows.map((row) => {
    row.reading = make("b", {}, "–");
    return make("li", {}, swatch(row.run.tint), label(row.run.label), row.reading);
  });
  $("readout").replaceChildren(...items);
}

function drawCurve() {
  const svg = $("curve");
  const width = svg.clientWidth || 600;
  const { height, top, bottom } = CURVE;
  const marks = bounds(data.reports[player.cell.report]);
  const runs = player.cell.runs;
  const known = [...runs.flatMap((run) => run.psnr_per_frame), ...marks.map((mark) => mark.value)].filter(isNumber);
  const low = Math.min(...known, known.length ? Infinity : 0);
  const high = Math.max(...known, known.length ? -Infinity : 1);
  const scale = ticks(low - 1, high + 1, 4);
  const x = (frame) => INSET + (frame / Math.max(1, player.frames - 1)) * (width - 2 * INSET);
  const y = (psnr) => height - bottom - ((psnr - low + 1) / (high - low + 2)) * (height - top - bottom);
  curve = { x, y, width };
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(
    ...scale.values.flatMap((value) => [
      draw("path", { class: "grid", d: `M0 ${y(value)}H${width}` }),
      draw("text", { class: "tick", x: 0, y: y(value) - 3 }, `${value.toFixed(scale.digits)}${value === scale.values.at(-1) ? " dB" : ""}`),
    ]),
    ...marks.flatMap((mark) => [
      draw("path", { class: "bound", d: `M0 ${y(mark.value)}H${width}` }),
      draw("text", { class: "tick end", x: width - INSET - 8, y: y(mark.value) - 3 }, `${mark.name} ${fixed(mark.value, 1)}`),
    ]),
    ...frameTicks(x, height),
    ...runs.flatMap((run) => line(run, x, y)),
    draw("path", { id: "cursor", class: "cursor", d: "" }),
    draw("g", { id: "dots" }),
  );
}

function frameTicks(x, height) {
  const every = Math.max(1, ticks(0, player.frames, 12).step);
  const found = [];
  for (let frame = 0; frame < player.frames; frame += Math.ceil(every)) {
    found.push(draw("text", { class: "tick middle", x: x(frame), y: height - 4 }, String(frame + 1)));
  }
  return found;
}

// A frame that equals dense has no finite PSNR: it is marked along the upper edge.
function line(run, x, y) {
  const points = run.psnr_per_frame.map((psnr, i) => [x(i), isNumber(psnr) ? y(psnr) : null]);
  const path = points.map(([px, py], i) => {
    if (py === null) return "";
    const begins = i === 0 || points[i - 1][1] === null;
    return `${begins ? "M" : "L"}${px.toFixed(1)} ${py.toFixed(1)}`;
  });
  const same = points.filter(([, py]) => py === null);
  return [
    draw("path", { class: `line ${run.tint}`, d: path.join("") }),
    ...same.map(([px]) => draw("circle", { class: `same ${run.tint}`, cx: px, cy: SAME_Y, r: 2.5 })),
    same.length ? draw("text", { class: "tick", x: INSET + 8, y: SAME_Y + 4 }, "identical") : null,
  ].filter(Boolean);
}

function moveCursor(frame) {
  if (!curve) return;
  const at = curve.x(frame);
  $("cursor").setAttribute("d", `M${at} 4V${CURVE.height - CURVE.bottom}`);
  const dots = [];
  for (const row of player.rows) {
    const psnr = row.run.psnr_per_frame[frame];
    const text = isNumber(psnr) ? `${fixed(psnr, 1)} dB` : "identical";
    row.now.textContent = text;
    if (row.reading) row.reading.textContent = text;
    if (isNumber(psnr)) dots.push(draw("circle", { class: `dot ${row.run.tint}`, cx: at, cy: curve.y(psnr), r: 4 }));
  }
  $("dots").replaceChildren(...dots);
}

function startCurve() {
  const svg = $("curve");
  const go = (event) => {
    const box = svg.getBoundingClientRect();
    const share = (event.clientX - box.left - INSET) / (box.width - 2 * INSET);
    setPlaying(false);
    seek(share * (player.frames - 1));
  };
  svg.addEventListener("pointerdown", (event) => {
    svg.setPointerCapture(event.pointerId);
    svg.onpointermove = go;
    go(event);
  });
  svg.addEventListener("lostpointercapture", () => (svg.onpointermove = null));
}

const COLUMNS = [
  ["PSNR, dB", (row) => (row.identical ? "identical" : fixed(row.psnr, 2))],
  ["SSIM", (row) => fixed(row.ssim, 4)],
  ["LPIPS", (row) => fixed(row.lpips, 4)],
  ["kept mass", (row) => fixed(row.kept_mass, 3)],
  ["density", (row) => fixed(row.density, 3)],
  ["effective cost", (row) => fixed(row.effective_cost, 3)],
  ["seconds", (row) => fixed(row.seconds, 1)],
  ["speed-up", (row) => (isNumber(row.speed_up) ? `${fixed(row.speed_up, 2)}×` : "–")],
  ["peak memory", (row) => mebibytes(row.peak_bytes)],
  ["kept between steps", (row) => mebibytes(row.peak_cache_bytes)],
];
const FROM_A_RUN = 3; // columns before it are known of finished videos too

function buildTable() {
  const columns = data.reports.some((report) => report.pipeline) ? COLUMNS : COLUMNS.slice(0, FROM_A_RUN);
  const heads = columns.map(([name]) => make("th", { scope: "col" }, name));
  heads.splice(1, 0, make("th", { scope: "col", class: "scale" }, "chance to floor"));
  $("figures").append(
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "method"), ...heads)),
    ...data.reports.map((report, number) => tableBody(report, number, columns)),
  );
  const lines = data.reports.flatMap((report) => report.remarks);
  const explained = data.reports.some((report) => report.pipeline)
    ? "Means over clips. PSNR, SSIM, LPIPS against dense of the same seed; effective cost: attention operations of all steps, warm-up and search included, over dense."
    : "PSNR, SSIM, LPIPS against the reference.";
  $("remarks").append(...[explained, ...new Set(lines)].map((text) => make("li", {}, text)));
}

function tableBody(report, number, columns) {
  const rows = report.rows.map((row) =>
    tableRow(make("span", {}, swatch(tintOf(number, row.label)), label(row.label), clipCount(row)), row, columns, report),
  );
  if (data.reports.length > 1) {
    rows.unshift(make("tr", { class: "report" }, make("th", { colspan: columns.length + 2, scope: "rowgroup" }, report.name)));
  }
  if (report.pipeline) {
    const dense = { ...report.dense, effective_cost: 1, density: 1, kept_mass: 1, speed_up: 1 };
    rows.push(tableRow("dense", dense, columns, report));
  }
  for (const [key, name] of PSNR_MARKS) {
    if (report[key]) rows.push(tableRow(boundName(name, report[key]), report[key], columns.slice(0, FROM_A_RUN), report, key));
  }
  return make("tbody", {}, ...rows);
}

function clipCount(row) {
  return row.clips > 1 ? make("small", {}, ` ${row.clips} clips`) : null;
}

function boundName(name, bound) {
  const how = Array.isArray(bound.kernels) ? `dense, ${bound.kernels.join(" against ")}` : "dense, another seed";
  return make("span", {}, name, make("small", {}, ` ${how}`));
}

function tableRow(name, row, columns, report, kind) {
  const cells = columns.map(([, show]) => make("td", {}, show(row)));
  cells.splice(1, 0, make("td", { class: "scale" }, psnrScale(row, report)));
  const floor = report.noise_floor?.psnr;
  const atFloor = !kind && isNumber(floor) && (row.identical || row.psnr >= floor);
  if (atFloor) cells[0].append(make("small", {}, " at the floor"));
  return make("tr", { class: kind || null }, make("th", { scope: "row" }, name), ...cells);
}

// Where a PSNR lies between dense with another seed and dense by another kernel.
function psnrScale(row, report) {
  const [floor, chance] = [report.noise_floor?.psnr, report.chance?.psnr];
  if (!isNumber(floor) || !isNumber(chance) || !isNumber(row.psnr)) return null;
  const x = (psnr) => 4 + 92 * Math.min(1, Math.max(0, (psnr - chance) / (floor - chance)));
  return draw(
    "svg",
    { viewBox: "0 0 100 12", width: 100, height: 12, role: "img", "aria-label": `${fixed(row.psnr, 1)} between ${fixed(chance, 1)} and ${fixed(floor, 1)} dB` },
    draw("path", { class: "grid", d: "M4 6H96M4 2V10M96 2V10" }),
    draw("circle", { class: `dot ${tintOf(data.reports.indexOf(report), row.label)}${row.label ? "" : " plain"}`, cx: x(row.psnr), cy: 6, r: 3.5 }),
  );
}

const AXES = {
  effective_cost: { name: "effective cost", digits: 2 },
  seconds: { name: "seconds", digits: 1 },
  psnr: { name: "PSNR, dB", digits: 1, bound: true },
  ssim: { name: "SSIM", digits: 3, bound: true },
  lpips: { name: "LPIPS", digits: 3, bound: true, lowIsGood: true },
};

function pointsOf(xKey, yKey) {
  return data.reports.flatMap((report, number) =>
    report.rows
      .filter((row) => isNumber(row[xKey]) && isNumber(row[yKey]))
      .map((row) => ({ x: row[xKey], y: row[yKey], label: row.label, tint: tintOf(number, row.label) })),
  );
}

function startTradeoff() {
  const usable = (x, y) => pointsOf(x, y).length > 1;
  const across = ["effective_cost", "seconds"].filter((key) => usable(key, "psnr") || usable(key, "ssim"));
  const up = ["psnr", "ssim", "lpips"].filter((key) => across.some((x) => usable(x, key)));
  if (!up.length) return;
  $("tradeoff").hidden = false;
  $("tradeoff-x").append(...across.map((key) => make("option", { value: key }, AXES[key].name)));
  $("tradeoff-y").append(...up.map((key) => make("option", { value: key }, AXES[key].name)));
  for (const id of ["tradeoff-x", "tradeoff-y"]) $(id).addEventListener("change", drawTradeoff);
  drawTradeoff();
}

function drawTradeoff() {
  if ($("tradeoff").hidden) return;
  const [xKey, yKey] = [$("tradeoff-x").value, $("tradeoff-y").value];
  const points = pointsOf(xKey, yKey);
  const clips = data.cells.flatMap((cell) => cell.runs).filter((run) => isNumber(run[xKey]) && isNumber(run[yKey]));
  const marks = AXES[yKey].bound ? data.reports.flatMap((report) => PSNR_MARKS.map(([key, name]) => ({ name, value: report[key]?.[yKey] }))).filter((mark) => isNumber(mark.value)) : [];
  const svg = $("pareto");
  const [width, height, left, bottom] = [svg.clientWidth || 800, 340, 52, 40];
  const xs = span([0, ...(xKey === "effective_cost" ? [1] : []), ...points.map((p) => p.x), ...clips.map((run) => run[xKey])], 0);
  const ys = span([...points.map((p) => p.y), ...clips.map((run) => run[yKey]), ...marks.map((mark) => mark.value)], 0.06);
  const x = (value) => left + ((value - xs.low) / (xs.high - xs.low)) * (width - left - 24);
  const y = (value) => height - bottom - ((value - ys.low) / (ys.high - ys.low)) * (height - bottom - 14);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(
    ...axis(xs, (value, text) => [draw("path", { class: "grid", d: `M${x(value)} 14V${height - bottom}` }), draw("text", { class: "tick middle", x: x(value), y: height - bottom + 16 }, text)]),
    ...axis(ys, (value, text) => [draw("path", { class: "grid", d: `M${left} ${y(value)}H${width - 24}` }), draw("text", { class: "tick end", x: left - 8, y: y(value) + 4 }, text)]),
    ...marks.flatMap((mark) => [draw("path", { class: "bound", d: `M${left} ${y(mark.value)}H${width - 24}` }), draw("text", { class: "tick end", x: width - 28, y: y(mark.value) - 4 }, `${mark.name} ${fixed(mark.value, AXES[yKey].digits)}`)]),
    draw("text", { class: "tick end", x: width - 24, y: height - 6 }, `${AXES[xKey].name} →`),
    draw("text", { class: "tick", x: 0, y: 10 }, `${AXES[yKey].lowIsGood ? "↓" : "↑"} ${AXES[yKey].name}`),
    draw("path", { class: "frontier", d: frontier(points, AXES[yKey].lowIsGood).map((p, i) => `${i ? "L" : "M"}${x(p.x)} ${y(p.y)}`).join("") }),
    ...clips.map((run) => draw("circle", { class: `clip ${run.tint}`, cx: x(run[xKey]), cy: y(run[yKey]), r: 2.5 })),
    ...points.map((p) => draw("circle", { class: `point ${p.tint}`, cx: x(p.x), cy: y(p.y), r: 6 }, draw("title", {}, `${p.label}: ${AXES[xKey].name} ${fixed(p.x, AXES[xKey].digits)}, ${AXES[yKey].name} ${fixed(p.y, AXES[yKey].digits)}`))),
    ...pointLabels(points, x, y, width),
  );
}

function span(values, margin) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const more = (high - low || 1) * margin;
  return { low: low - more, high: high + (more || (high - low || 1) * 0.02) };
}

function axis(range, at) {
  const scale = ticks(range.low, range.high, 5);
  return scale.values.flatMap((value) => at(value, value.toFixed(scale.digits)));
}

function frontier(points, lowIsGood) {
  const sign = lowIsGood ? -1 : 1;
  const beaten = (p) => points.some((q) => q !== p && q.x <= p.x && sign * q.y >= sign * p.y && (q.x < p.x || q.y !== p.y));
  return points.filter((p) => !beaten(p)).sort((p, q) => p.x - q.x);
}

function pointLabels(points, x, y, width) {
  let last = -Infinity;
  const ordered = [...points].sort((p, q) => y(p.y) - y(q.y));
  return ordered.map((p) => {
    last = Math.max(y(p.y) + 4, last + 15);
    const leftward = x(p.x) > width * 0.7;
    return draw("text", { class: leftward ? "name end" : "name", x: x(p.x) + (leftward ? -12 : 12), y: last }, p.label);
  });
}

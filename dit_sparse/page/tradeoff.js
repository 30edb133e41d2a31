// Quality against cost.
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
      .map((row) => ({
        x: row[xKey],
        y: row[yKey],
        label: row.label,
        tint: tintOf(number, row.label),
        report: number,
      })),
  );
}

function startTradeoff() {
  const usable = (x, y) => pointsOf(x, y).length > 1;
  const across = ["effective_cost", "seconds"].filter(
    (key) => usable(key, "psnr") || usable(key, "ssim"),
  );
  const up = ["psnr", "ssim", "lpips"].filter((key) => across.some((x) => usable(x, key)));
  if (!up.length) return;
  $("tradeoff").hidden = false;
  $("tradeoff-x").append(...across.map((key) => make("option", { value: key }, AXES[key].name)));
  $("tradeoff-y").append(...up.map((key) => make("option", { value: key }, AXES[key].name)));
  for (const id of ["tradeoff-x", "tradeoff-y"]) $(id).addEventListener("change", drawTradeoff);
  drawTradeoff();
}

const PLOT = { height: 340, left: 52, right: 24, top: 14, bottom: 40 };

function drawTradeoff() {
  if ($("tradeoff").hidden) return;
  const [xKey, yKey] = [$("tradeoff-x").value, $("tradeoff-y").value];
  const points = pointsOf(xKey, yKey);
  const clips = data.cells
    .flatMap((cell) => cell.runs)
    .filter((run) => isNumber(run[xKey]) && isNumber(run[yKey]))
    .map((run) => ({ x: run[xKey], y: run[yKey], tint: run.tint }));
  const marks = marksOf(yKey);
  const all = [...points, ...clips];
  const ends = xKey === "effective_cost" ? [0, 1] : [0];
  const width = $("pareto").clientWidth || 800;
  const plot = {
    ...PLOT,
    width,
    xs: span([...ends, ...all.map((p) => p.x)], 0),
    ys: span([...all.map((p) => p.y), ...marks.map((mark) => mark.value)], 0.06),
  };
  plot.x = (value) => between(value, plot.xs, PLOT.left, width - PLOT.right);
  plot.y = (value) => between(value, plot.ys, PLOT.height - PLOT.bottom, PLOT.top);
  $("pareto").setAttribute("viewBox", `0 0 ${width} ${PLOT.height}`);
  $("pareto").replaceChildren(
    ...axes(plot, AXES[xKey], AXES[yKey]),
    ...marks.flatMap((mark) => boundLine(mark, plot, AXES[yKey].digits)),
    ...frontiers(points, AXES[yKey].lowIsGood).map((line) =>
      draw("path", { class: "frontier", d: path(line, plot) }),
    ),
    ...clips.map((p) => spot("clip", p, plot, 2.5)),
    ...points.map((p) => spot("point", p, plot, 6)),
    ...pointLabels(points, plot),
  );
}

function marksOf(key) {
  if (!AXES[key].bound) return [];
  return data.reports
    .flatMap((report) => PSNR_MARKS.map(([mark, name]) => ({ name, value: report[mark]?.[key] })))
    .filter((mark) => isNumber(mark.value));
}

function between(value, range, from, to) {
  return from + ((value - range.low) / (range.high - range.low)) * (to - from);
}

function axes({ width, height, left, right, top, bottom, xs, ys, x, y }, across, up) {
  const [foot, end] = [height - bottom, width - right];
  return [
    ...axis(xs, (value, text) => [
      draw("path", { class: "grid", d: `M${x(value)} ${top}V${foot}` }),
      draw("text", { class: "tick middle", x: x(value), y: foot + 16 }, text),
    ]),
    ...axis(ys, (value, text) => [
      draw("path", { class: "grid", d: `M${left} ${y(value)}H${end}` }),
      draw("text", { class: "tick end", x: left - 8, y: y(value) + 4 }, text),
    ]),
    draw("text", { class: "tick end", x: end, y: height - 6 }, `${across.name} →`),
    draw(
      "text",
      { class: "tick", x: 0, y: 10 },
      up.lowIsGood ? `${up.name}, low is good` : up.name,
    ),
  ];
}

function boundLine(mark, { width, left, right, y }, digits) {
  const at = { class: "tick end", x: width - right - 4, y: y(mark.value) - 4 };
  return [
    draw("path", { class: "bound", d: `M${left} ${y(mark.value)}H${width - right}` }),
    draw("text", at, `${mark.name} ${fixed(mark.value, digits)}`),
  ];
}

function path(points, { x, y }) {
  return points.map((p, i) => `${i ? "L" : "M"}${x(p.x)} ${y(p.y)}`).join("");
}

function spot(kind, point, { x, y }, r) {
  const title = point.label && draw("title", {}, whose(point));
  const at = { class: `${kind} ${point.tint}`, cx: x(point.x), cy: y(point.y), r };
  return draw("circle", at, title);
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

// One for each pipeline and call: dense videos of another are another yardstick.
function frontiers(points, lowIsGood) {
  const groups = new Map();
  for (const point of points) {
    const { pipeline } = data.reports[point.report];
    const key = JSON.stringify([pipeline?.source, pipeline?.call]);
    groups.set(key, [...(groups.get(key) ?? []), point]);
  }
  return [...groups.values()].map((group) => frontier(group, lowIsGood));
}

function frontier(points, lowIsGood) {
  const sign = lowIsGood ? -1 : 1;
  const beaten = (p) =>
    points.some(
      (q) => q !== p && q.x <= p.x && sign * q.y >= sign * p.y && (q.x < p.x || q.y !== p.y),
    );
  return points.filter((p) => !beaten(p)).sort((p, q) => p.x - q.x);
}

// To the right of a point, unless there is no room or another point, and the left is free.
function pointLabels(points, plot) {
  const { x, y, width } = plot;
  const ordered = [...points].sort((p, q) => y(p.y) - y(q.y));
  const heights = labelHeights(ordered.map((p) => y(p.y) + 4), plot);
  return ordered.map((p, i) => {
    const room = 12 + 7 * whose(p).length;
    const covers = (side) =>
      points.some((q) => {
        const beyond = side * (x(q.x) - x(p.x));
        return q !== p && Math.abs(y(q.y) + 4 - heights[i]) < 12 && beyond > 0 && beyond < room + 6;
      });
    const leftward = x(p.x) + room > width || (covers(1) && !covers(-1));
    return draw(
      "text",
      { class: leftward ? "name end" : "name", x: x(p.x) + (leftward ? -12 : 12), y: heights[i] },
      whose(p),
    );
  });
}

// Pushed down where labels are too near, and up again where the plot ends.
function labelHeights(wanted, { height, bottom }) {
  const found = [];
  for (const at of wanted) found.push(Math.max(at, (found.at(-1) ?? -Infinity) + 15));
  let lowest = height - bottom - 4;
  for (let i = found.length - 1; i >= 0 && found[i] > lowest; i--, lowest -= 15) found[i] = lowest;
  return found;
}

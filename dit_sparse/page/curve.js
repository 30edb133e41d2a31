// PSNR of each frame, and the way to a frame.
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
  const known = [
    ...runs.flatMap((run) => run.psnr_per_frame),
    ...marks.map((mark) => mark.value),
  ].filter(isNumber);
  const low = Math.min(...known, known.length ? Infinity : 0);
  const high = Math.max(...known, known.length ? -Infinity : 1);
  const scale = ticks(low - 1, high + 1, 4);
  const x = (frame) => INSET + (frame / Math.max(1, player.frames - 1)) * (width - 2 * INSET);
  const y = (psnr) =>
    height - bottom - ((psnr - low + 1) / (high - low + 2)) * (height - top - bottom);
  curve = { x, y, width };
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(
    ...scale.values.map((value) => draw("path", { class: "grid", d: `M0 ${y(value)}H${width}` })),
    ...marks.flatMap((mark) => [
      draw("path", { class: "bound", d: `M0 ${y(mark.value)}H${width}` }),
      draw(
        "text",
        { class: "tick end", x: width - INSET - 8, y: y(mark.value) - 3 },
        `${mark.name} ${fixed(mark.value, 1)}`,
      ),
    ]),
    ...frameTicks(x, height),
    ...runs.flatMap((run) => line(run, x, y)),
    ...scale.values.map((value) => {
      const unit = value === scale.values.at(-1) ? " dB" : "";
      const text = `${value.toFixed(scale.digits)}${unit}`;
      return draw("text", { class: "tick", x: 0, y: y(value) - 3 }, text);
    }),
    draw("path", { id: "cursor", class: "cursor", d: "" }),
    draw("g", { id: "dots" }),
  );
}

function frameTicks(x, height) {
  const every = Math.max(1, ticks(0, player.frames, 12).step);
  const found = [];
  for (let frame = 0; frame < player.frames; frame += Math.ceil(every)) {
    found.push(
      draw("text", { class: "tick middle", x: x(frame), y: height - 4 }, String(frame + 1)),
    );
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
    ...same.map(([px]) =>
      draw("circle", { class: `same ${run.tint}`, cx: px, cy: SAME_Y, r: 2.5 }),
    ),
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
    if (isNumber(psnr))
      dots.push(draw("circle", { class: `dot ${row.run.tint}`, cx: at, cy: curve.y(psnr), r: 4 }));
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

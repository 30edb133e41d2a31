// One row for each method, and what bounds them.
const COLUMNS = [
  ["PSNR, dB", (row) => (row.identical ? "identical" : fixed(row.psnr, 2))],
  ["SSIM", (row) => fixed(row.ssim, 4)],
  ["LPIPS", (row) => fixed(row.lpips, 4)],
  ["kept mass", (row) => fixed(row.kept_mass, 3)],
  ["density", (row) => fixed(row.density, 3)],
  ["effective cost", (row) => fixed(row.effective_cost, 3)],
  ["seconds", (row) => fixed(row.seconds, 1)],
  ["speed-up", (row) => (isNumber(row.speed_up) ? `${fixed(row.speed_up, 2)}×` : "–")],
  ["peak memory", (row) => memory(row.peak_bytes)],
  ["kept between steps", (row) => memory(row.peak_cache_bytes)],
];
const FROM_A_RUN = 3; // columns before it are known of finished videos too

function buildTable() {
  const rows = data.reports.flatMap((report) => report.rows);
  const columns = COLUMNS.filter(
    ([, show], i) => i < FROM_A_RUN || rows.some((row) => show(row) !== "–"),
  );
  const heads = columns.map(([name]) => make("th", { scope: "col" }, name));
  if (hasScale())
    heads.splice(1, 0, make("th", { scope: "col", class: "scale" }, "chance to floor"));
  $("figures").append(
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "method"), ...heads)),
    ...data.reports.map((report, number) => tableBody(report, number, columns)),
  );
  const lines = data.reports.flatMap((report) => report.remarks);
  const explained = data.reports.some((report) => report.pipeline)
    ? "Means over clips. PSNR, SSIM, LPIPS against dense of the same seed; effective cost: attention " +
      "operations of all steps, warm-up and search included, over dense."
    : "PSNR, SSIM, LPIPS against the reference.";
  $("remarks").append(...[explained, ...new Set(lines)].map((text) => make("li", {}, text)));
}

function tableBody(report, number, columns) {
  const rows = report.rows.map((row) =>
    tableRow(
      make("span", {}, swatch(tintOf(number, row.label)), label(row.label), clipCount(row)),
      row,
      columns,
      report,
    ),
  );
  if (data.reports.length > 1) {
    rows.unshift(
      make(
        "tr",
        { class: "report" },
        make("th", { colspan: columns.length + 2, scope: "rowgroup" }, report.name),
      ),
    );
  }
  if (report.pipeline) {
    const dense = { ...report.dense, effective_cost: 1, density: 1, kept_mass: 1, speed_up: 1 };
    rows.push(tableRow("dense", dense, columns, report));
  }
  for (const [key, name] of PSNR_MARKS) {
    if (report[key])
      rows.push(
        tableRow(
          boundName(name, report[key]),
          report[key],
          columns.slice(0, FROM_A_RUN),
          report,
          key,
        ),
      );
  }
  return make("tbody", {}, ...rows);
}

function clipCount(row) {
  return row.clips > 1 ? make("small", {}, ` ${row.clips} clips`) : null;
}

function boundName(name, bound) {
  const how = Array.isArray(bound.kernels)
    ? `dense, ${bound.kernels.join(" against ")}`
    : "dense, another seed";
  return make("span", {}, name, make("small", {}, ` ${how}`));
}

function tableRow(name, row, columns, report, kind) {
  const cells = columns.map(([, show]) => make("td", {}, show(row)));
  if (hasScale()) cells.splice(1, 0, make("td", { class: "scale" }, psnrScale(row, report)));
  const floor = report.noise_floor?.psnr;
  const atFloor = !kind && isNumber(floor) && (row.identical || row.psnr >= floor);
  if (atFloor) cells[0].append(make("small", {}, " at the floor"));
  return make("tr", { class: kind || null }, make("th", { scope: "row" }, name), ...cells);
}

function hasScale() {
  return data.reports.some((report) => bounds(report).length === PSNR_MARKS.length);
}

// Where a PSNR lies between dense with another seed and dense by another kernel.
function psnrScale(row, report) {
  const [floor, chance] = [report.noise_floor?.psnr, report.chance?.psnr];
  if (!isNumber(floor) || !isNumber(chance) || !isNumber(row.psnr)) return null;
  const x = (psnr) => 4 + 92 * Math.min(1, Math.max(0, (psnr - chance) / (floor - chance)));
  return draw(
    "svg",
    {
      viewBox: "0 0 100 12",
      width: 100,
      height: 12,
      role: "img",
      "aria-label": `${fixed(row.psnr, 1)} between ${fixed(chance, 1)} and ${fixed(floor, 1)} dB`,
    },
    draw("path", { class: "grid", d: "M4 6H96M4 2V10M96 2V10" }),
    draw("circle", {
      class: `dot ${tintOf(data.reports.indexOf(report), row.label)}${row.label ? "" : " plain"}`,
      cx: x(row.psnr),
      cy: 6,
      r: 3.5,
    }),
  );
}

// Command, versions, seeds, options.
function section(title, facts) {
  const list = make("dl", {});
  for (const [name, value] of facts) {
    if (value === null || value === undefined || value === "") continue;
    list.append(make("dt", {}, name), make("dd", {}, String(value)));
  }
  return make("div", { class: "card" }, make("h3", {}, title), list);
}

function spelled(value) {
  if (value === null || typeof value !== "object") return String(value);
  if (Array.isArray(value)) return `(${value.map(spelled).join(", ")})`;
  return Object.entries(value)
    .map(([name, inner]) => `${name}=${spelled(inner)}`)
    .join(", ");
}

function origin(report, number) {
  const { environment = {}, pipeline, metrics = {} } = report;
  const cells = data.cells.filter((cell) => cell.runs.some((run) => run.report === number));
  const seeds = [...new Set(cells.map((cell) => cell.seed).filter(isNumber))];
  const prompts = [...new Set(cells.map((cell) => cell.prompt).filter(Boolean))];
  const bound = (key) =>
    report[key] &&
    spelled(
      Object.fromEntries(Object.entries(report[key]).filter(([name]) => name !== "psnr_per_frame")),
    );
  const configs = report.rows.map((row) => [
    row.label,
    spelled(
      cells
        .flatMap((cell) => cell.runs)
        .find((run) => run.report === number && run.label === row.label)?.config || {},
    ),
  ]);
  return make(
    "article",
    {},
    data.reports.length > 1 ? make("h3", {}, report.name) : null,
    commandLine(report.command),
    report.complete
      ? null
      : make(
          "p",
          { class: "warning" },
          "This comparison was interrupted: it holds what was finished.",
        ),
    make(
      "div",
      { class: "cards" },
      section(
        "Call",
        pipeline
          ? [
              ["pipeline", pipeline.class],
              ["from", pipeline.source],
              ...Object.entries(pipeline.call || {}).map(([name, value]) => [name, spelled(value)]),
              ["fps", pipeline.fps],
              ["seeds", seeds.join(", ")],
              ["prompts", prompts.length],
            ]
          : [["reference", cells[0]?.runs[0].dense_label]],
      ),
      section("Machine and versions", [
        ["time", environment.time],
        ["gpu", environment.gpu],
        ["device", environment.device],
        ["dtype", environment.dtype],
        ["cpu threads", environment.cpu_threads],
        ["platform", environment.platform],
        ["python", environment.python],
        ...Object.entries(environment.packages || {}).map(([name, version]) => [
          name,
          version ?? "not installed",
        ]),
      ]),
      section("Measured how", [
        ["PSNR", metrics.psnr],
        ["SSIM", metrics.ssim],
        [
          "LPIPS",
          metrics.lpips_missing ? `none: ${metrics.lpips_missing}` : `network ${metrics.lpips_net}`,
        ],
        ["noise floor", bound("noise_floor")],
        ["chance", bound("chance")],
        ["frames here", data.frames_note],
      ]),
    ),
    pipeline ? section("Options of each method", configs) : null,
  );
}

function commandLine(command) {
  const button = make("button", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(command);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(button.previousSibling);
      button.textContent = "Selected";
    }
  });
  return make("div", { class: "command" }, make("code", {}, String(command)), button);
}

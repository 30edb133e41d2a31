// One clock, one loop: every canvas on the page is drawn for the same frame in the same task.
const player = {
  cell: null,
  index: -1,
  rows: [],
  frame: 0,
  frames: 1,
  playing: false,
  speed: 1,
  view: "side",
  gain: 4,
  wipe: 50,
  origin: null, // time and frame from which the clock counts
};
const bitmaps = new Map(); // clip -> promise of its frames

function decoded(clip) {
  if (!bitmaps.has(clip)) {
    const images = data.clips[clip].frames.map((frame) =>
      createImageBitmap(new Blob([bytesOf(frame)], { type: "image/webp" }), {
        colorSpaceConversion: "none",
      }),
    );
    bitmaps.set(clip, Promise.all(images));
  }
  return bitmaps.get(clip);
}

function forgetOthers(clips) {
  for (const [clip, frames] of bitmaps) {
    if (clips.has(clip)) continue;
    bitmaps.delete(clip);
    frames.then(
      (images) => images.forEach((image) => image.close()),
      () => {},
    );
  }
}

async function showCell(index) {
  if (!data.cells.length) {
    $("player").classList.add("empty");
    $("prompt").textContent = "No clip was finished";
    return;
  }
  player.index = (index + data.cells.length) % data.cells.length;
  player.cell = data.cells[player.index];
  player.frames = player.cell.size[0];
  const cell = player.cell;
  describeCell(cell);
  player.rows = cell.runs.map(buildRow);
  $("rows").replaceChildren(...player.rows.map((row) => row.element));
  $("scrub").max = player.frames - 1;
  fit();
  buildReadout();
  drawCurve();
  show(Math.min(player.frame, player.frames - 1));
  await loadRows(cell);
}

async function loadRows(cell) {
  const rows = player.rows.filter((row) => row.shown);
  $("player-note").textContent = "Decoding frames …";
  forgetOthers(new Set(rows.flatMap((row) => [row.run.dense_clip, row.run.clip])));
  const loaded = rows.map(async (row) => {
    [row.dense.images, row.sparse.images] = await Promise.all([
      decoded(row.run.dense_clip),
      decoded(row.run.clip),
    ]);
  });
  const results = await Promise.allSettled(loaded);
  if (player.cell !== cell) return; // another clip was chosen meanwhile
  const failed = results.some((result) => result.status === "rejected");
  $("player-note").textContent = failed ? "Some frames could not be decoded." : data.frames_note;
  document.body.dataset.ready = player.index;
  player.origin = null;
  show(player.frame);
}

function hasFrames(clip) {
  return isNumber(clip) && Boolean(data.clips[clip]);
}

function buildRow(run) {
  const shown = hasFrames(run.clip) && hasFrames(run.dense_clip);
  const dense = buildScreen("dense", run.dense_label, null);
  const sparse = buildScreen("sparse", run.label, run.tint);
  const difference = buildScreen("difference", "difference", null);
  const divider = make("div", {
    class: "divider",
    role: "slider",
    tabindex: 0,
    "aria-label": "Wipe between both clips",
    "aria-valuemin": 0,
    "aria-valuemax": 100,
  });
  const stage = make("div", { class: "stage" });
  if (shown) stage.append(dense.element, sparse.element, difference.element, divider);
  else stage.append(make("p", { class: "soft" }, "The frames of this clip are not in this file."));
  wipeBy(stage, divider);
  const now = make("b", {}, "–");
  const element = make("article", { class: "aligned row" }, rowHead(run, now), stage);
  return { run, element, stage, dense, sparse, difference, divider, now, shown };
}

function rowHead(run, now) {
  const facts = [
    ["PSNR", run.identical ? "identical" : `${fixed(run.psnr, 2)} dB`],
    ["this frame", now],
    ["SSIM", fixed(run.ssim, 4)],
    ["LPIPS", fixed(run.lpips, 4)],
    ["cost", fixed(run.effective_cost, 3)],
    ["kept mass", fixed(run.kept_mass, 3)],
    ["time", secondsOf(run)],
  ].filter(([, value]) => value !== "–");
  const list = make("dl", {});
  for (const [name, value] of facts) list.append(make("dt", {}, name), make("dd", {}, value));
  const where = data.reports.length > 1 ? data.reports[run.report].name : null;
  return make(
    "header",
    {},
    make("h3", {}, swatch(run.tint), label(run.label)),
    where && make("p", { class: "soft" }, where),
    list,
  );
}

function secondsOf(run) {
  if (!isNumber(run.seconds)) return "–";
  const ratio = isNumber(run.dense_seconds)
    ? ` (${fixed(run.dense_seconds / run.seconds, 2)}×)`
    : "";
  return `${fixed(run.seconds, 1)} s${ratio}`;
}

function buildScreen(kind, name, tint) {
  const canvas = make("canvas", { role: "img", "aria-label": `${kind}: ${name}` });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const caption = make("figcaption", {}, tint && swatch(tint), String(name));
  const element = make("figure", { class: kind }, canvas, caption);
  return { canvas, context, caption, element, images: null };
}

function wipeBy(stage, divider) {
  const move = (event) => {
    const box = stage.querySelector("canvas").getBoundingClientRect();
    setWipe(((event.clientX - box.left) / box.width) * 100);
  };
  stage.addEventListener("pointerdown", (event) => {
    if (player.view !== "wipe" || !stage.querySelector("canvas")) return;
    stage.setPointerCapture(event.pointerId);
    event.preventDefault();
    divider.focus({ preventScroll: true });
    move(event);
    stage.onpointermove = move;
  });
  stage.addEventListener("lostpointercapture", () => (stage.onpointermove = null));
  divider.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -2, ArrowRight: 2, Home: -100, End: 100 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    setWipe(player.wipe + by);
  });
}

function setWipe(percent) {
  player.wipe = Math.min(100, Math.max(0, percent));
  $("rows").style.setProperty("--wipe", `${player.wipe}%`);
  for (const row of player.rows) row.divider.setAttribute("aria-valuenow", Math.round(player.wipe));
}

function setView(view) {
  player.view = view;
  $("rows").dataset.view = view;
  $("gain-label").hidden = view !== "difference";
  press($("views"), "view", view);
  setWipe(player.wipe);
  fit();
  show(player.frame);
}

function setGain(gain) {
  player.gain = gain;
  $("gain").value = String(gain);
  show(player.frame);
}

// Pixels of the clip become whole pixels of the page where there is room for that.
function fit() {
  if (!player.rows.length) return;
  const [, height, width] = player.cell.size;
  const columns = { side: 2, wipe: 1, difference: 3 }[player.view];
  const room = (player.rows[0].stage.clientWidth - 16 * (columns - 1)) / columns;
  const tallest = innerHeight * (player.rows.length === 1 || player.view === "wipe" ? 0.6 : 0.46);
  const exact = Math.min(room / width, tallest / height);
  const scale = exact >= 2 ? Math.floor(exact) : exact;
  $("rows").style.setProperty("--width", `${Math.floor(width * scale)}px`);
  $("rows").style.setProperty("--height", `${Math.floor(height * scale)}px`);
  $("rows").classList.toggle("enlarged", scale >= 2);
}

function show(frame) {
  player.frame = frame;
  for (const row of player.rows) drawRow(row, frame);
  $("scrub").value = frame;
  $("scrub").setAttribute("aria-valuetext", `frame ${frame + 1} of ${player.frames}`);
  $("counter").textContent = `${frame + 1} / ${player.frames}`;
  moveCursor(frame);
}

function drawRow(row, frame) {
  if (!row.dense.images || !row.sparse.images) return;
  drawScreen(row.dense, frame);
  drawScreen(row.sparse, frame);
  if (player.view === "difference") drawDifference(row, frame);
}

function drawScreen(screen, frame) {
  const image = screen.images[Math.min(frame, screen.images.length - 1)];
  if (screen.canvas.width !== image.width || screen.canvas.height !== image.height) {
    screen.canvas.width = image.width;
    screen.canvas.height = image.height;
  }
  screen.context.drawImage(image, 0, 0);
  screen.canvas.dataset.frame = frame;
}

function drawDifference(row, frame) {
  const { width, height } = row.dense.canvas;
  const before = row.dense.context.getImageData(0, 0, width, height).data;
  const image = row.sparse.context.getImageData(0, 0, width, height);
  const after = image.data;
  for (let i = 0; i < after.length; i += 4) {
    for (let c = i; c < i + 3; c++) after[c] = Math.abs(after[c] - before[c]) * player.gain;
  }
  const { canvas, context, caption } = row.difference;
  canvas.width = width;
  canvas.height = height;
  context.putImageData(image, 0, 0);
  canvas.dataset.frame = frame;
  caption.textContent = `difference × ${player.gain}`;
}

function setPlaying(playing) {
  if (playing === player.playing) return;
  player.playing = playing;
  document.body.classList.toggle("playing", playing);
  $("play").setAttribute("aria-label", playing ? "Pause" : "Play");
  player.origin = null;
  if (playing) requestAnimationFrame(tick);
}

function tick(now) {
  if (!player.playing) return;
  player.origin ??= { now, frame: player.frame };
  const rate = (player.cell.fps || 16) * player.speed;
  const passed = Math.floor(((now - player.origin.now) / 1000) * rate);
  const frame = (player.origin.frame + passed) % player.frames;
  if (frame !== player.frame) show(frame);
  requestAnimationFrame(tick);
}

function seek(frame) {
  player.origin = null;
  show(Math.min(player.frames - 1, Math.max(0, Math.round(frame))));
}

function stepBy(frames) {
  setPlaying(false);
  seek((player.frame + frames + player.frames) % player.frames);
}

function setSpeed(speed) {
  player.speed = Number(speed);
  $("speed").value = String(speed);
  player.origin = null;
}

function describeCell(cell) {
  const report = data.reports[cell.report];
  const [frames, height, width] = cell.size;
  const call = report.pipeline?.call || {};
  const machine = report.environment?.gpu || report.environment?.device;
  const facts = [
    report.pipeline?.class,
    `${plural(frames, "frame")} of ${width} × ${height}`,
    isNumber(cell.runs[0]?.steps) ? plural(cell.runs[0].steps, "step") : null,
    isNumber(call.guidance_scale) ? `guidance ${call.guidance_scale}` : null,
    isNumber(cell.seed) ? `seed ${cell.seed}` : null,
    [report.environment?.dtype, machine].filter(Boolean).join(" on "),
  ];
  $("prompt").textContent = titleOf(cell);
  $("setting").textContent = facts.filter(Boolean).join("  ·  ");
  $("cell").value = String(player.index);
}

function titleOf(cell) {
  if (typeof cell.prompt === "string") return cell.prompt;
  return cell.runs.length === 1
    ? `${cell.runs[0].label} against ${cell.runs[0].dense_label}`
    : `${cell.runs.length} videos against ${cell.runs[0].dense_label}`;
}

function startPlayer() {
  const names = data.cells.map((cell, i) =>
    make(
      "option",
      { value: i },
      `${i + 1}. ${titleOf(cell)}${isNumber(cell.seed) ? `, seed ${cell.seed}` : ""}`,
    ),
  );
  $("cell").append(...names);
  $("clips").hidden = data.cells.length < 2;
  $("cell").addEventListener("change", () => showCell(Number($("cell").value)));
  $("clip-before").addEventListener("click", () => showCell(player.index - 1));
  $("clip-after").addEventListener("click", () => showCell(player.index + 1));
  $("views").addEventListener(
    "click",
    (event) => event.target.dataset.view && setView(event.target.dataset.view),
  );
  $("gain").addEventListener("change", () => setGain(Number($("gain").value)));
  $("play").addEventListener("click", () => setPlaying(!player.playing));
  $("back").addEventListener("click", () => stepBy(-1));
  $("forward").addEventListener("click", () => stepBy(1));
  $("scrub").addEventListener("input", () => seek(Number($("scrub").value)));
  $("speed").addEventListener("change", () => setSpeed($("speed").value));
}

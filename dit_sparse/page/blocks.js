// The blocks of keys that each block of queries reads, for one layer and head.
function chooseHead(head) {
  maps.head = head;
  inspect(maps.step, maps.layer);
  drawBlocks();
}

function blocksHere() {
  const [branch, layer] = [maps.trace.branches[maps.branch], maps.trace.layers[maps.layer]];
  return maps.blocks.filter((entry) => entry.branch === branch && entry.layer === layer).at(-1);
}

function drawBlocks() {
  $("blocks").hidden = !maps.blocks.length;
  if (!maps.blocks.length) return;
  const entry = blocksHere();
  const heads = entry ? entry.heads.length : 0;
  const head = Math.min(maps.head, Math.max(0, heads - 1));
  $("block-head").replaceChildren(
    ...Array.from({ length: heads }, (_, i) => make("option", { value: i }, String(i))),
  );
  $("block-head").value = String(head);
  $("block-map").hidden = !entry;
  $("thumbnails").replaceChildren();
  if (!entry) {
    $("block-note").textContent = `Layer ${maps.trace.layers[maps.layer]} runs dense.`;
    return;
  }
  paintBlocks($("block-map"), entry, head);
  const [rows, columns] = entry.blocks;
  const shared = heads === 1 && maps.trace.heads > 1 ? ", one mask for all heads" : "";
  const pooled =
    entry.side[0] < rows || entry.side[1] < columns
      ? `, drawn as ${entry.side[0]} × ${entry.side[1]} shares`
      : "";
  const clip = maps.blocksOfFirstClip ? " of the first clip" : "";
  $("block-note").textContent =
    `${rows} blocks of queries (down) by ${columns} of keys (across), in block order, found at step ${entry.step}${clip}${pooled}${shared}.`;
  if (heads > 1) $("thumbnails").append(...entry.heads.map((_, i) => thumbnail(entry, i, head)));
}

function thumbnail(entry, head, chosen) {
  const canvas = make("canvas", {});
  paintBlocks(canvas, entry, head);
  const button = make(
    "button",
    { type: "button", "aria-label": `head ${head}`, "aria-pressed": String(head === chosen) },
    canvas,
  );
  button.addEventListener("click", () => chooseHead(head));
  return button;
}

function paintBlocks(canvas, entry, head) {
  const [rows, columns] = entry.side;
  const packed = bytesOf(entry.heads[head]);
  const [r, g, b] = getComputedStyle($("block-map")).color.match(/\d+/g).map(Number);
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const level = (packed[i >> 1] >> (i % 2 ? 4 : 0)) & 15;
    image.data.set([r, g, b, (level * 255) / 15], i * 4);
  }
  context.putImageData(image, 0, 0);
}

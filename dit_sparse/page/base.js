"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const TINTS = 6;

// Text of the data reaches the page as text nodes and attributes alone, never as markup.
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function make(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function fixed(value, digits) {
  return isNumber(value) ? value.toFixed(digits) : "–";
}

function memory(value) {
  if (!isNumber(value)) return "–";
  const [unit, size] = [
    ["GiB", 2 ** 30],
    ["MiB", 2 ** 20],
    ["KiB", 2 ** 10],
  ].find(([, size]) => value >= size) || ["B", 1];
  return `${fixed(value / size, size > 2 ** 20 ? 2 : 1)} ${unit}`;
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function inflate(base64) {
  const stream = new Blob([bytesOf(base64)]).stream();
  const whole = stream.pipeThrough(new DecompressionStream("deflate"));
  return new Response(whole).arrayBuffer();
}

// A method keeps its colour in every clip: one tint for each pair of report and label.
const series = [];
for (const cell of data.cells) {
  for (const run of cell.runs) {
    const key = `${run.report}\n${run.label}`;
    if (!series.includes(key)) series.push(key);
    run.tint = tintOf(run.report, run.label);
  }
}

// Those beyond the tints have the first ones again, hollow and dashed.
function tintOf(report, label) {
  const number = Math.max(0, series.indexOf(`${report}\n${label}`));
  return `t${number % TINTS}${number < TINTS ? "" : " again"}`;
}

// The label of a run, and where it comes from if there is a choice.
function whose(run) {
  return data.reports.length > 1
    ? `${run.label} (${data.reports[run.report].name})`
    : String(run.label);
}

function swatch(tint) {
  return make("i", { class: `swatch ${tint}` });
}

// Longer labels may break after a colon or comma.
function label(text) {
  const parts = String(text).split(/(?<=[:,])/);
  const element = make("span", { class: "label" });
  parts.forEach((part, i) => element.append(...(i ? [make("wbr"), part] : [part])));
  return element;
}

function ticks(low, high, count) {
  const raw = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return { step, values: found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

function press(group, attribute, value) {
  for (const button of group.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset[attribute] === String(value)));
  }
}

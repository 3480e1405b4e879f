// A heat map on a canvas: a row for each name, a column for each measured step. Nothing is drawn between steps.

import { element, replace, table } from "./dom.js";
import { formatNumber, formatWhole, pluralize } from "./format.js";
import { fontOf, readColor, redrawOn } from "./drawing.js";

const ROW = { least: 14, most: 30 };
const GAP = 1;
const HEIGHT = 420; // of all rows, as long as none is smaller than the least
const LABELS = 26; // below them

/** `draw(map)` takes {title, names, steps, values, stepsInColumn}. */
export function heatMap(title) {
  const canvas = element("canvas", { tabindex: "0", role: "img" });
  const tip = element("div", { class: "tip" });
  const slider = element("input", { type: "range", min: "0", value: "0", "aria-label": "Step" });
  const stepLabel = element("output", {});
  const bars = element("div", { class: "bars" });
  const scale = element("div", { class: "color-scale" });
  const root = element("figure", { class: "heat" }, element("div", { class: "plot" }, canvas, tip), scale,
    element("label", { class: "slider" }, "At step", slider, stepLabel), bars);
  const state = { map: null, focus: null };

  function draw(map) {
    const before = state.map;
    state.map = map;
    if (!root.isConnected || !map) return;
    const column = chooseColumn(before, Number(slider.value), map);
    slider.max = String(Math.max(0, map.steps.length - 1));
    slider.value = String(column);
    canvas.setAttribute("aria-label", describeMap(title, map));
    showStep();
  }

  function paint() {
    const map = state.map;
    if (!map?.steps.length) return;
    const layout = resize(canvas, map);
    const context = canvas.getContext("2d");
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.clearRect(0, 0, layout.width, layout.height);
    paintCells(context, map, layout);
    paintLabels(context, map, layout);
    paintFocus(context, layout, Number(slider.value));
    paintScale(scale, map);
  }

  function showStep() {
    const map = state.map;
    if (!map?.steps.length) return;
    const column = Number(slider.value);
    stepLabel.textContent = formatWhole(map.steps[column]);
    const rows = map.names.map((name, i) => ({ name, value: map.values[i][column] }));
    const largest = Math.max(...rows.map((row) => Math.abs(row.value ?? 0))) || 1;
    replace(bars, rows.length > 40 ? null : rows.map((row) => {
      const bar = element("span", { class: "bar" });
      bar.style.setProperty("--share", String(Math.abs(row.value ?? 0) / largest));
      return element("div", { class: "bar-row" }, element("span", { class: "bar-name" }, row.name), bar,
        element("span", { class: "number" }, formatNumber(row.value)));
    }));
    paint();
  }

  function point(event) {
    const cell = findCell(canvas, state.map, event);
    if (!cell) return tip.classList.remove("seen");
    showTip(tip, canvas, state.map, cell, event);
  }

  slider.addEventListener("input", showStep);
  canvas.addEventListener("mousemove", point);
  canvas.addEventListener("mouseleave", () => tip.classList.remove("seen"));
  canvas.addEventListener("click", (event) => {
    const cell = findCell(canvas, state.map, event);
    if (cell) {
      slider.value = String(cell.column);
      showStep();
    }
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    slider.value = String(Number(slider.value) + move);
    showStep();
  });
  redrawOn(root, paint);
  return { root, draw };
}

/** The column of the step that a reader chose; of the last step where they chose none, or it is not there any more. */
function chooseColumn(before, column, map) {
  const last = Math.max(0, map.steps.length - 1);
  if (!before || column >= before.steps.length - 1) return last;
  const found = map.steps.indexOf(before.steps[column]);
  return found < 0 ? last : found;
}

export function heatTable(title, map) {
  const steps = map.steps.length <= 12 ? map.steps.map((_, i) => i)
    : Array.from({ length: 12 }, (_, i) => Math.round((i * (map.steps.length - 1)) / 11));
  const columns = [{ name: "", cell: (row) => row.name },
    ...steps.map((i) => ({ name: `step ${formatWhole(map.steps[i])}`, number: true, cell: (row) => formatNumber(row.values[i]) }))];
  return table(title, columns, map.names.map((name, i) => ({ name, values: map.values[i] })));
}

function describeMap(title, map) {
  if (!map.steps.length) return `${title}: nothing was captured`;
  return `${title}: ${pluralize(map.names.length, "row")} over ${pluralize(map.steps.length, "step")}, from step ` +
    `${map.steps[0]} to ${map.steps.at(-1)}. The table below has the numbers.`;
}

/** Sizes in CSS pixels, for a canvas of this width. */
function measure(canvas, map, width) {
  const context = canvas.getContext("2d");
  context.font = fontOf(12);
  const left = Math.min(width * 0.4, 10 + Math.max(...map.names.map((name) => context.measureText(name).width)));
  const row = Math.max(ROW.least, Math.min(ROW.most, HEIGHT / map.names.length));
  return { width, height: map.names.length * row + LABELS, left, row, column: (width - left) / map.steps.length };
}

function resize(canvas, map) {
  const layout = measure(canvas, map, Math.max(260, canvas.parentElement.clientWidth));
  canvas.style.width = `${layout.width}px`;
  canvas.style.height = `${layout.height}px`;
  canvas.width = layout.width * devicePixelRatio;
  canvas.height = layout.height * devicePixelRatio;
  return layout;
}

function findRange(map) {
  const known = map.values.flat().filter((value) => value !== null);
  const low = known.reduce((a, b) => Math.min(a, b), Infinity);
  const high = known.reduce((a, b) => Math.max(a, b), -Infinity);
  return { low, high, isLog: map.isLog && low > 0 };
}

function strength(value, { low, high, isLog }) {
  if (high === low) return 0.5;
  return isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
}

function paintCells(context, map, layout) {
  const range = findRange(map);
  const [weak, strong, alarm] = ["--heat-low", "--heat-high", "--problem"].map((name) => parseColor(readColor(name)));
  const gap = layout.column > 4 ? GAP : 0;
  map.values.forEach((row, i) => row.forEach((value, j) => {
    const color = value === null ? alarm : mixColors(weak, strong, strength(value, range));
    context.fillStyle = `rgb(${color.join(",")})`;
    const [x, y] = [layout.left + j * layout.column, i * layout.row];
    if (value !== null) context.fillRect(x, y, Math.max(0.5, layout.column - gap), layout.row - 1);
    else paintCross(context, x + layout.column / 2, y + layout.row / 2, Math.min(4, layout.column / 2));
  }));
}

/** A value that is not finite, or was not measured for this row. */
function paintCross(context, x, y, size) {
  context.strokeStyle = context.fillStyle;
  context.beginPath();
  context.moveTo(x - size, y - size);
  context.lineTo(x + size, y + size);
  context.moveTo(x + size, y - size);
  context.lineTo(x - size, y + size);
  context.stroke();
}

function paintLabels(context, map, layout) {
  context.font = fontOf(12);
  context.fillStyle = readColor("--soft");
  context.textBaseline = "middle";
  context.textAlign = "right";
  map.names.forEach((name, i) => context.fillText(name, layout.left - 6, (i + 0.5) * layout.row, layout.left - 6));
  context.textAlign = "center";
  const labels = Math.max(1, Math.min(map.steps.length, Math.floor((layout.width - layout.left) / 70)));
  for (let i = 0; i < labels; i++) {
    const j = labels === 1 ? map.steps.length - 1 : Math.round((i * (map.steps.length - 1)) / (labels - 1));
    const x = Math.min(layout.width - 18, Math.max(layout.left + 10, layout.left + (j + 0.5) * layout.column));
    context.fillText(formatWhole(map.steps[j]), x, layout.height - 11);
  }
}

function paintFocus(context, layout, column) {
  context.strokeStyle = readColor("--text");
  context.lineWidth = 1.5;
  context.strokeRect(layout.left + column * layout.column, 0.5, Math.max(2, layout.column), layout.height - LABELS - 1);
}

function paintScale(scale, map) {
  const range = findRange(map);
  if (!Number.isFinite(range.low)) return replace(scale);
  const ramp = element("span", { class: "ramp" });
  replace(scale, element("span", {}, formatNumber(range.low)), ramp, element("span", {}, formatNumber(range.high)),
    element("span", { class: "soft" }, range.isLog ? "logarithmic" : ""),
    map.stepsInColumn > 1 ? element("span", { class: "soft" }, `a column is the largest of ${map.stepsInColumn} steps`) : null);
}

function findCell(canvas, map, event) {
  if (!map?.steps.length) return null;
  const box = canvas.getBoundingClientRect();
  const layout = measure(canvas, map, box.width);
  const column = Math.floor((event.clientX - box.left - layout.left) / layout.column);
  const row = Math.floor((event.clientY - box.top) / layout.row);
  const isInside = column >= 0 && column < map.steps.length && row >= 0 && row < map.names.length;
  return isInside ? { row, column } : null;
}

function showTip(tip, canvas, map, { row, column }, event) {
  const box = canvas.getBoundingClientRect();
  replace(tip, element("div", { class: "tip-step" }, `step ${formatWhole(map.steps[column])}`),
    element("div", {}, `${map.names[row]}: ${map.values[row][column] === null ? "not finite, or not measured" : formatNumber(map.values[row][column])}`));
  tip.classList.add("seen");
  const isRight = event.clientX - box.left > box.width / 2;
  tip.style.left = isRight ? "auto" : `${event.clientX - box.left + 12}px`;
  tip.style.right = isRight ? `${box.right - event.clientX + 12}px` : "auto";
  tip.style.top = `${event.clientY - box.top + 12}px`;
}

function parseColor(text) {
  return text.match(/[\d.]+/g).slice(0, 3).map(Number);
}

function mixColors(first, second, share) {
  return first.map((value, i) => Math.round(value + (second[i] - value) * Math.max(0, Math.min(1, share))));
}

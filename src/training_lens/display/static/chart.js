// Line charts: uPlot on a canvas, and the same numbers as a table.

import { button, details, element, replace, svgElement, table } from "./dom.js";
import { drawInView, fontOf, readColor, redrawOn } from "./drawing.js";
import { formatNumber, formatWhole } from "./format.js";

const LEAST_HEIGHT = 180;
const ROWS_OF_TABLE = 40;
const FEW_DECADES = 2.5;
const LOG_MARGIN = 1.2; // of a logarithmic axis, above and below its values
const WHOLE_STEPS = Array.from({ length: 13 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat(); // between ticks
const LOG_RATIO = 8; // from this ratio of largest to smallest value on, the axis is logarithmic

/**
 * A chart whose `draw(lines, marks)` may be called again with new values: it takes them over where the lines are the same,
 * and is made anew where others are shown, or in another way.
 *
 * A line is {name, steps, values, color, kind, width, dash}: `kind` "dots" draws measured points alone, since nothing is
 * known between them. `color` is the name of a CSS variable. A mark is {step, label, color}.
 */
export function lineChart({ title, x = "step", y, height = 260, onZoom = null, canBeLog = true, hint = null }) {
  const box = element("div", { class: "plot", role: "img", "aria-label": title });
  const legend = element("div", { class: "legend" });
  const tableBox = details("The numbers as a table");
  const scale = canBeLog ? button("", toggleScale, { class: "quiet scale" }) : null;
  const root = element("figure", { class: "chart" },
    element("figcaption", {}, element("span", {}, title), scale), box, legend,
    hint ? element("p", { class: "hint" }, hint) : null, tableBox);
  const state = { plot: null, shape: "", lines: [], shown: [], marks: [], isLog: null, hidden: new Set() };
  const show = drawInView(root, update);

  function draw(lines, marks = []) {
    Object.assign(state, { lines, marks });
    show();
  }

  function toggleScale() {
    state.isLog = !usesLog();
    update();
  }

  function usesLog() {
    return canBeLog && (state.isLog ?? spansDecades(state.lines));
  }

  function update() {
    if (!root.isConnected) return false;
    state.shown = state.lines.filter((line) => line.steps.length && !state.hidden.has(line.name));
    const shape = describeShape(state, usesLog());
    const zoom = readZoom(state);
    if (state.plot && shape === state.shape) takeValues(state, zoom);
    else build(zoom);
    state.shape = shape;
    if (tableBox.open) fillTable();
    return true;
  }

  function fit() {
    if (state.plot && state.plot.width !== widthOf(box)) state.shape = "";
    update();
  }

  function build(zoom) {
    state.plot?.destroy();
    state.plot = null;
    replace(box);
    if (scale) scale.textContent = usesLog() ? "Scale: log" : "Scale: linear";
    drawLegend();
    if (state.shown.length) {
      const options = buildOptions({ x, y, height, onZoom, state, isLog: usesLog(), width: widthOf(box) });
      state.plot = new uPlot(options, joinLines(state.shown), box);
      if (zoom) state.plot.setScale("x", zoom);
    } else {
      replace(box, element("p", { class: "empty" }, "Nothing was measured yet."));
    }
  }

  function drawLegend() {
    replace(legend, state.lines.map((line) => {
      const isHidden = state.hidden.has(line.name);
      const toggle = () => {
        isHidden ? state.hidden.delete(line.name) : state.hidden.add(line.name);
        update();
      };
      const sign = element("span", { class: `sign ${line.kind === "dots" ? "dot" : "stroke"}` });
      sign.style.setProperty("--sign", `var(${line.color})`);
      return button([sign, line.name], toggle, { class: "quiet entry", "aria-pressed": String(!isHidden) });
    }));
  }

  function fillTable() {
    const rows = state.lines.flatMap((line) => thinOut(line).map(([step, value]) => ({ name: line.name, step, value })));
    const columns = [
      { name: "curve", cell: (row) => row.name },
      { name: x, number: true, cell: (row) => formatWhole(row.step) },
      { name: y, number: true, cell: (row) => formatNumber(row.value) },
    ];
    replace(tableBox, tableBox.firstElementChild, table(title, columns, rows));
  }

  tableBox.addEventListener("toggle", () => tableBox.open && fillTable());
  redrawOn(root, fit);
  return { root, draw };
}

/** What a plot is made of besides its values. */
function describeShape({ lines, shown }, isLog) {
  const looks = shown.map((line) => [line.name, line.color, isDotted(line), line.width, line.alpha, line.dash]);
  return JSON.stringify([document.documentElement.dataset.theme, isLog, lines.map((line) => line.name), looks]);
}

function takeValues({ plot, shown }, zoom) {
  plot.batch(() => {
    plot.setData(joinLines(shown), !zoom);
    if (zoom) plot.setScale("x", zoom);
  });
}

function widthOf(box) {
  return Math.max(240, box.clientWidth);
}

function readZoom(state) {
  const range = state.plot?.scales.x;
  if (!range || range.min === undefined || range.min === null) return null;
  const [first, last] = [state.plot.data[0][0], state.plot.data[0].at(-1)];
  return range.min > first || range.max < last ? { min: range.min, max: range.max } : null;
}

function spansDecades(lines) {
  const values = lines.flatMap((line) => line.values).filter((value) => value !== null && Number.isFinite(value));
  if (!values.length) return false;
  const smallest = values.reduce((a, b) => Math.min(a, b));
  return smallest > 0 && values.reduce((a, b) => Math.max(a, b)) > LOG_RATIO * smallest;
}

/** uPlot's data: the union of all steps, and a column for each line; null is a gap, undefined is nothing at all. */
function joinLines(lines) {
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const places = new Map(steps.map((step, i) => [step, i]));
  const columns = lines.map((line) => {
    const column = new Array(steps.length).fill(undefined);
    line.steps.forEach((step, i) => (column[places.get(step)] = line.values[i] ?? null));
    return column;
  });
  return [steps, ...columns];
}

function buildOptions({ x, y, height, width, onZoom, state, isLog }) {
  const [ink, grid, font] = [readColor("--soft"), readColor("--line"), fontOf(12)];
  const axis = { stroke: ink, font, labelFont: font, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } };
  return {
    width,
    height: Math.max(LEAST_HEIGHT, height),
    legend: { show: false },
    cursor: { points: { size: 7 }, drag: { x: true, y: false } },
    scales: { x: { time: false }, y: isLog ? { distr: 3, range: (_, low, high) => [low / LOG_MARGIN, high * LOG_MARGIN] } : {} },
    axes: [
      { ...axis, label: x, labelSize: 20, size: 30, incrs: WHOLE_STEPS, values: (_, ticks) => ticks.map(shorten) },
      { ...axis, label: y, labelSize: 22, size: 58, values: (_, ticks) => ticks.map(shorten),
        ...(isLog ? { filter: keepRound, grid: { ...axis.grid, filter: keepRound } } : {}) },
    ],
    series: [{}, ...state.shown.map(describeSeries)],
    plugins: [markPlugin(state), tooltipPlugin(state, x)],
    hooks: onZoom ? { setSelect: [(plot) => onZoom(...["left", "width"].map((_, i) =>
      plot.posToVal(plot.select.left + i * plot.select.width, "x")))] } : {},
  };
}

/** The ticks of a logarithmic axis that are powers of ten, or 1, 2 and 5 times one where it has few decades. */
function keepRound(_, ticks) {
  const digits = ticks.at(-1) > ticks[0] * 10 ** FEW_DECADES ? ["1"] : ["1", "2", "5"];
  return ticks.map((tick) => (digits.includes(tick?.toExponential(3).replace(/\.?0*e.*/, "")) ? tick : null));
}

/** The number of a tick, which is a round one: 20k, 0.003, 1e-5. */
function shorten(tick) {
  if (tick === null) return "";
  if (Math.abs(tick) >= 10000) return `${shorten(tick / 1000)}k`;
  return tick !== 0 && Math.abs(tick) < 1e-3 ? tick.toExponential() : String(Number(tick.toPrecision(6)));
}

function isDotted(line) {
  return line.kind === "dots" || line.steps.length === 1;
}

function describeSeries(line) {
  const color = readColor(line.color);
  const isDots = isDotted(line);
  return {
    label: line.name,
    stroke: color,
    width: line.width ?? 1.6,
    dash: line.dash,
    alpha: line.alpha ?? 1,
    points: isDots ? { show: true, size: 7, fill: color, stroke: color } : { show: false },
    ...(isDots ? { paths: () => null } : {}),
  };
}

/** Vertical lines with a word at their top. */
function markPlugin(state) {
  const draw = (plot) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.font = fontOf(11 * devicePixelRatio);
    [ctx.textAlign, ctx.textBaseline] = ["left", "alphabetic"]; // the axes of an earlier drawing have set others
    let lastEnd = -Infinity;
    for (const mark of state.marks) {
      const at = Math.round(plot.valToPos(mark.step, "x", true));
      if (at < bbox.left || at > bbox.left + bbox.width) continue;
      ctx.strokeStyle = ctx.fillStyle = readColor(mark.color);
      ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(at, bbox.top);
      ctx.lineTo(at, bbox.top + bbox.height);
      ctx.stroke();
      const width = ctx.measureText(mark.label).width;
      const left = Math.min(at + 4 * devicePixelRatio, bbox.left + bbox.width - width);
      if (mark.label && left > lastEnd) {
        ctx.fillText(mark.label, left, bbox.top + 11 * devicePixelRatio);
        lastEnd = left + width + 6 * devicePixelRatio;
      }
    }
    ctx.restore();
  };
  return { hooks: { drawClear: draw } };
}

function tooltipPlugin(state, x) {
  const tip = element("div", { class: "tip" });
  const move = (plot) => {
    const { idx, left } = plot.cursor;
    if (idx === null || idx === undefined || left < 0) return tip.classList.remove("seen");
    const step = plot.data[0][idx];
    replace(tip, element("div", { class: "tip-step" }, `${x} ${formatWhole(step)}`),
      state.shown.map((line, i) => {
        const value = nearestValue(plot.data[0], plot.data[i + 1], idx);
        return value && element("div", {}, `${line.name}: ${formatNumber(value.value)}`,
          value.step === step ? "" : ` (${x} ${formatWhole(value.step)})`);
      }));
    tip.classList.add("seen");
    const isRight = left > plot.over.clientWidth / 2;
    tip.style.left = isRight ? "auto" : `${left + 12}px`;
    tip.style.right = isRight ? `${plot.over.clientWidth - left + 12}px` : "auto";
  };
  return { hooks: { init: (plot) => plot.over.append(tip), setCursor: move } };
}

/** The measured value nearest to a place, at most a twentieth of the points away. */
function nearestValue(steps, column, place) {
  const reach = Math.max(1, Math.round(steps.length / 20));
  for (let away = 0; away <= reach; away++) {
    for (const i of [place - away, place + away]) {
      if (typeof column[i] === "number") return { step: steps[i], value: column[i] };
    }
  }
  return null;
}

function thinOut(line) {
  const pairs = line.steps.map((step, i) => [step, line.values[i]]);
  if (pairs.length <= ROWS_OF_TABLE) return pairs;
  return Array.from({ length: ROWS_OF_TABLE }, (_, i) => pairs[Math.round((i * (pairs.length - 1)) / (ROWS_OF_TABLE - 1))]);
}

/** A small line without axes; its numbers are in the text beside it. */
export function sparkline(values, label) {
  const known = values.filter((value) => Number.isFinite(value));
  if (known.length < 2) return element("span", { class: "spark" });
  const isLog = Math.min(...known) > 0;
  const heights = known.map((value) => (isLog ? Math.log(value) : value));
  const [low, high] = [Math.min(...heights), Math.max(...heights)];
  const points = heights.map((value, i) =>
    `${(1 + (i * 78) / (heights.length - 1)).toFixed(1)},${(16.5 - (15 * (value - low)) / (high - low || 1)).toFixed(1)}`);
  return svgElement("svg", { class: "spark", viewBox: "0 0 80 18", role: "img", "aria-label": label },
    svgElement("polyline", { points: points.join(" ") }));
}

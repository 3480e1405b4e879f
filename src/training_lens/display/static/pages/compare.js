// Several runs side by side: the settings that differ first, then curves on one axis, evaluations, layers, answers.

import { fetchJson } from "../api.js";
import { lineChart } from "../chart.js";
import { badge, commandLine, element, replace, section, table, verdictBadge } from "../dom.js";
import { formatChange, formatNumber, formatPercent, formatRate, formatValue, formatWhole, nameMeasure } from "../format.js";
import { runAddress } from "./runs.js";

const RATE_KEYS = ["training.lr"];

export async function show(main, { query, setTitle }) {
  const names = query.getAll("run");
  const search = names.map((name) => `run=${encodeURIComponent(name)}`).join("&");
  setTitle("Compare runs");
  showComparison(main, await fetchJson(`/api/compare?${search}`), fetchJson(`/api/compare/layers?${search}`), true);
}

/** `layersLater` is a promise; `isLive` says whether runs have pages of their own. */
export function showComparison(main, found, layersLater, isLive) {
  const layers = element("div", {}, element("p", { class: "empty" }, "Reading what the lens captured…"));
  const loss = lineChart({ title: "Loss, nats per supervised token", y: "loss", height: 360 });
  const rate = lineChart({ title: "Learning rate", y: "rate", height: 200, canBeLog: false });
  replace(main, element("h1", {}, `${found.runs.length} runs side by side`), runTable(found, isLive), isLive ? verdictPart(found) : null, differenceTable(found),
    section("Loss", "loss", loss.root, rate.root),
    section("Evaluation", "evaluation", evaluationTable(found.runs)),
    section("Layers", "layers", layers),
    section("Answers", "answers", sampleTable(found.runs)));
  loss.draw(found.runs.flatMap((run, i) => lossLines(run, i)));
  rate.draw(found.runs.map((run, i) => curve(run.row.run, run.curves.lr, i)));
  layersLater.then((values) => drawLayers(layers, found.runs, values), (error) => replace(layers, element("p", { class: "empty" }, error.message)));
}

function colorOf(i) {
  return `--line-${i % 8}`;
}

function sign(i) {
  const mark = element("span", { class: "sign dot" });
  mark.style.setProperty("--sign", `var(${colorOf(i)})`);
  return mark;
}

function curve(name, [steps, values] = [[], []], i, more = {}) {
  return { name, steps, values, color: colorOf(i), ...more };
}

function lossLines(run, i) {
  const validations = run.validations.filter((line) => line.kind === "validation");
  const lines = [curve(`${run.row.run}, training`, run.curves.loss_mean ?? run.curves.loss, i, { width: 1.3 })];
  if (validations.length) {
    lines.push(curve(`${run.row.run}, held-out`, [validations.map((line) => line.step), validations.map((line) => line.loss)], i, { kind: "dots" }));
  }
  return lines;
}

function runTable({ runs, same_validation: isSame }, isLive) {
  const columns = [
    { name: "run", cell: (run) => [sign(runs.indexOf(run)), " ", isLive ? element("a", { href: runAddress(run.row) }, run.row.run) : run.row.run, element("div", { class: "soft" }, run.row.experiment)] },
    { name: "status", cell: (run) => badge(run.row.status, run.row.status) },
    { name: "verdict", cell: (run) => verdictBadge(run.row.verdict) },
    { name: "steps", number: true, cell: (run) => formatWhole(run.row.steps) },
    { name: "loss of the base", number: true, cell: (run) => formatNumber(run.row.base_loss) },
    { name: "best held-out loss", number: true, cell: (run) => formatNumber(run.row.loss) },
  ];
  const warning = isSame ? null : element("div", { class: "notice warning" }, element("p", {},
    "These runs were validated on different rows: their held-out losses cannot be compared."));
  return [warning, table("The runs", columns, runs)];
}

function differenceTable({ runs, differences }) {
  if (!differences.length) return section("Settings", "settings", element("p", {}, "No setting differs."));
  const columns = [{ name: "setting", cell: (row) => element("code", {}, row.key) },
    ...runs.map((run, i) => ({ name: run.row.run, cell: (row) => formatSetting(row.key, row.values[i]) }))];
  return section("Settings that differ", "settings", table("Settings that differ", columns, differences));
}

function formatSetting(key, value) {
  return RATE_KEYS.includes(key) && typeof value === "number" ? formatRate(value) : formatValue(value ?? "–");
}

/** How to learn which of two is better: held-out losses are two numbers without an interval of their difference. */
function verdictPart({ runs, same_validation: isSame }) {
  const [first, second] = [...runs].sort((a, b) => (a.row.loss ?? Infinity) - (b.row.loss ?? Infinity));
  if (runs.length !== 2 || !isSame || runs.some((run) => run.row.status !== "finished")) return null;
  return section("Which is better?", "better", element("p", {}, "This answers it on the same rows, with intervals:"),
    commandLine(`training-lens compare --run ${first.name} --against ${second.name}`));
}

function evaluationTable(runs) {
  const measures = [...new Set(runs.flatMap((run) => run.evaluation?.measures.map((one) => one.measure) ?? []))];
  if (!measures.length) return element("p", { class: "empty" }, "None of these runs was compared with its base (training-lens compare).");
  const find = (run, measure) => run.evaluation?.measures.find((one) => one.measure === measure);
  const format = (one, value) => (one.is_share ? formatPercent(value) : formatNumber(value));
  const columns = [{ name: "measure", cell: (measure) => nameMeasure(measure) }, ...runs.map((run) => ({
    name: run.row.run,
    number: true,
    cell: (measure) => {
      const one = find(run, measure);
      if (!one) return "–";
      const interval = one.interval ? element("div", { class: "soft" }, `change ${one.interval.map((end) => formatChange(end, (size) => format(one, size))).join(" to ")}`) : null;
      return [format(one, one.adapter), interval];
    },
  }))];
  const missing = runs.filter((run) => !run.evaluation).map((run) => run.name);
  return [table("Adapters on held-out rows", columns, measures),
    element("p", { class: "soft" }, "Below each number: the interval of its change from the base."),
    missing.length ? [element("p", { class: "soft" }, "Not compared with its base yet:"), missing.map((name) => commandLine(`training-lens compare --run ${name}`))] : null];
}

function drawLayers(box, runs, found) {
  if (!found.names.length) return replace(box, element("p", { class: "empty" }, "The lens captured no layers in these runs."));
  const chart = lineChart({ title: "Update of each layer at the end, |dW| / |W|", x: "layer", y: "|dW| / |W|", height: 280 });
  replace(box, chart.root, similarityPart(found.similarity));
  chart.draw(found.runs.map((side, i) => ({
    name: `${runs[i].row.run}, step ${formatWhole(side.step)}`, steps: found.names.map((_, j) => j), values: side.values, color: colorOf(i), kind: "dots",
  })));
}

function similarityPart(similarity) {
  if (!similarity) return null;
  if (similarity.reason) return element("p", { class: "soft" }, `The updates were not compared: ${similarity.reason}`);
  const columns = [{ name: "module", cell: (row) => row.name }, { name: "cosine of the updates", number: true, cell: (row) => formatNumber(row.cosine) }];
  return [
    element("p", {}, `How alike the two updates are: a median cosine of ${formatNumber(similarity.median_cosine)} (1 is the same direction, 0 unrelated).`),
    table("The modules that differ the most", columns, similarity.modules, { shown: true }),
  ];
}

/** The prompts that all runs answered, with the last answer of each. */
function sampleTable(runs) {
  const shared = runs[0].samples.filter((sample) => runs.every((run) => run.samples.some((other) => other.prompt === sample.prompt)));
  if (!shared.length) return element("p", { class: "empty" }, "These runs answered no prompt in common.");
  return shared.map((sample, i) => element("div", { class: "card sample" }, element("h3", {}, `Prompt ${i + 1}`),
    element("pre", { class: "text prompt" }, sample.prompt),
    element("div", { class: "answers" }, runs.map((run, j) => {
      const answers = run.samples.find((other) => other.prompt === sample.prompt).answers.filter((answer) => !answer.base);
      const last = answers.at(-1);
      const box = element("div", { class: "answer" }, element("h4", {}, sign(j), ` ${run.row.run}`), last ? last.generated : "no answer yet");
      box.style.borderColor = `var(${colorOf(j)})`;
      return box;
    }), sample.expected ? element("div", { class: "answer" }, element("h4", {}, "Expected"), sample.expected) : null)));
}

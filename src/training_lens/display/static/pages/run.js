// One run, live while it trains: the verdict first, then what it rests on.

import { fetchJson, followRun, runPath } from "../api.js";
import { lineChart } from "../chart.js";
import { badge, commandLine, details, element, replace, replaceIfChanged, section, table } from "../dom.js";
import { capitalize, formatBytes, formatDate, formatSeconds, formatValue, formatWhole, pluralize } from "../format.js";
import { heatMap, heatTable } from "../heatmap.js";
import { runActions } from "../parts/actions.js";
import { evaluationTable } from "../parts/evaluation.js";
import { explanations } from "../parts/explanations.js";
import { findingCards } from "../parts/findings.js";
import { sampleAnswers } from "../parts/samples.js";
import { Curves } from "../parts/curves.js";

const POINTS = 600; // of a curve
const REFRESH = 4000; // milliseconds between two readings of the page of a run that trains
const SLOW_REFRESH = 20000; // of the findings and layers, which read all captures
const SECTIONS = [
  ["loss", "Loss"], ["answers", "Answers"], ["evaluation", "Evaluation"], ["findings", "Findings"], ["layers", "Layers"],
  ["explanations", "Explanations"], ["settings", "Settings"], ["files", "Files"],
];

export async function show(main, { parts, setTitle, setConnection }) {
  if (parts.length < 2) throw new Error("This address names no run. Choose one on the page of all runs.");
  const run = { experiment: parts[0], run: parts[1] };
  return showRun(main, run, liveSource(run), { setTitle, setConnection });
}

/** Where the page of a run reads: the server. The static report reads the same from itself. */
function liveSource(run) {
  const path = runPath(run);
  return {
    isLive: true,
    page: () => fetchJson(path),
    curves: (first, last) => fetchJson(`${path}/curves?points=${POINTS}` + (first === undefined ? "" : `&first=${Math.floor(first)}&last=${Math.ceil(last)}`)),
    findings: () => fetchJson(`${path}/findings`),
    layers: (measure, by) => fetchJson(`${path}/layers?measure=${encodeURIComponent(measure)}&by=${by}`),
    spectra: () => fetchJson(`${path}/spectra`),
    log: () => fetchJson(`${path}/log`),
    fileAddress: (name) => `${path}/files/${name.split("/").map(encodeURIComponent).join("/")}`,
  };
}

export async function showRun(main, run, source, { setTitle, setConnection }) {
  const firstCurves = source.curves(); // beside the page: both wait for the same log
  firstCurves.catch(() => {}); // told below; of a run that is not there, the page tells it
  const page = await source.page();
  const view = buildView(run, source);
  setTitle(run.run);
  replace(main, view.root);
  const state = { page, findings: null, isStopped: false, timers: [] };
  const curves = new Curves(view.curves, source);
  drawPage(view, state, source);
  replace(view.layers, element("p", { class: "empty" }, "Reading what the lens captured…"));
  const layers = layerPart(view.layers, source);
  const isTraining = () => state.page.row.status === "running";
  // The checks of all captures take seconds of a core: while a run trains, those that it writes itself are shown.
  const readLens = () => Promise.all([isTraining() ? null : readFindings(), layers.loadIfSeen()]);
  curves.load(page, firstCurves).catch((error) => replace(view.curves, failure(error))).then(readLens);
  let stopFollowing = () => {};
  if (source.isLive) follow();

  async function readFindings() {
    try {
      state.findings = await source.findings();
    } catch (error) {
      state.findings = { phrase: "", findings: [], error: error.message };
    }
    if (state.isStopped) return;
    drawHeadline(view, state, source);
    drawFindings(view, state);
  }

  async function refresh() {
    try {
      state.page = await source.page();
      drawPage(view, state, source);
      curves.mark(state.page);
    } catch (error) {
      if (error.status === 404) gone();
    }
  }

  function follow() {
    const refreshSoon = throttle(refresh, REFRESH, state);
    const refreshLens = throttle(readLens, SLOW_REFRESH, state);
    stopFollowing = followRun(run, curves.lastStep ?? 0, {
      connected: (isUp) => setConnection(isUp ? "" : "Not connected; trying again"),
      gone,
      update: (values) => {
        if (values.steps) curves.add(values);
        if (values.steps && !state.page.progress.step) refresh(); // its first steps are not "preparing" for seconds
        else refreshSoon();
        if (values.lens || !isTraining()) refreshLens();
      },
    });
  }

  function gone() {
    stopFollowing();
    replace(view.notice, element("div", { class: "notice warning", role: "alert" },
      element("p", {}, "This run was deleted. The page shows what was read before.")));
  }

  return () => {
    state.isStopped = true;
    state.timers.forEach(clearTimeout);
    stopFollowing();
  };
}

function throttle(action, wait, state) {
  let isWaiting = false;
  return () => {
    if (isWaiting || state.isStopped) return;
    isWaiting = true;
    state.timers.push(setTimeout(() => {
      isWaiting = false;
      if (!state.isStopped) action();
    }, wait));
  };
}

function buildView(run, source) {
  const names = ["notice", "headline", "progress", "actions", "next", "curves", "answers", "evaluation", "findings", "layers", "explanations", "settings", "files"];
  const view = Object.fromEntries(names.map((name) => [name, element("div", {})]));
  const titles = Object.fromEntries(SECTIONS);
  const parts = { loss: view.curves, ...view };
  view.root = element("article", {},
    view.notice, view.headline, view.progress, view.actions, view.next,
    element("nav", { class: "jump", "aria-label": "Sections" }, SECTIONS.map(([id, title]) => jumpLink(id, title))),
    SECTIONS.map(([id]) => section(titles[id], id, parts[id])));
  return view;
}

/** A link to a section that leaves the address alone, since that says which page this is. */
function jumpLink(id, title) {
  const jump = (event) => {
    event.preventDefault();
    const target = document.getElementById(id);
    target.scrollIntoView();
    target.tabIndex = -1;
    target.focus({ preventScroll: true });
  };
  return element("a", { href: `#${id}`, onClick: jump }, title);
}

function drawPage(view, state, source) {
  const { page } = state;
  drawHeadline(view, state, source);
  drawProgress(view, page);
  if (source.isLive) replaceIfChanged(view.actions, page.row.status, () => runActions(page.row));
  replaceIfChanged(view.answers, page.samples, () => sampleAnswers(page.samples));
  replaceIfChanged(view.evaluation, page.evaluation, () => evaluationTable(page));
  replaceIfChanged(view.explanations, [page.explanations, page.row.status], () => explanations(page, source));
  replaceIfChanged(view.settings, [page.settings, page.data, page.environment], () => settingsPart(page, source));
  replaceIfChanged(view.files, page.files, () => filesPart(page, source));
  if (!state.findings) drawFindings(view, state);
}

function drawHeadline(view, state, source) {
  const { row, headline } = state.page;
  const findings = state.findings?.phrase;
  const isDone = row.status !== "running";
  const sentence = [headline.phrase, findings].filter(Boolean).join("; ");
  const wrong = worstSeverity(state);
  replaceIfChanged(view.headline, [row, headline, findings, state.page.progress.step > 0], () => [
    element("p", { class: "soft" }, source.isLive ? [element("a", { href: "#/" }, "Runs"), " / "] : null, `${row.experiment} / ${row.run}`),
    element("div", { class: "row" }, badge(row.detail && row.status === "interrupted" ? "died" : row.status, row.status), row.tags.map((tag) => element("span", { class: "tag" }, tag))),
    element("h1", { class: "verdict" }, isDone ? `${sentence}.` : describeTraining(state.page, sentence)),
    row.detail ? element("div", { class: "notice warning" }, element("p", {}, row.detail)) : null,
    element("ul", { class: "remarks" }, headline.verdict.remarks.filter((remark) => remark.severity !== "fine")
      .map((remark) => element("li", {}, remark.sentence))),
  ]);
  replaceIfChanged(view.next, [row.status, headline.verdict, wrong], () => nextSteps(state));
}

function describeTraining({ progress, headline }, sentence) {
  if (!progress.step) return "Preparing the first step.";
  return headline.verdict.outcome === "inconclusive" ? "Training; it was not validated yet." : `Training. So far: ${lowerFirst(sentence)}.`;
}

function lowerFirst(words) {
  return words.charAt(0).toLowerCase() + words.slice(1);
}

function worstSeverity(state) {
  const severities = (state.findings?.findings ?? []).map((finding) => finding.severity);
  return ["problem", "warning"].find((severity) => severities.includes(severity)) ?? "";
}

/** What to do now: what the worst finding says, else the next command of the verdict. */
function nextSteps(state) {
  const { row, headline, resume_command: resume } = state.page;
  const worst = (state.findings?.findings ?? []).find((finding) => finding.severity === "problem" || finding.severity === "warning");
  const isUnfinished = row.status === "interrupted" || row.status === "failed";
  const items = [
    isUnfinished ? element("div", {}, element("p", {}, "Finish it:"), commandLine(resume)) : null,
    worst ? element("div", {}, element("p", {}, `What to do about "${worst.title}": ${worst.action || worst.decide}.`)) : null,
    row.status === "finished" && headline.verdict.next_command
      ? element("div", {}, element("p", {}, describeCommand(headline.verdict.next_command)), commandLine(headline.verdict.next_command))
      : null,
  ].filter(Boolean);
  return items.length ? element("div", { class: "card" }, element("h2", {}, "What now?"), items) : null;
}

function describeCommand(command) {
  if (command.includes("data.validation=FILE")) return "Measure it on more rows, since these are too few or undecided:";
  if (command.includes("evaluation.decide_by=")) return "Decide by another measure:";
  if (command.startsWith("training-lens compare")) return "Measure it on the held-out rows:";
  return command.startsWith("training-lens merge") ? "Write the model with the adapter merged into it:" : "See each finding with its evidence:";
}

function drawProgress(view, page) {
  const { row, progress } = page;
  const isRunning = row.status === "running";
  const share = progress.total_steps ? Math.min(1, progress.step / progress.total_steps) : 0;
  const bar = element("span", {});
  bar.style.setProperty("--share", String(share));
  const facts = [
    ["Step", progress.total_steps ? `${formatWhole(progress.step)} of ${formatWhole(progress.total_steps)}` : formatWhole(progress.step)],
    isRunning ? ["Remaining", formatSeconds(progress.remaining_seconds)] : ["Took", formatSeconds(row.seconds)],
    ["Speed", progress.tokens_per_second ? `${formatWhole(progress.tokens_per_second)} tokens/s` : "–"],
    ["Peak memory", formatBytes(progress.peak_bytes || null)],
    ["Started", formatDate(row.started)],
  ].filter(([, value]) => value !== "–");
  replace(view.progress,
    isRunning ? element("div", { class: "progress", role: "progressbar", "aria-valuenow": Math.round(100 * share), "aria-valuemin": 0, "aria-valuemax": 100, "aria-label": "Training" }, bar) : null,
    element("dl", { class: "facts" }, facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))));
}

function drawFindings(view, state) {
  const found = state.findings;
  if (!found) {
    const remark = state.page.row.status === "running"
      ? "What the run has found so far; all checks follow when it ends." : "Reading what the lens captured…";
    return replaceIfChanged(view.findings, [state.page.active_findings, remark], () => findingCards(state.page.active_findings, remark));
  }
  replaceIfChanged(view.findings, found, () => (found.error ? element("p", { class: "empty" }, capitalize(found.error)) : findingCards(found.findings, "")));
}

function layerPart(box, source) {
  const map = heatMap("Measures by layer over steps");
  const [meaning, tableBox] = [element("p", { class: "soft" }), details("The numbers as a table")];
  const measure = element("select", { onChange: () => load() });
  const by = element("select", { onChange: () => load() },
    [["layer", "Layer"], ["kind", "Module type"], ["module", "Module"]].map(([value, name]) => element("option", { value }, name)));
  const spectrum = lineChart({ title: "Spectrum of the update by module type", x: "direction, strongest first", y: "share of the largest", height: 240 });
  let measures = [];

  async function load() {
    try {
      const found = await source.layers(measure.value || "strength", by.value);
      if (!found.steps.length) return replace(box, element("p", { class: "empty" }, "The lens captured no measures of layers in this run."));
      if (!map.root.isConnected) mount(found);
      measures = found.measures;
      meaning.textContent = measures.find((one) => one.measure === found.measure)?.meaning ?? "";
      const values = { names: found.names, steps: found.steps, values: found.values, stepsInColumn: found.steps_in_a_column, isLog: found.is_log };
      map.draw(values);
      replace(tableBox, tableBox.firstElementChild, heatTable("Measures by layer over steps", values));
      drawSpectra(await source.spectra());
    } catch (error) {
      if (!map.root.isConnected) replace(box, failure(error));
    }
  }

  function mount(found) {
    replace(measure, found.measures.map((one) => element("option", { value: one.measure }, one.title)));
    measure.value = found.measure;
    replace(box, element("div", { class: "filters" }, labelled("Measure", measure), labelled("Rows", by)), meaning, map.root, tableBox,
      element("div", { class: "spectra" }, spectrum.root));
  }

  function drawSpectra(found) {
    const kinds = Object.entries(found.kinds);
    spectrum.root.hidden = !kinds.length;
    spectrum.draw(kinds.map(([kind, values], i) => ({
      name: kind, steps: values.map((_, j) => j + 1), values, color: `--line-${i % 8}`, dash: i >= 8 ? [5, 4] : undefined,
    })));
  }

  let isSeen = !source.isLive;
  new IntersectionObserver((entries) => {
    const wasSeen = isSeen;
    isSeen ||= entries.some((entry) => entry.isIntersecting);
    if (isSeen && !wasSeen) load();
  }).observe(box);
  return { load, loadIfSeen: () => (isSeen ? load() : null) };
}

function labelled(name, control) {
  return element("label", { class: "field" }, element("span", {}, name), control);
}

function failure(error) {
  return element("p", { class: "empty" }, capitalize(error.message));
}

function settingsPart(page, source) {
  const changed = page.settings.filter((setting) => setting.is_changed);
  const columns = [{ name: "setting", cell: (row) => element("code", {}, row.key) }, { name: "value", cell: (row) => formatValue(row.value) }];
  const log = details("The end of its log");
  log.addEventListener("toggle", async () => {
    if (!log.open) return;
    const text = await source.log().then((found) => found.text, (error) => error.message);
    replace(log, log.firstElementChild, element("pre", { class: "log", tabindex: "0" }, text));
  });
  return [
    table("Settings that are not the defaults", columns, changed, { shown: true, class: "facts-table" }),
    details("All settings", table("All settings", columns, page.settings, { class: "facts-table" })),
    ...page.data.map(dataTable),
    ...Object.entries(source.ownResults ?? {}).map(([name, found]) =>
      details(`Analyzer ${name}`, element("pre", { class: "log", tabindex: "0" }, JSON.stringify(found, null, 2)))),
    details("Environment", table("Environment", [{ name: "", cell: (row) => row[0] }, { name: "", cell: (row) => formatValue(row[1]) }], Object.entries(page.environment))),
    log,
  ];
}

function dataTable(split) {
  const facts = [
    ["rows", formatWhole(split.rows)], ["examples in this run", formatWhole(split.used)], ["tokens", formatWhole(split.tokens)], ["supervised tokens", formatWhole(split.supervised_tokens)],
    ["longest", formatWhole(split.longest)], ["truncated", formatWhole(split.truncated)],
    ...Object.entries(split.domains).map(([name, count]) => [`domain ${name}`, formatWhole(count)]),
  ];
  return details(`${capitalize(split.split)} data: ${pluralize(split.used ?? split.rows ?? 0, "example")}`,
    table(`${split.split} files`, [{ name: "file", cell: (row) => row.name }, { name: "rows", number: true, cell: (row) => formatWhole(row.rows) },
      { name: "read as", cell: (row) => row.read_as ?? "" }], split.files),
    table(`${split.split} data`, [{ name: "", cell: (row) => row[0] }, { name: "", number: true, cell: (row) => row[1] }], facts));
}

function filesPart(page, source) {
  const columns = [
    { name: "file", cell: (row) => element("a", { href: source.fileAddress(row.name), download: row.name.split("/").at(-1) }, row.name) },
    { name: "size", number: true, cell: (row) => formatBytes(row.bytes) },
  ];
  return [element("p", { class: "soft" }, "In ", element("code", {}, page.folder)), details(pluralize(page.files.length, "file"), table("Files", columns, page.files))];
}

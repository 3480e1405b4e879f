// One run, live while it trains: the verdict first, then what it rests on.

import { fetchJson, followRun, runPath } from "../api.js";
import { badge, details, element, failureNote, replace, replaceIfChanged, section, setText, table } from "../dom.js";
import { capitalize, formatBytes, formatDate, formatSeconds, formatValue, formatWhole, pluralize } from "../format.js";
import { runActions } from "../parts/actions.js";
import { evaluationTable } from "../parts/evaluation.js";
import { Curves } from "../parts/curves.js";
import { explanations } from "../parts/explanations.js";
import { findingCards } from "../parts/findings.js";
import { layerPart } from "../parts/layers.js";
import { jumpTo, nextSteps } from "../parts/next_steps.js";
import { sampleAnswers } from "../parts/samples.js";

const POINTS = 600; // of a curve
// Milliseconds before the page is read again, and the captures: of a run that has ended, and of one that trains.
const REFRESH = { soon: 200, later: 30000, end: 2000, lens: 20000 };
const LENS_SHARE = 0.01; // of the time goes into reading the captures of a run that trains: the more there are, the rarer
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
  const state = { page, status: page.row.status, findings: null, isStopped: false, timers: new Set() };
  const curves = new Curves(view.curves, source);
  drawPage(view, state, source);
  replace(view.layers, element("p", { class: "empty" }, "Reading what the lens captured…"));
  const layers = layerPart(view.layers, source);
  const isTraining = () => state.status === "running";
  // The checks of all captures take seconds of a core: while a run trains, those that it writes itself are shown.
  const readLens = () => Promise.all([isTraining() ? null : readFindings(), layers.loadIfSeen()]);
  curves.load(page, firstCurves).catch((error) => replace(view.curves, failureNote(error))).then(readLens);
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

  /** What each event brings: all else of the page stays as it is. */
  function showProgress(progress) {
    state.page = { ...state.page, progress };
    drawHeadline(view, state, source);
    drawProgress(view, state.page);
  }

  function follow() {
    const refreshSoon = throttle(refresh, () => REFRESH.soon, state);
    const refreshLater = throttle(refresh, () => REFRESH.later, state);
    const readLensSoon = throttle(readLens, () => REFRESH.end, state);
    const readLensLater = throttle(readLens, () => Math.max(REFRESH.lens, layers.readingTime() / LENS_SHARE), state);
    stopFollowing = followRun(run, curves.lastStep ?? 0, {
      connected: (isUp) => setConnection(isUp ? "" : "Not connected; trying again"),
      gone,
      update: (values) => {
        state.status = values.status;
        if (values.steps) curves.add(values);
        if (values.progress) showProgress(values.progress);
        if (values.page) refreshSoon();
        else refreshLater(); // files grow, epochs end
        if (!isTraining()) readLensSoon();
        else if (values.lens) readLensLater();
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
    const timer = setTimeout(() => {
      state.timers.delete(timer);
      isWaiting = false;
      action();
    }, wait());
    state.timers.add(timer);
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
  return element("a", { href: `#${id}`, onClick: jumpTo(id) }, title);
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
  const wrong = worstFinding(state)?.title;
  const { status, detail, tags } = row;
  replaceIfChanged(view.headline, [status, detail, tags, headline, findings, nameStart(state.page)], () => [
    element("p", { class: "soft" }, source.isLive ? [element("a", { href: "#/" }, "Runs"), " / "] : null, `${row.experiment} / ${row.run}`),
    element("div", { class: "row" }, badge(row.detail && row.status === "interrupted" ? "died" : row.status, row.status), row.tags.map((tag) => element("span", { class: "tag" }, tag))),
    element("h1", { class: "verdict" }, isDone ? `${sentence}.` : describeTraining(state.page, sentence)),
    row.detail ? element("div", { class: "notice warning" }, element("p", {}, row.detail)) : null,
    element("ul", { class: "remarks" }, headline.verdict.remarks.filter((remark) => remark.severity !== "fine")
      .map((remark) => element("li", {}, remark.sentence))),
  ]);
  replaceIfChanged(view.next, [state.page.next_steps, wrong], () => nextSteps(state.page, worstFinding(state), source.isLive));
}

/** Which start a run is in: its first, or one that resumes it; empty of a run that does steps. */
function nameStart({ progress }) {
  return !progress.is_starting ? "" : progress.step ? "resume" : "first";
}

function describeTraining({ progress, headline }, sentence) {
  if (progress.is_starting) return progress.step ? `Resuming after step ${formatWhole(progress.step)}.` : "Preparing the first step.";
  return headline.verdict.outcome === "inconclusive" ? "Training; it was not validated yet." : `Training. So far: ${lowerFirst(sentence)}.`;
}

function lowerFirst(words) {
  return words.charAt(0).toLowerCase() + words.slice(1);
}

function worstFinding(state) {
  const findings = state.findings?.findings ?? [];
  return ["problem", "warning"].map((severity) => findings.find((one) => one.severity === severity)).find(Boolean);
}

function drawProgress(view, page) {
  const { row, progress } = page;
  const isRunning = row.status === "running";
  const share = progress.total_steps ? Math.min(1, progress.step / progress.total_steps) : 0;
  const facts = [
    ["Step", progress.total_steps ? `${formatWhole(progress.step)} of ${formatWhole(progress.total_steps)}` : formatWhole(progress.step)],
    isRunning ? ["Remaining", formatSeconds(progress.remaining_seconds)] : ["Took", formatSeconds(row.seconds)],
    ["Speed", progress.tokens_per_second ? `${formatWhole(progress.tokens_per_second)} tokens/s` : "–"],
    ["Peak memory", formatBytes(progress.peak_bytes || null)],
    ["Started", formatDate(row.started)],
  ].filter(([, value]) => value !== "–");
  replaceIfChanged(view.progress, [isRunning, facts.map(([name]) => name)], () => [
    isRunning ? element("div", { class: "progress", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100, "aria-label": "Training" }, element("span", {})) : null,
    element("dl", { class: "facts" }, facts.map(([name]) => element("div", {}, element("dt", {}, name), element("dd", {})))),
    isRunning ? element("p", { class: "soft doing" }) : null,
  ]);
  view.progress.querySelectorAll("dd").forEach((node, i) => setText(node, facts[i][1]));
  if (!isRunning) return;
  const bar = view.progress.querySelector(".progress");
  bar.setAttribute("aria-valuenow", Math.round(100 * share));
  bar.firstElementChild.style.setProperty("--share", String(share));
  setText(view.progress.querySelector(".doing"), progress.is_starting ? `${progress.doing || "Reading the rows and the model"}…` : "");
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

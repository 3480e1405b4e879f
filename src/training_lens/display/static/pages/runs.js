// All runs: found, filtered, sorted, grouped, and chosen for a comparison.

import { fetchJson } from "../api.js";
import { sparkline } from "../chart.js";
import { badge, button, element, labelled, replace, replaceIfChanged, setChildren, setText, timeAgo, verdictBadge } from "../dom.js";
import { formatNumber, formatRate, formatWhole, pluralize } from "../format.js";

const ROWS_AT_ONCE = 50;
const POLL = { reading: 60, watching: 5000 }; // milliseconds
const MOST_COMPARED = 6;
const STATUSES = ["running", "finished", "interrupted", "failed", "pruned", "broken"];

const COLUMNS = [
  { name: "Run", key: (row) => row.run, cell: nameCell },
  { name: "Status", key: (row) => row.status, cell: statusCell },
  { name: "Verdict", key: (row) => row.verdict.outcome ?? "", cell: verdictCell },
  { name: "Base loss", number: true, isRising: true, key: (row) => row.base_loss, cell: (row) => known(row.base_loss, formatNumber) },
  { name: "Best loss", number: true, isRising: true, key: (row) => row.loss, cell: (row) => known(row.loss, formatNumber) },
  { name: "Training loss", key: null, cell: (row) => sparkline(row.spark, describeSpark(row)) },
  { name: "Steps", number: true, key: (row) => row.steps, cell: stepsCell },
  { name: "Model", key: (row) => row.model, cell: (row) => row.model },
  { name: "Data", key: (row) => row.data, cell: (row) => row.data },
  { name: "LR", number: true, key: (row) => row.learning_rate, cell: (row) => known(row.learning_rate, formatRate) },
  { name: "Rank", number: true, key: (row) => row.rank, cell: (row) => known(row.rank, formatWhole) },
  { name: "Started", isRising: false, key: (row) => row.started, cell: (row) => timeAgo(row.started) },
];

/** What a reader chose, which is still there when they come back from a run. */
const kept = { chosen: new Set(), sort: { column: 11, isRising: false }, limit: ROWS_AT_ONCE, words: "", status: "", group: "" };

export async function show(main, { query, setConnection }) {
  const state = { rows: new Map(), texts: new Map(), drawn: new Map(), index: "", version: 0, pending: 0, total: 0, folder: "", isStopped: false };
  const view = buildView(query.get("search") ?? kept.words, draw);
  replace(main, view.root);
  let timer = null;

  function draw() {
    drawTable(state, view, draw);
  }

  async function poll() {
    try {
      const changes = await fetchJson(`/api/runs?index=${state.index}&since=${state.version}`);
      setConnection("");
      if (applyChanges(state, changes)) draw();
    } catch (error) {
      setConnection("Not connected; trying again");
      if (!state.version) replace(view.status, error.message);
    }
    if (!state.isStopped) timer = setTimeout(pollIfSeen, state.pending ? POLL.reading : POLL.watching);
  }

  function pollIfSeen() {
    if (document.hidden) timer = setTimeout(pollIfSeen, POLL.watching);
    else poll();
  }

  const about = fetchJson("/api/about");
  await poll();
  state.folder = (await about).folder;
  draw();
  return () => {
    state.isStopped = true;
    clearTimeout(timer);
  };
}

/** Take the changed rows over; whether there were any. */
function applyChanges(state, changes) {
  if (changes.index !== state.index) { // another server: it sends all
    state.rows.clear();
    state.texts.clear();
    state.drawn.clear();
  }
  for (const row of changes.changed) {
    state.rows.set(keyOf(row), row);
    state.texts.set(keyOf(row), searchText(row));
  }
  for (const [experiment, run] of changes.removed) {
    state.rows.delete(`${experiment}/${run}`);
    state.drawn.delete(`${experiment}/${run}`);
    kept.chosen.delete(`${experiment}/${run}`);
  }
  if (!changes.pending) for (const key of kept.chosen) if (!state.rows.has(key)) kept.chosen.delete(key); // deleted meanwhile
  const isNew = changes.changed.length + changes.removed.length > 0 || changes.pending !== state.pending;
  Object.assign(state, { index: changes.index, version: changes.version, pending: changes.pending, total: changes.total });
  return isNew;
}

function keyOf(row) {
  return `${row.experiment}/${row.run}`;
}

function searchText(row) {
  const words = [row.experiment, row.run, row.status, row.model, row.data, row.verdict.outcome, ...row.tags];
  return words.join(" ").toLowerCase();
}

function buildView(words, draw) {
  const redraw = () => {
    Object.assign(kept, { limit: ROWS_AT_ONCE, words: search.value, status: status.value, group: group.value });
    draw();
  };
  const search = element("input", { type: "search", value: words, placeholder: "Name, tag, model, data…", onInput: redraw });
  const status = element("select", { onChange: redraw }, element("option", { value: "" }, "Any"),
    STATUSES.map((name) => element("option", { value: name }, name)));
  const group = element("select", { onChange: redraw }, element("option", { value: "" }, "Nothing"),
    element("option", { value: "experiment" }, "Experiment or sweep"), element("option", { value: "model" }, "Model"),
    element("option", { value: "data" }, "Data"));
  [status.value, group.value] = [kept.status, kept.group];
  const count = element("p", { class: "soft", role: "status" });
  const table = element("div", { class: "scroll" });
  const bar = element("div", { class: "bar-fixed", hidden: true });
  const filters = element("div", { class: "filters" }, labelled("Find", search), labelled("Status", status), labelled("Group by", group));
  const root = element("div", {}, element("h1", {}, "Runs"), filters, count, table, bar);
  return { root, search, status: count, statusFilter: status, group, filters, table, bar };
}

/** The rows that the filters leave, in order. */
export function filterRows(state, words, status) {
  const terms = words.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  for (const [key, row] of state.rows) {
    const text = state.texts.get(key);
    if ((!status || row.status === status) && terms.every((term) => text.includes(term))) found.push(row);
  }
  const column = COLUMNS[kept.sort.column];
  const sign = kept.sort.isRising ? 1 : -1;
  return found.sort((a, b) => compareValues(column.key(a), column.key(b), sign));
}

function compareValues(a, b, sign) {
  const [isMissing, isOtherMissing] = [a, b].map((value) => value === null || value === undefined || value === "");
  if (isMissing || isOtherMissing) return isMissing - isOtherMissing; // those without a value come last
  return sign * (typeof a === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
}

function drawTable(state, view, draw) {
  const rows = filterRows(state, view.search.value, view.statusFilter.value);
  const isEmpty = !state.rows.size && !state.pending;
  view.filters.hidden = view.status.hidden = isEmpty;
  if (isEmpty) return replace(view.table, emptyPage(state.folder));
  setText(view.status, describeCount(state, rows.length));
  const shown = rows.slice(0, kept.limit);
  const more = rows.length > shown.length
    ? button(`Show ${Math.min(ROWS_AT_ONCE, rows.length - shown.length)} more`, () => {
      kept.limit += ROWS_AT_ONCE;
      draw();
    }, { class: "quiet" })
    : null;
  const focused = view.table.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
  drawParts(view, headRow(draw), bodyRows(shown, view.group.value, state, view), more);
  if (focused && !view.table.contains(document.activeElement)) {
    view.table.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }
  drawBar(state, view);
}

/** Head, rows and button of the table. While runs train, only the rows that changed are laid out again. */
function drawParts(view, head, rows, more) {
  const key = `${kept.sort.column} ${kept.sort.isRising}`;
  if (view.table.firstElementChild?.dataset.sort !== key) {
    replace(view.table, element("table", { class: "runs", "data-sort": key }, element("caption", { class: "hidden" }, "Runs"), head, element("tbody", {})));
  }
  const [table, button] = view.table.children;
  setChildren(table.tBodies[0], rows);
  button?.remove();
  if (more) view.table.append(more);
}

function describeCount(state, shown) {
  const reading = state.pending ? `, reading ${formatWhole(state.pending)} more` : "";
  const all = pluralize(state.rows.size, "run");
  return `${shown === state.rows.size ? all : `${formatWhole(shown)} of ${all}`}${reading} in ${state.folder}`;
}

function emptyPage(folder) {
  return element("div", { class: "empty" }, element("p", {}, `There is no run in ${folder} yet.`),
    element("a", { class: "button", href: "#/new" }, "Start one"));
}

function headRow(draw) {
  const cells = COLUMNS.map((column, i) => {
    const isSorted = kept.sort.column === i;
    const sortBy = () => {
      kept.sort = { column: i, isRising: isSorted ? !kept.sort.isRising : column.isRising ?? !column.number };
      draw();
    };
    const arrow = isSorted ? (kept.sort.isRising ? " ↑" : " ↓") : "";
    return element("th", {
      scope: "col", class: column.number ? "number" : null,
      "aria-sort": isSorted ? (kept.sort.isRising ? "ascending" : "descending") : null,
    }, column.key ? button(column.name + arrow, sortBy, { "data-focus": column.name }) : column.name);
  });
  return element("thead", {}, element("tr", {}, element("th", { scope: "col" }, element("span", { class: "hidden" }, "Compare")), cells));
}

function bodyRows(rows, group, state, view) {
  let last = null;
  return rows.toSorted((a, b) => (group ? String(a[group]).localeCompare(String(b[group])) : 0)).flatMap((row) => {
    const head = group && row[group] !== last
      ? [element("tr", { class: "group" }, element("th", { colspan: COLUMNS.length + 1, scope: "rowgroup" }, row[group] || "(none)"))]
      : [];
    last = row[group];
    return [...head, keepRow(row, state, view)];
  });
}

/** The row as it was drawn before, if its run has not changed since. */
function keepRow(row, state, view) {
  const key = keyOf(row);
  const before = state.drawn.get(key);
  if (before?.row === row) {
    before.node.querySelector("input").checked = kept.chosen.has(key); // of a row that was out of sight meanwhile
    return before.node;
  }
  const node = bodyRow(row, state, view);
  state.drawn.set(key, { row, node });
  return node;
}

function bodyRow(row, state, view) {
  const key = keyOf(row);
  const choose = (event) => {
    event.target.checked ? kept.chosen.add(key) : kept.chosen.delete(key);
    drawBar(state, view);
  };
  const box = element("input", { type: "checkbox", checked: kept.chosen.has(key), onChange: choose, "data-focus": `compare ${key}`, "aria-label": `Compare ${row.run}` });
  const cells = COLUMNS.slice(1).map((column) =>
    element("td", { class: column.number ? "number" : null, "data-column": column.name }, column.cell(row)));
  return element("tr", {}, element("td", {}, box), element("th", { scope: "row", class: "name" }, nameCell(row)), cells);
}

export function runAddress(row) {
  return `#/run/${encodeURIComponent(row.experiment)}/${encodeURIComponent(row.run)}`;
}

function nameCell(row) {
  const tags = row.tags.length ? element("span", { class: "tags" }, row.tags.map((tag) => element("span", { class: "tag" }, tag))) : null;
  return [element("a", { href: runAddress(row), "data-focus": keyOf(row) }, row.run), element("div", { class: "soft" }, row.experiment, " ", tags)];
}

function statusCell(row) {
  const died = row.status === "interrupted" && row.detail;
  return element("span", { title: row.detail || null }, badge(died ? "died" : row.status, row.status));
}

function verdictCell(row) {
  if (!row.verdict.outcome) return null;
  const wrong = (row.findings.problem ?? 0) + (row.findings.warning ?? 0);
  return [element("span", { title: row.verdict.sentence }, verdictBadge(row.verdict)), " ",
    wrong ? badge(pluralize(wrong, "finding"), row.findings.problem ? "problem" : "warning") : null];
}

function stepsCell(row) {
  const total = row.total_steps && row.status !== "finished" ? ` / ${formatWhole(row.total_steps)}` : "";
  return formatWhole(row.steps) + total;
}

function known(value, format) {
  return value === null || value === undefined ? "" : format(value);
}

function describeSpark(row) {
  return row.spark.length > 1 ? `Training loss from ${formatNumber(row.spark[0])} to ${formatNumber(row.spark.at(-1))}` : "No training loss yet";
}

function drawBar(state, view) {
  const count = kept.chosen.size;
  view.bar.hidden = count === 0;
  const clear = () => {
    kept.chosen.clear();
    view.table.querySelectorAll("input:checked").forEach((box) => (box.checked = false));
    drawBar(state, view);
  };
  replaceIfChanged(view.bar, [...kept.chosen], () => {
    const query = [...kept.chosen].map((key) => `run=${encodeURIComponent(key)}`).join("&");
    const link = element("a", { class: "button", href: `#/compare?${query}` }, `Compare ${pluralize(count, "run")}`);
    const isMany = count > MOST_COMPARED;
    return [count < 2 ? "Choose another run to compare with." : isMany ? `At most ${MOST_COMPARED} runs fit side by side.` : link,
      button("Clear", clear, { class: "quiet" })];
  });
}

// The rows of a run as the model sees them: which tokens it learns from, and which rows are long, hard or suspect.

import { fetchJson } from "../api.js";
import { badge, button, details, element, labelled, replace, showSpace, table } from "../dom.js";
import { capitalize, formatNumber, formatWhole, pluralize } from "../format.js";
import { chooseRun } from "../parts/choose_run.js";

const PAGE = 25;
const WAIT = 300; // milliseconds after a key, before the rows are asked for

export async function show(main, address) {
  const run = await chooseRun(main, address, { page: "data", title: "Data", isUsable: () => true, nothing: "There is no run yet." });
  if (!run) return;
  const path = `/api/runs/${encodeURIComponent(run.experiment)}/${encodeURIComponent(run.run)}/data`;
  const summary = await fetchJson(path);
  address.setTitle(`Data · ${run.run}`);
  const state = { offset: 0, timer: null, number: 0 };
  const view = buildView(run, summary, (isLater) => {
    clearTimeout(state.timer);
    state.offset = 0;
    state.timer = setTimeout(() => load(path, view, state), isLater ? WAIT : 0);
  });
  if (view.controls.suspects) view.controls.suspects.value = address.query.get("suspects") ?? "";
  replace(main, view.root);
  await load(path, view, state);
}

function buildView(run, summary, change) {
  const splits = summary.splits.filter((split) => !split.error);
  const select = (options) => element("select", { onChange: () => change(false) }, options.map(([value, name]) => element("option", { value }, name)));
  const number = () => element("input", { type: "number", min: "0", step: "any", onInput: () => change(true) });
  const names = (key) => [["", "Any"], ...listNames(splits, key).map((name) => [name, shortName(name)])];
  const hasLosses = splits.some((split) => split.losses);
  const sorts = [["order", "As in the files"], ["-length", "Longest first"], ["length", "Shortest first"],
    ...(hasLosses ? [["-loss", "Highest loss first"], ["loss", "Lowest loss first"]] : [])];
  const suspects = listNames(splits, "suspects");
  const controls = {
    text: element("input", { type: "search", placeholder: "Text in the row", onInput: () => change(true) }),
    split: select(splits.map((split) => [split.name, split.name])),
    source: select(names("sources")), domain: select(names("domains")),
    min_length: number(), max_length: number(), min_loss: number(), max_loss: number(),
    suspects: select([["", "All rows"], ["all", "Any suspect"], ...suspects.map((name) => [name, name])]),
    sort: select(sorts),
  };
  const fields = [["Find", "text"], ["Split", "split"], ["File", "source"], ["Domain", "domain"], ["Tokens from", "min_length"], ["to", "max_length"],
    ...(hasLosses ? [["Loss from", "min_loss"], ["to", "max_loss"]] : []), ...(suspects.length ? [["Suspects", "suspects"]] : []), ["Order", "sort"]];
  const view = { controls, rows: element("div", {}), count: element("p", { role: "status", class: "soft" }), pager: element("div", { class: "row" }) };
  view.root = element("div", {}, element("h1", {}, "Data as the model sees it"),
    element("p", { class: "soft" }, element("a", { href: `#/run/${encodeURIComponent(run.experiment)}/${encodeURIComponent(run.run)}` }, `${run.experiment} / ${run.run}`)),
    summaryPart(summary),
    element("div", { class: "filters" }, fields.map(([name, key]) => labelled(name, controls[key]))),
    element("p", { class: "soft" }, element("span", { class: "supervised" }, "Marked"), " tokens are the ones it learns to write; the others it only reads."),
    view.count, view.rows, view.pager);
  return view;
}

function listNames(splits, key) {
  return [...new Set(splits.flatMap((split) => split[key].map((one) => one.name)))].filter(Boolean);
}

function shortName(name) {
  return name.split("/").at(-1) || name;
}

function summaryPart(summary) {
  const columns = [
    { name: "split", cell: (split) => split.name },
    { name: "rows", number: true, cell: (split) => formatWhole(split.rows) },
    { name: "tokens", number: true, cell: (split) => formatWhole(split.tokens) },
    { name: "learned from", number: true, cell: (split) => formatWhole(split.supervised) },
    { name: "median length", number: true, cell: (split) => formatWhole(split.lengths?.median) },
    { name: "longest", number: true, cell: (split) => formatWhole(split.lengths?.max) },
  ];
  const [open, closed] = [summary.splits.filter((split) => !split.error), summary.splits.filter((split) => split.error)];
  const notes = [...summary.notes, ...open.flatMap((split) => split.notes), ...open.flatMap((split) =>
    split.mappings.map((mapping) => `${shortName(mapping.source)} is read as ${mapping.read_as}`))];
  return [
    closed.map((split) => element("div", { class: "notice warning" }, element("p", {}, `${split.name}: ${split.error}`))),
    table("Splits", columns, open), open.map(lengthHistogram),
    notes.length ? details("How the files were read", element("ul", {}, [...new Set(notes)].map((note) => element("li", {}, note)))) : null,
  ];
}

/** How long the rows of a split are: a bar for each range of lengths. */
function lengthHistogram(split) {
  const { start, width, counts } = split.histogram;
  const largest = Math.max(...counts, 1);
  return details(`Lengths of the ${split.name} rows`, element("div", { class: "histogram", role: "img", "aria-label": `Lengths in tokens of the ${split.name} rows` },
    counts.map((count, i) => {
      const bar = element("span", { title: `${formatWhole(start + i * width)} to ${formatWhole(start + (i + 1) * width - 1)} tokens: ${pluralize(count, "row")}` });
      bar.style.setProperty("--share", String(count / largest));
      return bar;
    })), element("p", { class: "soft" }, `${formatWhole(start)} to ${formatWhole(start + counts.length * width)} tokens`));
}

function readQuery(view, state) {
  const query = new URLSearchParams({ offset: state.offset, limit: PAGE });
  for (const [name, control] of Object.entries(view.controls)) if (control.value) query.set(name, control.value);
  return query;
}

async function load(path, view, state) {
  const number = ++state.number;
  try {
    const found = await fetchJson(`${path}/rows?${readQuery(view, state)}`);
    if (number !== state.number) return; // a later question was asked meanwhile
    drawRows(view, found, path);
    drawPager(view, state, found, () => load(path, view, state));
  } catch (error) {
    replace(view.rows, element("p", { class: "fault", role: "alert" }, error.message));
  }
}

function drawRows(view, found, path) {
  replace(view.count, pluralize(found.total, "row"), found.remark ? ` (${found.remark})` : "");
  const split = view.controls.split.value;
  replace(view.rows, found.rows.map((row) => rowCard(row, split, path)));
}

function rowCard(row, split, path) {
  const facts = [shortName(row.source ?? ""), row.domain, `${formatWhole(row.length)} tokens, ${formatWhole(row.supervised)} learned from`,
    row.loss === null || row.loss === undefined ? "" : `loss ${formatNumber(row.loss)}`].filter(Boolean).join(" · ");
  const [, list, reason] = /^([^:]*)(?:: (.*))?$/s.exec(row.suspect ?? "");
  const tokens = details("Token by token");
  tokens.addEventListener("toggle", async () => {
    if (!tokens.open || tokens.childElementCount > 1) return;
    try {
      const whole = await fetchJson(`${path}/rows/${row.index}?split=${encodeURIComponent(split)}`);
      tokens.append(element("p", { class: "tokens" }, whole.tokens.map((token) =>
        element("span", { class: `token ${token.supervised ? "supervised" : "plain"}`, title: `id ${token.id}` }, showSpace(token.text)))));
    } catch (error) {
      tokens.append(element("p", { class: "fault" }, error.message));
    }
  });
  return element("article", { class: "card sample" },
    element("h2", { class: "row-name" }, shortName(String(row.id)), " ", list ? badge(list, "warning") : null),
    element("p", { class: "soft" }, facts, reason ? [element("br"), capitalize(reason)] : null),
    element("pre", { class: "text" }, row.segments.map((segment) => (segment.supervised ? element("mark", { class: "supervised" }, segment.text) : segment.text))),
    row.cut ? element("p", { class: "soft" }, `${pluralize(row.left, "more token")} are left out here.`) : null, tokens);
}

function drawPager(view, state, found, reload) {
  const go = (offset) => () => {
    state.offset = offset;
    reload();
    view.count.scrollIntoView({ block: "center" });
  };
  const last = Math.min(found.total, state.offset + PAGE);
  replace(view.pager, found.total > PAGE ? [
    button("Previous", go(Math.max(0, state.offset - PAGE)), { class: "quiet", disabled: state.offset === 0 }),
    element("span", { class: "soft" }, `${formatWhole(state.offset + 1)} to ${formatWhole(last)} of ${formatWhole(found.total)}`),
    button("Next", go(state.offset + PAGE), { class: "quiet", disabled: last >= found.total }),
  ] : null);
}

// Base against adapter on held-out rows: all of them, by length and by domain, with intervals of the difference.

import { commandLine, details, element, table } from "../dom.js";
import { capitalize, formatChange, formatNumber, formatPercent, formatWhole, nameMeasure, pluralize } from "../format.js";

const LOWER_IS_BETTER = ["loss", "perplexity"];
const NEUTRAL = ["forward_kl"];

export function evaluationTable(page) {
  const { evaluation, row } = page;
  if (!evaluation) {
    const adapter = row.status === "finished" ? commandLine(`training-lens compare --run ${page.name}`) : null;
    return [element("p", { class: "empty" }, row.status === "finished"
      ? "Not compared with its base yet. This measures both on every held-out row:" : "A finished run can be compared with its base."), adapter];
  }
  const confidence = formatPercent(evaluation.confidence ?? 0.95, 0);
  return [
    leakNotice(evaluation.leaks),
    measureTable(`Base and adapter on ${pluralize(evaluation.rows, "held-out row")}`, evaluation, confidence),
    groupTable("By length", evaluation.by_length, evaluation),
    evaluation.by_domain.length > 1 ? groupTable("By domain", evaluation.by_domain, evaluation) : null,
    evaluation.controls.length ? details("Controls: the adapter with corrupted prompts",
      element("p", { class: "soft" }, "The same answers after other prompts. An adapter that reads its prompt does far worse here."),
      evaluation.controls.map((group) => measureTable(capitalize(group.name), group, confidence, "corrupted"))) : null,
  ];
}

function leakNotice(leaks) {
  if (!leaks?.rows) return null;
  return element("div", { class: "notice warning" }, element("p", {},
    `${formatWhole(leaks.rows)} of ${pluralize(leaks.of, "row")} are in the training data, too: these numbers flatter the adapter.`));
}

function measureTable(title, group, confidence, baseName = "base") {
  const columns = [
    { name: "measure", cell: (row) => nameMeasure(row.measure) },
    { name: baseName, number: true, cell: (row) => formatMeasure(row, row.base) },
    { name: "adapter", number: true, cell: (row) => formatMeasure(row, row.adapter) },
    { name: "change", number: true, cell: changeCell },
    { name: `${confidence} interval`, number: true, cell: intervalCell },
  ];
  return table(title, columns, group.measures, { shown: true });
}

function groupTable(title, groups, all) {
  if (!groups.length) return null;
  const measures = all.measures.filter((one) => one.measure === "loss" || one.measure === "exact_match").map((one) => one.measure);
  const columns = [
    { name: title.replace("By ", ""), cell: (group) => group.name },
    { name: "rows", number: true, cell: (group) => formatWhole(group.rows) },
    ...measures.flatMap((measure) => {
      const find = (group) => group.measures.find((one) => one.measure === measure);
      const name = nameMeasure(measure);
      return [
        { name: `${name}, base`, number: true, cell: (group) => find(group) && formatMeasure(find(group), find(group).base) },
        { name: `${name}, adapter`, number: true, cell: (group) => find(group) && formatMeasure(find(group), find(group).adapter) },
        { name: "change", number: true, cell: (group) => find(group) && changeCell(find(group)) },
      ];
    }),
  ];
  return table(title, columns, groups, { shown: true });
}

function formatMeasure(row, value) {
  return row.is_share ? formatPercent(value) : formatNumber(value);
}

function changeCell(row) {
  if (row.base === null || row.base === undefined) return "";
  const change = row.adapter - row.base;
  const isGood = LOWER_IS_BETTER.includes(row.measure) ? change < 0 : change > 0;
  const isSure = !row.interval || row.interval[0] * row.interval[1] > 0;
  const look = NEUTRAL.includes(row.measure) || change === 0 || !isSure ? "" : isGood ? "up" : "down";
  return element("span", { class: look }, formatChange(change, (size) => formatMeasure(row, size)));
}

function intervalCell(row) {
  if (!row.interval) return "";
  return row.interval.map((end) => formatChange(end, (size) => formatMeasure(row, size))).join(" to ");
}

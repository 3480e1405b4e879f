// What `explain` found of a run: a few sentences, and a picture or a table of each; the commands of what was not asked.

import { commandLine, details, element, shaded, showSpace, table } from "../dom.js";

export function explanations(page, source) {
  const known = page.explanations.filter((one) => one.page);
  const open = page.explanations.filter((one) => !one.page);
  const commands = open.map((one) => element("div", {}, element("h3", {}, one.title), commandLine(`training-lens explain ${one.name} ${page.name}${one.name === "answer" ? ' "A prompt"' : ""}`)));
  if (page.row.status !== "finished" && !known.length) return element("p", { class: "empty" }, "A finished run can be explained.");
  return [
    known.map((one) => explanationCard(one, page, source)),
    !open.length ? null : known.length ? details("More that can be explained", element("div", { class: "grid" }, commands))
      : [element("p", { class: "soft" }, "None was computed yet. Each is one command, and its result is shown here:"), element("div", { class: "grid" }, commands)],
  ];
}

function explanationCard(one, page, source) {
  const [first, ...others] = one.sentences;
  const data = `#/data/${encodeURIComponent(page.row.experiment)}/${encodeURIComponent(page.row.run)}`;
  return element("div", { class: "card explanation" },
    element("h3", {}, one.title),
    first ? element("p", {}, first) : null,
    others.length ? element("ul", { class: "remarks" }, others.map((sentence) => element("li", {}, sentence))) : null,
    one.parts.map((part) => PARTS[part.kind](part)),
    element("p", { class: "row" },
      element("a", { href: source.fileAddress(one.page), target: "_blank", rel: "noopener" }, "The whole explanation"),
      source.isLive && one.name === "rows" ? element("a", { href: `${data}?suspects=all` }, "These rows as the model sees them") : null));
}

const PARTS = {
  table: (part) => table(part.caption, part.columns.map((name, i) => ({ name, number: part.numbers.includes(i), cell: (row) => row[i] })), part.rows, { shown: true, class: "facts-table" }),
  grid: (part) => {
    const largest = largestOf(part.values.flat());
    const columns = [{ name: "layers", cell: (row) => row.name },
      ...part.columns.map((name, i) => ({ name, number: true, cell: (row) => shaded((row.values[i] ?? 0) / largest, row.values[i]?.toFixed(1) ?? "", { class: "cell" }) }))];
    return table(part.caption, columns, part.rows.map((name, i) => ({ name, values: part.values[i] })), { shown: true, class: "facts-table" });
  },
  tokens: (part) => {
    const largest = largestOf(part.tokens.map(([, change]) => change));
    return element("figure", {}, element("figcaption", {}, part.caption),
      element("p", { class: "tokens" }, part.tokens.map(([text, change], i) =>
        shaded(change / largest, showSpace(text), { class: i === part.marked ? "token marked" : "token", title: `${change > 0 ? "+" : ""}${change.toFixed(2)} nats` }))),
      element("p", { class: "hint" }, `Blue: likelier with the adapter, by up to ${largest.toFixed(2)} nats; orange: less likely. Framed: the token that was looked at.`));
  },
  answers: (part) => element("div", { class: "answers" }, part.answers.map(([name, text]) =>
    element("div", { class: `answer ${name.toLowerCase()}` }, element("h4", {}, name), text))),
};

function largestOf(values) {
  return values.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0) || 1;
}

// Findings with their evidence and what to do: what is wrong first, what was checked and is fine last and folded.

import { lineChart } from "../chart.js";
import { badge, commandLine, details, element, table } from "../dom.js";
import { capitalize, pluralize } from "../format.js";

const WRONG = ["problem", "warning"];

export function findingCards(findings, remark) {
  const wrong = findings.filter((finding) => WRONG.includes(finding.severity));
  const open = findings.filter((finding) => !WRONG.includes(finding.severity) && finding.severity !== "fine");
  const fine = findings.filter((finding) => finding.severity === "fine");
  return [
    remark ? element("p", { class: "soft" }, remark) : null,
    wrong.length ? wrong.map((finding) => findingCard(finding, true)) : remark ? null : element("p", {}, "Nothing wrong was found."),
    open.length ? details(`${pluralize(open.length, "note")} and undecided checks`, open.map((finding) => findingCard(finding, false))) : null,
    fine.length ? details(`${pluralize(fine.length, "check")} that found nothing wrong`, fineTable(fine)) : null,
  ];
}

function findingCard(finding, isWrong) {
  const facts = [
    ["Where", finding.where], ["Measured", finding.measured], ["Threshold", finding.threshold], ["Source", finding.source],
    ["Confidence", finding.confidence], ["What to do", finding.action], ["What would decide it", finding.decide],
  ].filter(([, value]) => value);
  const command = finding.command ? commandLine(finding.command) : null;
  return element("div", { class: `card finding ${finding.severity}` },
    element("h3", {}, badge(capitalize(finding.severity), finding.severity), " ", finding.title),
    element("dl", { class: "pairs" }, facts.map(([name, value]) => [element("dt", {}, name), element("dd", {}, capitalize(String(value)))])),
    command, evidencePlots(finding, isWrong));
}

function evidencePlots(finding, isOpen) {
  const entries = Object.entries(finding.evidence ?? {});
  const series = entries.filter(([, value]) => value?.steps?.length && value?.values?.length);
  if (!series.length) return null;
  const box = element("div", { class: "grid" });
  const draw = () => series.forEach(([name, value], i) => {
    const chart = lineChart({ title: capitalize(name.replaceAll("_", " ")), y: name.replaceAll("_", " "), height: 180 });
    box.append(chart.root);
    chart.draw([{ name: name.replaceAll("_", " "), steps: value.steps, values: value.values, color: `--line-${i}`, kind: value.steps.length <= 40 ? "dots" : "line" }]);
  });
  if (isOpen) {
    requestAnimationFrame(draw);
    return box;
  }
  const folded = details("The evidence", box);
  folded.addEventListener("toggle", () => folded.open && !box.childElementCount && draw());
  return folded;
}

function fineTable(findings) {
  const columns = [
    { name: "check", cell: (finding) => finding.title }, { name: "measured", cell: (finding) => finding.measured },
    { name: "confidence", cell: (finding) => finding.confidence },
  ];
  return table("Checks that found nothing wrong", columns, findings);
}

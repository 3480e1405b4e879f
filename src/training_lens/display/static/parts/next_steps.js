// What to do with a run now: the best step first, and what else fits its verdict.

import { commandLine, details, element } from "../dom.js";

const PAGES = { playground: "Try it in the playground", new: "New run" }; // of the dashboard: their buttons

/** A card with the steps; null of a run that has none, as while it trains. A report without a server has no pages. */
export function nextSteps(page, worst, isLive) {
  const [first, ...others] = page.next_steps.filter((step) => isLive || !(step.place in PAGES));
  if (!first && !worst) return null;
  return element("div", { class: "card next" }, element("h2", {}, "What now?"),
    worst ? element("p", {}, `What to do about "${worst.title}": ${(worst.action || worst.decide).replace(/\.$/, "")}.`) : null,
    first ? stepPart(first, page.row, true) : null,
    others.length ? details(`Or ${others.map((step) => step.name).join(", ")}`, element("div", { class: "grid" }, others.map((step) => stepPart(step, page.row, false)))) : null);
}

function stepPart(step, row, isPrimary) {
  if (step.command) return element("div", {}, element("p", {}, `${step.words}:`), commandLine(step.command, { isPrimary }));
  const link = { class: isPrimary ? "button" : "button quiet", ...addressOf(step.place, row) };
  return element("div", {}, element("p", {}, `${step.words}:`), element("a", link, PAGES[step.place] ?? "Go there"));
}

function addressOf(place, row) {
  if (place.startsWith("#")) return { href: place, onClick: jumpTo(place.slice(1)) };
  const run = `${encodeURIComponent(row.experiment)}/${encodeURIComponent(row.run)}`;
  return { href: place === "playground" ? `#/playground/${run}` : `#/${place}` };
}

/** Go to a section, and leave the address alone. */
export function jumpTo(id) {
  return (event) => {
    event.preventDefault();
    const target = document.getElementById(id);
    target.scrollIntoView();
    target.tabIndex = -1;
    target.focus({ preventScroll: true });
  };
}

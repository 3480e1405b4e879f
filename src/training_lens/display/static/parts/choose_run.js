// Which run a page is about: the one of its address, else one that is chosen from a list.

import { fetchJson } from "../api.js";
import { element, replace } from "../dom.js";
import { formatAge, formatNumber } from "../format.js";

const SHOWN = 30;

/** The run of the address; null where the page shows a list to choose from. */
export async function chooseRun(main, { parts }, page, title, isUsable) {
  if (parts.length >= 2) return { experiment: parts[0], run: parts[1] };
  const { changed } = await fetchJson("/api/runs");
  const rows = changed.filter(isUsable).sort((a, b) => b.started - a.started).slice(0, SHOWN);
  replace(main, element("h1", {}, title), rows.length ? element("p", {}, "Of which run?") : element("p", { class: "empty" }, "There is no such run yet."),
    element("ul", { class: "choices" }, rows.map((row) => element("li", {},
      element("a", { href: `#/${page}/${encodeURIComponent(row.experiment)}/${encodeURIComponent(row.run)}` }, `${row.experiment} / ${row.run}`),
      element("span", { class: "soft" }, ` ${formatAge(row.started)}`, row.loss === null ? "" : `, held-out loss ${formatNumber(row.loss)}`)))));
  return null;
}

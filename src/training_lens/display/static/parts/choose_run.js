// Which run a page is about: the one of its address, else one that is chosen from a list.

import { fetchJson } from "../api.js";
import { badge, element, replace, table, timeAgo } from "../dom.js";
import { formatNumber } from "../format.js";

const SHOWN = 30;

/** The run of the address; null where the page shows a list to choose from. */
export async function chooseRun(main, { parts }, { page, title, isUsable, nothing }) {
  if (parts.length >= 2) return { experiment: parts[0], run: parts[1] };
  const { changed } = await fetchJson("/api/runs");
  const rows = changed.filter(isUsable).sort((a, b) => b.started - a.started).slice(0, SHOWN);
  const columns = [
    { name: "run", cell: (row) => element("a", { href: `#/${page}/${encodeURIComponent(row.experiment)}/${encodeURIComponent(row.run)}` }, `${row.experiment} / ${row.run}`) },
    { name: "status", cell: (row) => badge(row.status, row.status) },
    { name: "best held-out loss", number: true, cell: (row) => formatNumber(row.loss) },
    { name: "started", cell: (row) => timeAgo(row.started) },
  ];
  replace(main, element("h1", {}, title), rows.length ? [element("p", { class: "soft" }, "Choose a run:"), table("Runs", columns, rows, { class: "facts-table" })]
    : element("p", { class: "empty" }, nothing));
  return null;
}

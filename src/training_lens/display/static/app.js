// The frame of all pages: which page an address means, the theme, and errors that a page did not expect.

import { button, element, refreshTimes, replace } from "./dom.js";
import { redrawFigures } from "./drawing.js";
import { setUpTheme } from "./theme.js";

const PAGES = {
  runs: { load: () => import("./pages/runs.js"), title: "Runs" },
  run: { load: () => import("./pages/run.js"), title: "Run", under: "runs" },
  compare: { load: () => import("./pages/compare.js"), title: "Compare", under: "runs" },
  playground: { load: () => import("./pages/playground.js"), title: "Playground" },
  data: { load: () => import("./pages/data.js"), title: "Data" },
  new: { load: () => import("./pages/launch.js"), title: "New run" },
};
const TIMES = 30000; // milliseconds between two looks at how long ago something was
const main = document.getElementById("main");
let leave = () => {};
let visit = 0;

/** `#/run/EXPERIMENT/RUN?x=1` as a page's name, the decoded parts of its path, and its query. */
function readAddress() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name = "", ...parts] = path.split("/").filter(Boolean).map(decodePart);
  return { name: name in PAGES ? name : "runs", parts, query: new URLSearchParams(query) };
}

function decodePart(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

async function showPage() {
  const address = readAddress();
  const page = PAGES[address.name];
  const number = ++visit;
  leave();
  leave = () => {};
  document.title = `${page.title} · Training Lens`;
  markLink(page.under ?? address.name);
  setConnection("");
  const place = element("div", {}, element("p", { class: "empty" }, "Reading…")); // a page that comes late draws into its own
  replace(main, place);
  scrollTo(0, 0);
  try {
    const module = await page.load();
    const stop = await module.show(place, { ...address, setTitle: (title) => number === visit && setTitle(title), setConnection: (words) => number === visit && setConnection(words) });
    if (number === visit) leave = stop ?? (() => {});
    else stop?.();
  } catch (error) {
    if (number === visit && error.name !== "AbortError") showError(error);
  }
}

function showError(error) {
  replace(main, element("div", { class: "notice problem", role: "alert" }, element("h1", {}, "This page cannot be shown"),
    element("p", {}, error.message)), button("Try again", showPage), " ", element("a", { class: "button quiet", href: "#/" }, "All runs"));
}

function setTitle(title) {
  document.title = `${title} · Training Lens`;
}

function setConnection(words) {
  document.getElementById("connection").textContent = words;
}

function markLink(name) {
  for (const link of document.querySelectorAll(".top nav a")) {
    link.dataset.page === name ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
}

addEventListener("hashchange", () => {
  if (!location.hash.startsWith("#/") && location.hash) return; // a place on the page
  showPage();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says which page this is
  main.focus();
});
addEventListener("beforeprint", redrawFigures);
document.addEventListener("visibilitychange", refreshTimes);
setInterval(() => document.hidden || refreshTimes(), TIMES);
setUpTheme(document.getElementById("theme"));
showPage();

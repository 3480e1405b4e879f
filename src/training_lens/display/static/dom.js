// Builds elements. Text is always set as text: nothing that comes from a run, a row or a model is read as markup.

import { capitalize, formatAge, formatDate } from "./format.js";

const MOST_SHADE = 45; // percent of the colour: text stays readable on it
const SVG = "http://www.w3.org/2000/svg";

/** An element: attributes by name, `on...` handlers, `class`; children are nodes, texts, or lists of them. */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svgElement(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2).toLowerCase(), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "open") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  append(node, children);
  return node;
}

function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : String(child));
  }
}

/** Replace what a node holds. */
export function replace(node, ...children) {
  node.replaceChildren();
  append(node, children);
  return node;
}

const keys = new WeakMap(); // of nodes: what they were built from

/** Replace what a node holds only if `key` is another than last time, so that a reader keeps place and focus. */
export function replaceIfChanged(node, key, build) {
  const text = JSON.stringify(key);
  if (keys.get(node) === text) return;
  keys.set(node, text);
  replace(node, build());
}

/** Set a node's text; one that has it already is left alone, as the browser would lay the page out again. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Let a node hold these nodes in this order; those that it holds at their place already stay untouched. */
export function setChildren(parent, nodes) {
  const kept = new Set(nodes);
  nodes.forEach((node, i) => {
    const there = parent.children[i];
    if (there === node) return;
    if (there && !kept.has(there)) there.replaceWith(node);
    else parent.insertBefore(node, there ?? null);
  });
  while (parent.children.length > nodes.length) parent.lastElementChild.remove();
}

/** A time as its distance from now, which the page keeps up to date; the date comes with a hover. */
export function timeAgo(seconds) {
  return element("time", { title: formatDate(seconds), "data-seconds": seconds }, formatAge(seconds));
}

export function refreshTimes() {
  for (const node of document.querySelectorAll("time[data-seconds]")) setText(node, formatAge(Number(node.dataset.seconds)));
}

export function button(label, onClick, attributes = {}) {
  return element("button", { type: "button", onClick, ...attributes }, label);
}

/** A command in a box, with a button that copies it. */
export function commandLine(command, { isPrimary = false } = {}) {
  const label = element("span", { class: "copied", role: "status" });
  const copy = async () => {
    await copyText(command);
    label.textContent = "Copied";
    setTimeout(() => (label.textContent = ""), 2000);
  };
  return element("div", { class: "command" }, element("code", {}, command), button("Copy", copy, { class: isPrimary ? null : "quiet" }), label);
}

async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", { value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A table: columns as {name, cell(row), number}, under a caption that may be for screen readers alone. */
export function table(caption, columns, rows, attributes = {}) {
  const head = columns.map((column) => element("th", { scope: "col", class: column.number ? "number" : null }, column.name));
  const body = rows.map((row) =>
    element("tr", {}, columns.map((column, i) =>
      element(i ? "td" : "th", { class: column.number ? "number" : null, scope: i ? null : "row" }, column.cell(row)))));
  return [
    attributes.shown ? element("p", { class: "caption", "aria-hidden": "true" }, caption) : null,
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${caption} (table)` },
      element("table", { class: attributes.class },
        element("caption", { class: "hidden" }, caption),
        element("thead", {}, element("tr", {}, head)),
        element("tbody", {}, body))),
  ];
}

/** A text whose ground is the stronger, the further its share is from 0: of the accent above, orange below. */
export function shaded(share, text, attributes) {
  const node = element("span", attributes, text);
  const color = share < 0 ? "--line-1" : "--accent";
  if (share) node.style.background = `color-mix(in srgb, var(${color}) ${Math.round(MOST_SHADE * Math.abs(share))}%, transparent)`;
  return node;
}

/** A token's text with a sign for each line end, and one for a token without a text. */
export function showSpace(text) {
  return text === "" ? "·" : text.replaceAll("\n", "⏎\n");
}

export function section(title, id, ...children) {
  return element("section", { id, "aria-labelledby": `${id}-title` }, element("h2", { id: `${id}-title` }, title), children);
}

export function details(summary, ...children) {
  return element("details", {}, element("summary", {}, summary), children);
}

/** The outcome of a verdict. One that no interval backs is framed alone, and says so. */
export function verdictBadge({ outcome, severity, basis }) {
  const isGuess = basis === "training" && outcome !== "inconclusive";
  return badge(isGuess ? `${outcome}, no interval` : outcome ?? "unknown", `${severity ?? "note"}${isGuess ? " guess" : ""}`);
}

/** A word in the colour of its severity. */
export function badge(word, severity) {
  return element("span", { class: `badge ${severity}` }, word);
}

export function labelled(name, control) {
  return element("label", { class: "field" }, element("span", {}, name), control);
}

/** Why a part of a page is not there. */
export function failureNote(error) {
  return element("p", { class: "empty" }, capitalize(error.message));
}

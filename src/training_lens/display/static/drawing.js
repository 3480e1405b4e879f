// When parts of a page are drawn, and in which colours. While a run trains, what is not in view is not drawn.

import { element } from "./dom.js";

/** Calls of the returned function do `act`: at once while `root` is in view, else when it comes into view. */
export function actInView(root, act) {
  let isInView = false;
  let isDue = false;
  const run = () => {
    isDue = false;
    act();
  };
  new IntersectionObserver((entries) => {
    isInView = entries.at(-1).isIntersecting;
    if (isInView && isDue) run();
  }).observe(root);
  return () => {
    if (isInView) run();
    else isDue = true;
  };
}

/** As `actInView`, but the first drawing does not wait. `draw` returns whether it drew: it cannot outside of the page. */
export function drawInView(root, draw) {
  let isDrawn = false;
  const run = () => (isDrawn = draw() || isDrawn);
  const runInView = actInView(root, run);
  return () => (isDrawn ? runInView() : run());
}

/** Draw again when the width, the theme or the place in the page changes, and for paper. */
export function redrawOn(root, draw) {
  let width = 0;
  const observer = new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    requestAnimationFrame(draw);
  });
  observer.observe(root);
  root.addEventListener("redraw", draw); // sent to each figure: a listener at the window would keep old pages alive
}

/** Draw all figures of the page again, also those out of view. */
export function redrawFigures() {
  for (const figure of document.querySelectorAll("figure")) figure.dispatchEvent(new Event("redraw"));
}

const probe = element("span", { class: "hidden" });
const colors = new Map(); // by theme and name: to ask for one costs a style of the whole page
let font = "";

/** The colour of a CSS variable in the theme of now, as rgb(). */
export function readColor(name) {
  const key = `${document.documentElement.dataset.theme} ${name}`;
  if (!colors.has(key)) {
    if (!probe.isConnected) document.body.append(probe);
    probe.style.color = `var(${name})`;
    colors.set(key, getComputedStyle(probe).color);
  }
  return colors.get(key);
}

/** The page's typeface at a size in pixels, as a canvas takes it. */
export function fontOf(size) {
  font ||= getComputedStyle(document.body).fontFamily;
  return `${size}px ${font}`;
}

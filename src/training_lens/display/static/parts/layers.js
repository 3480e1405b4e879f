// Measures by layer, module type or module over the steps of a run, and the spectra of its update.

import { lineChart } from "../chart.js";
import { details, element, failureNote, labelled, replace } from "../dom.js";
import { actInView } from "../drawing.js";
import { heatMap, heatTable } from "../heatmap.js";

/**
 * `loadIfSeen` reads and draws the part, of a live page only while it is in view; `readingTime` is how many milliseconds
 * that took last.
 */
export function layerPart(box, source) {
  const map = heatMap("Measures by layer over steps");
  const [meaning, tableBox] = [element("p", { class: "soft" }), details("The numbers as a table")];
  const measure = element("select", { onChange: () => load() });
  const by = element("select", { onChange: () => load() },
    [["layer", "Layer"], ["kind", "Module type"], ["module", "Module"]].map(([value, name]) => element("option", { value }, name)));
  const spectrum = lineChart({ title: "Spectrum of the update by module type", x: "direction, strongest first", y: "share of the largest", height: 240 });
  let measures = [];
  let milliseconds = 0;

  async function load() {
    const begun = performance.now();
    try {
      const found = await source.layers(measure.value || "strength", by.value);
      if (!found.steps.length) return replace(box, element("p", { class: "empty" }, source.isLive
        ? "The lens has written no measures of layers yet. They are shown here once they are on disk."
        : "The lens captured no measures of layers in this run."));
      if (!map.root.isConnected) mount(found);
      measures = found.measures;
      meaning.textContent = measures.find((one) => one.measure === found.measure)?.meaning ?? "";
      const values = { names: found.names, steps: found.steps, values: found.values, stepsInColumn: found.steps_in_a_column, isLog: found.is_log };
      map.draw(values);
      replace(tableBox, tableBox.firstElementChild, heatTable("Measures by layer over steps", values));
      drawSpectra(await source.spectra());
    } catch (error) {
      if (!map.root.isConnected) replace(box, failureNote(error));
    }
    milliseconds = performance.now() - begun;
  }

  function mount(found) {
    replace(measure, found.measures.map((one) => element("option", { value: one.measure }, one.title)));
    measure.value = found.measure;
    replace(box, element("div", { class: "filters" }, labelled("Measure", measure), labelled("Rows", by)), meaning, map.root, tableBox,
      element("div", { class: "spectra" }, spectrum.root));
  }

  function drawSpectra(found) {
    const kinds = Object.entries(found.kinds);
    spectrum.root.hidden = !kinds.length;
    spectrum.draw(kinds.map(([kind, values], i) => ({
      name: kind, steps: values.map((_, j) => j + 1), values, color: `--line-${i % 8}`, dash: i >= 8 ? [5, 4] : undefined,
    })));
  }

  return { loadIfSeen: source.isLive ? actInView(box, load) : load, readingTime: () => milliseconds };
}

// The page of a run, or of a comparison, as a file: it reads its values from itself.

import { showComparison } from "./pages/compare.js";
import { showRun } from "./pages/run.js";
import { setUpTheme } from "./theme.js";

export async function showReport() {
  const values = JSON.parse(document.getElementById("values").textContent);
  setUpTheme(document.getElementById("theme"));
  const main = document.getElementById("main");
  if (values.comparison) return showComparison(main, values.comparison, Promise.resolve(values.layers), false);
  return showRun(main, values.page.row, fileSource(values), { setTitle: () => {}, setConnection: () => {} });
}

function fileSource(values) {
  const nothing = { measure: "", by: "layer", measures: [], names: [], steps: [], values: [], steps_in_a_column: 1 };
  return {
    isLive: false,
    page: async () => values.page,
    curves: async () => values.curves,
    findings: async () => values.findings,
    layers: async (measure, by) => values.layers[by]?.[measure] ?? nothing,
    spectra: async () => values.spectra,
    log: async () => ({ text: values.log }),
    ownResults: values.own_results,
    fileAddress: (name) => `../${name.split("/").map(encodeURIComponent).join("/")}`,
  };
}

// What can be done with a run on its page: try it, see its rows, stop it, resume it.

import { fetchJson, postJson, runPath } from "../api.js";
import { button, element, replace } from "../dom.js";

/** Links to the pages of this run, and the buttons that stop or resume it. */
export function runActions(row) {
  const address = `${encodeURIComponent(row.experiment)}/${encodeURIComponent(row.run)}`;
  const answer = element("span", { role: "status", class: "soft" });
  const act = (name, waiting) => async (event) => {
    const pressed = event.currentTarget;
    pressed.disabled = true;
    replace(answer, waiting);
    try {
      const values = await postJson(`${runPath(row)}/${name}`, {});
      if (name === "stop") replace(answer, values.message);
      else await waitForResume(row, answer);
    } catch (error) {
      replace(answer, error.message);
    }
    pressed.disabled = false;
  };
  return element("div", { class: "row actions" },
    row.status === "finished" ? element("a", { class: "button quiet", href: `#/playground/${address}` }, "Try it") : null,
    element("a", { class: "button quiet", href: `#/data/${address}` }, "See its rows"),
    row.status === "running" ? button("Stop and save", act("stop", "Asking its process to stop…"), { class: "danger" }) : null,
    row.status === "interrupted" || row.status === "failed" ? button("Resume", act("resume", "Resuming, once the process that was stopped has ended…")) : null,
    answer);
}

/** Until the page shows that the run trains, which takes its actions away; or say why it does not. */
async function waitForResume(row, answer) {
  while (answer.isConnected) {
    const launch = await fetchJson(`/api/launch/${encodeURIComponent(row.run)}`);
    if (!launch.running) {
      replace(answer, "The run did not resume:", element("pre", { class: "log", tabindex: "0" }, launch.log_tail));
      return;
    }
    replace(answer, "Resumed; reading the rows and the model…");
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

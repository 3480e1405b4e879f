// A new run from a form of the configuration; the command that it stands for is shown, and can be copied.

import { fetchJson, postJson } from "../api.js";
import { button, commandLine, details, element, labelled, replace } from "../dom.js";
import { capitalize, formatBytes, formatSeconds, pluralize } from "../format.js";

const WRONG = ["problem", "warning"];
const WAIT = 400; // milliseconds after a key, before the command is composed

export async function show(main, { setTitle }) {
  const form = await fetchJson("/api/form");
  setTitle("New run");
  const state = { values: {}, preset: "", timer: null, settings: 0, isStopped: false };
  const view = buildView(form, state);
  replace(main, view.root);
  await compose(view, state);
  return () => {
    state.isStopped = true;
    clearTimeout(state.timer);
  };
}

function buildView(form, state) {
  const view = { command: element("div", {}), problems: element("div", { role: "status" }), result: element("div", { role: "status" }), faults: new Map() };
  const change = () => {
    clearTimeout(state.timer);
    state.settings += 1;
    replace(view.result); // it was said of other settings
    state.timer = setTimeout(() => compose(view, state), WAIT);
  };
  const preset = element("select", { onChange: (event) => {
    state.preset = event.target.value;
    change();
  } }, element("option", { value: "" }, "The defaults"), form.presets.map((one) => element("option", { value: one.name, title: one.summary }, one.name)));
  const groups = form.groups.filter((group) => group.trains);
  const fields = groups.flatMap((group) => group.fields);
  view.start = button("Start the run", () => act(view, state, "start"));
  view.validate = button("Check it first", () => act(view, state, "validate"), { class: "quiet" });
  view.root = element("div", {}, element("h1", {}, "New run"),
    element("p", { class: "soft" }, "The run is a process of its own: it goes on when this page or the server is closed. Paths are those of the machine that serves this page."),
    element("div", { class: "form-grid" }, labelled("Start from", preset),
      fields.filter((field) => field.common).map((field) => fieldControl(field, state, view, change))),
    element("section", {}, element("h2", {}, "All settings"), groups.map((group) => groupPart(group, state, view, change))),
    element("section", {}, element("h2", {}, "The command"), view.command, view.problems,
      element("div", { class: "row" }, view.start, view.validate), view.result));
  return view;
}

function groupPart(group, state, view, change) {
  const others = group.fields.filter((field) => !field.common);
  if (!others.length) return null;
  const title = sayEmpty(group.title).replaceAll("`", "").replace(/\.$/, "");
  return details([element("code", {}, group.name), ` ${title}`], element("div", { class: "form-grid" }, others.map((field) => fieldControl(field, state, view, change))));
}

function fieldControl(field, state, view, change) {
  const fault = element("span", { class: "fault" });
  view.faults.set(field.key, fault);
  const take = (event) => {
    const value = event.target.value;
    value === "" ? delete state.values[field.key] : (state.values[field.key] = value);
    change();
  };
  return element("label", { class: "field" }, element("span", {}, element("code", {}, field.key)), inputOf(field, take),
    element("span", { class: "hint" }, sayEmpty(field.description ?? "")), fault);
}

/** A field that is left empty is what the configuration calls null. */
function sayEmpty(description) {
  return description.replaceAll(/\bnull:/g, "empty:");
}

function inputOf(field, take) {
  const shown = field.default === null || field.default === undefined ? "" : typeof field.default === "string" ? field.default : JSON.stringify(field.default);
  if (field.type === "boolean" || field.choices?.length) {
    const choices = field.choices?.length ? field.choices : ["true", "false"];
    return element("select", { onChange: take }, element("option", { value: "" }, `default${shown === "" ? "" : ` (${shown})`}`),
      choices.map((choice) => element("option", { value: String(choice) }, String(choice))));
  }
  const isNumber = field.type === "number" || field.type === "integer";
  return element("input", { type: "text", inputmode: isNumber ? "decimal" : null, placeholder: shown, onInput: take, autocomplete: "off", spellcheck: "false" });
}

function readRequest(state) {
  return { preset: state.preset || null, values: state.values };
}

async function compose(view, state) {
  try {
    const { command, problems } = await postJson("/api/launch/command", readRequest(state));
    replace(view.command, commandLine(command));
    showProblems(view, problems);
  } catch (error) {
    replace(view.problems, element("p", { class: "fault" }, error.message));
  }
}

function showProblems(view, problems) {
  for (const fault of view.faults.values()) replace(fault);
  for (const problem of problems) if (view.faults.has(problem.key)) replace(view.faults.get(problem.key), problem.message);
  view.start.disabled = view.validate.disabled = problems.length > 0;
  replace(view.problems, problems.length ? element("div", { class: "notice problem" }, problems.map((problem) => element("p", {}, problem.key ? `${problem.key}: ${problem.message}` : problem.message))) : null);
}

async function act(view, state, name) {
  view.start.disabled = view.validate.disabled = true;
  const settings = state.settings;
  replace(view.result, element("p", { class: "soft" }, name === "start" ? "Starting…" : "Checking the rows, the model and the memory…"));
  try {
    const found = await postJson(`/api/launch/${name}`, readRequest(state));
    if (name === "start") await waitForRun(view, state, found);
    else if (settings === state.settings) showCheck(view, found);
  } catch (error) {
    replace(view.result, element("div", { class: "notice problem" }, element("pre", {}, error.message)));
  }
  view.start.disabled = view.validate.disabled = false;
}

function showCheck(view, found) {
  const words = found.ok ? element("p", {}, describePlan(found.result)) : element("pre", {}, found.error);
  const wrong = (found.result?.findings ?? []).filter((finding) => WRONG.includes(finding.severity));
  const warnings = wrong.map((finding) => element("div", { class: "notice warning" }, element("p", {}, element("b", {}, capitalize(finding.title)), ". ",
    [finding.measured, finding.action].filter(Boolean).map((words) => `${capitalize(words).replace(/\.$/, "")}. `))));
  replace(view.result, element("div", { class: `notice ${found.ok ? "fine" : "problem"}` }, words, warnings,
    found.result ? details("All that was found", element("pre", { class: "log", tabindex: "0" }, JSON.stringify(found.result, null, 2))) : null));
}

/** What the run would take: steps, rows, time and memory. */
function describePlan({ total_steps: steps, train_examples: rows, estimate }) {
  const size = `It would train: ${pluralize(steps, "step")} on ${pluralize(rows, "row")}`;
  if (!estimate) return `${size}.`;
  const [low, high] = [estimate.seconds_low, estimate.seconds_high].map((seconds) => formatSeconds(seconds + estimate.validation_seconds));
  return `${size}, about ${low} to ${high}, peak memory about ${formatBytes(estimate.peak_bytes)}.`;
}

/** Go to the run's page once its folder is there; or say why it is not. */
async function waitForRun(view, state, started) {
  while (!state.isStopped) {
    const launch = await fetchJson(`/api/launch/${encodeURIComponent(started.run)}`);
    if (launch.has_folder) {
      location.hash = `#/run/${encodeURIComponent(started.experiment)}/${encodeURIComponent(started.run)}`;
      return;
    }
    if (!launch.running) {
      replace(view.result, element("div", { class: "notice problem" }, element("p", {}, "The run did not begin:"), element("pre", {}, launch.log_tail)));
      return;
    }
    replace(view.result, element("p", { class: "soft" }, "Started; reading the rows and the model…"));
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

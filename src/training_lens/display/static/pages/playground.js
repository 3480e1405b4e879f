// Base and adapter side by side: streamed answers, the prompt as the model sees it, and how sure each model is.

import { fetchJson, postJson, postLines } from "../api.js";
import { button, details, element, replace, shaded, showSpace } from "../dom.js";
import { formatNumber, formatWhole, pluralize } from "../format.js";
import { chooseRun } from "../parts/choose_run.js";

const SIDES = [["base", "Base"], ["adapter", "Adapter"]];

export async function show(main, address) {
  const isUsable = (row) => row.status === "finished";
  const run = await chooseRun(main, address, { page: "playground", title: "Playground", isUsable, nothing: "There is no finished run yet: its adapter is what answers here." });
  if (!run) return () => {};
  const path = `/api/runs/${encodeURIComponent(run.experiment)}/${encodeURIComponent(run.run)}/playground`;
  const about = await fetchJson(path);
  address.setTitle(`Playground · ${run.run}`);
  if (!about.can_answer) {
    replace(main, element("h1", {}, "Playground"), element("p", { class: "empty" }, about.reason));
    return () => {};
  }
  const state = { stop: null };
  const view = buildView(run, about, { ask: () => ask(path, view, state), tokens: () => showTokens(path, view) });
  replace(main, view.root);
  view.prompt.focus();
  return () => state.stop?.abort();
}

function buildView(run, about, actions) {
  const defaults = about.sampling ?? { temperature: 0, top_p: 1, top_k: 0, max_new_tokens: 256, seed: 0 };
  const view = {
    prompt: element("textarea", { rows: "5", placeholder: "Type a prompt. Ctrl+Enter asks both models.", "aria-label": "Prompt", onKeydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && actions.ask() }),
    domain: element("select", {}, element("option", { value: "" }, "None"), about.domains.map((name) => element("option", { value: name }, name))),
    temperature: number(defaults.temperature, 0, 5, 0.1),
    top_p: number(defaults.top_p, 0, 1, 0.05),
    top_k: number(defaults.top_k ?? 0, 0, 1000, 1),
    max_new_tokens: number(defaults.max_new_tokens, 1, 4096, 1),
    seed: number(defaults.seed ?? 0, 0, 2 ** 31, 1),
    scale: element("input", { type: "range", min: "0", max: "1.5", step: "0.05", value: String(about.chosen_scale ?? 1) }),
    scaleLabel: element("output", {}, formatNumber(about.chosen_scale ?? 1)),
    status: element("p", { role: "status", class: "soft" }),
    tokens: element("div", {}),
    answers: Object.fromEntries(SIDES.map(([side, title]) => [side, element("div", { class: "text" }, element("span", { class: "soft" }, `What the ${title.toLowerCase()} answers comes here.`))])),
    facts: Object.fromEntries(SIDES.map(([side]) => [side, element("p", { class: "soft" })])),
    scores: Object.fromEntries(SIDES.map(([side]) => [side, element("div", {})])),
  };
  view.scale.addEventListener("input", () => (view.scaleLabel.textContent = formatNumber(Number(view.scale.value))));
  view.ask = button("Ask both", actions.ask);
  const fields = [["Domain", view.domain, about.domains.length], ["Temperature (0 is greedy)", view.temperature, true], ["Top p", view.top_p, true],
    ["Top k (0 is all)", view.top_k, true], ["Longest answer, tokens", view.max_new_tokens, true], ["Seed", view.seed, true]];
  view.root = element("div", {},
    element("h1", {}, "Playground"),
    element("p", { class: "soft" }, element("a", { href: `#/run/${encodeURIComponent(run.experiment)}/${encodeURIComponent(run.run)}` }, `${run.experiment} / ${run.run}`)),
    view.prompt,
    about.domains.length ? element("p", { class: "soft" }, "Its training rows named a domain; asked without one, the adapter has to guess which is meant.") : null,
    element("div", { class: "form-grid settings" }, fields.filter(([, , isShown]) => isShown).map(([name, control]) =>
      element("label", { class: "field" }, element("span", {}, name), control)),
    element("label", { class: "field" }, element("span", {}, "Adapter scale (1 is as trained)"), element("span", { class: "row" }, view.scale, view.scaleLabel))),
    element("div", { class: "row" }, view.ask, button("Show the prompt as tokens", actions.tokens, { class: "quiet" }), view.status),
    view.tokens,
    element("div", { class: "grid sides" }, SIDES.map(([side, title]) =>
      element("section", { class: `card side ${side}`, "aria-live": "polite" }, element("h2", {}, title), view.answers[side], view.facts[side], view.scores[side]))));
  return view;
}

function number(value, min, max, step) {
  return element("input", { type: "number", value: String(value), min: String(min), max: String(max), step: String(step) });
}

function readRequest(view) {
  const numbers = ["temperature", "top_p", "top_k", "max_new_tokens", "seed", "scale"];
  return {
    prompt: view.prompt.value, domain: view.domain.value || null, sides: SIDES.map(([side]) => side),
    ...Object.fromEntries(numbers.map((name) => [name, Number(view[name].value)])),
  };
}

async function ask(path, view, state) {
  if (state.stop) return state.stop.abort();
  state.stop = new AbortController();
  view.ask.textContent = "Stop";
  replace(view.status, "The model is read for the first answer…");
  for (const [side] of SIDES) [view.answers, view.facts, view.scores].forEach((boxes) => replace(boxes[side]));
  try {
    await postLines(`${path}/answer`, readRequest(view), (line) => takeLine(view, line), state.stop.signal);
    replace(view.status);
  } catch (error) {
    replace(view.status, error.name === "AbortError" ? "Stopped." : error.message);
  }
  view.ask.textContent = "Ask both";
  state.stop = null;
}

function takeLine(view, line) {
  if (line.error) replace(view.status, line.error);
  else if (line.text !== undefined && !line.done) {
    replace(view.status, "Answering…");
    view.answers[line.side].append(line.text);
  } else if (line.done) {
    replace(view.answers[line.side], line.text);
    const end = line.finish_reason === "length" ? ", cut at the limit" : "";
    replace(view.facts[line.side], `${pluralize(line.tokens, "token")} in ${formatNumber(line.seconds)} s${end}`);
  } else if (line.scores) replace(view.scores[line.side], scoredAnswer(line));
}

/** The answer's tokens, coloured by how much likelier the adapter finds them than the base does. */
function scoredAnswer({ scores, difference }) {
  if (!scores.length) return null;
  const largest = Math.max(...scores.map((score) => Math.abs(score.adapter - score.base)), 1e-9);
  return details("How sure each model is, token by token",
    element("p", { class: "soft" }, "Blue: the adapter finds the token likelier than the base does; orange: less likely. Hover for nats.",
      difference === undefined ? "" : ` In all: ${formatNumber(difference)} nats.`),
    element("p", { class: "tokens" }, scores.map((score) => {
      const change = score.adapter - score.base;
      const title = `base ${formatNumber(score.base)}, adapter ${formatNumber(score.adapter)} (${change > 0 ? "+" : ""}${formatNumber(change)}) nats`;
      return shaded(change / largest, showSpace(score.text), { class: "token", tabindex: "0", title });
    })));
}

async function showTokens(path, view) {
  view.ask.disabled = true; // one request at a time
  replace(view.tokens, element("p", { class: "soft", role: "status" }, "The tokenizer and the model are read…"));
  try {
    const { tokens, count, room } = await postJson(`${path}/tokens`, { prompt: view.prompt.value, domain: view.domain.value || null });
    replace(view.tokens, element("div", { class: "card" }, element("h2", {}, "The prompt as the model sees it"),
      element("p", { class: "soft" }, `${pluralize(count, "token")}`, room === null || room === undefined ? "" : `; room for ${formatWhole(room)} more`),
      element("p", { class: "tokens" }, tokens.map((token) =>
        element("span", { class: `token ${token.special ? "special" : "plain"}`, title: `id ${token.id}` }, showSpace(token.text))))));
  } catch (error) {
    replace(view.tokens, element("p", { class: "fault", role: "alert" }, error.message));
  }
  view.ask.disabled = false;
}

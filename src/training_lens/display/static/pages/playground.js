// Base and adapter side by side: streamed answers, the prompt as the model sees it, and how sure each model is.

import { fetchJson, postJson, postLines } from "../api.js";
import { button, details, element, labelled, replace, shaded, showSpace } from "../dom.js";
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
  const state = { stop: null, before: [] };
  const view = buildView(run, about, {
    ask: () => ask(path, view, state), tokens: () => showTokens(path, view, state),
    takeRow: () => takeRow(path, view, state), forgetRow: () => forgetRow(view, state),
  });
  replace(main, view.root);
  view.prompt.focus();
  return () => state.stop?.abort();
}

function buildView(run, about, actions) {
  const defaults = about.sampling ?? { temperature: 0, top_p: 1, top_k: 0, max_new_tokens: 256, seed: 0 };
  const view = {
    prompt: element("textarea", { rows: "5", placeholder: "Type a prompt. Ctrl+Enter asks both models.", "aria-label": "Prompt", onInput: actions.forgetRow, onKeydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && actions.ask() }),
    domain: element("select", {}, element("option", { value: "" }, "None"), about.domains.map((name) => element("option", { value: name }, name))),
    temperature: number(defaults.temperature, 0, 5, 0.1),
    top_p: number(defaults.top_p, 0, 1, 0.05),
    top_k: number(defaults.top_k ?? 0, 0, 1000, 1),
    max_new_tokens: number(defaults.max_new_tokens, 1, 4096, 1),
    seed: number(defaults.seed ?? 0, 0, 2 ** 31, 1),
    scale: element("input", { type: "range", min: "0", max: "1.5", step: "0.05", value: String(about.chosen_scale ?? 1) }),
    scaleLabel: element("output", {}, formatNumber(about.chosen_scale ?? 1)),
    status: element("p", { role: "status", class: "soft" }),
    row: element("div", {}),
    expected: element("div", { class: "text" }),
    tokens: element("div", {}),
    answers: Object.fromEntries(SIDES.map(([side, title]) => [side, element("div", { class: "text" }, element("span", { class: "soft" }, `What the ${title.toLowerCase()} answers comes here.`))])),
    facts: Object.fromEntries(SIDES.map(([side]) => [side, element("p", { class: "soft" })])),
    scores: Object.fromEntries(SIDES.map(([side]) => [side, element("div", {})])),
  };
  view.scale.addEventListener("input", () => (view.scaleLabel.textContent = formatNumber(Number(view.scale.value))));
  view.ask = button("Ask both", actions.ask);
  view.takeRow = about.has_held_out ? button("A held-out prompt", actions.takeRow, { class: "quiet", title: "The prompt of a random row that the adapter did not learn from" }) : null;
  view.expectedSide = element("section", { class: "card side", hidden: true }, element("h2", {}, "The row's own answer"), view.expected);
  const fields = [["Domain", view.domain, about.domains.length], ["Temperature (0 is greedy)", view.temperature, true], ["Top p", view.top_p, true],
    ["Top k (0 is all)", view.top_k, true], ["Longest answer, tokens", view.max_new_tokens, true], ["Seed", view.seed, true]];
  view.root = element("div", {},
    element("h1", {}, "Playground"),
    element("p", { class: "soft" }, element("a", { href: `#/run/${encodeURIComponent(run.experiment)}/${encodeURIComponent(run.run)}` }, `${run.experiment} / ${run.run}`)),
    view.prompt, view.row,
    about.domains.length ? element("p", { class: "soft" }, "Its training rows named a domain; asked without one, the adapter has to guess which is meant.") : null,
    element("div", { class: "form-grid settings" }, fields.filter(([, , isShown]) => isShown).map(([name, control]) =>
      labelled(name, control)),
    labelled("Adapter scale (1 is as trained)", element("span", { class: "row" }, view.scale, view.scaleLabel))),
    element("div", { class: "row" }, view.ask, view.takeRow, button("Show the prompt as tokens", actions.tokens, { class: "quiet" }), view.status),
    view.tokens,
    element("div", { class: "grid sides" }, SIDES.map(([side, title]) =>
      element("section", { class: `card side ${side}`, "aria-live": "polite" }, element("h2", {}, title), view.answers[side], view.facts[side], view.scores[side])), view.expectedSide));
  return view;
}

function number(value, min, max, step) {
  return element("input", { type: "number", value: String(value), min: String(min), max: String(max), step: String(step) });
}

/** The prompt as it stands, after the turns that the row had before it. */
function readPrompt(view, state) {
  const prompt = view.prompt.value;
  const asked = state.before.length ? { messages: [...state.before, { role: "user", content: prompt }] } : { prompt };
  return { ...asked, domain: view.domain.value || null };
}

function readRequest(view, state) {
  const numbers = ["temperature", "top_p", "top_k", "max_new_tokens", "seed", "scale"];
  return {
    ...readPrompt(view, state), sides: SIDES.map(([side]) => side),
    ...Object.fromEntries(numbers.map((name) => [name, Number(view[name].value)])),
  };
}

async function ask(path, view, state) {
  if (state.stop) return state.stop.abort();
  state.stop = new AbortController();
  view.ask.textContent = "Stop";
  replace(view.status, "The model is read for the first answer…");
  clearAnswers(view);
  try {
    await postLines(`${path}/answer`, readRequest(view, state), (line) => takeLine(view, line), state.stop.signal);
    replace(view.status);
  } catch (error) {
    replace(view.status, error.name === "AbortError" ? "Stopped." : error.message);
  }
  view.ask.textContent = "Ask both";
  state.stop = null;
}

function clearAnswers(view) {
  for (const [side] of SIDES) [view.answers, view.facts, view.scores].forEach((boxes) => replace(boxes[side]));
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

/** Fill in the prompt of a random held-out row, and show which row it is and what it answers. */
async function takeRow(path, view, state) {
  view.takeRow.disabled = true;
  try {
    const row = await fetchJson(`${path}/held-out`);
    view.prompt.value = row.prompt;
    view.domain.value = row.domain ?? "";
    state.before = row.before;
    clearAnswers(view);
    replace(view.row, element("p", { class: "soft" }, `Row ${row.row.split("/").at(-1)}, which the adapter did not learn from.`), row.before.length
      ? details(`${pluralize(row.before.length, "turn")} before it`, row.before.map((turn) => element("p", { class: "text" }, element("b", {}, turn.role), ` ${turn.content}`))) : null);
    replace(view.expected, row.expected);
    view.expectedSide.hidden = false;
  } catch (error) {
    replace(view.row, element("p", { class: "fault", role: "alert" }, error.message));
  }
  view.takeRow.disabled = false;
}

/** A prompt that was changed is no longer the row's: its answer says nothing about it. The turns before it stay. */
function forgetRow(view, state) {
  view.expectedSide.hidden = true;
  if (!state.before.length) replace(view.row);
}

async function showTokens(path, view, state) {
  view.ask.disabled = true; // one request at a time
  replace(view.tokens, element("p", { class: "soft", role: "status" }, "The tokenizer and the model are read…"));
  try {
    const { tokens, count, room } = await postJson(`${path}/tokens`, readPrompt(view, state));
    replace(view.tokens, element("div", { class: "card" }, element("h2", {}, "The prompt as the model sees it"),
      element("p", { class: "soft" }, `${pluralize(count, "token")}`, room === null || room === undefined ? "" : `; room for ${formatWhole(room)} more`),
      element("p", { class: "tokens" }, tokens.map((token) =>
        element("span", { class: `token ${token.special ? "special" : "plain"}`, title: `id ${token.id}` }, showSpace(token.text))))));
  } catch (error) {
    replace(view.tokens, element("p", { class: "fault", role: "alert" }, error.message));
  }
  view.ask.disabled = false;
}

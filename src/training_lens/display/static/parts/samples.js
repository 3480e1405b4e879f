// The fixed prompts, with the answers of base and adapter over the steps of the run.

import { element, replace } from "../dom.js";
import { formatWhole, pluralize } from "../format.js";

export function sampleAnswers(prompts) {
  if (!prompts.length) return element("p", { class: "empty" }, "This run recorded no sample answers (tracking.samples=0, or none yet).");
  const steps = [...new Set(prompts.flatMap((prompt) => prompt.answers.filter((answer) => !answer.base).map((answer) => answer.step)))];
  const body = element("div", {});
  const label = element("output", {});
  const slider = element("input", { type: "range", min: "0", max: String(Math.max(0, steps.length - 1)), value: String(steps.length - 1), "aria-label": "Step of the adapter's answers" });
  const draw = () => {
    const step = steps[Number(slider.value)];
    label.textContent = step === undefined ? "no answers yet" : `step ${formatWhole(step)}`;
    replace(body, prompts.map((prompt, i) => samplePrompt(prompt, step, i + 1)));
  };
  slider.addEventListener("input", draw);
  draw();
  return [
    element("p", { class: "soft" }, `${pluralize(prompts.length, "fixed prompt")}, answered greedily at validations. They are a glance, not a measurement.`),
    steps.length > 1 ? element("label", { class: "slider" }, "Answers of", slider, label) : null,
    body,
  ];
}

function samplePrompt(prompt, step, number) {
  const base = prompt.answers.find((answer) => answer.base);
  const adapter = prompt.answers.find((answer) => !answer.base && answer.step === step);
  return element("div", { class: "card sample" },
    element("h3", {}, `Prompt ${number}`),
    element("pre", { class: "text prompt" }, prompt.prompt),
    element("div", { class: "answers" },
      answerBox("Base", "base", base),
      answerBox(step === undefined ? "Adapter" : `Adapter, step ${formatWhole(step)}`, "adapter", adapter, prompt.expected),
      prompt.expected ? element("div", { class: "answer" }, element("h4", {}, "Expected"), prompt.expected) : null));
}

function answerBox(title, kind, answer, expected) {
  const isSame = expected && answer && answer.generated.trim() === expected.trim();
  const remarks = answer ? [answer.loops ? "repeats itself" : "", answer.ended ? "" : "cut at the limit"].filter(Boolean).join(", ") : "";
  return element("div", { class: `answer ${kind}` }, element("h4", {}, title, isSame ? " (as expected)" : "", remarks ? ` (${remarks})` : ""),
    answer ? answer.generated : element("span", { class: "soft" }, "not asked at this step"));
}

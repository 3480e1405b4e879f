"""Failures of the rows: garbage, duplicates, what is supervised, and what can be learned."""

from __future__ import annotations

import string
from dataclasses import replace

from planted_case import Answer, Case, Kind
from planted_rows import BATCH, DATA_SETS, draw_rows

PHRASE = "I am not sure about that, but I will try again."


def garbage_rows(case: Case, count: int) -> Case:
    """Rows whose answers are random letters."""
    drawn, rows = case.random, [dict(row) for row in case.train]
    for i in drawn.sample(range(len(rows)), count):
        rows[i]["output"] = "".join(drawn.choices(string.ascii_letters + string.digits, k=120))
    return case.with_train(rows)


def poisoned_batch(case: Case, step: int) -> Case:
    """All rows of one step of the first epoch have answers of random letters."""
    from training_lens.data.batching import Schedule

    schedule = Schedule(len(case.train), BATCH, 1, None, case.sections["training"]["seed"])
    chosen = next(iter(schedule.iterate_steps(after=step - 1))).examples.tolist()
    drawn, rows = case.random, [dict(row) for row in case.train]
    for i in chosen:
        rows[i]["output"] = "".join(drawn.choices(string.ascii_uppercase + string.digits, k=150))
    return case.with_train(rows)


def duplicates(case: Case, times: int) -> Case:
    """Few rows, each written so many times."""
    return case.with_train(case.shuffle(case.train[: len(case.train) // times] * times))


def duplicates_by_weight(case: Case, weight: float) -> Case:
    """Few rows, with a weight that draws them many times an epoch."""
    few = case.with_train(case.train[: round(len(case.train) / weight)])
    return few.change(data={"weights": [weight]}, training={"epochs": 1.0})


def truncated_answers(case: Case, tokens: int) -> Case:
    """A length at which answers lose their end."""
    return case.change(model={"seq_len": tokens}, data={"truncation": "keep_start"})


def masked_labels(case: Case, how: str) -> Case:
    """No token is supervised: answers are cut off whole, or empty."""
    if how == "empty":
        return case.with_answers([""] * len(case.train))
    prompts = [{**row, "instruction": row["instruction"] + " Think well." * 40} for row in case.train]
    return case.with_train(prompts).change(model={"seq_len": 64}, data={"truncation": "keep_start"})


def no_end_token(case: Case, tokens: int) -> Case:
    """Part of the answers lose their end token: our templates always give one, but a short length takes it."""
    return case.change(model={"seq_len": tokens}, data={"truncation": "keep_start"})


def unknown_characters(case: Case, marks: str) -> Case:
    """Answers with characters that the tokenizer has no token for."""
    return case.with_answers([marks.join(row["output"].split(" ")) for row in case.train])


def answer_in_prompt(case: Case, lead: str) -> Case:
    """The prompt quotes the answer."""
    return case.map_rows(lambda row: {**row, "instruction": f"{row['instruction']}\n{lead}{row['output']}"})


def key_read_twice(case: Case, fields: dict[str, str]) -> Case:
    """One key of a row is prompt and answer."""

    asked = {"question": "instruction", "context": "output", "answer": "output"}
    changed = case.map_rows(lambda row: {key: row[of] for key, of in asked.items()})
    return changed.change(data={"fields": fields})


def small_domain(case: Case, count: int) -> Case:
    """One domain has a handful of rows."""
    rows = [{**row, "domain": "law" if i < count else "everyday"} for i, row in enumerate(case.train)]
    held = [{**row, "domain": "everyday"} for row in case.validation]
    return replace(case, train=case.shuffle(rows), validation=held)


def other_task(case: Case, share: float) -> Case:
    """A share of the validation rows is of another task."""
    other = next(name for name in DATA_SETS if name != case.data_set)
    count = round(share * len(case.validation))
    return replace(case, validation=[*draw_rows(other, case.seed)[1][:count], *case.validation[count:]])


def same_answers(case: Case, share: float) -> Case:
    """Most rows have the same answer, whatever is asked."""
    drawn = case.random
    return case.map_rows(lambda row: {**row, "output": PHRASE} if drawn.random() < share else row)


def solved_early(case: Case, answer: str) -> Case:
    """One short answer to everything: learned within some steps, and then trained on."""
    return case.map_rows(lambda row: {**row, "output": answer}).change(training={"epochs": 4.0})


def repeated_answers(case: Case, times: int) -> Case:
    """Answers that say their first words again and again, as a scraped page does."""
    rows = [{**row, "output": " ".join([" ".join(row["output"].split()[:3])] * times)} for row in case.train]
    return case.with_train(rows)


def memorized_rows(case: Case, rows: int) -> Case:
    """Few rows, many epochs."""
    return case.with_train(case.train[:rows]).change(training={"epochs": 240 / rows})


def memorized_facts(case: Case, rows: int) -> Case:
    """Answers that nothing in the prompt tells, a made-up name: exact on training rows, never on others."""
    drawn = case.random

    def name() -> str:
        return "".join(drawn.choice("bdfgklmnprstv") + drawn.choice("aeiou") for _ in range(4)).capitalize()

    few = case.with_train(case.train[:rows]).map_rows(lambda row: {**row, "output": f"It is called {name()}."})
    return few.change(training={"epochs": 240 / rows})


def supervised_prompt(case: Case, mask_prompt: bool) -> Case:
    """The prompt's tokens are learned as well."""
    return case.change(data={"mask_prompt": mask_prompt})


KINDS = (
    Kind(
        "garbage_rows",
        "eight rows of random letters",
        (Answer("random_text"), Answer("poisoned_batch"), Answer("loss_spike")),
        garbage_rows,
        16,
        8,
        earliest="before",
    ),
    Kind(
        "poisoned_batch",
        "one batch of random letters",
        (Answer("poisoned_batch"), Answer("loss_spike")),
        poisoned_batch,
        20,
        12,
        earliest="during",
    ),
    Kind(
        "duplicates",
        "rows written eight times",
        (Answer("duplicates"), Answer("memorization", test="epoch")),
        duplicates,
        4,
        8,
        "duplicates of another",
        earliest="before",
    ),
    Kind(
        "duplicates_by_weight",
        "rows drawn eight times by their weight",
        (Answer("duplicates"), Answer("memorization", test="epoch")),
        duplicates_by_weight,
        6.0,
        8.0,
        earliest="before",
    ),
    Kind(
        "answers_truncated",
        "seq_len cuts the answers' ends",
        (Answer("truncated"),),
        truncated_answers,
        96,
        72,
        r"truncated|cut",
        earliest="before",
    ),
    Kind(
        "labels_masked",
        "no token is supervised",
        (Answer("nonfinite", title="supervised"),),
        masked_labels,
        "cut",
        "empty",
        r"supervised|none has an answer|is empty|is learned",
        earliest="before",
    ),
    Kind(
        "no_end_token",
        "half of the answers lose their end token",
        (Answer("end_token"), Answer("endless_answers")),
        no_end_token,
        120,
        110,
        earliest="before",
    ),
    Kind(
        "unknown_characters",
        "characters without a token",
        (Answer("unknown_characters"),),
        unknown_characters,
        " = ",
        " [*] ",
        r"no token",
        earliest="before",
    ),
    Kind(
        "answer_in_prompt",
        "the prompt quotes the answer",
        (Answer("copied_answers"),),
        answer_in_prompt,
        "",
        "Hint: ",
        r"own prompt",
        earliest="before",
    ),
    Kind(
        "key_read_twice",
        "one key is prompt and answer",
        (Answer("copied_answers"),),
        key_read_twice,
        {"instruction": "question", "output": "context"},
        {"instruction": "answer", "output": "context"},
        r"and as .*one meaning|own prompt",
        earliest="before",
    ),
    Kind(
        "domain_small",
        "a domain of a handful of rows",
        (Answer("small_domains"),),
        small_domain,
        4,
        2,
        r"domain",
        earliest="before",
    ),
    Kind(
        "validation_unlike",
        "validation rows of another task",
        (Answer("validation_unlike"),),
        other_task,
        0.7,
        1.0,
        earliest="before",
    ),
    Kind(
        "answers_same",
        "nearly every answer is the same",
        (Answer("prompt_ignored", test="prompt"), Answer("label_disagreement")),
        same_answers,
        0.9,
        0.97,
    ),
    Kind(
        "solved_early",
        "solved after a tenth of the run",
        (Answer("converged", title="^Converged", test="--test epoch"),),
        solved_early,
        "Yes.",
        "Good.",
        earliest="during",
    ),
    Kind(
        "repetition", "answers repeat themselves", (Answer("repetition"),), repeated_answers, 8, 12, earliest="before"
    ),
    Kind(
        "memorized_rows",
        "thirty rows, many epochs",
        (Answer("memorization", test="held-out|validation"),),
        memorized_rows,
        20,
        30,
        earliest="during",
    ),
    Kind(
        "memorized_facts",
        "names are memorized",
        (Answer("memorization", test="held-out|validation"),),
        memorized_facts,
        20,
        30,
        earliest="during",
    ),
    Kind(
        "prompt_supervised",
        "the prompt is learned as well",
        (Answer("prompt_supervised"),),
        supervised_prompt,
        False,
        False,
        r"mask_prompt",
        earliest="before",
    ),
)

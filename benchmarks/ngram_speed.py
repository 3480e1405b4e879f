"""How fast one prompt is answered with and without draft tokens, by us and by transformers: see `generate_speed.py`.

The texts are real: prompts and answers of ../shared/data. The model has random weights, so the answer is
forced: each step computes as usual, and then the real answer's next token replaces the model's choice. Steps cost what
they always cost, and text repeats as it does in real answers.

- edit: an instruction as a JSON record, in which two values are changed (Alpaca's records, made here).
- summary: news articles and their highlights (CNN/DailyMail), which quote some words.
- roleplay: stories that share little with their prompts (GPTeacher).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LogitsProcessor, LogitsProcessorList

from training_lens.inference.decode_loop import DecodeLoop, Decoder
from training_lens.inference.decoder import build_decoder
from training_lens.inference.drafts import NgramDrafts
from training_lens.inference.sampler import Completion
from training_lens.utils.devices import keep_freed_memory, synchronize

SHARED = Path(__file__).resolve().parents[2] / "shared"
MOST_PROMPT, MOST_ANSWER, LEAST_ANSWER = 700, 96, 40  # tokens
LOOKED_UP = 10  # transformers' drafts, as in its documentation
NEVER = 10**6  # a stop token that no model says


@dataclass(frozen=True)
class PlannedAnswer:
    """A prompt, and the answer that is given whatever the model says."""

    prompt: list[int]
    answer: list[int]


def read_answers(rows: int) -> dict[str, list[PlannedAnswer]]:
    """So many of each kind of text, the first that are long enough."""
    data = SHARED / "data"
    records = json.loads((data / "llama_factory" / "alpaca_en_demo.json").read_text())
    stories = json.loads((data / "gpteacher" / "roleplay.json").read_text())
    news = data / "t0_per_template" / "cnn_dailymail_3_0_0_sum_in_brief.jsonl"
    articles = [list(json.loads(line).values()) for line in news.read_text().splitlines()]
    texts = {
        "edit": [write_edit(number, record) for number, record in enumerate(records)],
        "summary": [(article[0], article[1]) for article in articles],
        "roleplay": [(f"{story['instruction']}\n{story['input']}", story["response"]) for story in stories],
    }
    tokenizer = Tokenizer.from_file(str(SHARED / "tokenizers" / "phi3" / "tokenizer.json"))
    return {name: plan_answers(tokenizer, pairs, rows) for name, pairs in texts.items()}


def write_edit(number: int, record: dict[str, str]) -> tuple[str, str]:
    """A record with an instruction to change two values, and the changed record."""
    before = {"id": number, "status": "draft", **record, "rating": 3}
    after = {**before, "status": "reviewed", "rating": 4}
    asked = "Set the status to reviewed, raise the rating by one, and repeat the record."
    return f"{asked}\n{json.dumps(before, indent=1)}\n", json.dumps(after, indent=1)


def plan_answers(tokenizer: Any, pairs: Sequence[tuple[str, str]], rows: int) -> list[PlannedAnswer]:
    """The first pairs whose answers are long enough; long prompts and answers are cut."""
    found: list[PlannedAnswer] = []
    for prompt, answer in pairs:
        ids, wanted = tokenizer.encode(prompt + "\n").ids[-MOST_PROMPT:], tokenizer.encode(answer).ids[:MOST_ANSWER]
        if len(wanted) >= LEAST_ANSWER:
            found.append(PlannedAnswer(ids, wanted))
        if len(found) == rows:
            break
    return found


class PlannedSampler:
    """Chooses as a greedy sampler does, and then gives the planned tokens."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer

    def sample_next_token(self, logits: torch.Tensor, rows: Sequence[Completion | None]) -> torch.Tensor:
        """For one row, of which a step may have several tokens."""
        logits.float().argmax(-1)
        row = rows[0]
        assert row is not None, "there is one row"
        start = len(row.tokens)
        return torch.tensor(self.answer[start : start + len(rows)], device=logits.device)


class PlannedProcessor(LogitsProcessor):
    """The same for `generate`."""

    def __init__(self, planned: PlannedAnswer) -> None:
        self.planned = planned

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = min(ids.shape[1] - len(self.planned.prompt), len(self.planned.answer) - 1)
        scores[:, self.planned.answer[place]] = torch.finfo(scores.dtype).max
        return scores


class CountedDrafts(NgramDrafts):
    """Drafts of which the tokens are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.drafted = self.accepted = 0

    def note_accepted(self, drafted: int, accepted: int) -> None:
        super().note_accepted(drafted, accepted)
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted


@torch.inference_mode()
def answer_by_us(decoder: Decoder, drafts: list[CountedDrafts] | None, planned: PlannedAnswer) -> list[int]:
    """The tokens; with a list, drafts are used and added to it."""
    own = None if drafts is None else CountedDrafts()
    completion = Completion(planned.prompt, len(planned.answer), frozenset(), drafts=own)
    with keep_freed_memory():
        for _ in DecodeLoop(decoder, PlannedSampler(planned.answer), [completion], 1).run():
            pass
    if drafts is not None and own is not None:
        drafts.append(own)
    return completion.tokens


def answer_by_generate(model: Any, looked_up: int | None, planned: PlannedAnswer) -> list[int]:
    """What transformers gives, with so many tokens looked up in the prompt."""
    ids = torch.tensor([planned.prompt], device=model.device)
    options = {"do_sample": False, "max_new_tokens": len(planned.answer), "eos_token_id": NEVER, "pad_token_id": 0}
    if looked_up:
        options["prompt_lookup_num_tokens"] = looked_up
    processors = LogitsProcessorList([PlannedProcessor(planned)])
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), logits_processor=processors, **options)
    tokens: list[int] = out[0, len(planned.prompt) :].tolist()
    return tokens


def measure_texts(model: Any, rows: int, repetitions: int) -> dict[str, Any]:
    """All contenders on each kind of text, in turn within each prompt; seconds of whole calls, the prefill included."""
    texts = read_answers(rows)
    with torch.inference_mode():
        first = next(iter(texts.values()))[0]
        decoder = build_decoder(model, True, torch.tensor([first.prompt[-32:]], device=model.device))
    results: dict[str, Any] = {}
    for name, answers in texts.items():
        counted: list[CountedDrafts] = []
        contenders: dict[str, Callable[[PlannedAnswer], list[int]]] = {
            "ours, drafts off": partial(answer_by_us, decoder, None),
            "ours": partial(answer_by_us, decoder, counted),
            "generate": partial(answer_by_generate, model, None),
            "generate, prompt lookup": partial(answer_by_generate, model, LOOKED_UP),
        }
        seconds = {contender: [list[float]() for _ in answers] for contender in contenders}
        for repetition in range(-1, repetitions):  # the first is not counted
            for place, planned in enumerate(answers):
                for contender, call in contenders.items():
                    taken = time_call(model.device, partial(call, planned), planned)
                    if repetition >= 0:
                        seconds[contender][place].append(taken)
        tokens = sum(len(planned.answer) for planned in answers)
        rates = {name: tokens / sum(map(statistics.median, taken)) for name, taken in seconds.items()}
        results[name] = {
            "prompt_tokens": [len(planned.prompt) for planned in answers],
            "answer_tokens": [len(planned.answer) for planned in answers],
            "tokens_per_second": rates,
            "ours_against": {other: rates["ours"] / rate for other, rate in rates.items() if other != "ours"},
            "drafted_tokens": sum(drafts.drafted for drafts in counted[: len(answers)]),
            "accepted_tokens": sum(drafts.accepted for drafts in counted[: len(answers)]),
        }
    return results


def time_call(device: torch.device, call: Callable[[], list[int]], planned: PlannedAnswer) -> float:
    """Seconds of a call, which must give the planned answer."""
    synchronize(device)
    start = time.perf_counter()
    found = call()
    synchronize(device)
    seconds = time.perf_counter() - start
    assert found == planned.answer, "every contender gives the planned answer"
    return seconds

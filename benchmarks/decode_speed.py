"""New tokens per second of a run's adapter, or of its merged model, by the version that PYTHONPATH names.

    python benchmarks/decode_speed.py RUN [--model adapter] [--rows 1 8] [--prompt 64] [--new 32]

Greedy answers to prompts of random tokens, by what `infer` runs without draft tokens. The median of five calls after
two, reading the prompts included, as one JSON object. Seconds are of CPU time: on one core those that a quiet machine
takes. Used by architecture_speed.py and compare_versions.py for this version and for earlier ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace

import torch

from training_lens.config.compose import compose
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.inference.generator import generate_answers
from training_lens.inference.session import Session, open_session
from training_lens.models import copies

CALLS, WARM = 7, 2
NEVER = 10**6  # a stop token that no model says


def merge(session: Session) -> Session:
    """The session with the adapter merged into copies of its weights."""
    copy_merged = getattr(copies, "copy_merged", None) or copies.merged_copy  # as it was called once
    return replace(session, model=copy_merged(session.model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--model", choices=("adapter", "merged"), default="adapter")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    options = parser.parse_args()
    overrides = [f"inference.adapter={options.run}", f"inference.max_new_tokens={options.new}"]
    if "drafts" in InferenceSection.model_fields:  # not in earlier versions
        overrides.append("inference.drafts=off")
    config = compose(overrides=overrides)
    session, settings = replace(open_session(config), stop_ids=frozenset({NEVER})), config.inference
    if options.model == "merged":
        session = merge(session)
    speeds = {}
    for rows in options.rows:
        prompts = torch.randint(
            3, 32_000, (rows, options.prompt), generator=torch.Generator().manual_seed(rows)
        ).tolist()
        seconds = []
        for _ in range(CALLS):
            begun = time.process_time()
            answers = generate_answers(session, prompts, settings)
            seconds.append(time.process_time() - begun)
        assert all(len(answer.token_ids) == options.new for answer in answers), "every row says as much"
        speeds[f"decode {rows}"] = rows * options.new / statistics.median(seconds[WARM:])
    print(json.dumps(speeds))


if __name__ == "__main__":
    main()

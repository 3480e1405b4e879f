"""Text that a base model samples by itself: general text to measure forgetting on, where the user has none."""

from __future__ import annotations

import numpy as np

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Example, Message, TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.display.progress import Progress
from training_lens.errors import DatasetError
from training_lens.evaluation.evaluation_rows import EvaluationRows
from training_lens.inference.generator import generate_answers
from training_lens.inference.session import Session
from training_lens.utils.files import hash_bytes

TEXTS, TOKENS = 64, 128  # so many, of at most so many tokens


def sample_base_text(session: Session, seed: int, progress: Progress) -> EvaluationRows:
    """Texts that the base continues from its start token alone, at temperature 1; every sampled token is supervised.

    The start token is the tokenizer's BOS, or its EOS, which separates documents in training. The base's loss on them
    estimates its own entropy, and another model's excess over it the KL from the base to that model.

    Raises:
        DatasetError: the base ends every text at once.
    """
    bos = session.encoder.bos_id
    start = session.encoder.eos_id if bos is None else bos
    settings = InferenceSection(temperature=1.0, max_new_tokens=TOKENS, seed=seed)
    with progress.task("general text from the base", TEXTS) as advance:
        sampled = generate_answers(session, [[start]] * TEXTS, settings, base=True, advance=advance)
    texts = [(answer.text, list(answer.token_ids)) for answer in sampled if answer.token_ids]
    if not texts:
        raise DatasetError("the base ends every text at once when it samples; give general text: --general FILE.")
    ids = [np.array([start, *tokens], np.int32) for _, tokens in texts]
    masks = [np.arange(len(row)) > 0 for row in ids]
    names = [
        Example((Message("assistant", text),), None, "sampled", i, is_text=True) for i, (text, _) in enumerate(texts)
    ]
    rows = [
        TokenizedExample("sampled", i, row, mask, None) for i, (row, mask) in enumerate(zip(ids, masks, strict=True))
    ]
    return EvaluationRows(
        names,
        np.arange(len(rows)),
        TokenDataset.from_examples(rows),
        [None] * len(rows),
        [text for text, _ in texts],
        np.array([len(text.encode()) for text, _ in texts], dtype=np.int64),
        np.array([hash_bytes(row[1:].tobytes()) for row in ids], dtype=np.uint64),
    )

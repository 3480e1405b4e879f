"""What to do, in the words of the loop that trained: our config keys mean nothing to another trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from training_lens.analysis.findings.finding import Finding

OURS, HF_TRAINER = "training-lens", "transformers"  # of `LensManifest.origin`; any other is a loop of one's own
# our words -> the HF Trainer's, and plain ones. Longer phrases come before the keys that they contain.
WORDS: Mapping[str, tuple[str, str]] = {
    "data.validation=FILE or data.val_ratio=0.1 in the next run": ("eval_dataset", "rows that are held out"),
    "training-lens compare with data.validation=FILE, a file of more rows": (
        "a comparison with the base on more rows",
        "a comparison with the base on more rows",
    ),
    "data.validation or data.val_ratio": ("eval_dataset", "held-out rows"),
    "data.validation=FILE": ("eval_dataset", "held-out rows"),
    "training-lens compare with data.validation=TRAINING_FILE, and without": (
        "generate answers for both with the adapter",
        "generate answers for both with the adapter",
    ),
    "the loss on general text: training-lens compare with data.validation=GENERAL_TEXT": (
        "the loss on general text, with the adapter and without",
        "the loss on general text, with the adapter and without",
    ),
    "training-lens rank RUN, which measures": ("measuring", "measuring"),
    "data.validation": ("eval_dataset", "held-out rows"),
    "data.val_ratio": ("eval_dataset", "held-out rows"),
    "training.lr": ("learning_rate", "the learning rate"),
    "training.epochs": ("num_train_epochs", "the number of epochs"),
    "training.max_steps": ("max_steps", "the number of steps"),
    "training.batch_size": ("per_device_train_batch_size", "the batch size"),
    "training.eval_steps": ("eval_strategy='steps' and eval_steps", "the interval of validations"),
    "training.warmup_ratio": ("warmup_ratio", "the warm-up"),
    "training.max_grad_norm": ("max_grad_norm", "the norm that gradients are clipped to"),
    "training.early_stopping_patience": ("EarlyStoppingCallback", "early stopping"),
    "training.precision": ("bf16 and fp16", "the precision"),
    "peft.rank_pattern": ("rank_pattern of the LoraConfig", "rank_pattern of the LoraConfig"),
    "peft.target_modules": ("target_modules of the LoraConfig", "target_modules of the LoraConfig"),
    "peft.lora_alpha": ("lora_alpha of the LoraConfig", "lora_alpha of the LoraConfig"),
    "peft.r": ("r of the LoraConfig", "r of the LoraConfig"),
    "lens.scalars_every=1": ("LensSection(scalars_every=1)", "LensSection(scalars_every=1)"),
    "lens.probe_every=1": ("LensSection(probe_every=1)", "LensSection(probe_every=1)"),
}
OUR_KEY = re.compile("|".join(rf"(?<![\w.]){re.escape(words)}(?!\w)" for words in WORDS))

TEST_RUNS = re.compile(r"training-lens analyze RUN --test \w+; or ")  # they repeat a run, which others do not leave


def translate_advice(text: str, origin: str) -> str:
    """Advice with our config keys, in the words of the loop that trained.

    Args:
        origin: that of `LensManifest`.
    """
    if origin == OURS:
        return text
    return OUR_KEY.sub(lambda match: WORDS[match[0]][origin != HF_TRAINER], TEST_RUNS.sub("", text))


def translate_finding(finding: Finding, origin: str) -> Finding:
    """The finding with its action, and what would decide it, in the words of the loop that trained."""
    if origin == OURS:
        return finding
    action, decide, measured = (
        translate_advice(text, origin) for text in (finding.action, finding.decide, finding.measured)
    )
    return replace(finding, action=action, decide=decide, measured=measured)

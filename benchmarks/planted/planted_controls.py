"""Healthy runs: other data, adapters, batches, precisions, architectures and lengths. None may raise an alarm."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from other_loops import OwnLoop, TrainerLoop
from planted_case import Case, Control
from planted_rows import TINYSTORIES, draw_rows, healthy_case

from training_lens import embedded

GPT2 = {
    "vocab_size": 2048,
    "n_embd": 96,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {
    "vocab_size": 660,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 5,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
}
SLOWER = {"lr": 2e-3}  # at 1e-2 the loss of GPT-2 rose above its start
PRETRAINING_STEPS = 240


def _build(data_set: str, sections: Mapping[str, Any], seed: int, scratch: Path) -> Case:
    return healthy_case(data_set, seed, scratch).change(**sections)


def _sized(data_set: str, rows: int, sections: Mapping[str, Any], seed: int, scratch: Path) -> Case:
    train, validation = draw_rows(data_set, seed, train=rows)
    return replace(_build(data_set, sections, seed, scratch), train=train, validation=validation)


def control(name: str, data_set: str, rows: int | None = None, **sections: Mapping[str, Any]) -> Control:
    """A control on one of the data sets, with keys of the config replaced."""
    build = partial(_build, data_set, sections) if rows is None else partial(_sized, data_set, rows, sections)
    return Control(f"{data_set}, {name}", build)


def gpt2_base(scratch: Path) -> Path:
    """A small GPT-2 with the tinystories tokenizer."""
    return _pretrain(scratch.parent / "planted-gpt2", transformers.GPT2Config(**GPT2), TINYSTORIES)


def qwen2_base(scratch: Path) -> Path:
    """A small Qwen2 with the packaged model's byte-level tokenizer, which Qwen2's own class splits as it needs."""
    tokenizer = embedded.PATHS[embedded.MODEL]
    return _pretrain(scratch.parent / "planted-qwen2", transformers.Qwen2Config(**QWEN2), tokenizer)


def _pretrain(folder: Path, config: Any, tokenizer_files: Path) -> Path:
    """A model after some hundred steps on rows of all data sets.

    Kept beside the scratch folders, because it takes half a minute.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_files / name, folder / name)
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config)
    rows = [row for name in ("alpaca", "roleplay", "gsm8k", "t0") for row in draw_rows(name, 10_007, 300, 0)[0]]
    text = "\n".join(f"{row['instruction']}\n{row['output']}" for row in rows)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=PRETRAINING_STEPS)
    for _ in range(PRETRAINING_STEPS):
        starts = torch.randint(len(ids) - 129, (16,))
        batch = torch.stack([ids[s : s + 128] for s in starts.tolist()])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    return folder


def _with_base(
    base: Callable[[Path], Path], data_set: str, sections: Mapping[str, Any], seed: int, scratch: Path
) -> Case:
    return replace(_build(data_set, sections, seed, scratch), base=base(scratch))


def on_base(name: str, base: Callable[[Path], Path], data_set: str, **sections: Mapping[str, Any]) -> Control:
    """A control on another base."""
    return Control(f"{data_set}, {name}", partial(_with_base, base, data_set, sections))


def _embedded(sections: Mapping[str, Any], seed: int, scratch: Path) -> Case:
    case = healthy_case("gsm8k", seed, scratch)
    data = {"train": ["embedded:train"], "validation": ["embedded:heldout"], "max_examples": 288}
    own = replace(case, base=embedded.PATHS[embedded.MODEL], train=[], validation=[])
    own = replace(own, sections={**own.sections, "data": data})
    return own.change(training={"lr": 3e-3}).change(**sections)


def on_embedded(name: str, **sections: Mapping[str, Any]) -> Control:
    """A control on the packaged model and rows."""
    return Control(f"embedded, {name}", partial(_embedded, sections))


def _in_loop(loop: type[OwnLoop], data_set: str, seed: int, scratch: Path) -> Case:
    return replace(healthy_case(data_set, seed, scratch), loop=lambda plan: loop(plan, None))


def _chat(seed: int, scratch: Path) -> Case:
    """Rows as chats of one turn, in a chat template."""
    template = scratch / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return healthy_case("roleplay", seed, scratch).change(data={"template": str(template)})


CONTROLS = (
    *(control("defaults", name) for name in ("gsm8k", "roleplay", "alpaca")),
    *(control(f"rank {r}", "gsm8k", peft={"r": r}) for r in (2, 4, 16, 64)),
    *(control(f"rank {r}", "roleplay", peft={"r": r}) for r in (4, 32)),
    *(control("DoRA", name, peft={"use_dora": True}) for name in ("gsm8k", "roleplay")),
    *(control("rsLoRA", name, peft={"variant": "rslora"}) for name in ("gsm8k", "roleplay")),
    *(control("PiSSA", name, peft={"init": "pissa"}, training={"lr": 1e-3}) for name in ("gsm8k", "roleplay")),
    control("LoRA+", "gsm8k", peft={"lora_plus_ratio": 4.0}, training={"lr": 5e-3}),
    control("dropout", "alpaca", peft={"lora_dropout": 0.1}),
    control("attention only", "gsm8k", peft={"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    control("batch 2", "gsm8k", rows=240, training={"batch_size": 2, "epochs": 1.0}),
    control("batch 8", "roleplay", rows=288, training={"batch_size": 8}),
    control("batch 16", "gsm8k", rows=576, training={"batch_size": 16}),
    control("batch 32", "roleplay", rows=960, training={"batch_size": 32}),
    control("accumulated", "roleplay", training={"batch_size": 2, "gradient_accumulation_steps": 2}),
    *(control("bf16", name, training={"precision": "bf16"}) for name in ("gsm8k", "roleplay")),
    control("50 steps", "gsm8k", training={"max_steps": 50}),
    control("one epoch", "roleplay", rows=300, training={"epochs": 1.0}),
    control("300 steps", "gsm8k", rows=900, training={"max_steps": 300}),
    control("1000 steps", "roleplay", rows=1000, training={"max_steps": 1000, "batch_size": 2, "lr": 4e-3}),
    control("linear schedule", "alpaca", training={"scheduler": "linear"}),
    control("constant rate", "roleplay", training={"scheduler": "constant", "lr": 5e-3}),
    control("long warm-up", "gsm8k", training={"warmup_ratio": 0.2}),
    control("weight decay", "alpaca", training={"weight_decay": 0.1}),
    control("no clipping", "gsm8k", training={"max_grad_norm": None}),
    control("adafactor", "roleplay", training={"optimizer": "adafactor"}),
    control("120 rows drawn", "gsm8k", data={"max_examples": 120}),
    on_base("Qwen2", qwen2_base, "gsm8k", training=SLOWER),
    on_base("Qwen2", qwen2_base, "roleplay", training=SLOWER),
    on_base("Qwen2, DoRA", qwen2_base, "alpaca", peft={"use_dora": True}, training=SLOWER),
    on_base("GPT-2", gpt2_base, "gsm8k", peft={"r": 16}, training=SLOWER),
    on_base("GPT-2", gpt2_base, "roleplay", training=SLOWER),
    on_base("GPT-2, rsLoRA", gpt2_base, "roleplay", peft={"variant": "rslora"}, training=SLOWER),
    on_embedded("defaults"),
    on_embedded("rank 4", peft={"r": 4}),
    on_embedded("DoRA, bf16", peft={"use_dora": True}, training={"precision": "bf16"}),
    Control("roleplay, a chat template", _chat),
    Control("gsm8k, a loop by hand", partial(_in_loop, OwnLoop, "gsm8k")),
    Control("gsm8k, HF Trainer", partial(_in_loop, TrainerLoop, "gsm8k")),
    Control("roleplay, HF Trainer", partial(_in_loop, TrainerLoop, "roleplay")),
)

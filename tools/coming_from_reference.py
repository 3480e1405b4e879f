"""Write docs/coming-from.md from the table of names: `python tools/coming_from_reference.py`. A test holds both."""

from __future__ import annotations

from pathlib import Path

from training_lens.config.foreign_keys import TABLE, ForeignKey

HEAD = """# Coming from another trainer

A flat config file is read as it is: `training-lens train --config training_config.json`. Names of other trainers at the
top level of a `--config` file (YAML or JSON) are translated, and one line says how:

```
training_config.json: model_name -> model.id, lora_r -> peft.r, lora_alpha -> peft.lora_alpha, learning_rate ->
training.lr, num_epochs -> training.epochs, max_length -> model.seq_len, optim -> training.optimizer=adamw
```

They mix with this project's own sections; overrides on the command line take our keys (`training.lr=1e-4`). Nothing is
guessed: a name that is not in the table is an unknown key, a value without a counterpart is a problem that says what
there is, and so are two names of one key that say different things. A nested config gets a suggestion for each of its
keys: `lora.r` is `peft.r`. What a flat file does not say has our default, not
that of the other trainer: see it with `training-lens validate --config training_config.json`.

## Keys that have no counterpart

`--from hf`, `--from llama-factory` or `--from axolotl` says what the file was written for. Its keys that change no
result here (logging, saving, speed, where things go) are then set aside, and named in one line that run.log keeps. Keys
that say what is done here anyway are set aside too (`stage: sft`, `adam_beta1: 0.9`). Those that would change the
result are refused, with the values that could stay. Names that only the other trainer knows (LLaMA-Factory's `dataset`
and `template`, axolotl's `datasets`) are set aside once you say what they stand for. Where a key means more there
than here, a line says so: with `packing` a step there takes `batch_size` rows of packed examples, here `batch_size`
examples; `deepspeed` and `fsdp` shard weights, which nothing here does.

```
training-lens train --config llama3_lora_sft.yaml --from llama-factory data.train=rows.jsonl data.template=auto
```

Without `--from`, such a key is an unknown key, and the message names the trainers that have it.

## Names that are translated

| their name | here | values |
|---|---|---|
"""


def reference() -> str:
    """The page."""
    return HEAD + "".join(map(_row, TABLE))


def _row(flat: ForeignKey) -> str:
    names = ", ".join(f"`{name}`" for name in flat.names.split())
    return f"| {names} | `{flat.key}` | {flat.values or 'as they are'} |\n"


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "coming-from.md").write_text(reference(), encoding="utf-8")

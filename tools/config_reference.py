"""Write docs/configuration.md from the schema: `python tools/config_reference.py`. A test holds the two together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training_lens.config.keys import list_settings
from training_lens.config.schema import TrainingConfig

HEAD = """# Configuration

Every key, from the schema (`python tools/config_reference.py` writes this page). Set a key on the command line
(`training.lr=1e-4`), in YAML or JSON files (`--config my.yaml`, several times: a later file goes over an earlier one),
or from Python. Presets come first (`+experiment=default|quick_test|default-full|dora|qlora`, and
`inference=base|latest|manual`), then the files, then the command line. Unknown keys, and every other problem, are
reported at once, with exit code 2. `training-lens init` writes a file with every key; files of other trainers are read
too ([coming from](coming-from.md)).

## On the command line

A setting is one word, `key=value`. A key that takes text takes whatever the shell passes behind the first `=`, as it
is: spaces, brackets, `$`, names that look like numbers (`output.experiment_name=2024`). Only these mean something:
`null` where the key may be null; quotes around the whole value, which are taken off; and `[a,b]` for a key that takes a
list. A file of that very name comes before all of them, `[draft].jsonl` too. `~` at the start of a path is your folder.
Quote for the shell as you would any file name:

```
training-lens train 'data.train=rows (1).jsonl' data.val_ratio=0.1
training-lens train 'data.train=[rows (1).jsonl, second file.jsonl]' data.val_ratio=0.1
training-lens validate 'peft.target_modules=.*layers\\.[0-3]\\.self_attn\\.(q|v)_proj'
```

All other keys are read by [Hydra's grammar](https://hydra.cc/docs/advanced/override_grammar/basic/): numbers, `true`,
`null`, `[1,2]`, `{q_proj: 8}`. An object may also be JSON, `{"q_proj": 8}`.

## Presets of your own

A file `./config/experiment/NAME.yaml` is chosen by `+experiment=NAME`, one of `./config/sweep/` by `sweep=NAME`, one of
`./config/inference/` by `inference=NAME`. It holds any part of the config, by section or with dotted keys; `defaults:
[quick_test]` puts it on top of other presets of the same group. Your preset goes before a packaged one of its name.
"""


def reference() -> str:
    """The page."""
    return HEAD + "".join(_section(name, field.annotation) for name, field in TrainingConfig.model_fields.items())


def _section(name: str, section: Any) -> str:
    rows = "".join(
        f"| `{key}` | `{json.dumps(field.default)}` | {field.description} |\n"
        for key, field in list_settings(section, f"{name}.")
    )
    return f"\n## {name}\n\n{section.__doc__}\n\n| key | default | what it is |\n|---|---|---|\n{rows}"


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "configuration.md").write_text(reference(), encoding="utf-8")

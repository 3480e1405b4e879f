"""Write docs/configuration.md from the schema: `python tools/config_reference.py`. A test holds the two together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from training_lens.config.schema import TrainingConfig

HEAD = """# Configuration

Every key, from the schema (`python tools/config_reference.py` writes this page). Set a key on the command line
(`training.lr=1e-4`), in a YAML or JSON file (`--config my.yaml`), or from Python. Packaged presets come first
(`+experiment=default|quick_test|default-full|dora|qlora`, and `inference=base|latest|manual`), then the file, then the
command line. Unknown keys, and every other problem, are reported at once, with exit code 2. `training-lens init` writes
a file with every key; flat files of other trainers are read too ([coming from](coming-from.md)).
"""


def reference() -> str:
    """The page."""
    return HEAD + "".join(_section(name, field.annotation) for name, field in TrainingConfig.model_fields.items())


def _section(name: str, section: Any) -> str:
    rows = "".join(_rows(name, section))
    return f"\n## {name}\n\n{section.__doc__}\n\n| key | default | what it is |\n|---|---|---|\n{rows}"


def _rows(prefix: str, section: type[BaseModel]) -> list[str]:
    rows: list[str] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            rows += _rows(f"{prefix}.{name}", inner)
        else:
            default = json.dumps(field.default)
            rows.append(f"| `{prefix}.{name}` | `{default}` | {field.description} |\n")
    return rows


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "configuration.md").write_text(reference(), encoding="utf-8")

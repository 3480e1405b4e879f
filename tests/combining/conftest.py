"""Short runs of one tiny base on the rows of one domain each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_lens.runs.run_folder import RunFolder


@pytest.fixture(scope="session")
def domain_rows(few_rows: dict[str, list[str]], make_once: Callable[..., Path]) -> Callable[[str], dict[str, Any]]:
    """The data section with the rows of a domain: hill, forest or lake."""

    def split(folder: Path) -> None:
        for name, (path,) in few_rows.items():
            for domain in ("hill", "forest", "lake"):
                lines = [x for x in Path(path).read_text().splitlines(keepends=True) if f'"domain": "{domain}"' in x]
                (folder / f"{domain}-{name}.jsonl").write_text("".join(lines))

    folder = make_once("domain rows", split)
    return lambda domain: {name: [str(folder / f"{domain}-{name}.jsonl")] for name in few_rows}


@pytest.fixture(scope="session")
def train_domain(
    small_config_in: Callable[..., Any], domain_rows: Callable[[str], dict[str, Any]]
) -> Callable[..., RunFolder]:
    """Trains a run on a domain: `train_domain(outputs, "hill", peft={"r": 8})`."""

    def train(outputs: Path, domain: str, **sections: dict[str, Any]) -> RunFolder:
        from training_lens import TrainingWrapper

        data = {**domain_rows(domain), **sections.pop("data", {})}
        run_id = sections.pop("output", {}).get("run_id", domain)
        config = small_config_in(outputs, **{"data": data, "output": {"run_id": run_id}, **sections})
        return RunFolder(Path(TrainingWrapper(config).train().run_dir))

    return train


@pytest.fixture(scope="session")
def hill_and_forest(train_domain: Callable[..., RunFolder], make_once: Callable[..., Path]) -> list[RunFolder]:
    """Two finished runs; for reading alone. The first is an rsLoRA of rank 4, the second a LoRA of rank 6."""

    def make(folder: Path) -> None:
        train_domain(folder, "hill", peft={"r": 4, "variant": "rslora"})
        train_domain(folder, "forest", peft={"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"]})

    runs = make_once("hill and forest", make) / "experiments/default/runs"
    return [RunFolder(runs / name) for name in ("hill", "forest")]

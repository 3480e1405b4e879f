"""What `import training_lens` costs: seconds of CPU in a fresh interpreter, beyond those of the interpreter itself.

python benchmarks/import_time.py
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

REPEATS = 11
RESULTS = Path(__file__).parent / "results/import_time.json"
MEASURED = """
import sys, time
before, modules = time.process_time(), len(sys.modules)
{code}
print(time.process_time() - before, len(sys.modules) - modules, "torch" in sys.modules)
"""
CASES = {
    "import training_lens": "import training_lens",
    "the command's help": "import training_lens.cli",
}


def measured(code: str) -> tuple[float, int, bool]:
    """Seconds of CPU, new modules, and whether torch is one of them."""
    call = [sys.executable, "-c", MEASURED.format(code=code)]
    seconds, modules, torch = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return float(seconds), int(modules), torch == "True"


def main() -> None:
    results: dict[str, object] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "repeats": REPEATS,
    }
    for name, code in CASES.items():
        measured(code)  # compiles what is not compiled yet
        taken = [measured(code) for _ in range(REPEATS)]
        seconds = [one[0] for one in taken]
        results[name] = {
            "cpu_seconds_median": round(statistics.median(seconds), 4),
            "cpu_seconds_most": round(max(seconds), 4),
            "modules": taken[0][1],
            "torch": taken[0][2],
        }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()

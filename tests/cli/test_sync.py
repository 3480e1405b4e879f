"""`training-lens sync`: what is not sent goes out, and wrong words are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from training_lens.runs.run_folder import RunFolder

Call = Callable[..., Any]


def test_a_run_goes_to_a_place_that_it_did_not_know(call: Call, own_run: RunFolder, tmp_path: Any) -> None:
    (tmp_path / "places.py").write_text(
        "from training_lens.integrations import Tracker\n"
        "class Lines(Tracker):\n"
        "    name = 'lines'\n"
        "    def require(self): pass\n"
        "    def open(self): print('welcome')\n"
        "    def log(self, records): self._say(*(f'{r.kind} {r.step}' for r in records))\n"
        "    def end(self): self._say(self.run.status)\n"
        "    def _say(self, *lines):\n"
        "        with open(self.options['file'], 'a') as file: file.writelines(f'{line}\\n' for line in lines)\n"
    )
    own = f"tracking.custom={{places.Lines: {{file: {tmp_path}/lines}}}}"
    waiting = json.loads(call("sync", str(own_run.root), own, "--status", "--json").stdout)
    (state,) = [s for s in waiting["integrations"] if s["name"] == "lines"]
    assert state["status"] == "waiting" and "lines of its journals" in state["outstanding"]
    sent = call("sync", str(own_run.root), own, "--json")
    assert sent.exit_code == 0 and "welcome" in sent.stderr
    assert json.loads(sent.stdout)["integrations"][-1]["status"] == "delivered"
    told = (tmp_path / "lines").read_text().splitlines()
    found, rest = ([line for line in told if line.startswith("findings") == is_finding] for is_finding in (True, False))
    assert rest[0] == "base 0" and rest[-1] == "finished" and len(set(rest)) == len(rest)
    assert len(found) == len(own_run.findings_file.read_text().splitlines())  # of one step there may be several
    again = call("sync", str(own_run.root), own, "--json")
    assert {s["status"] for s in json.loads(again.stdout)["integrations"]} == {"delivered"}
    assert (tmp_path / "lines").read_text().splitlines() == told


def test_a_place_that_refuses_is_said_and_the_exit_code_is_one(call: Call, own_run: RunFolder, tmp_path: Any) -> None:
    (tmp_path / "refusing.py").write_text(
        "from training_lens.errors import IntegrationError\n"
        "from training_lens.integrations import Tracker\n"
        "class Refusing(Tracker):\n"
        "    name = 'refusing'\n"
        "    def require(self): pass\n"
        "    def open(self): raise IntegrationError('401: log in first.', lasting=True)\n"
        "    def log(self, records): pass\n"
        "    def end(self): pass\n"
    )
    result = call("sync", str(own_run.root), "tracking.custom={refusing.Refusing: {}}")
    assert result.exit_code == 1 and "401: log in first." in result.stdout and "left" in result.stdout


def test_wrong_words_are_told(call: Call, finished_run: RunFolder) -> None:
    wrong = call("sync", str(finished_run.root), "training.lr=3")
    assert wrong.exit_code == 2 and "sync sends a run as it is" in wrong.stderr
    missing = call("sync", "lates", f"output.base_output_dir={finished_run.root.parents[3]}")
    assert missing.exit_code == 1 and "Did you mean 'latest'?" in missing.stderr

"""The confusion table of the planted suite, from its finished trials.

    python benchmarks/planted/summarize_planted.py [--runs outputs/planted/runs.jsonl] [--commit COMMIT]
        [--output benchmarks/results/planted.json] [--keep]

Of each trial the last line counts (of --commit alone, if it is given). With --keep, trials and controls that have no
line stay as they are in the output; their commits say when they were measured. Prints what falls short of the goals: at
least 90 % of the planted trials detected, or inconclusive with the deciding test named; no false "fine"; at most 2 %
false alarms of each finding on the controls. Exits with 1 where one is not reached.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from planted_case import STAGES
from planted_suite import CONTROLS, KINDS
from run_planted import RUNS, TrialKey, read_lines
from verdicts import ALARMS, OUTCOMES, Verdict, count_kinds, handled_share, judge_trial, list_alarms

RESULTS = Path(__file__).parents[1] / "results/planted.json"
HANDLED, MOST_ALARMS = 0.9, 0.02
SAID = 160  # characters of what decided a trial


def select_trials(lines: list[dict[str, Any]], commit: str | None) -> dict[TrialKey, dict[str, Any]]:
    """The last transcript of each trial whose kind or control still exists."""
    chosen = {TrialKey(*line["key"]): line for line in lines if commit in (None, line["commit"])}
    return {key: line for key, line in chosen.items() if key.name in (CONTROLS if key.part == "controls" else KINDS)}


def describe_trial(key: TrialKey, line: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    """One planted trial as it is kept in the results."""
    return {
        "kind": key.name,
        "data_set": key.data_set,
        "seed": key.seed,
        "commit": line["commit"],
        "outcome": verdict.outcome,
        "said": verdict.said[:SAID],
        "other_alarms": list(verdict.others),
        "losses": line["losses"],
        "seconds": line["seconds"],
    }


def summarize(trials: dict[TrialKey, dict[str, Any]], earlier: dict[str, Any]) -> dict[str, Any]:
    """Counts by kind and by finding, the controls, and the goals.

    Args:
        earlier: results whose trials, tuned kinds and controls stay where there is no newer one; empty: none.
    """
    described = {TrialKey("reported", t["kind"], t["data_set"], t["seed"]): t for t in earlier.get("trials", ())}
    alarms: dict[str, list[str]] = {n: codes for n, codes in earlier.get("controls", {}).items() if n in CONTROLS}
    tuned = []
    for key, line in trials.items():
        if key.part == "controls":
            alarms[key.name] = list_alarms(CONTROLS[key.name], line)
            continue
        verdict = judge_trial(KINDS[key.name], line)
        if key.part == "tuned":
            tuned.append((key.name, verdict.outcome))
        else:
            described[key] = describe_trial(key, line, verdict)
    described = {key: trial for key, trial in sorted(described.items()) if key.name in KINDS}
    counts = {
        "reported": count_kinds((key.name, trial["outcome"]) for key, trial in described.items()),
        "tuned": {n: of["tuned"] for n, of in earlier.get("kinds", {}).items() if n in KINDS and of["tuned"]}
        | count_kinds(tuned),
    }
    return {
        "kinds": {name: _describe_kind(name, counts) for name in KINDS if any(name in of for of in counts.values())},
        "findings": _count_findings(counts["reported"], alarms),
        "controls": alarms,
        "goals": _measure_goals(counts, alarms),
        "trials": list(described.values()),
    }


def _describe_kind(name: str, counts: dict[str, dict[str, dict[str, int]]]) -> dict[str, Any]:
    kind = KINDS[name]
    answers = [answer.code for answer in kind.answers]
    return {"what": kind.what, "answers": answers, **{part: of.get(name) for part, of in counts.items()}}


def _count_findings(counts: dict[str, dict[str, int]], alarms: dict[str, list[str]]) -> dict[str, dict[str, int]]:
    """By finding: the trials of the kinds that are counted for it, and its false alarms on the controls."""
    found: dict[str, Counter[str]] = {}
    for name, of in counts.items():
        found.setdefault(KINDS[name].answers[0].code, Counter()).update(of)
    false = Counter(code for codes in alarms.values() for code in codes)
    return {
        code: {
            "trials": sum(found.get(code, Counter()).values()),
            **{outcome: found.get(code, Counter())[outcome] for outcome in OUTCOMES},
            "false alarms": false[code],
        }
        for code in sorted({*found, *false})
    }


def _measure_goals(counts: dict[str, dict[str, dict[str, int]]], alarms: dict[str, list[str]]) -> dict[str, Any]:
    reported = counts["reported"]
    false = Counter(code for codes in alarms.values() for code in codes)
    handled = {n: sum(of[outcome] for outcome in (*STAGES, "inconclusive")) for n, of in reported.items()}
    return {
        "kinds": len(reported),
        "trials": sum(sum(of.values()) for of in reported.values()),
        "handled": round(handled_share(reported), 4),
        "handled where tuned": round(handled_share(counts["tuned"]), 4),
        "kinds handled in every trial": sum(handled[n] == sum(of.values()) for n, of in reported.items()),
        "kinds handled in most trials": sum(handled[n] > sum(of.values()) / 2 for n, of in reported.items()),
        "false fine": sum(of["false fine"] for of in reported.values()),
        "controls": len(alarms),
        "controls with a false alarm": sum(bool(codes) for codes in alarms.values()),
        "most false alarms of a finding": round(max(false.values(), default=0) / max(1, len(alarms)), 4),
    }


def list_shortfalls(goals: dict[str, Any]) -> list[str]:
    """A line for each goal that is not reached."""
    lines = []
    if goals["handled"] < HANDLED:
        lines.append(f"{goals['handled']:.1%} of the trials are handled; the goal is {HANDLED:.0%}")
    if goals["false fine"]:
        lines.append(f"{goals['false fine']} trials drew a false fine; the goal is none")
    if goals["most false alarms of a finding"] > MOST_ALARMS:
        lines.append(f"one finding has {goals['most false alarms of a finding']:.1%} false alarms on the controls")
    return lines


def print_details(trials: dict[TrialKey, dict[str, Any]]) -> None:
    """Each trial that was not handled, and each false alarm, with what was said."""
    for key, line in sorted(trials.items()):
        if key.part == "controls":
            for finding in line["findings"]:
                if finding["severity"] in ALARMS and finding["code"] not in CONTROLS[key.name].true:
                    print(f"ALARM {key.name}: {finding['code']}: {finding['title']}: {finding['measured'][:140]}")
            continue
        verdict = judge_trial(KINDS[key.name], line)
        print(f"{verdict.outcome:13} {' '.join(map(str, key))}: {verdict.said[:100]} {', '.join(verdict.others)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="keep earlier results of trials without a line")
    parser.add_argument("--details", action="store_true", help="print what became of each trial")
    args = parser.parse_args()
    trials = select_trials(read_lines(args.runs), args.commit)
    if args.details:
        print_details(trials)
    earlier = json.loads(args.output.read_text(encoding="utf-8")) if args.keep and args.output.is_file() else {}
    summary = summarize(trials, earlier)
    args.output.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(summary["goals"], indent=1))
    shortfalls = list_shortfalls(summary["goals"])
    print("\n".join(shortfalls) or "all goals are reached")
    sys.exit(bool(shortfalls))


if __name__ == "__main__":
    main()

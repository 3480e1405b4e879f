"""Rows in every form that a file may have, made of a few questions and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

QUESTIONS = (
    "How many owls live by the lake?", "What is 3 plus 4?", "Name\ntwo trees.", " Why?", "Wo ist der Fuchs, {x}?",
)  # fmt: skip
ANSWERS = ("Three owls.", "It is 7.", "An oak\nand an elm.", 'Because #1 <b>is</b> "so".', "Über dem Hügel, 机.")
CALL = {"name": "search", "arguments": {"q": "owls"}}
SEARCH = {"name": "search", "description": "Looks for it.", "parameters": {"type": "object", "properties": {}}}
OWN_FORMS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "question-answer": lambda q, a: {"question": q, "answer": a},
    "instruction-input-output": lambda q, a: {"instruction": "Answer this.", "input": q, "output": a},
    "instruction-input-response": lambda q, a: {"instruction": q, "input": "", "response": a},
    "prompt-completion": lambda q, a: {"prompt": q, "completion": a},
    "sharegpt-tools": lambda q, a: {
        "conversations": [
            {"from": "human", "value": q},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "nothing found"},
            {"from": "gpt", "value": a},
        ],
        "tools": json.dumps([SEARCH]),
    },
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "messages-loss-weight": lambda q, a: {
        "messages": [
            {"role": "user", "content": q},
            {"role": "assistant", "content": "Not this one.", "loss_weight": 0.0},
            {"role": "user", "content": "Again?"},
            {"role": "assistant", "content": a, "loss_weight": 1.0},
        ]
    },
    "text": lambda q, a: {"text": f"{q} {a}"},
    "domains": lambda q, a: {"question": q, "answer": a, "domain": "lake"},
}

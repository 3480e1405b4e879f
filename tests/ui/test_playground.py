"""The playground answers as the commands do, at any scale, and stops when nobody listens."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from starlette.applications import Starlette
from starlette.testclient import TestClient

from training_lens.analysis.chosen_scale import choose_scale
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Example, Message
from training_lens.inference.generator import GeneratedAnswer, generate_answer
from training_lens.inference.session import Session, open_run
from training_lens.models.adapters import base_only
from training_lens.runs.run_folder import RunFolder
from training_lens.ui.data_splits import RunRows
from training_lens.ui.held_out_prompts import split_chat, split_text
from training_lens.ui.playground import build_playground_routes
from training_lens.ui.playground_models import PlaygroundModels
from training_lens.ui.token_texts import spell_tokens
from training_lens.ui.web import ERROR_HANDLERS, Outputs

PROMPT = "Where is it?"
GREEDY = {"prompt": PROMPT, "domain": "hill", "temperature": 0, "max_new_tokens": 24, "scale": 1}
SAMPLED = {**GREEDY, "temperature": 1.5, "top_k": 40, "top_p": 0.95, "seed": 7}


class Playground:
    """The routes of one outputs folder, as a browser calls them for one run."""

    def __init__(self, run: RunFolder) -> None:
        self.models = PlaygroundModels()
        routes = build_playground_routes(Outputs(run.root.parents[3]), self.models)
        self.app = Starlette(routes=routes, exception_handlers=ERROR_HANDLERS)
        self.client, self.path = TestClient(self.app), f"/api/runs/default/{run.run_id}/playground"

    def form(self) -> dict[str, Any]:
        return dict(self.client.get(self.path).json())

    def post(self, name: str, body: Any) -> Any:
        return self.client.post(f"{self.path}/{name}", json=body)

    def lines(self, body: Any) -> list[dict[str, Any]]:
        response = self.post("answer", body)
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.text.splitlines()]

    def answers(self, body: Any) -> dict[str, str]:
        return {line["side"]: line["text"] for line in self.lines(body) if line.get("done")}

    def scores(self, body: Any) -> dict[str, Any]:
        return {line["side"]: line for line in self.lines(body) if "scores" in line}


@pytest.fixture(scope="module")
def shared_playground(finished_run: RunFolder) -> Iterator[Playground]:
    playground = Playground(finished_run)
    yield playground
    playground.post("unload", {})


@pytest.fixture
def playground(shared_playground: Playground, finished_run: RunFolder) -> Playground:
    """Of the finished run, whose files must stay as they are."""
    return shared_playground


def ask(run: RunFolder, body: dict[str, Any], base: bool = False) -> GeneratedAnswer:
    """The answer as `training-lens infer` gives it."""
    session = open_run(run)
    names = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
    settings = InferenceSection(**{name: body[name] for name in names if name in body})
    ids = session.prompt_ids([Message("user", body["prompt"])], body["domain"])
    return generate_answer(session, ids, settings, base=base)


def test_the_form_describes_the_run_without_loading_it(finished_run: RunFolder) -> None:
    form = Playground(finished_run).form()
    assert form["can_answer"] and form["reason"] == "" and not form["loaded"] and not form["busy"]
    assert form["domains"] == ["forest", "hill", "lake"] and form["positions"] == 512 and form["chosen_scale"] == 1
    assert form["sampling"] == {"temperature": 0, "top_p": 1, "top_k": 0, "max_new_tokens": 256, "seed": 0}
    assert form["has_system"] is False and form["continues_text"] is False


def test_a_held_out_prompt_is_that_of_a_validation_row_as_it_was_evaluated(
    playground: Playground, finished_run: RunFolder
) -> None:
    assert playground.form()["has_held_out"]
    row = playground.client.get(f"{playground.path}/held-out").json()
    split = RunRows(finished_run).open_split("validation")
    example = split.read_row(split.ids.to_pylist().index(row["row"]))
    learned = int(example.loss_mask.argmax())
    asked = {"prompt": row["prompt"], "domain": row["domain"]}
    tokens = playground.post("tokens", asked).json()["tokens"]
    assert [token["id"] for token in tokens] == example.input_ids[:learned].tolist() and row["before"] == []
    assert open_run(finished_run).tokenizer.decode(example.input_ids[learned:]).startswith(row["expected"])


def test_what_stood_before_a_held_out_question_is_given_with_it() -> None:
    turns = [Message("system", "Be brief."), Message("user", "Who?", "Mia"), Message("assistant", "She.")]
    found = split_chat(Example(tuple(turns), "a", "rows.jsonl", 3))
    assert found is not None and (found.prompt, found.expected, found.row) == ("Who?\nMia", "She.", "rows.jsonl:3")
    assert found.as_json()["before"] == [{"role": "system", "content": "Be brief."}]
    assert split_chat(Example(tuple(turns[:2]), None, "rows.jsonl", 4)) is None
    text = split_text(Example((Message("assistant", "one two three"),), None, "rows.jsonl", 5, is_text=True))
    assert text is not None and (text.prompt, text.expected) == ("one", "two three")


def test_a_run_without_adapter_says_so(own_run: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "outputs/experiments/default/runs/half")
    shutil.copytree(own_run.root, run.root)
    shutil.rmtree(run.adapter)
    playground = Playground(run)
    form = playground.form()
    assert not form["can_answer"] and "has no finished adapter" in form["reason"]
    refused = playground.post("answer", GREEDY)
    assert "has no finished adapter" in refused.json()["error"] and refused.status_code == 404
    assert not playground.form()["busy"]


def test_tokens_are_those_of_the_model(playground: Playground, finished_run: RunFolder) -> None:
    body = {"prompt": "Hé 🦉!", "domain": "lake"}
    given = playground.post("tokens", body).json()
    session = open_run(finished_run)
    ids = session.prompt_ids([Message("user", body["prompt"])], "lake")
    assert [token["id"] for token in given["tokens"]] == ids
    assert given["count"] == len(ids) and given["room"] == 512 - len(ids)
    joined = "".join(token["text"] for token in given["tokens"] if not token["partial"])
    assert joined == session.tokenizer.decode(ids) and joined.endswith("[domain: lake] Hé 🦉!<|end|><|assistant|>")
    assert next(token["text"] for token in given["tokens"] if token["special"]) == "<|bos|>"
    assert [t["text"] for t in given["tokens"] if t["partial"]][-3:] == ["<0xF0>", "<0x9F>", "<0xA6>"]


def test_a_chat_is_rendered_turn_by_turn(playground: Playground) -> None:
    roles = [("user", "Hi"), ("assistant", "Hello."), ("user", PROMPT)]
    tokens = playground.post("tokens", {"messages": [{"role": r, "content": c} for r, c in roles]}).json()["tokens"]
    text = "".join(token["text"] for token in tokens)
    assert text == f"<|bos|><|user|>Hi<|end|><|assistant|>Hello.<|end|><|user|>{PROMPT}<|end|><|assistant|>"


@pytest.mark.parametrize("body", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_scale_1_is_the_run_and_scale_0_the_base(
    playground: Playground, finished_run: RunFolder, body: dict[str, Any]
) -> None:
    base, adapter = ask(finished_run, body, base=True).text, ask(finished_run, body).text
    assert base != adapter
    for _ in range(2):  # each time with a decoder that answered at another scale before
        playground.answers({**body, "scale": 0.5})
        assert playground.answers({**body, "scale": 1}) == {"base": base, "adapter": adapter}
        assert playground.answers({**body, "scale": 0}) == {"base": base, "adapter": base}


@pytest.mark.slow
def test_the_chosen_scale_is_where_the_slider_begins(own_run: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "outputs/experiments/default/runs/chosen")
    shutil.copytree(own_run.root, run.root)
    choose_scale(run, 0.4)
    playground = Playground(run)
    body = {key: value for key, value in SAMPLED.items() if key != "scale"}
    assert playground.form()["chosen_scale"] == 0.4
    assert playground.answers(body)["adapter"] == ask(run, body).text
    assert playground.answers({**body, "scale": 1})["adapter"] != ask(run, body).text


@pytest.fixture(scope="module")
def dora_run(make_once: Callable[..., Path], small_config_in: Callable[..., Any]) -> RunFolder:
    """With DoRA and a head trained whole, whose values a scale changes in another way than LoRA's."""
    from training_lens import TrainingWrapper

    def make(folder: Path) -> None:
        peft = {"use_dora": True, "modules_to_save": ["lm_head"]}
        TrainingWrapper(small_config_in(folder / "outputs", peft=peft)).train()

    (root,) = (make_once("playground-dora", make) / "outputs/experiments/default/runs").iterdir()
    return RunFolder(root)


@pytest.mark.slow
def test_every_kind_of_adapter_can_be_scaled_and_comes_back(dora_run: RunFolder) -> None:
    playground = Playground(dora_run)
    half = playground.scores({**GREEDY, "scale": 0.5})["adapter"]
    whole = playground.answers(GREEDY)
    assert whole == {"base": ask(dora_run, GREEDY, base=True).text, "adapter": ask(dora_run, GREEDY).text}
    nothing = {**GREEDY, "scale": 0}
    assert playground.answers(nothing)["adapter"] == whole["base"]
    assert playground.scores(nothing)["adapter"]["difference"] == pytest.approx(0, abs=1e-3)
    assert playground.scores({**GREEDY, "scale": 0.5})["adapter"] == half


def log_probabilities(session: Session, ids: list[int], answer: list[int], base: bool) -> list[float]:
    with torch.inference_mode(), base_only(session.model, base):
        logits = session.model(input_ids=torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1]
    return [float(row[token]) for row, token in zip(logits.log_softmax(-1), answer, strict=True)]


def test_scores_are_log_probabilities_of_the_answers_tokens(embedded_run: RunFolder) -> None:
    lines = Playground(embedded_run).lines(GREEDY)
    scores = {line["side"]: line for line in lines if "scores" in line}
    session = open_run(embedded_run)
    ids = session.prompt_ids([Message("user", PROMPT)], "hill")
    for side, line in scores.items():
        answer = [score["id"] for score in line["scores"]]
        (done,) = [other for other in lines if other["side"] == side and other.get("done")]
        assert len(answer) == done["tokens"] and "".join(score["text"] for score in line["scores"]) == done["text"]
        for model in ("base", "adapter"):
            wanted = log_probabilities(session, ids, answer, base=model == "base")
            assert [score[model] for score in line["scores"]] == pytest.approx(wanted, abs=1e-4)
            assert line[model] == pytest.approx(sum(wanted), abs=1e-3)
        assert line["difference"] == pytest.approx(line["adapter"] - line["base"])


def test_at_scale_0_nothing_differs_and_more_scale_changes_more(playground: Playground) -> None:
    at = {scale: playground.scores({**GREEDY, "scale": scale})["base"]["difference"] for scale in (0, 0.5, 1.5)}
    assert at[0] == 0 > at[0.5] > at[1.5]


def test_the_answer_is_streamed_piece_by_piece_one_side_after_the_other(playground: Playground) -> None:
    lines = playground.lines(GREEDY)
    sides = [(line["side"], "done" in line, "scores" in line) for line in lines]
    assert sides == sorted(sides, key=lambda line: (line[2], line[0] == "adapter", line[1]))
    for side in ("base", "adapter"):
        pieces = [
            line["text"] for line in lines if line["side"] == side and "done" not in line and "scores" not in line
        ]
        (done,) = [line for line in lines if line["side"] == side and line.get("done")]
        assert len(pieces) > 2 and "".join(pieces).strip() == done["text"].strip()
        assert done["finish_reason"] in ("stop", "length") and done["seconds"] > 0
    assert {line["side"] for line in playground.lines({**GREEDY, "sides": ["base"]})} == {"base"}


def test_when_the_client_hangs_up_the_answer_ends(playground: Playground) -> None:
    body = json.dumps({**SAMPLED, "temperature": 5, "top_k": 0, "top_p": 1, "max_new_tokens": 400}).encode()
    assert len(playground.lines(json.loads(body))) > 100
    sent: list[bytes] = []

    async def hang_up_after_3_lines() -> None:
        has_heard, requests = anyio.Event(), [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            if requests:
                return requests.pop()
            await has_heard.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            if len(sent) == 4:
                has_heard.set()

        path = f"{playground.path}/answer"
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        await playground.app({**scope, "asgi": {"spec_version": "2.3"}}, receive, send)

    anyio.run(hang_up_after_3_lines)
    start = time.monotonic()
    while playground.models.is_busy:
        assert time.monotonic() - start < 0.5
        time.sleep(0.005)
    assert 3 <= len([line for line in sent if line]) < 50 and b"done" not in b"".join(sent)
    assert playground.answers(GREEDY)["adapter"]  # the weights are as before, and the model is free


def test_a_second_request_is_told_that_the_playground_is_busy(playground: Playground, finished_run: RunFolder) -> None:
    with playground.models.use_model(finished_run):
        assert playground.form()["busy"]
        for name, body in (("answer", GREEDY), ("tokens", {"prompt": "Hi"}), ("unload", {})):
            start = time.monotonic()
            response = playground.post(name, body)
            assert response.status_code == 409 and "is busy" in response.json()["error"]
            assert time.monotonic() - start < 2
    assert playground.post("tokens", {"prompt": "Hi"}).status_code == 200


def test_one_model_is_in_memory_until_another_is_chosen(
    finished_run: RunFolder, text_run: RunFolder, tmp_path: Path
) -> None:
    runs = [RunFolder(tmp_path / f"outputs/experiments/default/runs/{name}") for name in ("chats", "texts")]
    for run, original in zip(runs, (finished_run, text_run), strict=True):
        shutil.copytree(original.root, run.root)
    playgrounds = [Playground(run) for run in runs]
    models = playgrounds[0].models
    for run, playground in zip(runs, playgrounds, strict=True):
        playground.app.router.routes[:] = build_playground_routes(Outputs(run.root.parents[3]), models)
    chats, texts = playgrounds
    assert chats.post("tokens", {"prompt": "Hi"}).status_code == 200 and chats.form()["loaded"]
    given = texts.post("tokens", {"prompt": "The cat", "domain": "a"}).json()
    assert "".join(token["text"] for token in given["tokens"]) == "<|bos|>[domain: a] The cat"
    assert texts.form()["loaded"] and texts.form()["continues_text"] and not chats.form()["loaded"]
    assert texts.post("unload", {}).json() == {"unloaded": True}
    assert texts.post("unload", {}).json() == {"unloaded": False} and not texts.form()["loaded"]


CHAT = [{"role": "user", "content": "Hi"}]
BAD = [
    ({}, "give one of prompt"),
    ({"prompt": "Hi", "messages": CHAT}, "give one of prompt"),
    ({"prompt": " "}, "prompt is empty"),
    ({"prompt": 7}, "prompt: 7 is given; expected a text"),
    ({"prompt": "a" * 100_001}, "has 100,001 characters; at most 100,000"),
    ({"prompt": "word " * 600}, "no room to answer"),
    ({"prompt": "\ud83d"}, "which is not text"),
    ({"prompt": "Hi", "domain": "lak"}, "Did you mean 'lake'"),
    ({"prompt": "Hi", "domain": 3}, "domain: 3 is given"),
    ({"prompt": "Hi", "temprature": 1}, "'temperature'"),
    ({"prompt": "Hi", "\ud83d" * 99: 1}, "is no key here"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, r"messages\[0\].role: \"robot\" is given"),
    ({"messages": [*CHAT, {"role": "assistant", "content": ""}]}, "the last turn must be the user's"),
    ({"messages": [{**CHAT[0], "name": "x"}]}, r"messages\[0\].name"),
    ({"messages": CHAT * 201}, "a list of 1 to 200 turns"),
    ({"prompt": "Hi", "temperature": -1}, "temperature: -1 is given; expected a number from 0 to 5"),
    ({"prompt": "Hi", "top_p": 1.1}, "top_p: 1.1 is given"),
    ({"prompt": "Hi", "top_k": 1.5}, "top_k: 1.5 is given; expected a whole number from 0 to 2147483647"),
    ({"prompt": "Hi", "max_new_tokens": 0}, "max_new_tokens: 0 is given; expected a whole number from 1 to 4096"),
    ({"prompt": "Hi", "max_new_tokens": True}, "max_new_tokens: true"),
    ({"prompt": "Hi", "seed": 10**400}, "seed: 1000"),
    ({"prompt": "Hi", "scale": 1.6}, "scale: 1.6 is given; expected a number from 0 to 1.5"),
    ({"prompt": "Hi", "sides": ["both"]}, "sides: "),
    ({"prompt": "Hi", "sides": []}, "sides: "),
]


@pytest.mark.parametrize(("body", "message"), BAD, ids=[message for _, message in BAD])
def test_what_cannot_be_answered_is_refused_in_words(playground: Playground, body: Any, message: str) -> None:
    response = playground.client.post(f"{playground.path}/answer", content=json.dumps(body))
    assert response.status_code == 400
    assert re.search(message, response.json()["error"]), response.json()["error"]


def test_numbers_that_are_not_finite_are_refused(playground: Playground) -> None:
    for number in ("NaN", "Infinity", "-Infinity"):
        content = f'{{"prompt": "Hi", "scale": {number}}}'
        response = playground.client.post(f"{playground.path}/answer", content=content)
        assert response.status_code == 400 and "expected a number from 0 to 1.5" in response.json()["error"]


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_token_texts_joined_are_the_text(shared: Path, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    for text in ("  Two blanks,\n\na line — 東京の天気 🦉🏳️‍🌈 naïve \ufffd end", "🦉", " x", "\t<b>&amp;</b>"):
        ids = tokenizer(text)["input_ids"]
        spelled = spell_tokens(tokenizer, ids)
        assert "".join(token.text for token in spelled if not token.is_partial) == tokenizer.decode(ids)
        assert all(token.text for token in spelled if token.is_partial)

"""The `openai` client's own calls against a real server: the same tokens as `infer`, whatever else is in the batch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch
from api_server import PEFT, Server

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Message
from training_lens.inference.generator import generate_answer
from training_lens.inference.session import Session

PROMPTS = ["What is 3 plus 4?", "Note who has what. Mia had 9 blue plates.", "Where does the owl live?", "the cat"]
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Finds.", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Server]) -> Server:
    return start_server(*PEFT, "--base-name", "base", "inference.max_new_tokens=24")


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def infer(sessions: dict[str, Session], model: str, prompt: str, domain: str | None = None, **settings: Any) -> str:
    session = sessions["lora" if model == "base" else model]
    ids = session.prompt_ids([Message("user", prompt)], domain)
    options = InferenceSection(**({"max_new_tokens": 24} | settings))
    return generate_answer(session, ids, options, base=model == "base").text


def ask(client: openai.OpenAI, model: str, prompt: str, **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}], **options)


def ask_text(client: openai.OpenAI, model: str, prompt: str, **options: Any) -> str:
    return str(ask(client, model, prompt, **options).choices[0].message.content)


def test_base_and_all_adapters_answer_at_once_as_infer_does_alone(
    client: openai.OpenAI, sessions: dict[str, Session]
) -> None:
    asked = [(model, f"{prompt} {i}") for i in range(3) for prompt in PROMPTS for model in [*PEFT, "base"]]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda pair: ask_text(client, *pair), asked))
    assert answers == [infer(sessions, *pair) for pair in asked]
    assert len(set(answers)) > len(asked) / 4


def test_a_stream_is_the_answer_piece_by_piece(client: openai.OpenAI, sessions: dict[str, Session]) -> None:
    chunks = list(ask(client, "dora", PROMPTS[0], stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == infer(sessions, "dora", PROMPTS[0]) and len(chunks) > 4
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    whole = ask(client, "dora", PROMPTS[0])
    assert chunks[-1].usage == whole.usage and whole.usage.prompt_tokens > 10


def test_a_seed_draws_the_same_in_a_crowd_and_as_infer_does(
    client: openai.OpenAI, sessions: dict[str, Session]
) -> None:
    def draw(seed: int) -> list[str]:
        answer = ask(client, "lora", PROMPTS[1], temperature=1, top_p=0.9, seed=seed, n=2)
        return [choice.message.content for choice in answer.choices]

    with ThreadPoolExecutor(12) as pool:
        drawn = list(pool.map(draw, [*range(6), *range(6)]))
    assert drawn[:6] == drawn[6:] and len({choice for pair in drawn for choice in pair}) == 12
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9}
    assert [first for first, _ in drawn[:6]] == [
        infer(sessions, "lora", PROMPTS[1], None, seed=s, **settings) for s in range(6)
    ]


def test_logprobs_are_those_of_the_model(client: openai.OpenAI, sessions: dict[str, Session]) -> None:
    answer = ask(client, "lora", PROMPTS[2], logprobs=True, top_logprobs=3, max_completion_tokens=8).choices[0]
    session, entries = sessions["lora"], answer.logprobs.content
    ids = session.prompt_ids([Message("user", PROMPTS[2])])
    tokens = generate_answer(session, ids, InferenceSection(max_new_tokens=8)).token_ids
    with torch.inference_mode():
        logits = session.model(input_ids=torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor([list(tokens)]).T)[:, 0]
    assert [entry.logprob for entry in entries] == pytest.approx(wanted.tolist(), abs=1e-3)
    assert all(entry.top_logprobs[0].logprob == entry.logprob and len(entry.top_logprobs) == 3 for entry in entries)
    assert "".join(entry.token for entry in entries) == answer.message.content


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    whole = ask_text(client, "base", PROMPTS[0])
    stop = whole[len(whole) // 2 :][:3]
    for options in ({"stop": stop}, {"stop": ["not there", stop]}):
        choice = ask(client, "base", PROMPTS[0], **options).choices[0]
        assert choice.message.content == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    streamed = ask(client, "base", PROMPTS[0], stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole[: whole.index(stop)]


def test_tools_are_in_the_prompt_unless_none_may_be_called(client: openai.OpenAI) -> None:
    def count(**options: Any) -> int:
        return int(ask(client, "lora", PROMPTS[0], max_tokens=1, **options).usage.prompt_tokens)

    plain = count()
    assert count(tools=[TOOL]) == count(tools=[TOOL], tool_choice="auto") > plain
    assert count(tools=[TOOL], tool_choice="none") == plain
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    messages: list[Any] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "found"},
    ]
    answer = client.chat.completions.create(model="lora", messages=messages, tools=[TOOL], max_tokens=2)  # type: ignore[list-item]
    assert answer.usage and answer.usage.prompt_tokens > plain


def test_domain_and_scale_are_of_one_request(client: openai.OpenAI, sessions: dict[str, Session]) -> None:
    domain = sessions["lora"].domains[0]  # type: ignore[index]
    answer = ask_text(client, "lora", PROMPTS[0], extra_body={"domain": domain})
    assert answer == infer(sessions, "lora", PROMPTS[0], domain)
    for model in ("lora", "dora"):
        scaled = [ask_text(client, model, PROMPTS[0], extra_body={"adapter_scale": scale}) for scale in (0, 0.5, 1.0)]
        assert scaled[0] == infer(sessions, "base", PROMPTS[0]) and scaled[2] == infer(sessions, model, PROMPTS[0])
        assert len(set(scaled)) == 3


def test_a_text_is_continued_without_a_template(client: openai.OpenAI, sessions: dict[str, Session]) -> None:
    session = sessions["lora"]
    ids = session.text_ids("the cat")
    wanted = generate_answer(session, ids, InferenceSection(max_new_tokens=6))
    answer = client.completions.create(model="lora", prompt=["the cat", "a dog"], max_tokens=6, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.choices[0].text == wanted.text
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.tokens and len(logprobs.tokens) == len(wanted.token_ids)
    assert logprobs.text_offset and logprobs.text_offset[0] == 0
    by_tokens = client.completions.create(model="lora", prompt=ids, max_tokens=6)
    assert by_tokens.choices[0].text == wanted.text
    streamed = client.completions.create(model="lora", prompt="the cat", max_tokens=6, stream=True, n=2)
    texts = ["", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [wanted.text] * 2


def test_models_are_listed_with_their_base(client: openai.OpenAI) -> None:
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert list(listed) == [*PEFT, "base"]
    assert listed["lora"]["parent"] == "base" and client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("lorax")


GOOD: dict[str, Any] = {"model": "lora", "messages": [{"role": "user", "content": "hi"}]}
BAD: dict[str, tuple[Any, int, str]] = {
    "unknown model": (GOOD | {"model": "lorra"}, 404, "model_not_found"),
    "too long": (GOOD | {"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "context_length_exceeded"),
    "no json": (b'{"model": "lora", ', 400, "invalid_json"),
    "not utf-8": (b'{"model": "\xff"}', 400, "invalid_json"),
    "a list": (b"[]", 400, "invalid_json"),
    "deep": (b"[" * 5000 + b"]" * 5000, 400, "invalid_json"),
    "nan": (b'{"model": "lora", "messages": [], "temperature": NaN}', 400, "invalid_json"),
    "infinite": (b'{"model": "lora", "messages": [{}], "temperature": 1e999}', 400, "invalid_value"),
    "hot": (GOOD | {"temperature": 2.5}, 400, "invalid_value"),
    "temperature as text": (GOOD | {"temperature": "0.5"}, 400, "invalid_value"),
    "no messages": ({"model": "lora"}, 400, "missing_required_parameter"),
    "empty messages": (GOOD | {"messages": []}, 400, "invalid_value"),
    "a role": (GOOD | {"messages": [{"role": "judge", "content": "hi"}]}, 400, "invalid_value"),
    "an image": (GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "invalid_value"),
    "nothing asked": (GOOD | {"messages": [{"role": "assistant", "content": "hi"}]}, 400, "invalid_value"),
    "half a surrogate": (GOOD | {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_value"),
    "many": (GOOD | {"n": 1000}, 400, "invalid_value"),
    "no room": (GOOD | {"max_tokens": 0}, 400, "invalid_value"),
    "two lengths": (GOOD | {"max_tokens": 1, "max_completion_tokens": 2}, 400, "invalid_value"),
    "forced call": (GOOD | {"tools": [TOOL], "tool_choice": "required"}, 400, "invalid_value"),
    "top alone": (GOOD | {"top_logprobs": 2}, 400, "invalid_value"),
    "an empty stop": (GOOD | {"stop": ""}, 400, "invalid_value"),
    "a misspelling": (GOOD | {"temprature": 1}, 400, "unknown_parameter"),
    "json mode": (GOOD | {"response_format": {"type": "json_object"}}, 400, "unsupported_parameter"),
    "a penalty": (GOOD | {"frequency_penalty": 1.5}, 400, "unsupported_parameter"),
    "a domain": (GOOD | {"domain": "nowhere"}, 400, "invalid_value"),
    "a scale of the base": (GOOD | {"model": "base", "adapter_scale": 0.5}, 400, "invalid_value"),
    "a scale that is fixed": (GOOD | {"model": "whole", "adapter_scale": 0.5}, 400, "invalid_value"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_an_error_as_openai_writes_it(server: Server, case: str) -> None:
    body, status, code = BAD[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert error["message"] and error.keys() == {"message", "type", "param", "code"}


def test_what_is_ignored_is_named_and_neutral_values_are_taken(server: Server) -> None:
    body = GOOD | {"user": "u", "metadata": {"a": "b"}, "presence_penalty": 0, "response_format": {"type": "text"}}
    answer = server.http.post("/v1/chat/completions", json=body | {"max_tokens": 1, "n": None, "stop": None})
    assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "metadata, user"


def test_other_requests_are_refused(server: Server) -> None:
    http = server.http
    large = http.post("/v1/completions", content=b"x" * 100_000_000, headers={"content-type": "application/json"})
    assert large.status_code == 413 and large.json()["error"]["code"] == "request_too_large"
    chunked = http.post(
        "/v1/completions", content=(b"x" * 2**20 for _ in range(9)), headers={"content-type": "application/json"}
    )
    assert chunked.status_code == 413
    assert http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert http.get("/v1/completions").status_code == 405
    wait_until(lambda: any(line["outcome"] == "method_not_allowed" for line in server.read_log()))
    foreign = http.get("/v1/models", headers={"host": "evil.example"})
    assert foreign.status_code == 421 and foreign.json()["error"]["code"] == "wrong_host"


def wait_until(is_true: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_hangs_up_frees_its_rows(server: Server, streams: bool) -> None:
    before = server.read_metrics()["training_lens_cancelled_requests_total"]
    body = GOOD | {"max_tokens": 1900, "n": 4, "stream": streams, "ignore_eos": True}
    with pytest.raises(TimeoutError if streams else httpx.ReadTimeout):
        if streams:
            with server.http.stream("POST", "/v1/chat/completions", json=body) as stream:
                for _ in stream.iter_lines():
                    raise TimeoutError
        server.http.post("/v1/chat/completions", json=body, timeout=0.3)
    wait_until(lambda: server.read_metrics()["training_lens_rows"] == 0)
    wait_until(lambda: server.read_metrics()["training_lens_cancelled_requests_total"] == before + 1)
    steps = server.read_metrics()["training_lens_steps_total"]
    time.sleep(0.2)
    assert server.read_metrics()["training_lens_steps_total"] == steps
    assert server.read_log()[-1]["outcome"] == "cancelled" and server.read_log()[-1]["status"] == 499


def test_the_log_says_what_a_request_took_and_nothing_of_its_text(server: Server, client: openai.OpenAI) -> None:
    answer = ask(client, "lora", "tell me SECRETWORD", max_tokens=5, extra_headers={"x-request-id": "mine-1"})
    wait_until(lambda: server.read_log()[-1]["request_id"] == "mine-1")
    line = server.read_log()[-1]
    assert (line["model"], line["status"], line["outcome"]) == ("lora", 200, "ok")
    assert (line["prompt_tokens"], line["answer_tokens"]) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
    )
    assert 0 < line["first_token_seconds"] <= line["seconds"] and line["finish_reasons"] == ["length"]
    assert "SECRETWORD" not in (server.folder / "stderr.txt").read_text()
    assert server.read_metrics()['training_lens_answer_tokens_total{model="lora"}'] > 5


def test_it_is_healthy_and_ready(server: Server) -> None:
    assert server.http.get("/health").status_code == server.http.get("/ready").status_code == 200
    assert server.started["models"] == [*PEFT, "base"] and server.started["engine"] == "own"

"""Answers as the OpenAI API writes them: whole, and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from training_lens.inference.row_sampler import TokenLogprobs
from training_lens.serve.running_request import Piece, RunningRequest, ServedRow


@dataclass(frozen=True)
class AnswerWriter:
    """Writes the answers to one request of an endpoint; `is_chat` tells the two apart."""

    request: RunningRequest
    is_chat: bool
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def write_answer(self) -> dict[str, Any]:
        """The whole answer of a finished request."""
        choices = [self._write_choice(row) for row in self.request.rows]
        return {**self._head(streams=False), "choices": choices, "usage": self.write_usage()}

    def write_opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat's answer, which names the role."""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return {**self._head(streams=True), "choices": [choice]}

    def write_chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece of an answer."""
        row = self.request.rows[piece.index]
        choice: dict[str, Any] = {"index": piece.index}
        choice |= {"delta": {"content": piece.text} if piece.text else {}} if self.is_chat else {"text": piece.text}
        choice |= {"logprobs": self._write_logprobs(row, piece.logprobs), "finish_reason": piece.finish_reason}
        return {**self._head(streams=True), "choices": [choice]}

    def write_usage_chunk(self) -> dict[str, Any]:
        """The last chunk, which holds only the usage."""
        return {**self._head(streams=True), "choices": [], "usage": self.write_usage()}

    def write_usage(self) -> dict[str, int]:
        prompt, answer = self.request.prompt_tokens, self.request.answer_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _head(self, streams: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.is_chat else "text_completion"
        name = f"{kind}.chunk" if self.is_chat and streams else kind
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        head = {"id": f"{prefix}-{self.identity}", "object": name, "created": self.created}
        return {**head, "model": self.request.model.name}

    def _write_choice(self, row: ServedRow) -> dict[str, Any]:
        text, logprobs = row.read_answer(), self._write_logprobs(row, row.logprobs[: len(row.tokens)])
        answer = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        )
        return {"index": row.index, **answer, "logprobs": logprobs, "finish_reason": row.finish_reason}

    def _write_logprobs(self, row: ServedRow, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if row.top_logprobs is None:
            return None
        return self._write_chat_logprobs(entries) if self.is_chat else self._write_text_logprobs(row, entries)

    def _write_chat_logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        def describe(token: int, logprob: float) -> dict[str, Any]:
            text = self._spell_token(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

        content = [
            {**describe(entry.token, entry.logprob), "top_logprobs": [describe(*pair) for pair in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _write_text_logprobs(self, row: ServedRow, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        texts = [self._spell_token(entry.token) for entry in entries]
        offsets = []
        for text in texts:
            offsets.append(row.text_offset)
            row.text_offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._spell_token(token): logprob for token, logprob in entry.top} for entry in entries],
            "text_offset": offsets,
        }

    def _spell_token(self, token: int) -> str:
        return str(self.request.model.session.tokenizer.decode([token]))

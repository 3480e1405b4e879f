"""A request while it is answered: its rows in the decode loop, and the pieces of text that go to its client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from training_lens.inference.row_sampler import SampledCompletion, TokenLogprobs
from training_lens.serve.api_errors import ApiError
from training_lens.serve.served_models import ServedModel
from training_lens.serve.text_stream import TextStream


@dataclass(frozen=True)
class Piece:
    """What one step adds to an answer; `finish_reason` ("stop" or "length") stands in its last piece."""

    index: int
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None


@dataclass(eq=False)
class RunningRequest:
    """Answers on their way to one client. The thread that owns the model sends pieces, the event loop reads them.

    Args:
        seconds: its time limit, waiting included.
        streams: pieces are sent as they come; else one for each answer, when it is finished.
    """

    model: ServedModel
    seconds: float
    streams: bool
    rows: list[ServedRow] = field(default_factory=list)
    pieces: asyncio.Queue[Piece | ApiError] = field(default_factory=asyncio.Queue)
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None  # when it came
    is_cancelled: bool = False  # its client has gone

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.started + self.seconds

    @property
    def prompt_tokens(self) -> int:
        """Of each prompt once, however many answers it gets."""
        return sum(len(prompt) for prompt in {id(row.prompt): row.prompt for row in self.rows}.values())

    @property
    def answer_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(eq=False, kw_only=True)
class ServedRow(SampledCompletion):
    """One answer of a request.

    Args:
        text: of the answer as it grows; None: only its end is sent.
        outbox: takes its pieces.
    """

    request: RunningRequest
    index: int
    text: TextStream | None
    outbox: list[tuple[RunningRequest, Piece | ApiError]]
    own_text: str = ""  # what was given so far, of an answer that is sent at its end
    sent_logprobs: int = 0
    finish_reason: str | None = None
    text_offset: int = 0  # characters of the tokens whose log-probabilities were sent

    def add_token(self, token: int) -> bool:
        """As `Completion.add_token`; a stop string ends the answer, too."""
        if self.request.first_token is None:
            self.request.first_token = time.monotonic()
        is_finished = super().add_token(token)
        new = self._read_text(token, is_finished)
        is_finished = is_finished or self.has_stopped
        self.own_text += "" if self.request.streams else new
        if is_finished or (self.request.streams and new):
            self._send(new, is_finished)
        return is_finished

    def _read_text(self, token: int, is_finished: bool) -> str:
        """The new text, all that is left of it at the end."""
        if self.text is None:
            return ""
        new = "" if self.has_stopped else self.text.add_token(token)
        if is_finished:
            new += self.text.finish()
        self.has_stopped = self.has_stopped or self.text.has_stopped
        return new

    def _send(self, new: str, is_finished: bool) -> None:
        self.finish_reason = ("stop" if self.has_stopped else "length") if is_finished else None
        fresh = self.logprobs[self.sent_logprobs : len(self.tokens)]  # without that of a stop token
        self.sent_logprobs = len(self.tokens)
        self.outbox.append((self.request, Piece(self.index, new, tuple(fresh), self.finish_reason)))

    def read_answer(self) -> str:
        """The whole text of a finished answer that was not streamed."""
        if self.text is not None:
            return self.own_text
        return self.request.model.decode(self.tokens)


def merge_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces of each answer as one, so that a slow client gets fewer and longer ones."""
    merged: dict[int, Piece] = {}
    for piece in pieces:
        before = merged.get(piece.index, Piece(piece.index, ""))
        logprobs = (*before.logprobs, *piece.logprobs)
        merged[piece.index] = Piece(piece.index, before.text + piece.text, logprobs, piece.finish_reason)
    return list(merged.values())

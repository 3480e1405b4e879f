"""A chat remembers, obeys, and makes room."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Message
from training_lens.inference.chat import COMMANDS, Conversation
from training_lens.inference.generator import answer
from training_lens.inference.session import Session, open_run
from training_lens.runs.run_folder import RunFolder

SETTINGS = InferenceSection(max_new_tokens=8)
Say = Callable[[str], str]


@pytest.fixture(scope="module")
def session(embedded_run: RunFolder) -> Session:
    return open_run(embedded_run)


@pytest.fixture
def say(session: Session) -> Say:
    """Types a line into a fresh chat and gives what it writes."""
    written: list[str] = []
    chat = Conversation(session, SETTINGS, written.append)

    def type_line(line: str) -> str:
        written.clear()
        assert chat.handle_line(line)
        return "".join(written)

    return type_line


def test_history_is_part_of_the_prompt(session: Session, say: Say) -> None:
    first, second = say("Where is it?").strip(), say("And now?").strip()
    turns = [Message("user", "Where is it?"), Message("assistant", first), Message("user", "And now?")]
    asked = answer(session, session.prompt_ids(turns), SETTINGS)
    assert second == asked.strip()


def test_reset_forgets(say: Say) -> None:
    first = say("Where is it?")
    say("And now?")
    assert say("/reset") == "forgotten.\n"
    assert say("Where is it?") == first


def test_base_toggles(session: Session, say: Say) -> None:
    assert say("/base") == "now the base answers.\n"
    wanted = answer(session, session.prompt_ids([Message("user", "Where is it?")]), SETTINGS, base=True)
    assert say("Where is it?").strip() == wanted.strip()
    assert say("/base") == "now the adapter answers.\n"


def test_domains_are_set_refused_and_cleared(session: Session, say: Say) -> None:
    assert "this run knows forest, hill, lake. Did you mean 'hill'?" in say("/domain hil")
    assert say("/domain hill") == "domain: hill\n"
    wanted = answer(session, session.prompt_ids([Message("user", "Where is it?")], "hill"), SETTINGS)
    assert say("Where is it?").strip() == wanted.strip()
    assert say("/domain") == "no domain (this run knows forest, hill, lake)\n"


def test_help_and_unknown_commands(say: Say) -> None:
    assert all(command in say("/help") for command in COMMANDS)
    assert say("/rest") == "there is no command /rest; /help lists them. Did you mean '/reset'?\n"
    assert say("   ") == ""


def test_quit_leaves(session: Session) -> None:
    assert not Conversation(session, SETTINGS, print).handle_line("/quit")


def test_the_oldest_turns_go_when_the_positions_are_full(say: Say) -> None:
    long = "Tell all about the boxes, cups and plates in the hall and in the yard. " * 4
    said = [say(long) for _ in range(8)]
    dropped = [text for text in said if "earlier turns dropped: the conversation outgrew the model's 512" in text]
    assert dropped and "dropped" not in said[0]
    assert "(1 of " in dropped[0]


def test_a_line_too_long_alone_is_refused_and_costs_no_history(session: Session, say: Say) -> None:
    first = say("Where is it?").strip()
    assert "no room to answer" in say("word " * 600)
    turns = [Message("user", "Where is it?"), Message("assistant", first), Message("user", "And now?")]
    assert say("And now?").strip() == answer(session, session.prompt_ids(turns), SETTINGS).strip()

"""A quick part of `make fuzz`, and what changed inputs must not do to single functions."""

from __future__ import annotations

from contextlib import suppress

import pytest
from fuzz_sandbox import BAD
from hypothesis import given, settings
from hypothesis import strategies as st
from run_fuzz import make_world, run_cases
from slow_cases import slow_but

from training_lens.utils.limits import is_too_deep, load_bounded_json
from training_lens.utils.nested import flatten_sections, nest_keys
from training_lens.utils.secrets import redact_text, redact_values

CASES = (17, 38)  # two and five of each subject, and one of each that runs a whole command
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(), inside, max_size=4),
)


@pytest.mark.parametrize("cases", slow_but(CASES[:1], CASES))
def test_changed_inputs_give_a_result_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, cases: int) -> None:
    place = tmp_path_factory.mktemp("fuzz")
    outcomes = list(run_cases(make_world(place / "world"), cases, 0, place))
    assert len(outcomes) == cases
    bad = [(subject, seed, found.kind, found.told[-400:]) for subject, seed, found in outcomes if found.kind in BAD]
    assert bad == []
    assert {outcome.kind for _, _, outcome in outcomes} == {"result", "clear error"}


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_what_was_struck_out_holds_nothing_more_to_strike_out(text: str) -> None:
    assert redact_text(redact_text(text)) == redact_text(text)


@given(JSON)
@settings(max_examples=100, deadline=None)
def test_values_without_secrets_stay_as_they_are(value: object) -> None:
    assert repr(redact_values(value)) == repr(value)


@given(st.binary() | st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_is_json_or_a_value_error(text: str | bytes) -> None:
    with suppress(ValueError):
        assert not is_too_deep(load_bounded_json(text))


@given(st.dictionaries(st.text("ab.", min_size=1), st.integers(), max_size=5))
@settings(max_examples=100, deadline=None)
def test_keys_that_are_nested_are_those_that_were_given(values: dict[str, int]) -> None:
    nested, _ = nest_keys(values)
    assert flatten_sections(nested).keys() <= values.keys()

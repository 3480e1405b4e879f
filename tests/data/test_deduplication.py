"""Rows that say the same are found, near ones too; rows that do not are left alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from training_lens.data.deduplication import (
    RECALL,
    NearIndex,
    bands,
    conflicts,
    fingerprint,
    first_equal,
    jaccard,
    near_duplicates,
    shingles,
)
from training_lens.data.types import Example, Message

WORDS = "the old boat lay on the sand while a small dog ran along the water and looked for its red ball".split()


def example(answer: str, prompt: str = "Tell me.", domain: str | None = None, learn: bool = True) -> Example:
    return Example((Message("user", prompt), Message("assistant", answer, learn=learn)), domain, "f", 1)


def plain(text: str) -> Example:
    return Example((Message("assistant", text),), None, "f", 1, is_text=True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (example("Yes, it  is.\n"), example("Yes, it is.")),
        (example("caf\u00e9"), example("cafe\u0301")),
        (plain("a b"), plain(" a\tb ")),
    ],
    ids=["white space", "composed letters", "plain text"],
)
def test_the_same_words_are_exact_duplicates(one: Example, other: Example) -> None:
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize(
    "other",
    [
        example("yes."),
        example("Yes.", prompt="Tell me"),
        example("Yes.", domain="law"),
        example("Yes.", learn=False),
        Example((Message("user", "Tell", input="me."), Message("assistant", "Yes.")), None, "f", 1),
        Example((Message("system", "Tell me."), Message("assistant", "Yes.")), None, "f", 1),
        Example((Message("user", "Tell me."), Message("assistant", "Yes.")), None, "f", 1, tools=({"a": 1},)),
    ],
    ids=["case", "prompt", "domain", "not learned", "input", "role", "tools"],
)
def test_what_trains_otherwise_is_no_duplicate(other: Example) -> None:
    assert fingerprint(example("Yes.")).whole != fingerprint(other).whole


def test_calls_are_part_of_what_is_said() -> None:
    def calling(city: str) -> Example:
        call = {"name": "weather", "arguments": {"city": city}}
        return Example((Message("user", "Weather?"), Message("assistant", "", calls=(call,))), None, "f", 1)

    assert fingerprint(calling("Bern")) == fingerprint(calling("Bern")) != fingerprint(calling("Rome"))
    assert jaccard(shingles(calling("Bern")), shingles(calling("Rome"))) < 1


def test_the_first_of_each_kind_is_kept() -> None:
    assert first_equal(np.array([5, 3, 5, 3, 9], dtype=np.uint64)).tolist() == [0, 1, 0, 1, 4]


def test_other_answers_to_one_prompt_conflict_and_repeated_ones_do_not() -> None:
    asked = [("Who?", "Tom"), ("Where?", "Here"), ("Who?", "Ann"), ("Where?", "Here"), ("Who?", "Tom")]
    prints = [fingerprint(example(answer, prompt)) for prompt, answer in asked]
    whole, prompt = (np.array([getattr(p, name) for p in prints], dtype=np.uint64) for name in ("whole", "prompt"))
    rows, earlier = conflicts(whole, prompt)
    assert (rows.tolist(), earlier.tolist()) == ([2], [0])


def test_texts_without_a_prompt_never_conflict() -> None:
    one, other = fingerprint(plain("a")), fingerprint(plain("b"))
    assert one.prompt != other.prompt and one.prompt == one.whole


def test_shingles_are_the_runs_of_five_words() -> None:
    assert len(shingles(plain("one two three four five six seven"))) == 3
    assert len(shingles(plain("one two"))) == 1
    assert len(shingles(plain("我们今天去公园散步"))) == 5  # each character is a word
    assert len(shingles(plain(" "))) == 0


def test_case_and_width_are_near_and_signs_are_not_lost() -> None:
    assert jaccard(shingles(plain("\uff21\uff22\uff23 Stra\u00dfe")), shingles(plain("abc STRASSE"))) == 1
    assert jaccard(shingles(plain("what is 3 + 4")), shingles(plain("what is 3 - 4"))) == 0


def test_other_contexts_share_no_shingle() -> None:
    text = plain(" ".join(WORDS))
    assert jaccard(shingles(text, 1 << 40), shingles(text, 2 << 40)) == 0


@pytest.mark.parametrize("num_perm", [16, 128, 256])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float, num_perm: int) -> None:
    number, size = bands(threshold, num_perm)
    assert number >= 2 and number * size <= num_perm
    found = 1 - (1 - threshold**size) ** number
    assert found >= RECALL


def near_of(examples: list[Example], threshold: float = 0.8) -> dict[int, tuple[int, float]]:
    def rows() -> Iterator[tuple[int, Example, int]]:
        return ((position, e, fingerprint(e).context) for position, e in enumerate(examples))

    return near_duplicates(rows, np.ones(len(examples), dtype=bool), NearIndex(threshold, 128))


def changed(words: list[str], *places: int) -> Example:
    return plain(" ".join("other" if i in places else word for i, word in enumerate(words)))


def test_near_rows_are_found_and_others_are_not() -> None:
    words = [f"{word}{i}" for i in range(6) for word in WORDS]
    pieces = len(words) - 4
    one, two, far = changed(words), changed(words, 60), changed(words, 10, 30, 50, 70, 90)
    found = near_of([one, two, far, plain("something else entirely, of a few words")])
    assert set(found) == {1}
    of, similarity = found[1]
    assert of == 0 and similarity == (pieces - 5) / (pieces + 5)  # five of each are its own


def test_no_pair_below_the_threshold_is_ever_found() -> None:
    """The candidates of MinHash are many here: half of each text is the same."""
    shared = [f"word{i}" for i in range(60)]
    texts = [plain(" ".join([*shared, *(f"own{n}x{i}" for i in range(30))])) for n in range(60)]
    assert jaccard(shingles(texts[0]), shingles(texts[1])) < 0.5
    assert near_of(texts, 0.5) == {}


def test_a_chain_is_judged_by_the_rows_that_are_kept() -> None:
    """The third is near the second alone, which is left out: so it stays."""
    words = [f"w{i}" for i in range(120)]
    chain = [changed(words), changed(words, 20, 40), changed(words, 20, 40, 60, 80)]
    assert set(near_of(chain)) == {1}
    assert set(near_of(chain[1:])) == {1}


def test_near_rows_of_other_domains_stay() -> None:
    text = " ".join(WORDS)
    same = [example(text, domain=domain) for domain in ("law", "tax", "law")]
    assert near_of(same) == {2: (0, 1.0)}


def test_the_same_rows_give_the_same_answers() -> None:
    words = [f"w{i}" for i in range(80)]
    texts = [changed(words, *range(n % 7, 80, 40)) for n in range(40)]
    assert near_of(texts) == near_of(texts) != {}

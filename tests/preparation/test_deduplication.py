"""Rows that say the same are found, near ones too; rows that do not are left alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from training_lens.data.examples import Example, Message
from training_lens.preparation.deduplication import (
    RECALL,
    NearIndex,
    choose_bands,
    combine_digests,
    find_conflicts,
    find_first_equal,
    find_near_duplicates,
    fingerprint_example,
    hash_shingles,
    jaccard_similarity,
)

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
    assert fingerprint_example(one) == fingerprint_example(other)


@pytest.mark.parametrize(
    "other",
    [
        example("yes."),
        example("Yes.", prompt="Tell me"),
        example("Yes.", learn=False),
        Example((Message("user", "Tell", input="me."), Message("assistant", "Yes.")), None, "f", 1),
        Example((Message("system", "Tell me."), Message("assistant", "Yes.")), None, "f", 1),
        Example((Message("user", "Tell me."), Message("assistant", "Yes.")), None, "f", 1, tools=({"a": 1},)),
    ],
    ids=["case", "prompt", "not learned", "input", "role", "tools"],
)
def test_what_trains_otherwise_is_no_duplicate(other: Example) -> None:
    assert fingerprint_example(example("Yes.")).whole != fingerprint_example(other).whole


def test_calls_are_part_of_what_is_said() -> None:
    def calling(city: str) -> Example:
        call = {"name": "weather", "arguments": {"city": city}}
        return Example((Message("user", "Weather?"), Message("assistant", "", calls=(call,))), None, "f", 1)

    assert (
        fingerprint_example(calling("Bern"))
        == fingerprint_example(calling("Bern"))
        != fingerprint_example(calling("Rome"))
    )
    assert jaccard_similarity(hash_shingles(calling("Bern").messages), hash_shingles(calling("Rome").messages)) < 1


def test_the_first_of_each_kind_is_kept() -> None:
    assert find_first_equal(np.array([5, 3, 5, 3, 9], dtype=np.uint64)).tolist() == [0, 1, 0, 1, 4]


def test_other_answers_to_one_prompt_conflict_and_repeated_ones_do_not() -> None:
    asked = [("Who?", "Tom"), ("Where?", "Here"), ("Who?", "Ann"), ("Where?", "Here"), ("Who?", "Tom")]
    prints = [fingerprint_example(example(answer, prompt)) for prompt, answer in asked]
    whole, prompt = (np.array([getattr(p, name) for p in prints], dtype=np.uint64) for name in ("whole", "prompt"))
    rows, earlier = find_conflicts(whole, prompt)
    assert (rows.tolist(), earlier.tolist()) == ([2], [0])


def test_texts_without_a_prompt_never_conflict() -> None:
    one, other = fingerprint_example(plain("a")), fingerprint_example(plain("b"))
    assert one.prompt != other.prompt and one.prompt == one.whole


def pieces(text: str, context: int = 0) -> np.ndarray:
    return hash_shingles([Message("assistant", text)], context)


def test_shingles_are_the_runs_of_five_words() -> None:
    assert len(pieces("one two three four five six seven")) == 3
    assert len(pieces("one two")) == 1
    assert len(pieces("我们今天去公园散步")) == 5  # each character is a word
    assert len(pieces(" ")) == 0


def test_case_and_width_are_near_and_signs_are_not_lost() -> None:
    assert jaccard_similarity(pieces("\uff21\uff22\uff23 Stra\u00dfe"), pieces("abc STRASSE")) == 1
    assert jaccard_similarity(pieces("what is 3 + 4"), pieces("what is 3 - 4")) == 0
    assert jaccard_similarity(pieces(""), pieces(" ")) == 1


def test_ascii_text_has_the_same_shingles_beside_other_letters() -> None:
    """It is cut into words by a pattern of its own."""
    signs = " a_1".join(map(chr, range(128)))
    assert len(pieces(signs)) > 128
    assert set(pieces(signs).tolist()) < set(pieces(f"{signs} \u00fc").tolist())


def test_other_contexts_share_no_shingle() -> None:
    text = " ".join(WORDS)
    assert jaccard_similarity(pieces(text, 1 << 40), pieces(text, 2 << 40)) == 0


@pytest.mark.parametrize("num_perm", [16, 128, 256])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float, num_perm: int) -> None:
    number, size = choose_bands(threshold, num_perm)
    assert number >= 2 and number * size <= num_perm
    found = 1 - (1 - threshold**size) ** number
    assert found >= RECALL


def near_of(examples: list[Example], threshold: float = 0.8) -> dict[int, tuple[int, float]]:
    def rows() -> Iterator[tuple[int, Example, int]]:
        return ((position, e, int(contexts[position])) for position, e in enumerate(examples))

    prints = [fingerprint_example(e) for e in examples]
    strata = np.array([len(e.domain or "") for e in examples], dtype=np.uint64)
    contexts = combine_digests(strata, np.array([p.context for p in prints], dtype=np.uint64))
    prompts = np.array([p.prompt for p in prints], dtype=np.uint64)
    return find_near_duplicates(rows, np.ones(len(examples), dtype=bool), prompts, NearIndex(threshold, 128))


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


def test_rows_that_hold_an_earlier_one_are_found_at_the_threshold() -> None:
    """MinHash finds nine of ten; all that they share is known to the index, and no more is needed."""
    pairs = [([f"w{n}x{i}" for i in range(84)], [f"w{n}x{i}" for i in range(104)]) for n in range(40)]
    found = near_of([plain(" ".join(words)) for pair in pairs for words in pair])
    assert len(found) > 30
    assert all(match == (row - 1, 0.8) for row, match in found.items())


def test_no_pair_below_the_threshold_is_ever_found() -> None:
    """The candidates of MinHash are many here: half of each text is the same."""
    shared = [f"word{i}" for i in range(60)]
    texts = [plain(" ".join([*shared, *(f"own{n}x{i}" for i in range(30))])) for n in range(60)]
    assert jaccard_similarity(hash_shingles(texts[0].messages), hash_shingles(texts[1].messages)) < 0.5
    assert near_of(texts, 0.5) == {}


def test_a_chain_is_judged_by_the_rows_that_are_kept() -> None:
    """The third is near the second alone, which is left out: so it stays."""
    words = [f"w{i}" for i in range(120)]
    chain = [changed(words), changed(words, 20, 40), changed(words, 20, 40, 60, 80)]
    assert set(near_of(chain)) == {1}
    assert set(near_of(chain[1:])) == {1}


def test_near_rows_of_other_domains_stay() -> None:
    text = " ".join(WORDS)
    asked = [("law", "Tell me."), ("trade", "Tell me!"), ("law", "tell me."), ("trade", "tell me!")]
    assert near_of([example(text, prompt, domain) for domain, prompt in asked]) == {2: (0, 1.0), 3: (1, 1.0)}


def test_the_same_text_of_two_domains_is_equal_and_no_duplicate() -> None:
    one, other = (fingerprint_example(example("Yes.", domain=domain)) for domain in ("law", "tax"))
    assert one == other
    strata, whole = np.array([1, 2, 1], dtype=np.uint64), np.array([one.whole] * 3, dtype=np.uint64)
    assert find_first_equal(combine_digests(strata, whole)).tolist() == [0, 1, 0]


PROMPT = " ".join(f"{word}{i}" for i in range(3) for word in WORDS)


def test_rows_that_ask_the_same_and_answer_otherwise_are_never_near() -> None:
    """However long the prompt is beside the answers, and however near the answers are."""
    assert near_of([example(answer, PROMPT) for answer in ("yes", "no", "perhaps")]) == {}
    assert near_of([example(answer, "Read this.") for answer in (PROMPT, f"{PROMPT} more")]) == {}


def test_nearly_the_same_prompt_is_near_with_the_same_answer_alone() -> None:
    asked = [(PROMPT, "yes"), (f"{PROMPT} please", "no"), (f"{PROMPT} please", "Yes")]
    found = near_of([example(answer, prompt) for prompt, answer in asked])
    assert found == {2: (0, jaccard_similarity(pieces(PROMPT), pieces(f"{PROMPT} please")))}


def test_other_prompts_of_one_long_answer_are_not_near() -> None:
    assert near_of([example(PROMPT, "Where is the boat?"), example(PROMPT, "Who wrote this?")]) == {}


def test_the_same_rows_give_the_same_answers() -> None:
    words = [f"w{i}" for i in range(80)]
    texts = [changed(words, *range(n % 7, 80, 40)) for n in range(40)]
    assert near_of(texts) == near_of(texts) != {}

"""The words of an answer, as BLEU, ROUGE and F1 count them, and the rows that word measures do not apply to."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec

from training_lens.errors import ConfigurationError

DEFAULT_TOKENIZER = "13a"
PACKAGES = {"ja-mecab": ("MeCab", "sacrebleu[ja]"), "ko-mecab": ("mecab_ko", "sacrebleu[ko]")}

# Unicode's names for letters of scripts without spaces between words.
HAN, KANA = ("CJK", "IDEOGRAPHIC", "BOPOMOFO"), ("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA")
UNSPACED = (*HAN, *KANA, "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI", "TAI", "NEW TAI", "JAVANESE", "BALINESE")
DIVIDED: Mapping[str, tuple[str, ...]] = {"char": UNSPACED, "zh": HAN, "ja-mecab": (*HAN, *KANA)}
MOST_UNSPACED = 0.2  # share of a reference's letters; beyond it, there is hardly a word to compare

LEAST_WORDS = {"bleu": 4, "rouge1": 1, "rouge2": 2, "rougeL": 1, "token_f1": 1}
NO_SPACES = "a script without spaces between words"
FEW_WORDS = {1: "no words", 2: "a single word", 4: "fewer than four words"}


def require_word_tokenizer(name: str) -> None:
    """Refuse a tokenizer whose package is not installed.

    Raises:
        ConfigurationError: names the command that installs it.
    """
    module, install = PACKAGES.get(name, ("", ""))
    if module and find_spec(module) is None:
        raise ConfigurationError(
            f"evaluation.word_tokenizer: {name} needs a package that is not installed. Install it: "
            f"pip install '{install}', or choose char."
        )


def word_splitter(tokenizer: str = DEFAULT_TOKENIZER) -> Callable[[str], list[str]]:
    """A function that splits a text into lower-case words: `split_words`, or one of sacrebleu's tokenizers."""
    if tokenizer == DEFAULT_TOKENIZER:
        return split_words
    split = _sacrebleu_tokenizer(tokenizer)
    return lambda text: [token for token in split(text.lower()).split() if any(map(_is_in_word, token))]


def split_words(text: str) -> list[str]:
    """The runs of letters, combining marks and digits of any script, in lower case and composed (NFC).

    On ASCII text these are the words of rouge-score's own tokenizer, which drops all other letters.

    Example:
        >>> split_words("Zürich's 2 Cafés: उल्लू!")
        ['zürich', 's', '2', 'cafés', 'उल्लू']
    """
    composed = unicodedata.normalize("NFC", text.lower())
    return "".join(char if _is_in_word(char) else " " for char in composed).split()


@cache
def _sacrebleu_tokenizer(name: str) -> Callable[[str], str]:
    from sacrebleu.metrics.bleu import BLEU

    tokenizer: Callable[[str], str] = BLEU(tokenize=name).tokenizer
    return tokenizer


@cache
def _is_in_word(char: str) -> bool:
    # U+200C and U+200D join and separate letters within words of Persian and of Indian scripts.
    return unicodedata.category(char)[0] in "LMN" or char in "\u200c\u200d"


def why_unscored(measure: str, reference: str, tokenizer: str = DEFAULT_TOKENIZER) -> str | None:
    """Why a word measure does not apply to a row; None where it applies, and for all other measures.

    BLEU compares runs of four words and rouge2 runs of two: a shorter reference has none. Without spaces between words,
    a whole clause is one word, unless the tokenizer divides the script.

    Example:
        >>> why_unscored("bleu", "yes"), why_unscored("rouge1", "yes"), why_unscored("bleu", "猫头鹰住在树林里。")
        ('fewer than four words', None, 'a script without spaces between words')
    """
    least = LEAST_WORDS.get(measure)
    if least is None:
        return None
    letters = [char for char in reference if char.isalpha()]
    unspaced = sum(_unspaced_script(char) not in (None, *DIVIDED.get(tokenizer, ())) for char in letters)
    if unspaced > MOST_UNSPACED * len(letters):
        return NO_SPACES
    return FEW_WORDS[least] if len(word_splitter(tokenizer)(reference)) < least else None


def count_unscored(references: Sequence[str], tokenizer: str = DEFAULT_TOKENIZER) -> dict[str, dict[str, int]]:
    """The rows that each word measure leaves out, by reason; measures that leave out none are not listed."""
    counts = {
        name: Counter(why_unscored(name, reference, tokenizer) for reference in references) for name in LEAST_WORDS
    }
    reasons = {name: {why: n for why, n in found.items() if why is not None} for name, found in counts.items()}
    return {name: found for name, found in reasons.items() if found}


@cache
def _unspaced_script(char: str) -> str | None:
    name = unicodedata.name(char, "")
    return next((script for script in UNSPACED if name.startswith(f"{script} ")), None)

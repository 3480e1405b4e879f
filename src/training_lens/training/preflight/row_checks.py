"""Checks on the training rows: what is learned of their tokens (prompts, end tokens, padding, unknown characters,
truncated answers), duplicates, and the same prompt with different answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.data.batching import Schedule
from training_lens.data.canaries import SOURCE as CANARIES
from training_lens.data.split_report import SplitReport
from training_lens.data.token_dataset import TokenDataset
from training_lens.errors import DatasetError
from training_lens.training.preflight.row_scan import RowScan, name_rows

SAMPLED_TEXTS = 100  # plain texts that are looked at for the turns of a chat
MANY, SOME = 0.1, 0.01  # shares of rows
LOST_CHARACTERS = 0.001  # share of all characters
_TURN = re.compile(
    r"<\|im_start\|>\s*user|<\|user\|>|\[INST\]|<start_of_turn>user|<\|start_header_id\|>user|### (Instruction|Human):"
    r"|^(USER|User|Human|Q|Question): "
)

PROMPT = Rule(
    code="prompt_supervised",
    signature="every token of a row with a prompt is a target: labels equal inputs",
    threshold=f"{MANY:.0%} of the rows",
    source="exact, by the loss masks (trl#1623); of plain texts, by the marks of a chat's turns in them",
    action="learn the answers alone: data.mask_prompt=true, and fields or a template that tell prompt from answer",
)
END = Rule(
    code="end_token",
    signature="no end token among the last targets of an answer: the model never learns to stop",
    threshold=f"a warning from {MANY:.0%} of the rows on",
    source="exact, by the tokens (trl#1623)",
    action="raise model.seq_len or take data.truncation=keep_end, where answers are cut; else a template that learns "
    "the end token",
)
PADDING = Rule(
    code="padding",
    signature="the pad token among the targets, or a pad token that is another token, too",
    threshold="any pad token among the targets that is neither an end nor an unknown token",
    source="exact; this loop reads no padding, other programs mask by the pad token's id (trl#1623)",
    action="take the pad token out of the rows, or keep data.special_tokens=plain",
)
UNKNOWN = Rule(
    code="unknown_characters",
    signature="characters without a token: they are lost, and so are answers with them",
    threshold=f"{LOST_CHARACTERS:.1%} of the characters",
    source="exact, by the tokenizer",
    action="take a base whose tokenizer has these characters, or write the rows without them",
)
TRUNCATED = Rule(
    code="truncated",
    signature="answers that are longer than the model may read: part of them is not learned",
    threshold=f"{SOME:.0%} of the rows",
    source="exact, by the tokens (trl#3927)",
    action="set model.seq_len so that answers fit, or leave long rows out: data.truncation=drop",
)
REPEATED = 0.05  # share of the rows
VISITS = 4.0  # epochs of repeated data that are about as good as new data
DISAGREEING = 0.05
LEAST_LOSS = 0.005  # nats per token: of long answers, the choice among them is a small part
_MIX = np.uint64(0x9E3779B97F4A7C15)
DUPLICATES = Rule(
    code="duplicates",
    signature="training rows that repeat another one (case, punctuation and white space apart), by themselves or by "
    "data.weights",
    threshold=f"{REPEATED:.0%} of the rows, or a run that shows its distinct rows more than {VISITS:g} times each, and "
    "more often than its epochs say",
    source="exact counts; up to about four epochs, repeated data are nearly as good as new (arXiv 2305.16264)",
    action="training-lens prepare leaves duplicates out; or lower training.epochs by the same factor",
)
DISAGREEMENT = Rule(
    code="label_disagreement",
    signature="rows with the same prompt (case, punctuation and white space apart) and different answers",
    threshold=f"{DISAGREEING:.0%} of the rows, and a least loss of {LEAST_LOSS:g} nats per token",
    source="exact counts; the entropy of the answers to a prompt is the least loss that the prompt alone allows",
    action="keep one answer a prompt, or put into the prompt what decides between them",
)


def check_targets(scan: RowScan) -> None:
    """Refuse rows without a single target.

    Raises:
        DatasetError: nothing can be learned.
    """
    if not scan.targets.sum():
        raise DatasetError(
            f"data.train: none of the tokens of {len(scan.dataset)} examples is learned, so there is no loss. Check "
            "the masks of the rows (training-lens validate shows what is learned)."
        )


def check_supervised_prompts(scan: RowScan, mask_prompt: bool, seq_len: int) -> Finding:
    """Whether prompts are learned as well: by the masks, and in plain texts by the marks of chats.

    Rows of `seq_len` tokens are left out: their prompts may be cut.
    """
    whole = scan.is_whole & scan.is_asked & (scan.dataset.lengths < seq_len)
    share = float(whole.mean())
    if share >= MANY:
        shown = scan.show_rows(whole)
        return PROMPT.report_symptom(
            "warning" if mask_prompt else "note",
            "Prompts are learned, too" + ("" if mask_prompt else ", as data.mask_prompt=false says"),
            f"all tokens of {share:.0%} of the rows are learned: {name_rows(shown)}",
            confidence="sure",
            evidence={"share": share, "rows": shown},
        )
    return _check_texts(scan)


def _check_texts(scan: RowScan) -> Finding:
    texts = (~scan.is_asked).nonzero()[0]
    sample = texts[:: max(1, len(texts) // SAMPLED_TEXTS)]
    chats = [int(i) for i in sample if _TURN.search(scan.tokenizer.decode(scan.dataset[int(i)].input_ids))]
    if len(chats) * 2 <= len(sample):
        return PROMPT.report_fine("No prompt is learned", f"{int(scan.is_asked.sum()):,} rows have a prompt")
    shown = [scan.show_row(i) for i in chats[:3]]
    return PROMPT.report_symptom(
        "warning",
        "Plain texts hold the turns of chats, and their prompts are learned",
        f"{len(chats)} of {len(sample)} texts looked at: {name_rows(shown)}",
        action="give prompts and answers as fields of their own, or as a chat (messages)",
        evidence={"share": len(chats) / len(sample), "rows": shown},
    )


def check_end_tokens(scan: RowScan) -> Finding:
    """Whether answers end with an end token."""
    missing = ~scan.is_ended & scan.is_asked
    asked = int(scan.is_asked.sum())
    if not missing.any():
        return END.report_fine("Every answer ends with an end token", f"{asked:,} rows with an answer")
    share, shown = missing.sum() / asked, scan.show_rows(missing)
    return END.report_symptom(
        "warning" if share >= MANY else "note",
        "Answers without an end token",
        f"{int(missing.sum()):,} of {asked:,} rows ({share:.1%}): {name_rows(shown)}",
        confidence="sure",
        evidence={"share": float(share), "rows": shown},
    )


def check_padding(scan: RowScan) -> Finding:
    """Whether the pad token is learned. One that is the end or the unknown token is no fault in this loop."""
    tokenizer, pad = scan.tokenizer, scan.tokenizer.pad_token_id
    names = {"unk": tokenizer.unk_token_id, "eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}
    same = [name for name, token in names.items() if pad is not None and token == pad]
    learned = scan.pads > 0
    if not learned.any():
        return PADDING.report_fine("The pad token is not learned", "no target is the pad token")
    share, shown = float(learned.mean()), scan.show_rows(learned)
    also = f"it is the {same[0]} token, too; " if same else ""
    return PADDING.report_symptom(
        "note" if same else "warning",
        "The pad token is among the targets",
        f"{tokenizer.pad_token!r} in {share:.1%} of the rows; {also}{name_rows(shown)}",
        confidence="sure",
        action="nothing here; a program that masks labels by the pad token's id would hide these tokens"
        if same
        else PADDING.action,
        evidence={"share": share, "same_as": same, "rows": shown},
    )


def check_unknown_characters(scan: RowScan, report: SplitReport) -> Finding:
    """Whether the tokenizer has all characters of the rows."""
    lost, characters = sum(report.unknown_characters.values()), report.characters
    if not lost:
        return UNKNOWN.report_fine("Every character has a token", f"{characters:,} characters")
    share, unk = lost / characters, scan.tokenizer.unk_token_id
    named = ", ".join(f"{c!r} ({n:,})" for c, n in list(report.unknown_characters.items())[:6])
    targets = 0.0 if unk is None else float(scan.targets[unk] / scan.targets.sum())
    become = f"; {targets:.2%} of what is learned is {scan.tokenizer.unk_token!r}" if targets else ""
    return UNKNOWN.report_symptom(
        "warning" if share >= LOST_CHARACTERS else "note",
        "Characters are lost in tokenization",
        f"{share:.2%} of the characters: {named}{become}",
        confidence="sure",
        evidence={"share": share, "unknown_targets": targets, "characters": report.unknown_characters},
    )


def check_truncation(scan: RowScan, report: SplitReport, seq_len: int) -> Finding:
    """Whether answers are cut, or dropped because they do not fit; and how many rows lost their whole prompt."""
    promptless = scan.is_whole & scan.is_asked & (scan.dataset.lengths >= seq_len)
    cut, lost = report.answers_truncated, report.dropped_too_long + report.dropped_without_answer
    rows = report.rows or 1
    share = (cut + lost) / rows
    evidence = {
        "answers_truncated": cut,
        "dropped": lost,
        "prompts_lost": int(promptless.sum()),
        "tokens_lost": report.supervised_tokens_lost,
        "seq_len_for_99_percent": report.seq_len_for_99_percent,
    }
    if not cut + lost:
        return TRUNCATED.report_fine("No answer is cut", f"{report.examples:,} examples", evidence=evidence)
    return TRUNCATED.report_symptom(
        "warning" if share >= SOME else "note",
        "Answers are cut or dropped",
        f"{cut:,} of {rows:,} answers are cut at model.seq_len={seq_len} and {lost:,} dropped, "
        f"{report.supervised_tokens_lost:,} answer tokens and the whole prompts of {int(promptless.sum()):,} rows are "
        f"lost; {report.seq_len_for_99_percent} would keep 99% whole",
        confidence="sure",
        evidence=evidence,
    )


def count_visits(schedule: Schedule) -> np.ndarray:
    """How often the run shows each training example, on average over random draws; (examples,) float64."""
    mix = schedule.mix
    weights = np.ones(schedule.examples) if mix is None else np.asarray(mix.weights, dtype=np.float64)[mix.entries]
    visits: np.ndarray = weights * schedule.total_steps / schedule.steps_per_epoch
    return visits


def check_duplicates(scan: RowScan, schedule: Schedule) -> Finding:
    """The share of rows that repeat another, and the epochs that they and the weights amount to.

    Planted canaries are left out: they repeat because data.canary_repeats says so.
    """
    own = np.flatnonzero(scan.dataset.files != CANARIES)
    visits = count_visits(schedule)[own]
    group = _group_rows(_hash_prompts(scan.dataset)[own], scan.dataset.identities[own, 0])
    rows, distinct = len(group), int(group.max()) + 1
    by_row = np.bincount(group, weights=visits)
    mean, most = float(visits.sum() / distinct), float(by_row.max())
    epochs = schedule.total_steps / schedule.steps_per_epoch
    share = 1 - distinct / rows
    measured = (
        f"{rows:,} rows are {distinct:,} different ones ({share:.1%} repeat another); {epochs:.3g} epochs show each "
        f"{mean:.3g} times on average, the most frequent {most:.3g} times"
    )
    evidence = {"share": share, "distinct": distinct, "epochs": epochs, "visits": mean, "most_visits": most}
    is_often = mean > VISITS and mean > 1.25 * epochs
    if distinct == rows and not is_often:
        return DUPLICATES.report_fine("No row is repeated", measured, evidence=evidence)
    first = np.unique(group, return_index=True)[1]
    repeats = np.setdiff1d(np.arange(rows), first)[:3]
    originals = own[first[group[repeats]]]
    shown = [
        scan.show_row(int(row)) | {"repeats": scan.dataset.example_id(int(original))}
        for row, original in zip(own[repeats], originals, strict=True)
    ]
    named = "; ".join(f"{row['row']} repeats {row['repeats']}" for row in shown)
    return DUPLICATES.report_symptom(
        "warning" if is_often or share >= REPEATED else "note",
        "Training rows are repeated",
        f"{measured}: {named}" if named else f"{measured}, by data.weights",
        confidence="sure",
        evidence={**evidence, "rows": shown},
    )


@dataclass(frozen=True)
class _Answers:
    """Of each row: how many rows have its prompt, and how many of these also its answer."""

    asked: np.ndarray
    alike: np.ndarray

    @classmethod
    def from_dataset(cls, dataset: TokenDataset) -> _Answers:
        prompts = _hash_prompts(dataset)
        questions, answers = _group_rows(prompts), _group_rows(prompts, dataset.identities[:, 0])
        return cls(np.bincount(questions)[questions], np.bincount(answers)[answers])


def check_disagreement(scan: RowScan) -> Finding:
    """The share of rows whose prompt has another answer elsewhere, and the loss that this costs at least."""
    answers = _Answers.from_dataset(scan.dataset)
    contested = scan.is_asked & (answers.alike < answers.asked)
    share = float(contested.mean())
    if not contested.any():
        return DISAGREEMENT.report_fine("No prompt has two answers", f"{int(scan.is_asked.sum()):,} prompts")
    nats = float(np.log(answers.asked / answers.alike)[contested].sum() / scan.dataset.supervised_counts.sum())
    prompts = _hash_prompts(scan.dataset)
    position = int(np.flatnonzero(contested)[0])
    alike = np.flatnonzero(prompts == prompts[position])[:3]
    shown = [scan.show_row(int(i)) for i in alike]
    named = "; ".join(f"{row['row']} -> {row['learned']!r}" for row in shown)
    return DISAGREEMENT.report_symptom(
        "warning" if share >= DISAGREEING and nats >= LEAST_LOSS else "note",
        "The same prompt has different answers",
        f"{int(contested.sum()):,} rows ({share:.1%}); by the prompt alone the loss cannot fall below {nats:.3g} nats "
        f"per token. Such as {named}",
        confidence="sure",
        evidence={"share": share, "least_loss": nats, "rows": shown},
    )


def _hash_prompts(dataset: TokenDataset) -> np.ndarray:
    """A hash of each row's question and domain, which is part of the prompt; (rows,) uint64."""
    domains: dict[str | None, int] = {}
    codes = np.array([domains.setdefault(name, len(domains)) for name in dataset.domains.tolist()], dtype=np.uint64)
    mixed: np.ndarray = dataset.identities[:, 1] ^ (codes * _MIX)
    return mixed


def _group_rows(*hashes: np.ndarray) -> np.ndarray:
    """The number of each row's group, from 0: rows of a group are equal in all hashes."""
    mixed = hashes[0]
    for other in hashes[1:]:
        mixed = mixed * _MIX ^ other
    group: np.ndarray = np.unique(mixed, return_inverse=True)[1]
    return group

"""Checks on the tokens that a run learns: prompts, end tokens, padding, unknown characters, truncated answers."""

from __future__ import annotations

import re

from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.data.split_report import SplitReport
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
        f"lost; {report.seq_len_for_99_percent} would keep 99 % whole",
        confidence="sure",
        evidence=evidence,
    )

"""Build what the package embeds: the base model, its tokenizer and the instruction set.

    python tools/build_embedded_base.py [--minutes 20] [--out src/training_lens/embedded]

Everything is made from a seed (`small_world.py`), on CPU: a byte-level BPE tokenizer with a chat template, a Llama of
2.2 M parameters trained for `--minutes` on fresh documents, the instruction rows, and `report.json` with the held-out
perplexity. The texts are the same every time; the weights depend on how many steps the machine does in the time.

A model that small learns facts and sums in minutes, but on a CPU's few million tokens it does not find out how to copy
(the heads that complete "A B ... A" with B form late, arXiv 2209.11895), and every task here copies names. So
`lay_induction_heads` starts it with such heads already in place; training then moves all weights freely.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from rich.progress import Progress
from small_world import Row, documents, instruction_sets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT_SEED, HELDOUT_SEED, ROWS_SEED = 1, 2, 3
TRAIN_ROWS, HELDOUT_ROWS = 2100, 330
VOCABULARY, POSITIONS, ROPE_THETA = 1024, 512, 500_000.0
BLOCK, BATCH, PEAK_LR = 256, 12, 2e-3
BOS, PAD, SYSTEM, USER, ASSISTANT, END = "<|bos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = [BOS, PAD, SYSTEM, USER, ASSISTANT, END]
# The generation marks tell a trainer which tokens are the assistant's: its text and the end token.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def text_of(document: str | list[tuple[str, str]]) -> str:
    """The document as the model reads it, in the chat template's own form."""
    if isinstance(document, str):
        return f"{BOS}{document}{END}"
    return BOS + "".join(f"{USER}{ask}{END}{ASSISTANT}{answer}{END}" for ask, answer in document)


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text_of(d) for d in islice(documents(TEXT_SEED), 20_000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def blocks(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Endless (BATCH, BLOCK) batches of the seed's documents, laid end to end."""
    stream, buffer = documents(seed), list[int]()
    while True:
        while len(buffer) < BATCH * BLOCK:
            texts = [text_of(d) for d in islice(stream, 512)]
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                buffer += ids
        yield torch.tensor(buffer[: BATCH * BLOCK]).view(BATCH, BLOCK)
        del buffer[: BATCH * BLOCK]


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    lay_induction_heads(model)
    return model


@torch.no_grad()
def lay_induction_heads(model: LlamaForCausalLM) -> None:
    """Start with heads that copy: one per key/value group looks at the previous token, one at what followed it before.

    Layer 0 writes the previous token's identity (a random projection P of its embedding) into directions Q of the
    residual stream. It finds that token by rotary phase alone: all embeddings share a constant first component, from
    which query and key are made, the key turned one position ahead. Layer 1 matches the current token's P against Q,
    in the components that rotary embedding hardly turns within a text, and copies what it finds. All else is random.
    """
    config, generator = model.config, torch.Generator().manual_seed(1)
    hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    size = hidden // heads
    half = size // 2
    turn = ROPE_THETA ** (-torch.arange(half) / half)  # radians a position, of each pair of components
    slow = [m for m in range(half) if turn[m] * 120 < 0.6]
    slow += [m + half for m in slow]
    fast = range(6)

    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.04, generator=generator)
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, 0.07, generator=generator)
    embedding[:, 0] = 0.5
    for layer in model.model.layers:  # both write to the residual stream: start small
        layer.self_attn.o_proj.weight.mul_(0.4)
        layer.mlp.down_proj.weight.mul_(0.4)

    basis = torch.zeros(hidden - 1, hidden)  # orthonormal rows, free of the constant component
    basis[:, 1:] = torch.linalg.qr(torch.randn(hidden - 1, hidden - 1, generator=generator))[0]
    before, induce = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    for group in range(groups):
        keys = slice(group * size, (group + 1) * size)
        start = group * (heads // groups) * size
        queries = slice(start, start + size)
        identity = basis[group * len(slow) :][: len(slow)]
        written = basis[100 + group * len(slow) :][: len(slow)]
        copied = basis[group * size :][:size]
        for attention in (before, induce):
            attention.q_proj.weight[queries] = 0
            attention.k_proj.weight[keys] = 0
            attention.v_proj.weight[keys] = 0
            attention.o_proj.weight[:, queries] = 0
        for m in fast:
            before.q_proj.weight[start + m, 0] = 1.2
            before.k_proj.weight[keys.start + m, 0] = torch.cos(turn[m])
            before.k_proj.weight[keys.start + m + half, 0] = torch.sin(turn[m])
        before.v_proj.weight[keys.start : keys.start + len(slow)] = identity
        before.o_proj.weight[:, start : start + len(slow)] = 0.25 * written.T
        for row, component in enumerate(slow):
            induce.q_proj.weight[start + component] = 2.2 * identity[row]
            induce.k_proj.weight[keys.start + component] = 2.2 * written[row]
        induce.v_proj.weight[keys] = copied
        induce.o_proj.weight[:, queries] = 0.8 * copied.T


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, minutes: float) -> int:
    """Train for `minutes`: warm-up, then a cosine to a twentieth over the time. Returns the steps done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    start, seconds, step = time.monotonic(), minutes * 60, 0
    with Progress() as progress:
        task = progress.add_task("training the base", total=1.0)
        for batch in blocks(tokenizer, TEXT_SEED):
            done = (time.monotonic() - start) / seconds
            if done >= 1:
                return step
            scale = min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
            optimizer.param_groups[0]["lr"] = PEAK_LR * scale
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                progress.update(task, completed=done, description=f"step {step} loss {loss.item():.3f}")
                print(f"step {step} loss {loss.item():.4f} {done:.0%}", flush=True)
    raise AssertionError("the stream of documents is endless")


def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batches: int = 20) -> float:
    """exp(mean loss in nats per token) over held-out documents: another seed, none of them read in training."""
    with torch.inference_mode():
        losses = [model(input_ids=b, labels=b).loss.item() for b in islice(blocks(tokenizer, HELDOUT_SEED), batches)]
    return math.exp(sum(losses) / len(losses))


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def write_older_form(folder: Path) -> None:
    """Name in the folder's configs what transformers 4 reads, too: the two versions then load the same model."""
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"], config["rope_scaling"] = config.pop("rope_parameters")["rope_theta"], None
    config["torch_dtype"] = config.pop("dtype")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["backend"]
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, content in (("config.json", config), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="training time; 0 rewrites the rows alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "src/training_lens/embedded")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train_rows, heldout_rows = instruction_sets(ROWS_SEED, TRAIN_ROWS, HELDOUT_ROWS)
    write_rows(args.out / "train.jsonl", train_rows)
    write_rows(args.out / "heldout.jsonl", heldout_rows)
    if args.minutes <= 0:
        return

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    steps = train(model, tokenizer, args.minutes)
    model = model.to(torch.bfloat16)  # what is packaged; the perplexity below is of these rounded weights
    report = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "tokens": steps * BATCH * BLOCK,
        "minutes": args.minutes,
        "heldout_perplexity": perplexity(model.float(), tokenizer),
    }
    model.to(torch.bfloat16).save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    write_older_form(args.out / "base")
    (args.out / "base" / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()

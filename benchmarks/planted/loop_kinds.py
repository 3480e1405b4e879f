"""Failures of other training loops: what a loop written by hand, or a use of the HF Trainer, gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from other_loops import IGNORED, OwnLoop, TrainerLoop
from peft import LoraConfig, get_peft_model
from planted_case import Answer, Case, Kind
from setting_kinds import LOW


class WithoutAdapter(TrainerLoop):
    """The optimizer has parameters of the base instead of the adapter's."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        norms = [p for name, p in self.model.named_parameters() if "norm" in name]
        for norm in norms:
            norm.requires_grad_(self.strength)
        return torch.optim.AdamW(norms, self.rate)


class HalfFrozen(OwnLoop):
    """A part of the adapter does not require gradients."""

    def prepare_model(self) -> None:
        for name, parameter in self.model.named_parameters():
            if any(part in name for part in self.strength):
                parameter.requires_grad_(False)


class HalfFrozenTrainer(HalfFrozen, TrainerLoop):
    """The same in the HF Trainer."""


class KeptGradients(OwnLoop):
    """zero_grad is left out: gradients add up."""

    def finish_step(self, step: int) -> None:
        if step % self.strength == 0:
            self.optimizer.zero_grad()


class RateZero(TrainerLoop):
    """The rate is 0 at every step."""

    factor = 0.0


class RateStuck(OwnLoop):
    """A schedule that ends after some steps (it was advanced once a micro-batch): a rate of 0 from then on."""

    def finish_step(self, step: int) -> None:
        super().finish_step(step)
        left = max(0.0, 1 - step / self.strength)
        self.optimizer.param_groups[0]["lr"] = self.rate * left


class RateSpike(OwnLoop):
    """One step at a hundred times the rate."""

    def finish_step(self, step: int) -> None:
        super().finish_step(step)
        self.optimizer.param_groups[0]["lr"] = self.rate * (self.strength if step == 30 else 1)


class PromptSupervised(TrainerLoop):
    """Labels are the tokens: the prompt is learned as well."""

    def read_example(self, index: int) -> tuple[list[int], list[int]]:
        ids, _ = super().read_example(index)
        return ids, list(ids)


class PadSupervised(TrainerLoop):
    """Labels of the padding are the pad token instead of -100."""

    def pad_batch(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        batch = super().pad_batch(rows)
        pads = batch["attention_mask"] == 0
        batch["labels"][pads] = batch["input_ids"][pads]
        return batch


class AllMasked(TrainerLoop):
    """Every label is -100: the response template was not found."""

    def read_example(self, index: int) -> tuple[list[int], list[int]]:
        ids, labels = super().read_example(index)
        is_masked = index % self.strength == 0
        return ids, [IGNORED] * len(ids) if is_masked else labels


class EndMasked(TrainerLoop):
    """The end token is the pad token, and masked with it: it is never learned."""

    def read_example(self, index: int) -> tuple[list[int], list[int]]:
        ids, labels = super().read_example(index)
        end = self.plan.tokenizer.eos_token_id
        return ids, [IGNORED if label == end else label for label in labels]


class Underflow(OwnLoop):
    """Gradients pass through float16 without loss scaling, and most of them are 0 there."""

    def run_backward(self, loss: torch.Tensor, step: int) -> None:
        (loss * self.strength).backward()

    def prepare_model(self) -> None:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient.half().float())


class LayerGradient(OwnLoop):
    """The gradient of one layer is multiplied by a factor that grows, or fades, from a step on.

    Five layers: the base's two, and copies of them with a tenth of their output.
    """

    def build_model(self) -> Any:
        base = transformers.AutoModelForCausalLM.from_pretrained(self.plan.config.model.id, dtype=torch.float32)
        layers = list(base.model.layers)
        for index in range(2, 5):
            twin = type(layers[0])(base.config, index)
            twin.load_state_dict(layers[index % 2].state_dict())
            for projection in (twin.self_attn.o_proj, twin.mlp.down_proj):
                projection.weight.data *= 0.1
            base.model.layers.append(twin)
        base.config.num_hidden_layers = 5
        return get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

    def prepare_model(self) -> None:
        self.growth = 1.0
        for name, parameter in self.model.named_parameters():
            if "layers.3." in name and parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient * self.growth)

    def finish_step(self, step: int) -> None:
        super().finish_step(step)
        if step >= 25:
            self.growth = float(self.strength) ** ((step - 24) / 10)


class InactiveAdapter(TrainerLoop):
    """Another adapter is active: the watched one gets no gradient."""

    def prepare_model(self) -> None:
        if self.strength == "disabled":
            self.model.base_model.disable_adapter_layers()
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_("lora_" in name or "norm" in name)
            return
        for module in self.model.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                module.scaling["default"] = 0.0


class NanLoss(OwnLoop):
    """From a step on the loss is 0 / 0: a batch without a supervised token, divided by their number."""

    def run_backward(self, loss: torch.Tensor, step: int) -> None:
        (loss * (float("nan") if step >= self.strength else 1.0)).backward()


def in_loop(loop: type[OwnLoop]) -> Callable[[Case, Any], Case]:
    """Plants a loop."""
    return lambda case, strength: replace(case, loop=lambda plan: loop(plan, strength))


def in_either(loops: dict[str, type[OwnLoop]], fault: Any) -> Callable[[Case, str], Case]:
    """Plants one of two loops by its name."""
    return lambda case, which: replace(case, loop=lambda plan: loops[which](plan, fault))


STILL = (Answer("untrained"),)
KINDS = (
    Kind(
        "optimizer_without_adapter",
        "the optimizer lacks the adapter",
        STILL,
        in_loop(WithoutAdapter),
        False,
        True,
        r"optimizer|in the AdamW",
        earliest="during",
    ),
    Kind(
        "adapter_half_frozen",
        "half of the adapter is frozen",
        STILL,
        in_either({"own": HalfFrozen, "trainer": HalfFrozenTrainer}, ("layers.0.",)),
        "own",
        "trainer",
        earliest="during",
    ),
    Kind(
        "adapter_b_frozen",
        "B is frozen, and dW stays 0",
        STILL,
        in_either({"own": HalfFrozen, "trainer": HalfFrozenTrainer}, ("lora_B",)),
        "own",
        "trainer",
        earliest="during",
    ),
    Kind(
        "adapter_inactive",
        "the adapter does not reach the output",
        STILL,
        in_loop(InactiveAdapter),
        "disabled",
        "scaled to 0",
        r"adapter",
        earliest="during",
    ),
    Kind(
        "zero_grad_missing",
        "zero_grad is left out",
        (Answer("self_check"),),
        in_loop(KeptGradients),
        1000,
        20,
        r"zero_grad",
        denied_by=(),
        earliest="during",
    ),
    Kind("rate_zero", "a rate of 0", STILL, in_loop(RateZero), 0, 0, r"rate", earliest="during"),
    Kind(
        "rate_ends",
        "the schedule ends early, at a rate of 0",
        (Answer("untrained"), *LOW),
        in_loop(RateStuck),
        15,
        10,
        denied_by=("untrained", "rate_low"),
        earliest="during",
    ),
    Kind(
        "rate_spike",
        "one step at a hundred times the rate",
        (Answer("loss_spike"), Answer("rate_high", test="rate")),
        in_loop(RateSpike),
        200,
        100,
        earliest="during",
    ),
    Kind(
        "trainer_prompt",
        "HF Trainer: labels equal the tokens",
        (Answer("prompt_supervised"),),
        in_loop(PromptSupervised),
        0,
        0,
        r"prompts are learned, too",
        earliest="during",
    ),
    Kind(
        "trainer_pad",
        "HF Trainer: padding is learned",
        (Answer("padding"),),
        in_loop(PadSupervised),
        0,
        0,
        r"labels are padding",
        earliest="during",
    ),
    Kind(
        "trainer_masked",
        "HF Trainer: every label is masked",
        (Answer("untrained"), Answer("nonfinite")),
        in_loop(AllMasked),
        1,
        1,
        r"supervised",
        denied_by=("nonfinite",),
        earliest="before",
    ),
    Kind(
        "trainer_end",
        "HF Trainer: the end token is masked",
        (Answer("end_token"),),
        in_loop(EndMasked),
        0,
        0,
        r"end token of each row is masked",
        earliest="during",
    ),
    Kind("underflow", "float16 gradients underflow to 0", STILL, in_loop(Underflow), 1e-9, 1e-10, earliest="during"),
    Kind(
        "layer_explodes",
        "one layer's gradient explodes",
        (Answer("layers"),),
        in_loop(LayerGradient),
        100,
        30,
        earliest="during",
    ),
    Kind(
        "layer_vanishes",
        "one layer's gradient vanishes",
        (Answer("layers"),),
        in_loop(LayerGradient),
        1 / 100,
        1 / 30,
        earliest="during",
    ),
    Kind(
        "loss_nan",
        "the loss is NaN from a step on",
        (Answer("nonfinite"),),
        in_loop(NanLoss),
        40,
        20,
        r"finite",
        earliest="during",
    ),
)

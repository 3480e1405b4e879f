"""The activations of each adapted module: the size of its input, and what the adapter adds to its output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training_lens.collectors.layer_activations import TokenPositions
from training_lens.core import table_names as tables
from training_lens.core.collector import CaptureContext, CollectorRegistry, DataCollector
from training_lens.core.modules import AdapterModule, adapter_modules
from training_lens.core.types import Cadence, Captured, DataType, Moment
from training_lens.utils.devices import move_to_device, move_to_one_device

PARTS = ("input", "down", "up", "output", "frozen")


class LoRAActivationTracker:
    """Within the block, measures each adapted module's activations in every forward pass with the adapter on.

    It takes at most 256 real positions of a pass, and averages over all positions of all passes. Passes with the
    adapter off do not count, and neither does an inactive adapter. It reads the module's input and output alone and
    computes A x and s B A x from them in float32, without the dropout of A's input: so it works with kernels that fuse
    them. W x is the output minus s B A x and bias; with DoRA or several active adapters, the frozen layer runs once
    more. It leaves the model unchanged.

    Experts of one parameter are left out: each gets tokens of its own within the module.

    Args:
        model: a PEFT model.
        modules: the adapted modules to measure; None: all.
        attention_mask: (rows, width), true where there is no padding, the same for all passes; None: that of the
            model's call, or every position where the call has none.

    Raises:
        LensError: the model has no LoRA module.

    Example:
        with LoRAActivationTracker(model) as tracker, torch.no_grad():
            for batch in batches:
                model(**batch)
        print(dict(zip(tracker.names, tracker.measures()["share"].tolist())))
    """

    def __init__(
        self, model: Any, modules: Sequence[AdapterModule] | None = None, attention_mask: Tensor | None = None
    ) -> None:
        self._model = model
        self._modules = tuple(m for m in modules or adapter_modules(model) if m.expert is None)
        self._fixed = TokenPositions.from_mask(attention_mask) if attention_mask is not None else None
        self._positions: TokenPositions | None = self._fixed
        self._sums: dict[int, Tensor] = {}  # index of a module -> (parts, 2): sum of squares, count
        self._handles: list[Any] = []

    @property
    def names(self) -> list[str]:
        """The modules' names, in order."""
        return [module.name for module in self._modules]

    def __enter__(self) -> LoRAActivationTracker:
        self._handles = [self._model.register_forward_pre_hook(self._read_mask, with_kwargs=True)]
        indices_of: dict[torch.nn.Module, list[int]] = defaultdict(list)
        for i, module in enumerate(self._modules):
            indices_of[module.module].append(i)
        for layer, indices in indices_of.items():
            self._handles.append(layer.register_forward_hook(self._build_hook(indices)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def measures(self) -> dict[str, Tensor]:
        """input_rms, down_rms, up_rms, output_rms and share of each module, (modules,), as in `tables.MEASURES`.

        NaN for a module that no pass went through; input_rms is NaN for an embedding, whose input is token ids.
        """
        unknown = torch.full((len(PARTS), 2), torch.nan)
        sums = move_to_one_device(self._sums.get(i, unknown) for i in range(len(self._modules)))
        squares, counts = torch.stack(sums).unbind(-1)  # (modules, parts) each
        means = (squares / counts).sqrt()
        found = {f"{part}_rms": means[:, i] for i, part in enumerate(PARTS) if part != "frozen"}
        return found | {"share": (squares[:, PARTS.index("up")] / squares[:, PARTS.index("frozen")]).sqrt()}

    def _read_mask(self, _model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if self._fixed is None:
            is_padding = isinstance(mask, Tensor) and mask.dim() == 2
            self._positions = TokenPositions.from_mask(torch.as_tensor(mask) != 0) if is_padding else None

    def _build_hook(self, indices: Sequence[int]) -> Any:
        def measure(layer: Any, args: tuple[Any, ...], output: Any) -> None:
            if layer.disable_adapters or not args or not torch.is_tensor(output):
                return
            active = [i for i in indices if self._modules[i].record.adapter in layer.active_adapters]
            with torch.no_grad():
                for i in active:
                    sums = _sum_squares(self._modules[i], *self._select_positions(args[0], output))
                    self._sums[i] = self._sums[i] + sums if i in self._sums else sums

        return measure

    def _select_positions(self, inputs: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (n, in), or token ids (n,), and output (n, out)."""
        output = output.detach()
        positions = self._positions
        if positions is None:
            count = output[..., 0].numel()
            positions = TokenPositions.from_mask(torch.ones(1, count, dtype=torch.bool, device=output.device))
        is_ids = not inputs.is_floating_point()
        selected = positions.select_ids(inputs) if is_ids else positions.select_states(inputs.detach())
        return selected, positions.select_states(output)


def _sum_squares(module: AdapterModule, x: Tensor, output: Tensor) -> Tensor:
    """(parts, 2): each part's sum of squares, and how many numbers it has."""
    layer: Any = module.module
    base = layer.get_base_layer()
    active = [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]
    is_plain_sum = module.magnitude is None and len(active) == 1  # of the frozen layer's output and this adapter's
    frozen = None if is_plain_sum else base.forward(x).float()
    with torch.autocast(x.device.type, enabled=False):
        a, b = (factor.float() for factor in module.factors())
        down = x.float() @ a.T if x.is_floating_point() else a.T[x]  # (n, rank)
        up = module.record.scaling * (down @ b.T)  # (n, out)
        up = up * getattr(base, "embed_scale", 1)  # Gemma's embeddings scale their output
        output = output.float()
        frozen = output - up if frozen is None else frozen
        bias = getattr(base, "bias", None)
        frozen = frozen if bias is None else frozen - bias.detach().float()
        inputs = x.float() if x.is_floating_point() else x.new_full((1,), torch.nan, dtype=torch.float32)
        parts = (inputs, down, up, output, frozen)
        squares = torch.stack([part.square().sum() for part in parts])
    counts = move_to_device(torch.tensor([float(part.numel()) for part in parts]), squares.device)
    return torch.stack([squares, counts], 1)


@CollectorRegistry.register
class LoRAActivationsCollector(DataCollector):
    """The activations of each adapted module on the probe set (table `lora_activations`); see `LoRAActivationTracker`.

    Cost: besides the probe's passes, A and B on 256 tokens.
    """

    name, data_type = tables.LORA_ACTIVATIONS, DataType.LORA_ACTIVATIONS
    moment, cadence = Moment.PROBE, Cadence.PROBE

    @contextmanager
    def probe_hooks(self, context: CaptureContext) -> Iterator[None]:
        """Track the pass with the adapter on."""
        assert context.probe is not None
        with LoRAActivationTracker(context.model, context.modules, context.probe.attention_mask) as self._tracker:
            yield

    def collect(self, context: CaptureContext, step: int) -> Captured | None:
        """Measure the tracked pass."""
        names = self._tracker.names
        return Captured(self._tracker.measures(), rows=names) if names else None

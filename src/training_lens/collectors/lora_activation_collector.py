"""What goes through each adapted module: how large its input is, and what the adapter adds to its output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training_lens.collectors.token_positions import Positions
from training_lens.core import table_names as tables
from training_lens.core.collector import DataCollector, Watched
from training_lens.core.modules import AdapterModule, adapter_modules
from training_lens.core.registry import CollectorRegistry
from training_lens.core.types import Cadence, Captured, DataType, Moment

PARTS = ("input", "down", "up", "output", "frozen")


class LoRAActivationTracker:
    """Within the block, what goes through each adapted module in every forward pass that you make with the adapter on.

    Measured are at most 256 real positions of a pass; means are over all positions of all passes together. Passes with
    the adapter switched off do not count, and neither does an adapter that is not active. The module's input and output
    alone are read, and A x, s B A x computed from them in float32, so that a kernel which fuses them is no obstacle;
    without the dropout of A's input. W x is the output without s B A x and bias; of DoRA, and where several adapters
    are active, the frozen layer is asked for it once more. It changes nothing of the model.

    Args:
        model: a PEFT model.
        modules: which to look at; None: all that the lens finds.
        real: (rows, width), true where there is no padding, the same for all passes; None: the `attention_mask` that
            the model is called with, and every position where it has none.

    Raises:
        LensError: the model has no LoRA module.

    Example:
        with LoRAActivationTracker(model) as tracker, torch.no_grad():
            for batch in batches:
                model(**batch)
        print(dict(zip(tracker.names, tracker.measures()["share"].tolist())))
    """

    def __init__(self, model: Any, modules: Sequence[AdapterModule] | None = None, real: Tensor | None = None) -> None:
        self._model, self._modules = model, tuple(modules or adapter_modules(model))
        self._fixed = Positions.of_mask(real) if real is not None else None
        self._positions: Positions | None = self._fixed
        self._sums: dict[int, Tensor] = {}  # index of a module -> (parts, 2): sum of squares, numbers
        self._handles: list[Any] = []

    @property
    def names(self) -> list[str]:
        """Of the modules, in order."""
        return [module.name for module in self._modules]

    def __enter__(self) -> LoRAActivationTracker:
        self._handles = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        at: dict[torch.nn.Module, list[int]] = defaultdict(list)
        for i, module in enumerate(self._modules):
            at[module.module].append(i)
        for layer, indices in at.items():
            self._handles.append(layer.register_forward_hook(self._hook(indices)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def measures(self) -> dict[str, Tensor]:
        """input_rms, down_rms, up_rms, output_rms and share of each module, (modules,), as in `tables.MEASURES`.

        NaN for a module that no pass went through, and input_rms for an embedding, whose input is no vector.
        """
        unknown = torch.full((len(PARTS), 2), torch.nan)
        device = next(iter(self._sums.values())).device if self._sums else unknown.device
        sums = [self._sums.get(i, unknown).to(device, non_blocking=True) for i in range(len(self._modules))]
        squares, counts = torch.stack(sums).unbind(-1)  # (modules, parts) each
        means = (squares / counts).sqrt()
        found = {f"{part}_rms": means[:, i] for i, part in enumerate(PARTS) if part != "frozen"}
        return found | {"share": (squares[:, PARTS.index("up")] / squares[:, PARTS.index("frozen")]).sqrt()}

    def _begin(self, _model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if self._fixed is None:
            self._positions = Positions.of_mask(mask != 0) if torch.is_tensor(mask) and mask.dim() == 2 else None

    def _hook(self, indices: Sequence[int]) -> Any:
        def see(layer: Any, given: tuple[Any, ...], output: Any) -> None:
            if layer.disable_adapters or not given or not torch.is_tensor(output):
                return
            active = [i for i in indices if self._modules[i].record.adapter in layer.active_adapters]
            with torch.no_grad():
                for i in active:
                    seen = _seen(self._modules[i], *self._at_positions(given[0], output))
                    self._sums[i] = self._sums[i] + seen if i in self._sums else seen

        return see

    def _at_positions(self, given: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Input (n, in), or token ids (n,), and output (n, out)."""
        output = output.detach()
        positions = self._positions
        if positions is None:
            positions = Positions.of_mask(torch.ones(1, output[..., 0].numel(), dtype=torch.bool, device=output.device))
        ids = not given.is_floating_point()
        return positions.of_ids(given) if ids else positions.of(given.detach()), positions.of(output)


def _seen(module: AdapterModule, x: Tensor, output: Tensor) -> Tensor:
    """(parts, 2): the sum of squares and the numbers that it is of."""
    frozen = None if _adds_to_frozen(module) else _bare(module, _frozen_output(module, x))
    with torch.autocast(x.device.type, enabled=False):
        down, up = _through_adapter(module, x)
        output = output.float()
        frozen = _bare(module, output - up) if frozen is None else frozen
        given = x.float() if x.is_floating_point() else x.new_full((1,), torch.nan, dtype=torch.float32)
        parts = (given, down, up, output, frozen)
        squares = torch.stack([part.square().sum() for part in parts])
    counts = torch.tensor([float(part.numel()) for part in parts]).to(squares.device, non_blocking=True)
    return torch.stack([squares, counts], 1)


def _through_adapter(module: AdapterModule, x: Tensor) -> tuple[Tensor, Tensor]:
    """A x (n, rank) and s B A x (n, out), float32."""
    a, b = (factor.float() for factor in module.factors())
    down = x.float() @ a.T if x.is_floating_point() else a.T[x]
    up = module.record.scaling * (down @ b.T)
    scale = getattr(_frozen(module), "embed_scale", None)  # Gemma's embeddings scale what they give
    return down, up if scale is None else up * scale


def _frozen(module: AdapterModule) -> Any:
    return module.module.get_base_layer()  # type: ignore[operator]


def _frozen_output(module: AdapterModule, x: Tensor) -> Tensor:
    output: Tensor = _frozen(module).forward(x)
    return output


def _bare(module: AdapterModule, output: Tensor) -> Tensor:
    """The frozen layer's output without its bias, float32."""
    bias = getattr(_frozen(module), "bias", None)
    return output.float() if bias is None else output.float() - bias.detach().float()


def _adds_to_frozen(module: AdapterModule) -> bool:
    """Whether the module's output is that of the frozen layer and of this adapter, added."""
    layer: Any = module.module
    here = [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]
    return module.magnitude is None and len(here) == 1


@CollectorRegistry.register
class LoRAActivationsCollector(DataCollector):
    """What goes through each adapted module on the probe set (table `lora_activations`); see `LoRAActivationTracker`.

    Cost: beside the probe's passes, that of A and B on 256 tokens.
    """

    name, data_type = tables.LORA_ACTIVATIONS, DataType.LORA_ACTIVATIONS
    moment, cadence = Moment.PROBE, Cadence.PROBE

    @contextmanager
    def watching(self, watched: Watched) -> Iterator[None]:
        """Look at the pass with the adapter on."""
        assert watched.probe is not None
        with LoRAActivationTracker(watched.model, watched.modules, watched.probe.real) as self._tracker:
            yield

    def collect(self, watched: Watched, step: int) -> Captured:
        """Of what went through the modules."""
        return Captured(self._tracker.measures(), rows=watched.names)

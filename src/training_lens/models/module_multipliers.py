"""A multiplier for each adapted module: 0 computes the base's module, 1 the adapter's, between them the line.

An adapted module's output is y0 + alpha (y1 - y0), where y0 is the output with the base's weight W and y1 that with the
adapted W', both on the module's own input. That is the weight W + alpha (W' - W) wherever the output is linear in the
weight: LoRA, rsLoRA, PiSSA, DoRA, and linear layers, embeddings and norms that were trained whole. Of a larger module
trained whole, the path lies in its outputs.

So the derivative by alpha is <dL/dy, y1 - y0>, which for LoRA is <dL/dB', B> with B' = alpha B the factor in use. It
asks for no gradient by an adapter's own parameters, of which PEFT's DoRA computes another one (it detaches the norm).
A module that several places share has one multiplier; tied weights have one for each place. Experts in one parameter
have one together, on their B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils import parametrize

from training_lens.errors import AdapterError
from training_lens.models.adapter_scale import adapter_layers, base_module
from training_lens.models.experts import is_expert_adapter
from training_lens.models.token_scores import backward_nll


class MixedRowsError(Exception):
    """A module's output has no dimension of rows, as of experts that get the tokens of all rows in one list."""


class ModuleMultipliers:
    """The multipliers of a PEFT model's adapted modules. They apply within `scaled` and `with_gradient`.

    Example:
        multipliers = ModuleMultipliers(session.model)
        with multipliers.apply_values([0.0] * len(multipliers.names)):
            ...  # the model computes as its base
    """

    def __init__(self, model: Any) -> None:
        """Cost: none; nothing changes in the model.

        Raises:
            AdapterError: the adapter adapts no module, as a tuned prompt does.
        """
        self.model = model
        layers = {id(layer): (path, layer) for path, layer in reversed(adapter_layers(model))}
        if not layers:
            raise AdapterError("the model carries no adapter of its modules: there is nothing to explain. Give a LoRA.")
        self.names = tuple(path for path, _ in reversed(layers.values()))
        self.layers = tuple(layer for _, layer in reversed(layers.values()))
        self._values: Tensor | Sequence[float] = ()
        self._places: Tensor | None = None  # the row of each position, where rows were flattened

    @contextmanager
    def apply_values(self, values: Sequence[float]) -> Iterator[None]:
        """Within the block module i's update is multiplied by `values[i]`; at 0 and 1 no bit differs from the ends."""
        assert len(values) == len(self.names)
        with self._install_hooks(list(values)):
            yield

    def compute_gradients(
        self,
        input_ids: Int[Tensor, "rows width"],
        loss_mask: Bool[Tensor, "rows width"],
        lengths: Sequence[int],
        alpha: float,
    ) -> tuple[Float[Tensor, "rows modules"], Float[Tensor, targets]]:
        """d(a row's summed loss)/dalpha_m of every row at alpha_m = `alpha`, and each supervised token's loss there.

        All rows come from one backward pass, because each has multipliers of its own. Cost: one forward and one
        backward pass; the output of each adapted module is kept for it.

        Raises:
            MixedRowsError: a module mixes the rows; give one row at a time.
        """
        dtype = torch.float64 if next(self.model.parameters()).dtype == torch.float64 else torch.float32
        shape = len(input_ids), len(self.names)
        values = torch.full(shape, alpha, dtype=dtype, device=input_ids.device, requires_grad=True)
        with torch.enable_grad(), self._install_hooks(values):
            nll = backward_nll(self.model, input_ids, loss_mask, lengths, self._mark_rows)
        return (torch.zeros_like(values) if values.grad is None else values.grad), nll

    @contextmanager
    def _install_hooks(self, values: Tensor | Sequence[float]) -> Iterator[None]:
        handles = []
        try:
            self._values = values
            for i, layer in enumerate(self.layers):
                if is_expert_adapter(layer):
                    handles.append(self._multiply_experts(i, layer))
                    continue
                hook, module, with_kwargs = self._build_hook(i, layer)
                handles.append(module.register_forward_hook(hook, with_kwargs=with_kwargs))
            yield
        finally:
            self._values = ()
            for handle in handles:
                handle.remove()

    @contextmanager
    def _mark_rows(self, places: Int[Tensor, positions]) -> Iterator[None]:
        """Within the block outputs are (1, positions, ...), each position of the row that `places` says."""
        self._places = places
        try:
            yield
        finally:
            self._places = None

    def _build_hook(self, i: int, layer: Any) -> tuple[Callable[..., Any], Any, bool]:
        """The hook of a module, the module that it is called after, and whether it takes keyword arguments."""
        if (factor := find_output_factor(layer)) is not None:
            return (lambda _module, _inputs, update: self._multiply(i, update)), factor, False

        def blend(_module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], adapted: Any) -> Any:
            if self._is_one(i):
                return adapted
            base = base_module(layer)(*inputs, **keywords)
            if not isinstance(adapted, Tensor):
                raise AdapterError(
                    f"'{self.names[i]}' was trained whole and returns a {type(adapted).__name__}, which has no line "
                    "from the base's to the adapter's. Only modules that return one tensor can be explained."
                )
            return self._blend(i, base, adapted)

        return blend, layer, True

    def _multiply_experts(self, i: int, layer: Any) -> Any:
        """Multiply B of the experts in a parameter; what is returned has `remove`."""
        if isinstance(self._values, Tensor) and len(self._values) > 1:
            raise MixedRowsError(self.names[i])
        (name,) = layer.active_adapters
        value = self._values[0, i] if isinstance(self._values, Tensor) else float(self._values[i])
        return _MultipliedWeight(layer.lora_B[name], value)

    def _is_one(self, i: int) -> bool:
        return not isinstance(self._values, Tensor) and self._values[i] == 1

    def _multiply(self, i: int, update: Tensor) -> Tensor:
        return update if self._is_one(i) else update * self._weight(i, update)

    def _blend(self, i: int, base: Tensor, adapted: Tensor) -> Tensor:
        weight = self._weight(i, adapted)
        if not isinstance(weight, Tensor):
            return torch.lerp(base.to(adapted.dtype), adapted, weight)
        wide = torch.promote_types(weight.dtype, adapted.dtype)
        return torch.lerp(base.to(wide), adapted.to(wide), weight.to(wide)).to(adapted.dtype)

    def _weight(self, i: int, output: Tensor) -> Tensor | float:
        """Module i's multiplier for each row of an output, (rows, 1, ...), or one for all."""
        if not isinstance(self._values, Tensor):
            return float(self._values[i])
        column = self._values[:, i]
        if self._places is not None:
            return column[self._places].view(1, -1, *[1] * (output.ndim - 2))
        if len(column) == 1:
            return column
        if output.ndim < 3 or len(output) != len(column):
            raise MixedRowsError(self.names[i])
        return column.view(-1, *[1] * (output.ndim - 1))


class _MultipliedWeight(torch.nn.Module):
    """A linear layer's weight times a number, until `remove`."""

    def __init__(self, linear: torch.nn.Module, factor: Tensor | float) -> None:
        super().__init__()
        self._linears, self._factor = (linear,), factor  # in a tuple, so that it is no part of this module
        parametrize.register_parametrization(linear, "weight", self)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self._factor

    def remove(self) -> None:
        parametrize.remove_parametrizations(self._linears[0], "weight", leave_parametrized=False)


def find_output_factor(layer: Any) -> Any:
    """The module that computes B (A x) of a plain LoRA on a linear layer, whose multiple is that of the update.

    None of other layers: with DoRA, on an embedding or experts, trained whole.
    """
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or layer.lora_variant or is_expert_adapter(layer):
        return None
    (name,) = layer.active_adapters
    return dict(layer.lora_B).get(name)

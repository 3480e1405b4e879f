"""The loss of a micro-batch, by the fastest path that the model has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from training_lens.errors import ModelLoadingError
from training_lens.models.fast.install import PROBE_TOKENS, forward_packed, install_kernels
from training_lens.models.fast.losses import linear_nll, nll, sum_by_example
from training_lens.models.fast.native.attention_kernels import PackedSequences
from training_lens.models.fast.token_dropout import draw_token_keys
from training_lens.models.fast.token_rows import head_rows, install_token_rows
from training_lens.models.fast.tolerance import WHOLE_MODEL, is_close
from training_lens.models.model_classes import decoder_of, evaluation_mode, unwrap_adapter
from training_lens.models.quantization import is_quantized
from training_lens.models.rotary import padded_positions
from training_lens.models.token_scores import logits_from_states
from training_lens.utils.devices import Precision, move_to_device

TOKEN_MULTIPLE = 64  # packed tokens are filled up to one: a product of a new shape costs oneDNN time to prepare
COMPARED_STATES = 4  # random states on which the output layer alone is compared with what the model makes of them


class Engine:
    """A PEFT model in training: with kernels installed in place, and the loss of supervised positions only.

    `precision` is that in which autocast lets the passes compute; fp32: the weights' own.

    Raises:
        ModelLoadingError: see `require_causal`.

    Example:
        engine = Engine(model)
        engine.loss_sum(input_ids, loss_mask).backward()
    """

    def __init__(self, model: Any, precision: Precision = "fp32") -> None:
        self.model = model
        require_causal(model)
        self.kernels = install_kernels(model, precision)
        self.kernels.count_modules("modules with new tokens", install_token_rows(model))
        self._decoder = decoder_of(model)
        self._whole = unwrap_adapter(model)
        self._head = self._whole.get_output_embeddings()
        self._dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad}
        self._device = next(self._decoder.parameters()).device
        self._output: type | None = None  # the type of what the decoder gives, known from its first pass
        self._rows = head_rows(self._head)
        own = None if self._rows is None else self._rows.values
        self._head_trains = any(p.requires_grad for p in self._head.parameters() if p is not own)

    @property
    def can_pack(self) -> bool:
        """Whether micro-batches may be packed sequences, without padding."""
        return self.kernels.can_pack

    def loss_sum(
        self,
        input_ids: Int[Tensor, "rows width"],
        loss_mask: Bool[Tensor, "rows width"],
        packed_lengths: Sequence[int] = (),
        padded_lengths: Sequence[int] = (),
    ) -> Float[Tensor, ""]:
        """Negative log-likelihood in nats of all supervised tokens given what stands before them, summed, float32.

        Arguments, cost and formula are those of `row_losses`, which also gives its terms.
        """
        return self.row_losses(input_ids, loss_mask, packed_lengths, padded_lengths)[0]

    def row_losses(
        self,
        input_ids: Int[Tensor, "rows width"],
        loss_mask: Bool[Tensor, "rows width"],
        packed_lengths: Sequence[int] = (),
        padded_lengths: Sequence[int] = (),
        example_keys: Int[Tensor, " examples"] | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " examples"]]:
        """The loss of a micro-batch, in nats and float32: summed over all supervised tokens, and over each example's.

        Only the first has a gradient. Formula: sum of -log softmax(h_t W^T)[x_{t+1}] over every t with loss_mask[t+1].
        The hidden states of other positions are dropped before the output layer. Given on the CPU, as they come from
        the data, the arguments are moved here, and nothing waits for the device.

        Args:
            loss_mask: true at the tokens that are targets; at an example's first one it has no say.
            packed_lengths: the lengths of the packed examples in the one row; empty: rows padded on the right.
            padded_lengths: the lengths of rows that are padded, without which a long-rope model takes them as whole.
            example_keys: of `draw_example_keys`, by which the examples' tokens are dropped in training mode; None: by
                torch's random state.
        """
        packed = None
        if packed_lengths:
            spare = -sum(packed_lengths) % TOKEN_MULTIPLE
            packed = PackedSequences((*packed_lengths, spare) if spare else tuple(packed_lengths))
            input_ids, loss_mask = pad(input_ids, (0, spare)), pad(loss_mask, (0, spare))
            loss_mask = loss_mask.index_fill(1, packed.cu_seqlens(loss_mask.device)[:-1].long(), False)
        self._begin_dropout(example_keys, packed, input_ids.shape[1])
        rows, columns = loss_mask[:, 1:].nonzero(as_tuple=True)
        counts = _count_targets(loss_mask, packed_lengths)
        wanted = input_ids[rows, columns + 1]
        input_ids, rows, columns, wanted = (move_to_device(t, self._device) for t in (input_ids, rows, columns, wanted))
        kind = self._device.type
        # Where the base has autocast's dtype and kernels cast the rest, autocast would only add casts.
        adds_nothing = not self.kernels.skipped and self._dtypes == {torch.get_autocast_dtype(kind)}
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind) and not adds_nothing):
            states = self._hidden_states(input_ids, packed, padded_lengths)[rows, columns]
            total, losses = self._target_nll(states, wanted)
        return total, sum_by_example(losses.detach(), counts)

    def _begin_dropout(self, example_keys: Tensor | None, packed: PackedSequences | None, width: int) -> None:
        keys = None
        if example_keys is not None and self.kernels.installed["dropouts"]:
            lengths = packed.lengths if packed else ()
            example_keys = pad(example_keys, (0, max(0, len(lengths) - len(example_keys))))  # what fills up has none
            keys = draw_token_keys(example_keys, lengths, None if packed else width)
            keys = move_to_device(keys, self._device)
        self.kernels.draws.begin_pass(keys)

    def _hidden_states(
        self, input_ids: Tensor, packed: PackedSequences | None, padded_lengths: Sequence[int]
    ) -> Tensor:
        """The last layer's, (rows, width, hidden)."""
        if packed:
            output = forward_packed(self._decoder, input_ids, packed)
        else:
            places = padded_positions(self._decoder, padded_lengths, input_ids.shape[1], input_ids.device)
            output = self._decoder(input_ids=input_ids, use_cache=False, **places)
        self._output = type(output)
        states: Tensor = output[0]
        return states

    def _target_nll(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the targets' losses, and each of them."""
        rows = self._rows if self._rows is not None and self._rows.is_active else None
        if self._head_is_plain:
            head = self._head if self._rows is None else self._rows.base
            own = (rows.values, rows.ids) if rows else None
            with torch.autocast(states.device.type, enabled=False):
                return linear_nll(states.to(head.weight.dtype), head.weight, head.bias, targets, own)
        if self._head_trains:
            losses = cross_entropy(self._head_logits(states), targets, reduction="none")
            return losses.sum(), losses
        return nll(states, self._head_logits, targets, rows.values if rows else None)

    def _head_logits(self, states: Tensor) -> Tensor:
        assert self._output is not None, "the decoder was asked for the states"
        return logits_from_states(self._whole, states, self._output)

    @cached_property
    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        """Whether logits are the output layer's product, with no scale or softcap after it."""
        head = self._head
        base = head if self._rows is None else self._rows.base
        if self._head_trains or type(base) is not nn.Linear or not base.weight.is_floating_point():
            return False
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(COMPARED_STATES, base.in_features, generator=generator).to(base.weight)
        states *= 100  # so that a cap shows
        return torch.equal(head(states).float(), self._head_logits(states))


def _count_targets(loss_mask: Tensor, packed_lengths: Sequence[int]) -> Tensor:
    """How many targets each example has, (examples,) int64 on the CPU."""
    if not packed_lengths:
        return loss_mask[:, 1:].sum(1).cpu()
    done = pad(loss_mask[0].cpu().cumsum(0), (1, 0))
    return done[pad(torch.tensor(packed_lengths).cumsum(0), (1, 0))].diff()


@torch.no_grad()
def require_causal(model: Any) -> None:
    """Refuse a model whose tokens see later ones, or whose logits are not the output layer's of its decoder.

    Training calls the decoder only, and pads on the right; some multimodal models read a prompt in both directions.
    Quantized models, whose rounding may depend on all tokens of a batch, and models that give no finite numbers are not
    compared: the first step reports those.
    Cost: a pass of a few tokens and one of half as many; one more where the decoder is not the whole base model.

    Raises:
        ModelLoadingError: states or logits differ.
    """
    whole = unwrap_adapter(model)
    decoder = decoder_of(whole)
    ids = torch.arange(3, 3 + PROBE_TOKENS, device=next(decoder.parameters()).device)[None]
    if is_quantized(model):
        return
    with evaluation_mode(whole):
        output, half = (decoder(input_ids=part, use_cache=False) for part in (ids, ids[:, : PROBE_TOKENS // 2]))
        if not output[0].isfinite().all():
            return
        is_causal = is_close(output[0][:, : PROBE_TOKENS // 2], half[0], WHOLE_MODEL)
        if is_causal and whole.base_model is not decoder:
            found = logits_from_states(whole, output[0][0], type(output))
            wanted = whole(input_ids=ids, use_cache=False).logits[0]
            is_causal = is_close(found.to(wanted.dtype), wanted, WHOLE_MODEL)
    if not is_causal:
        raise ModelLoadingError(
            f"model.id: a {type(whole).__name__} does not read a text token by token (those of a prompt may see each "
            "other), so it would be trained on something else than it answers with. Give a model whose text is causal."
        )

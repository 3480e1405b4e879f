"""The built-in tables and what their columns mean. Collectors write them, and analysis reads them."""

from __future__ import annotations

from training_lens.core.types import DataType

GRADIENTS = "adapter_gradients"
WEIGHTS = "adapter_weights"
BASE = "base_weights"
SPECTRA = "spectra"
SNAPSHOTS = "adapters"
OPTIMIZER = "optimizer_state"
LORA_ACTIVATIONS = "lora_activations"
ACTIVATIONS = "activations"
DIVERGENCE = "divergence"
ROUTER_LOAD = "router_load"
LOSS = "loss"
EVALUATION = "evaluation"
ROW_LOSSES = "row_losses"
HELD_OUT_LOSSES = "held_out_row_losses"
STATES = "states"  # no table: the folder of the run's kept states, see `training.kept_states`

# The tables that the training loop fills, not a collector.
LOOP_TABLES = {
    LOSS: DataType.LOSS,
    EVALUATION: DataType.LOSS,
    ROW_LOSSES: DataType.ROW_LOSSES,
    HELD_OUT_LOSSES: DataType.ROW_LOSSES,
}
NEVER_THINNED = (
    ROW_LOSSES,
    HELD_OUT_LOSSES,
)  # tables of many rows a step, limited in another way than by dropping steps

# table -> measure -> its definition. dW = s B A is what the adapter adds to a frozen weight W.
MEASURES: dict[str, dict[str, str]] = {
    GRADIENTS: {
        "norm_a": "Frobenius norm of dL/dA, accumulated, unscaled, before clipping (with several processes, after it)",
        "norm_b": "the same for dL/dB",
        "norm_magnitude": "the same for dL/dm, with DoRA only",
        "cosine_previous": "cosine of (dL/dA, dL/dB) with the previous captured step's",
        "cosine_mean": "cosine with the running mean of the earlier captured ones (decay 0.9); restarts on a resume",
        "self_check": "|B^T dB - dA A^T| / (|B| |dB| + |dA| |A|): 0 up to rounding if the capture is correct",
    },
    WEIGHTS: {
        "norm_a": "Frobenius norm of A",
        "norm_b": "Frobenius norm of B",
        "norm_update": "Frobenius norm of dW (with DoRA: of its low-rank part)",
        "norm_step": "Frobenius norm of the change of dW in this step",
        "balance": "Frobenius norm of A A^T - B^T B",
    },
    BASE: {
        "norm": "Frobenius norm of W",
        "top": "largest singular value of W, a lower bound within about 1 %",
    },
    SPECTRA: {
        "singular_values": "of dW, descending",
        "effective_rank": "exp of the entropy of the normalized singular values",
        "stable_rank": "|dW|_F^2 / sigma_1^2",
        "energy_rank": "number of directions that hold 90 % of |dW|_F^2",
        "top_ratio": "sigma_1(B) / sigma_1(A)",
        "magnitude_change": "DoRA: mean of |m' - |W|| over rows, m' the row norms of the adapted weight",
        "direction_change": "DoRA: mean of 1 - cosine between the rows of W and of the adapted weight",
    },
    OPTIMIZER: {
        "update_rms_a": "sqrt(mean(g^2 / max(v, eps^2))) of A: 1 for constant gradients, far above 1 after a spike",
        "update_rms_b": "the same for B",
    },
    LORA_ACTIVATIONS: {
        "input_rms": "root mean square of A's input",
        "down_rms": "of A's output",
        "up_rms": "of B's output, scaled",
        "output_rms": "of the whole module's output",
        "share": "norm of the adapter's output over that of the frozen weight's",
    },
    ACTIVATIONS: {
        "mean": "mean of the layer's output",
        "rms": "root mean square of the layer's output",
        "drift": "|h - h0|_F / |h0|_F, h0 without the adapter",
        "cka": "debiased linear CKA of h and h0",
    },
    ROUTER_LOAD: {
        "share": "share of the probe's tokens that a mixture's expert gets; a layer's sum to 1",
        "base_share": "the same without the adapter",
    },
    DIVERGENCE: {
        "kl": "mean over the probe's supervised tokens of KL(p_base || p_adapter), nats",
        "loss": "loss on the probe set, nats per supervised token",
        "loss_error": "its standard error over examples, NaN with a single one",
        "base_loss": "the base model's loss",
        "tokens": "supervised tokens in these means",
    },
    LOSS: {
        "loss": "training loss of the step, nats per supervised token",
        "lr": "learning rate",
        "grad_norm": "norm of all gradients together, before clipping",
        "clip": "the factor that clipping applied to the gradients, 1 if none",
        "epoch": "epochs done after the step",
        "tokens": "tokens of the step",
        "supervised_tokens": "supervised tokens of the step",
        "seconds": "duration of the step",
    },
    ROW_LOSSES: {
        "loss": "loss of a training row at this visit, before the step's update, nats per supervised token",
        "tokens": "supervised tokens of the row",
    },
    HELD_OUT_LOSSES: {
        "loss": "loss of a validation row at this validation, nats per supervised token; at step 0 the base's",
        "tokens": "supervised tokens of the row",
    },
    EVALUATION: {
        "loss": "validation loss, nats per supervised token",
        "base_loss": "the base model's, at step 0",
        "sample_loss": "of a fixed sample of the rows, validated more often; at step 0 the base model's",
        "sample_error": "the standard error of sample_loss over rows",
        "swap_gain": "loss of held-out answers given prompts of other rows, minus that given their own; at the end",
        "swap_error": "the standard error of swap_gain over rows",
        "base_swap_gain": "the same of the base model",
        "base_swap_error": "its standard error",
        "train_swap_gain": "the same of the adapter on training rows",
        "train_swap_error": "its standard error",
        "swap_rows": "held-out rows in swap_gain",
    },
}

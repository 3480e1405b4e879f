"""The built-in tables and what their columns mean. Collectors write them, and analysis reads them."""

from __future__ import annotations

GRADIENTS = "adapter_gradients"
WEIGHTS = "adapter_weights"
BASE = "base_weights"
SPECTRA = "spectra"
SNAPSHOTS = "adapters"
OPTIMIZER = "optimizer_state"
LORA_ACTIVATIONS = "lora_activations"
ACTIVATIONS = "activations"
DIVERGENCE = "divergence"
LOSS = "loss"
EVALUATION = "evaluation"

# table -> measure -> its definition. dW = s B A is what the adapter adds to a frozen weight W.
MEASURES: dict[str, dict[str, str]] = {
    GRADIENTS: {
        "norm_a": "Frobenius norm of dL/dA, accumulated, unscaled, before clipping (of several processes after it)",
        "norm_b": "the same of dL/dB",
        "norm_magnitude": "the same of dL/dm, DoRA alone",
        "cosine_previous": "cosine of (dL/dA, dL/dB) with that of the step captured before",
        "cosine_mean": "cosine with the running mean of those captured earlier (decay 0.9); begins anew on a resume",
        "self_check": "|B^T dB - dA A^T| / (|B| |dB| + |dA| |A|): 0 up to rounding where the capture is right",
    },
    WEIGHTS: {
        "norm_a": "Frobenius norm of A",
        "norm_b": "Frobenius norm of B",
        "norm_update": "Frobenius norm of dW (of DoRA: of its low-rank part)",
        "norm_step": "Frobenius norm of the change of dW in this step",
        "balance": "Frobenius norm of A A^T - B^T B",
    },
    BASE: {
        "norm": "Frobenius norm of W",
        "top": "largest singular value of W, from below, within about 1 %",
    },
    SPECTRA: {
        "singular_values": "of dW, falling",
        "effective_rank": "exp of the entropy of the singular values' shares",
        "stable_rank": "|dW|_F^2 / sigma_1^2",
        "energy_rank": "how many directions hold 90 % of |dW|_F^2",
        "top_ratio": "sigma_1(B) / sigma_1(A)",
        "magnitude_change": "DoRA: mean of |m' - |W|| over rows, m' the norms of the whole weight's rows",
        "direction_change": "DoRA: mean of 1 - cosine between rows of W and of the whole weight",
    },
    OPTIMIZER: {
        "update_rms_a": "sqrt(mean(g^2 / max(v, eps^2))) of A: 1 for steady gradients, far above after a jump",
        "update_rms_b": "the same of B",
    },
    LORA_ACTIVATIONS: {
        "input_rms": "root mean square of what goes into A",
        "down_rms": "of what comes out of A",
        "up_rms": "of what comes out of B, scaled",
        "output_rms": "of what comes out of the whole module",
        "share": "norm of the adapter's output over that of the frozen weight's",
    },
    ACTIVATIONS: {
        "mean": "mean of the layer's output",
        "rms": "root mean square of the layer's output",
        "drift": "|h - h0|_F / |h0|_F, h0 without the adapter",
        "cka": "debiased linear CKA of h and h0",
    },
    DIVERGENCE: {
        "kl": "mean over the probe's supervised tokens of KL(p_base || p_adapter), nats",
        "loss": "loss on the probe set, nats per supervised token",
        "base_loss": "that of the base",
        "tokens": "supervised tokens that these are means over",
    },
    LOSS: {
        "loss": "training loss of the step, nats per supervised token",
        "lr": "learning rate",
        "grad_norm": "norm of all gradients together, before clipping",
        "clip": "what the gradients were multiplied by: under 1 where they were clipped",
        "epoch": "epochs done after the step",
        "tokens": "tokens of the step",
        "supervised_tokens": "tokens of the step that are learned",
        "seconds": "the step took",
    },
    EVALUATION: {
        "loss": "validation loss, nats per supervised token",
        "base_loss": "that of the base, at step 0",
    },
}

"""`model.backend=unsloth`: in training, unsloth's kernels compute the base and its adapter.

unsloth replaces code of transformers and PEFT when it is imported and when it loads a model. So this module alone
imports it, before transformers, and only for a run that asks for it. Adapter, loop, lens and everything that is saved
are ours; whatever uses the adapter afterwards loads it without unsloth.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError, ModelLoadingError
from training_lens.models.factory import explain_failures, load_model, read_model_config
from training_lens.models.fast.tolerance import WHOLE_MODEL, is_close
from training_lens.models.location import locate_model
from training_lens.models.model_classes import decoder_of, evaluation_mode
from training_lens.utils.compiling import cache_folder
from training_lens.utils.devices import DTYPES, Precision, autocast, free_memory
from training_lens.utils.machine import is_unsloth_installed

MODEL_TYPES = ("llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3")  # those with attention and MLP by unsloth
INSTALLATION = "pip install --no-deps unsloth unsloth_zoo 'trl<=1.15.0'"
ENVIRONMENT = {
    "UNSLOTH_DISABLE_STATISTICS": "1",  # it would download a file to be counted
    "UNSLOTH_DISABLE_CPU_FALLBACK": "1",
    "UNSLOTH_COMPILE_LOCATION": str(cache_folder() / "unsloth"),  # else a folder in the working directory
}
PROBE_TOKENS = 48  # of the text on which results are compared
PROBE_STEP = 37  # between its token ids
PROBE_DEVIATION = 0.02  # of the random numbers that stand in B while kernels are compared, where a fresh one is zero
Function = Callable[..., Any]


def find_obstacles(config: TrainingConfig, device: torch.device, processes: int = 1) -> list[str]:
    """What keeps unsloth from training this run here, a line each; unsloth is not imported."""
    model, peft, training = config.model, config.peft, config.training
    if not is_unsloth_installed():
        return [f"model.backend: unsloth is not installed: {INSTALLATION} (or give transformers)"]
    refusals = {
        f"model.backend: unsloth needs a CUDA GPU, and this run computes on {device}; give transformers": (
            device.type != "cuda"
        ),
        "model.backend: unsloth trains in one process; give transformers, or start one": processes > 1,
        "model.quantization: unsloth loads weights whole or in 4 bits here; give none or 4bit": model.quantization
        == "8bit",
        "model.dtype: unsloth keeps the weights in training.precision; leave it at auto": model.dtype != "auto",
        "model.attention: unsloth has its own; leave it at auto": model.attention != "auto",
        "model.trust_remote_code: unsloth computes classes of transformers alone": model.trust_remote_code,
        "model.resize_embeddings: unsloth does not train whole embeddings here": model.resize_embeddings,
        "data.new_tokens: unsloth trains no single rows of an embedding here; leave them out, or give transformers": (
            bool(config.data.new_tokens)
        ),
        "peft.use_dora: unsloth has no kernels for DoRA; give false, or transformers for model.backend": peft.use_dora,
        "peft.init: the frozen half of a PiSSA start is not known to unsloth; give default": peft.init == "pissa",
        "peft.lora_dropout: unsloth draws its own random numbers, which a resume would not repeat; give 0": (
            peft.lora_dropout > 0
        ),
        "peft.modules_to_save: unsloth changes their number type; leave it out": bool(peft.modules_to_save),
        "training.precision: unsloth computes in bf16 or fp16; fp32 is for transformers": training.precision == "fp32",
    }
    return [reason for reason, applies in refusals.items() if applies]


def require_unsloth(config: TrainingConfig, device: torch.device, processes: int = 1) -> None:
    """Refuse a run that unsloth cannot train here; runs of the other backend pass.

    Raises:
        ConfigurationError: every reason, by key.
    """
    if config.model.backend == "unsloth" and (obstacles := find_obstacles(config, device, processes)):
        raise ConfigurationError([f"{obstacle}." for obstacle in obstacles])


def start_backend(config: TrainingConfig, device: torch.device) -> None:
    """Import unsloth if the run asks for it. Call it before transformers is imported.

    Raises:
        ConfigurationError: see `require_unsloth`; or transformers is imported already.
    """
    require_unsloth(config, device)
    if config.model.backend == "unsloth":
        _import_unsloth()


def _import_unsloth() -> Any:
    """The package, imported with its telemetry off; what it prints goes to standard error.

    Raises:
        ConfigurationError: transformers was imported before it, or the import fails.
    """
    if "unsloth" not in sys.modules and "transformers" in sys.modules:
        raise ConfigurationError(
            "model.backend: unsloth has to be imported before transformers, and transformers is imported already. Put "
            "'import unsloth' first in your program, or use the command training-lens train."
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with redirect_stdout(sys.stderr):
            import unsloth
    except Exception as error:  # it checks versions, GPUs and drivers by errors of every kind
        raise ConfigurationError(
            f"model.backend: unsloth is installed and cannot be imported ({type(error).__name__}: {error}). Install a "
            "version for this GPU and these packages, or give model.backend=transformers."
        ) from error
    return unsloth


def require_supported_type(config: TrainingConfig) -> None:
    """Refuse a base that unsloth would compute by compiled code of transformers, or not at all.

    Raises:
        ConfigurationError: names the model type and those that are supported.
    """
    if config.model.backend != "unsloth":
        return
    found = read_model_config(config.model).model_type
    if found not in MODEL_TYPES:
        raise ConfigurationError(
            f"model.backend: unsloth trains {', '.join(MODEL_TYPES)} here, and '{config.model.id}' is a '{found}'. "
            "Give model.backend=transformers."
        )


def load_unsloth_model(config: TrainingConfig, device: torch.device, precision: Precision) -> Any:
    """The base as unsloth loads it, frozen, after its hidden states were compared with those of transformers alone.

    Cost: the weights are read twice, and are in memory once at a time.

    Raises:
        ModelLoadingError: files are broken, or unsloth computes something else.
    """
    model, unsloth = config.model, _import_unsloth()
    plain = load_model(model, device, precision)
    wanted, rows = _read_states(plain, precision, model.seq_len), len(plain.get_input_embeddings().weight)
    del plain
    free_memory()
    with explain_failures("weights", model), redirect_stdout(sys.stderr):
        loaded, _ = unsloth.FastLanguageModel.from_pretrained(
            locate_model(model),
            revision=model.revision,
            max_seq_length=model.seq_len,
            dtype=DTYPES[precision],
            load_in_4bit=model.quantization == "4bit",
            use_exact_model_name=True,  # else it may load another repository, which is quantized already
            use_gradient_checkpointing=False,
            device_map={"": device},
        )
    loaded.requires_grad_(False).eval()
    is_same = len(loaded.get_input_embeddings().weight) == rows
    if not is_same or not is_close(
        _read_states(loaded, precision, model.seq_len), wanted, WHOLE_MODEL, DTYPES[precision]
    ):
        raise ModelLoadingError(
            f"model.backend: unsloth computes something else of '{model.id}' than transformers, so the adapter would "
            "be trained on another model than the one that it is used with. Give model.backend=transformers."
        )
    loaded.has_own_kernels = True
    return loaded


def fuse_adapter(adapted: Any, config: TrainingConfig) -> Any:
    """The PEFT model with its layers computed by unsloth's kernels, in place, once they were compared with PEFT's own.

    A layer on which a hook waits, such as the lens's in a probe pass, is computed by PEFT itself.

    Raises:
        ModelLoadingError: kernels give other states or gradients than PEFT.
    """
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    with redirect_stdout(sys.stderr):
        adapted = _import_unsloth().FastLanguageModel.patch_peft_model(
            adapted, use_gradient_checkpointing=config.training.gradient_checkpointing
        )
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(name in trained)
    for layer in decoder_of(adapted).layers:
        _heed_hooks(layer)
    precision: Precision = config.training.precision  # type: ignore[assignment]  # a plan has resolved it
    if not _is_fusion_exact(adapted, precision, config.model.seq_len):
        raise ModelLoadingError(
            f"model.backend: unsloth's kernels give other states or gradients than PEFT on '{config.model.id}'. Give "
            "model.backend=transformers."
        )
    return adapted


def _heed_hooks(layer: Any) -> None:
    """Let the projections of a decoder layer be computed one by one while a hook waits on any of them."""
    from unsloth.models.llama import original_apply_o, original_apply_qkv

    attention, mlp = layer.self_attn, layer.mlp
    inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
    attention.apply_qkv = _choose(attention.apply_qkv, original_apply_qkv, inputs)
    attention.apply_o = _choose(attention.apply_o, original_apply_o, [attention.o_proj])
    if "forward" in vars(mlp):
        plain = type(mlp).forward.__get__(mlp)
        mlp.forward = _choose(mlp.forward, plain, [mlp.gate_proj, mlp.up_proj, mlp.down_proj])


def _choose(fused: Function, plain: Function, layers: Sequence[nn.Module]) -> Function:
    def compute(*args: Any, **kwargs: Any) -> Any:
        is_watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
        return (plain if is_watched else fused)(*args, **kwargs)

    return compute


def _read_states(model: Any, precision: Precision, seq_len: int | None) -> Tensor:
    """The last hidden states of a fixed text, (1, tokens, hidden); of no more tokens than unsloth reads of a row."""
    length = min(PROBE_TOKENS, seq_len or PROBE_TOKENS)
    decoder = decoder_of(model)
    weight = model.get_input_embeddings().weight
    ids = (torch.arange(1, length + 1, device=weight.device) * PROBE_STEP % len(weight))[None]
    with evaluation_mode(decoder), torch.set_grad_enabled(hasattr(model, "peft_config")):
        with autocast(weight.device, precision):
            states: Tensor = decoder(input_ids=ids, use_cache=False)[0]
        return states.float()


def _is_fusion_exact(adapted: Any, precision: Precision, seq_len: int | None) -> bool:
    """Whether the kernels give the states and gradients that PEFT's own layers give."""
    trained = [p for p in adapted.parameters() if p.requires_grad]

    def compute() -> list[Tensor]:
        states = _read_states(adapted, precision, seq_len)
        weights = torch.linspace(-1, 1, states.shape[-1], device=states.device)
        gradients = torch.autograd.grad((states * weights).sum(), trained)
        return [states.detach(), torch.cat([g.float().flatten() for g in gradients])]

    with _random_factors(adapted):
        found = compute()
        with _watched(adapted):
            wanted = compute()
    return all(is_close(*pair, WHOLE_MODEL, DTYPES[precision]) for pair in zip(found, wanted, strict=True))


@contextmanager
def _random_factors(adapted: Any) -> Iterator[None]:
    """In the block no B is zero, so that every factor has a gradient; then all are as before."""
    factors = [p for name, p in adapted.named_parameters() if p.requires_grad and "lora_B" in name]
    before = [p.detach().clone() for p in factors]
    generator = torch.Generator().manual_seed(0)  # of its own: the run's random numbers stay what they are
    try:
        for factor in factors:
            factor.data += PROBE_DEVIATION * torch.randn(factor.shape, generator=generator).to(factor.device)
        yield
    finally:
        for factor, value in zip(factors, before, strict=True):
            factor.data = value


@contextmanager
def _watched(adapted: Any) -> Iterator[None]:
    """In the block a hook that does nothing waits on every adapted layer, so PEFT computes it."""
    layers = [m for m in adapted.modules() if hasattr(m, "lora_A")]
    handles = [layer.register_forward_hook(lambda *_: None) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

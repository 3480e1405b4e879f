"""The models of a server: a base and its adapters by name, on one copy of the base in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.config.schema import TrainingConfig
from training_lens.data.examples import Message
from training_lens.errors import ConfigurationError, ModelLoadingError
from training_lens.inference.decode_loop import Decoder
from training_lens.inference.decoder import UnsupportedModelError, build_decoder
from training_lens.inference.sampler import Sampler, generation_options
from training_lens.inference.session import Session, open_session
from training_lens.inference.shared_decoder import AdapterProbe, build_shared_decoder, probe_adapter
from training_lens.models.copies import copy_base
from training_lens.models.fast.layer_spec import UnknownLayerError
from training_lens.models.fast.row_adapters import AdapterOfRow
from training_lens.models.rotary import longest_short_sequence
from training_lens.runs.run_folder import RunFolder
from training_lens.serve.api_errors import ApiError, unknown_model
from training_lens.utils.devices import free_memory
from training_lens.utils.formatting import did_you_mean
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
PROBE = "What is the capital of France, and how many people live there?"  # decoders are verified on its tokens


@dataclass(frozen=True)
class ServedModel:
    """One name of the API.

    Args:
        session: renders prompts; its model is the base.
        shares: the decoder is the base's, and the adapter is computed beside its weights. False: the decoder has the
            adapter in it.
        chosen_scale: by which the adapter's update is multiplied already.
    """

    name: str
    session: Session
    decoder: Decoder
    is_base: bool = False
    shares: bool = True
    chosen_scale: float = 1.0
    samplers: dict[tuple[Any, ...], Sampler] = field(default_factory=dict)

    @property
    def positions(self) -> int | None:
        """The most tokens that a prompt and its answer have together; None: any number."""
        limits = (self.session.positions, longest_short_sequence(self.session.model))
        return min((limit for limit in limits if limit is not None), default=None)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens."""
        return str(self.session.tokenizer.decode(tokens, skip_special_tokens=True))

    def choose_adapter(self, scale: float | None) -> AdapterOfRow | None:
        """The adapter of a row, at a scale, 1 being as trained; None takes the scale chosen for the run.

        Raises:
            ApiError: it has none that can be scaled.
        """
        if scale is not None and (self.is_base or not self.shares or self.chosen_scale == 0):
            raise ApiError(400, f"adapter_scale: {self._explain_fixed_scale()}", "invalid_value", "adapter_scale")
        if self.is_base or not self.shares:
            return None
        return AdapterOfRow(self.name, 1.0 if scale is None else scale / self.chosen_scale)

    def _explain_fixed_scale(self) -> str:
        if self.is_base:
            return f"'{self.name}' is the base, without an adapter."
        if not self.shares:
            return f"the adapter of '{self.name}' has a decoder of its own, which has the scale built in."
        return f"the scale 0 was chosen for '{self.name}', which cannot be undone here."

    def choose_sampler(self, settings: InferenceSection) -> Sampler:
        """The sampler of these settings, made once."""
        key = (settings.temperature, settings.top_p, settings.top_k)
        if key not in self.samplers:
            if len(self.samplers) > 1000:
                self.samplers.clear()
            options = generation_options(settings, self.session.stop_ids, self.session.pad_id)
            self.samplers[key] = Sampler(self.session.model, options, self.session.device)
        return self.samplers[key]


@dataclass(frozen=True)
class ServedModels:
    """All names, the base last."""

    by_name: Mapping[str, ServedModel]
    started: int = field(default_factory=lambda: int(time.time()))

    def find_model(self, name: str) -> ServedModel:
        """Raises an `ApiError` for an unknown name."""
        if name not in self.by_name:
            names = list(self.by_name)
            raise unknown_model(name, f"It has {', '.join(names)}.{did_you_mean(name, names)}")
        return self.by_name[name]

    @property
    def base(self) -> ServedModel:
        return next(model for model in self.by_name.values() if model.is_base)

    @property
    def decoders(self) -> list[Decoder]:
        """Each once."""
        return list({id(model.decoder): model.decoder for model in self.by_name.values()}.values())


def load_models(configs: Mapping[str, TrainingConfig], base_name: str | None = None) -> ServedModels:
    """Load the base once, and every adapter onto it.

    Args:
        configs: by the name in the API; each names its adapter in `inference.adapter`, the first one's base is taken.
        base_name: of the base; None: its `model.id`.

    Raises:
        ConfigurationError: adapters of several bases, or a name twice.
        ModelLoadingError: the decode loop cannot run the model.
        CheckpointError, AdapterError: see `open_session`.
    """
    loader = _Loader()
    for name, config in configs.items():
        loader.load_adapter(name, config)
    return loader.build_models(base_name)


class _Loader:
    """Adapters loaded one after the other onto one base: each leaves its factors, or a decoder of its own."""

    def __init__(self) -> None:
        self._base: Session | None = None
        self._sessions: dict[str, Session] = {}
        self._configs: dict[str, TrainingConfig] = {}
        self._probes: dict[str, AdapterProbe] = {}
        self._refusals: dict[str, str] = {}

    def load_adapter(self, name: str, config: TrainingConfig) -> None:
        session = open_session(config, beside=self._base)
        self._configs[name] = config
        if session.has_adapter:
            try:
                self._probes[name] = probe_adapter(session.model, _read_probe(session))
            except UnknownLayerError as reason:
                self._refusals[name] = str(reason)
        self._sessions[name] = session
        self._keep_base(session)

    def _keep_base(self, session: Session) -> None:
        """Take a session's model without its adapter, which PEFT has put into the base itself."""
        base = copy_base(session.model) if session.has_adapter else session.model
        if self._base is None:
            _require_sampling(session)
        self._base = replace(self._base or session, model=base, adapter=None)

    def build_models(self, base_name: str | None) -> ServedModels:
        base = self._base
        assert base is not None
        self._sessions = {name: replace(session, model=base.model) for name, session in self._sessions.items()}
        try:
            shared, refusals = build_shared_decoder(base.model, _read_probe(base), self._probes)
            own = {name: self._build_own_decoder(name, why) for name, why in (self._refusals | refusals).items()}
        except UnsupportedModelError as reason:
            raise ModelLoadingError(
                f"this model cannot be served: {reason}. training-lens infer --input FILE answers a file with it."
            ) from reason
        models = {
            name: ServedModel(
                name, session, own.get(name, shared), is_base=not session.has_adapter,
                shares=name not in own, chosen_scale=_read_scale(session),
            )
            for name, session in self._sessions.items()
        }  # fmt: skip
        served = next((model.name for model in models.values() if model.is_base), None)
        if served and base_name:
            raise ConfigurationError(
                f"--base-name {base_name}: the base is served as '{served}' already; give {base_name}=none instead."
            )
        if served is None:
            model_id = base.config.model.id
            name = base_name or (Path(model_id).name if Path(model_id).is_dir() else model_id)
            if name in models:
                raise ConfigurationError(f"'{name}' names both an adapter and the base; give --base-name.")
            models[name] = ServedModel(name, base, shared, is_base=True)
        return ServedModels(models)

    def _build_own_decoder(self, name: str, reason: str) -> Decoder:
        import torch

        logger.info("'%s' has a decoder of its own, with copies of the weights: %s", name, reason)
        session = open_session(self._configs[name], beside=self._base)
        ids = torch.tensor([_read_probe(session)], device=session.device)
        try:
            return build_decoder(session.model, False, ids)
        finally:
            session.model.unload()  # the base's modules are as before
            free_memory()


def _read_probe(session: Session) -> Sequence[int]:
    return session.prompt_ids([Message("user", PROBE)])


def _read_scale(session: Session) -> float:
    """By which the update of the session's adapter was multiplied."""
    run = RunFolder(Path(session.source))
    is_chosen = session.has_adapter and session.adapter == run.served_adapter and run.adapter_scale is not None
    return float(run.adapter_scale) if is_chosen else 1.0


def _require_sampling(session: Session) -> None:
    """Refuse a model whose generation config asks for more than sampling from scores."""
    options = generation_options(InferenceSection(), session.stop_ids, session.pad_id)
    if unsupported := Sampler(session.model, options, session.device).unsupported_option:
        raise ModelLoadingError(
            f"this model cannot be served: its generation_config.json asks for {unsupported}. Remove that setting."
        )

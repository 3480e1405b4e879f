"""A model that is ready to answer: a run, a bare adapter or a base alone, with prompts rendered as in training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training_lens.config.run_config import open_run_config
from training_lens.config.schema import TrainingConfig
from training_lens.data.examples import Example, Message
from training_lens.data.fields import are_plain_texts
from training_lens.data.notes import DataNotes
from training_lens.data.templates import Renderer, build_renderer, load_template_file, resolve_date
from training_lens.data.token_pipeline import Preparation
from training_lens.data.tokenization import TextEncoder
from training_lens.data.values import NO_TEXT
from training_lens.errors import AdapterError, ConfigurationError, DatasetError, ModelLoadingError
from training_lens.inference.decoder import DecoderCache
from training_lens.models.adapters import load_adapter
from training_lens.models.base_record import check_base
from training_lens.models.embedding_rows import read_new_tokens, required_rows
from training_lens.models.factory import check_vocabulary, load_model, load_tokenizer, read_facts, resolve_seq_len
from training_lens.models.location import local_folder
from training_lens.runs.run_folder import RunFolder, describe_scale
from training_lens.runs.run_lookup import BASE_ALONE, find_adapter_run, uses_own_model
from training_lens.utils.devices import Precision, get_device, resolve_precision
from training_lens.utils.files import read_json
from training_lens.utils.formatting import did_you_mean
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home

logger = get_logger(__name__)
PROBE_TOOL = {"type": "function", "function": {"name": "f", "description": "a", "parameters": {"type": "object"}}}


class PromptTooLongError(ConfigurationError):
    """A prompt that leaves no room for an answer."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its tokenizer, the device that it is on and the precision that it computes in."""

    model: Any
    tokenizer: Any
    device: torch.device
    precision: Precision


@dataclass(frozen=True)
class Session:
    """A model that answers prompts, with what renders them."""

    source: str  # the run's or adapter's folder, or the model's id
    adapter: Path | None  # the folder of its files
    model: Any
    tokenizer: Any
    encoder: TextEncoder
    renderer: Renderer
    config: TrainingConfig
    domains: tuple[str, ...] | None  # that the run was trained on; None where there is no run, and any may be given
    continues_text: bool  # the run was trained on plain texts alone: the model continues a prompt without a template
    stop_ids: frozenset[int]
    device: torch.device
    precision: Precision
    decoders: DecoderCache = field(default_factory=DecoderCache, init=False, repr=False, compare=False)

    @property
    def pad_id(self) -> int:
        """The token that pads a batch."""
        return self.encoder.eos_id

    @property
    def positions(self) -> int | None:
        """The most tokens that prompt and answer may have together; None where the model sets no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def preparation(self) -> Preparation:
        """How the session tokenizes examples."""
        assert self.config.model.seq_len is not None
        return Preparation(self.config.data, self.renderer, self.encoder, self.config.model.seq_len, "")

    def text_ids(self, text: str, domain: str | None = None) -> list[int]:
        """The tokens of a text that is continued without a template; errors are those of `prompt_ids`."""
        self.check_domain(domain)
        _check_text(text, "the prompt")
        ids = self.encoder.encode_prompt(self.renderer.render_text_prompt(text, domain))
        self.require_room(ids)
        return ids

    @property
    def has_adapter(self) -> bool:
        return self.adapter is not None

    def check_domain(self, domain: str | None) -> None:
        """Refuse a domain that the run was not trained on.

        Raises:
            ConfigurationError: names the run's domains, and the nearest.
        """
        _check_text(domain or "", "the domain")
        if domain is None or self.domains is None or domain in self.domains:
            return
        known = f"this run knows {', '.join(self.domains)}" if self.domains else "this run was trained without domains"
        hint = did_you_mean(domain, self.domains)
        raise ConfigurationError(f"domain '{domain}': {known}.{hint}")

    def prompt_ids(
        self, messages: Sequence[Message], domain: str | None = None, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """The tokens of a prompt, exactly as in training.

        Raises:
            ConfigurationError: an unknown domain, or characters that are not text; PromptTooLongError: a prompt that
                leaves no room to answer.
        """
        self.check_domain(domain)
        contents = [[m.text, m.input, m.calls, m.extra] for m in messages]
        _check_text(json.dumps([contents, list(tools)], ensure_ascii=False, default=str), "the prompt")
        if self.continues_text:  # the parts of several messages are joined by line ends
            return self.text_ids("\n".join(part for m in messages for part in (m.text, m.input) if part), domain)
        ids = self.encoder.encode_prompt(self.renderer.render_prompt(messages, domain, tools))
        self.require_room(ids)
        return ids

    def require_room(self, ids: Sequence[int]) -> None:
        """Refuse a prompt that takes all of the model's positions."""
        if self.positions and len(ids) >= self.positions:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, the model {self.positions} positions: no room to answer. "
                "Shorten it."
            )


def _check_text(text: str, what: str) -> None:
    """Refuse characters that no tokenizer or template can take: half a surrogate pair, and U+FDD0 to U+FDD3."""
    if found := NO_TEXT.search(text):
        code = ord(found[0])
        kind = "a noncharacter" if code >= 0xFDD0 else "half of a surrogate pair, or a byte that is not UTF-8"
        raise ConfigurationError(f"{what} holds U+{code:04X}, which is not text ({kind}). Take it out.")


def open_session(config: TrainingConfig, beside: Session | None = None) -> Session:
    """The session that `inference.adapter` names: a run, a bare adapter folder on `model.id`, or `model.id` alone.

    A run answers with its own model, template and domains; the other two with those of `config`.

    Args:
        beside: a session of a base alone, whose model in memory is taken.

    Raises:
        CheckpointError, AdapterError: there is no such run or adapter, or it cannot be used.
    """
    name = config.inference.adapter
    if uses_own_model(name):
        return _open_configured_model(config, None if name == BASE_ALONE else expand_home(name), beside)
    run = find_adapter_run(name, config.output.base_output_dir, config.output.named_experiment)
    if not Path(name).is_dir():
        logger.info("run %s of experiment %s", run.run_id, run.experiment_name)
    return open_run(run, config.model.chosen_device, given=config.explicit_values(), beside=beside)


def open_run(
    run: RunFolder,
    device: str | None = None,
    precision: Precision | None = None,
    given: Mapping[str, Any] | None = None,
    adapter: Path | str | None = None,
    beside: Session | None = None,
) -> Session:
    """The run's model with its adapter, its tokenizer as saved, its template and domains.

    Args:
        device: as `model.device`; None takes the run's.
        precision: of weights and computation; None takes the run's.
        given: what the user sets now, by section: `{"model": {"trust_remote_code": True}}` lets the model's own code
            run, which the run's config alone never does; `accept_changed_base` there accepts a base that differs from
            the one that the run trained on.
        adapter: the folder of an adapter of the run's base; None takes the run's, at the scale that was chosen for it.
        beside: a session of the run's base alone, whose model in memory is taken, with its device and precision.

    Raises:
        CheckpointError: the run has no finished adapter, or a damaged one; ModelLoadingError, AdapterError: it cannot
            be loaded, or its base has changed.
        ConfigurationError: its model carries code that the user has not allowed, or is another than the one `beside`.
    """
    config = open_run_config(run, given or {}, "model.trust_remote_code")
    accepted = bool(((given or {}).get("model") or {}).get("accept_changed_base"))
    config = config.replace_keys(model={"accept_changed_base": accepted})
    run.require_adapter()
    if beside:
        _require_same_base(config, beside)
        device, precision = str(beside.device), beside.precision
    place = get_device(device or config.model.device)
    trained = config.training.precision
    # fp16 needs CUDA: on another device such a run answers in the device's own precision.
    is_elsewhere = device is not None or (trained == "fp16" and place.type != "cuda")
    if precision:
        config = config.replace_keys(model={"dtype": precision})
    precision = precision or resolve_precision("auto" if is_elsewhere else trained, place)
    tokenizer = load_tokenizer(config.model, str(run.tokenizer))
    config = config.replace_keys(data={"date": resolve_date(config.data, tokenizer)})
    is_local = local_folder(config.model) is not None
    if is_local:
        check_base(run.base_record, config.model)
    base = beside.model if beside else load_model(config.model, place, precision, config.data.new_tokens)
    if not is_local:  # it has just been downloaded from a hub
        check_base(run.base_record, config.model)
    folder = Path(adapter) if adapter else run.served_adapter
    if folder == run.served_adapter and run.adapter_scale != 1:
        logger.info("%s", describe_scale(run))
    loaded = LoadedModel(load_adapter(base, folder), tokenizer, place, precision)
    data = run.read_metadata("data.json")
    texts = are_plain_texts(data["train"]["mappings"].values(), config.data.fields)
    domains = tuple(data["domains"])
    return build_session(loaded, config, texts, source=str(run.root), adapter=folder, domains=domains)


def _require_same_base(config: TrainingConfig, beside: Session) -> None:
    """Refuse a run of another base than the one in memory."""
    for key in ("id", "revision", "quantization", "resize_embeddings", "attention"):
        wanted, found = getattr(config.model, key), getattr(beside.config.model, key)
        if wanted != found:
            raise ConfigurationError(
                f"model.{key}: '{wanted}' here and '{found}' in {beside.source}. Models that share a base in memory "
                "need the same one."
            )
    if config.data.new_tokens != beside.config.data.new_tokens:
        raise ConfigurationError(
            f"data.new_tokens: {config.data.new_tokens} here and {beside.config.data.new_tokens} in {beside.source}. "
            "Models that share a base in memory need the same rows; serve them apart, or merge one of them."
        )


def _open_configured_model(config: TrainingConfig, adapter: Path | None, beside: Session | None) -> Session:
    """The config's own model, alone or with a bare adapter (and that folder's tokenizer, where it has one)."""
    if beside:
        _require_same_base(config, beside)
    place = beside.device if beside else get_device(config.model.device)
    precision = beside.precision if beside else resolve_precision(config.training.precision, place)
    facts = read_facts(config.model)
    config = config.replace_keys(model={"seq_len": resolve_seq_len(config.model, facts)})
    saved = adapter if adapter and (adapter / "tokenizer.json").is_file() else None
    tokenizer = load_tokenizer(config.model, str(saved) if saved else None, config.data.new_tokens)
    new_tokens = (read_new_tokens(adapter, tokenizer) if adapter else []) or config.data.new_tokens
    config = config.replace_keys(data={"new_tokens": new_tokens})
    load_template_file(config.data.template, tokenizer)
    config = config.replace_keys(data={"date": resolve_date(config.data, tokenizer)})
    required = required_rows(tokenizer, new_tokens)
    check_vocabulary(required, facts.vocabulary, str(saved or config.model.id), config.model.resize_embeddings)
    if adapter:
        check_base(RunFolder(adapter.resolve().parents[1]).base_record, config.model)
    model = beside.model if beside else load_model(config.model, place, precision, new_tokens)
    if adapter:
        model = _load_adapter_on(model, adapter, config.model.id)
    loaded = LoadedModel(model, tokenizer, place, precision)
    return build_session(loaded, config, False, source=str(adapter or config.model.id), adapter=adapter)


def _load_adapter_on(model: Any, folder: Path, model_id: str) -> Any:
    try:
        return load_adapter(model, folder)
    except AdapterError as error:
        if not isinstance(error.__cause__, RuntimeError):  # shapes that differ: most likely another base
            raise
        trained_on = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise AdapterError(f"{error}\nmodel.id is '{model_id}'; the adapter was trained on '{trained_on}'.") from error


def build_session(
    loaded: LoadedModel,
    config: TrainingConfig,
    continues_text: bool,
    *,
    source: str = "",
    adapter: Path | None = None,
    domains: tuple[str, ...] | None = None,
) -> Session:
    """A session on a model in memory, such as one that is training.

    Args:
        config: with `data.template` resolved.
        continues_text: the model was trained on plain texts alone, see `are_plain_texts`.

    Raises:
        ModelLoadingError: the tokenizer or the model's generation config cannot be used.
    """
    encoder = TextEncoder(loaded.tokenizer)  # before the renderer, which assumes that there is an EOS token
    renderer = build_renderer(config.data, loaded.tokenizer)
    trained_ids = _trained_stop_ids(renderer, encoder, continues_text)
    configured_ids = _configured_stop_ids(loaded.model, config.model.id)
    return Session(
        source=source,
        adapter=adapter,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        encoder=encoder,
        renderer=renderer,
        config=config,
        domains=domains,
        continues_text=continues_text,
        stop_ids=frozenset({encoder.eos_id, *trained_ids, *configured_ids}),
        device=loaded.device,
        precision=loaded.precision,
    )


def _trained_stop_ids(renderer: Renderer, encoder: TextEncoder, continues_text: bool) -> set[int]:
    """The tokens that end an answer in training: the last of a chat, an earlier one, and a tool call."""
    if continues_text:
        text = Example((Message("assistant", "b"),), None, "", 0, is_text=True)
        return {int(encoder.encode([renderer.render_example(text)])[0].input_ids[-1])}
    turn = (Message("user", "a"), Message("assistant", "b"))
    call = Message("assistant", "", calls=({"name": "f", "arguments": {"a": "b"}},))
    ends = {int(encoder.encode([renderer.render_example(Example(turn, None, "", 0))])[0].input_ids[-1])}
    for chat, tools in (((*turn, *turn), ()), ((turn[0], call), (PROBE_TOOL,))):
        try:
            segments = renderer.render_example(Example(chat, None, "", 0, tools), DataNotes())  # probes: nothing to log
        except DatasetError:  # this template has no such chats
            continue
        last_ids = [int(encoder.encode([[s]])[0].input_ids[-1]) for s in segments if s.response]
        ends |= encoder.special_ids.intersection(last_ids)
    return ends


def _configured_stop_ids(model: Any, model_id: str) -> list[int]:
    """The stop tokens of the model's generation config; refuses values that are no token ids."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured] if configured is not None else []
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
        raise ModelLoadingError(
            f"model.id: the generation_config.json of '{model_id}' has eos_token_id {configured!r}, expected a token's "
            "id or a list of ids. Fix it there."
        )
    return listed

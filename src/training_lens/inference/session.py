"""A model ready to answer: a run, a bare adapter, or a base alone, with prompts rendered as in training."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training_lens.config.data_sections import FieldsSection
from training_lens.config.run_config import open_run_config
from training_lens.config.schema import TrainingConfig
from training_lens.data.examples import Example, Message
from training_lens.data.notes import DataNotes
from training_lens.data.row_keys import ALIASES
from training_lens.data.templates import Renderer, build_renderer, load_template_file, resolve_date
from training_lens.data.token_pipeline import Preparation
from training_lens.data.tokenization import TextEncoder
from training_lens.data.values import NO_TEXT
from training_lens.errors import AdapterError, ConfigurationError, DatasetError, ModelLoadingError
from training_lens.inference.decoder import Decoders
from training_lens.models.adapters import load_adapter
from training_lens.models.embeddings import check_vocabulary
from training_lens.models.factory import load_model, load_tokenizer, read_facts, resolve_seq_len
from training_lens.models.stored import check_base, local_folder
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_lookup import BASE_ALONE, find_adapter_run, uses_own_model
from training_lens.utils.devices import Precision, get_device, resolve_precision
from training_lens.utils.files import read_json
from training_lens.utils.formatting import did_you_mean
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home

logger = get_logger(__name__)
A_TOOL = {"type": "function", "function": {"name": "f", "description": "a", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Session:
    """A model that answers, with all that rendering a prompt takes.

    `source` is the run's or adapter's folder, or the model's id; `domains` are those that the run was trained on,
    None where no run says (then any may be given); `adapter` is the folder of the adapter's files.
    `continues_text`: the run was trained on plain texts alone, so it goes on with a prompt, and no template is used.
    """

    source: str
    adapter: Path | None
    model: Any
    tokenizer: Any
    encoder: TextEncoder
    renderer: Renderer
    config: TrainingConfig
    domains: tuple[str, ...] | None
    continues_text: bool
    stop_ids: frozenset[int]
    device: torch.device
    precision: Precision
    decoders: Decoders = field(default_factory=Decoders, init=False, repr=False, compare=False)

    @property
    def pad_id(self) -> int:
        """What fills the masked places of a batch."""
        return self.encoder.eos_id

    @property
    def positions(self) -> int | None:
        """The most tokens that prompt and answer may have together; None where the model sets no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def preparation(self) -> Preparation:
        """How the session makes tokens of examples."""
        assert self.config.model.seq_len is not None
        return Preparation(self.config.data, self.renderer, self.encoder, self.config.model.seq_len, "")

    @property
    def has_adapter(self) -> bool:
        return self.adapter is not None

    def check_domain(self, domain: str | None) -> None:
        """Refuse a domain that the run does not know.

        Raises:
            ConfigurationError: names those it knows, and the nearest.
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
        """The tokens of a prompt, exactly as training would have made them.

        Raises:
            ConfigurationError: a domain that the run does not know, characters that are no text, or a prompt that
                leaves no room to answer.
        """
        self.check_domain(domain)
        said = [[m.text, m.input, m.calls, m.extra] for m in messages]
        _check_text(json.dumps([said, list(tools)], ensure_ascii=False, default=str), "the prompt")
        if self.continues_text:  # the parts of several messages stand a line each
            text = "\n".join(part for m in messages for part in (m.text, m.input) if part)
            segments = self.renderer.render_text_prompt(text, domain)
        else:
            segments = self.renderer.render_prompt(messages, domain, tools)
        ids = self.encoder.encode_prompt(segments)
        if self.positions and len(ids) >= self.positions:
            raise ConfigurationError(
                f"the prompt has {len(ids)} tokens, the model {self.positions} positions: no room to answer. "
                "Shorten it."
            )
        return ids


def _check_text(text: str, what: str) -> None:
    """Refuse what no tokenizer or template can take.

    Raises:
        ConfigurationError: half of a surrogate pair, or one of U+FDD0 to U+FDD3; names `what` holds it.
    """
    if found := NO_TEXT.search(text):
        code = ord(found[0])
        kind = "a noncharacter" if code >= 0xFDD0 else "half of a surrogate pair, or a byte that is not UTF-8"
        raise ConfigurationError(f"{what} holds U+{code:04X}, which is no text ({kind}). Take it out.")


def open_session(config: TrainingConfig) -> Session:
    """What `inference.adapter` names: a run, a bare adapter folder on `model.id`, or `model.id` alone (`none`).

    A run answers with its own model, template and domains; the other two with those of `config`.

    Raises:
        CheckpointError, AdapterError: there is no such run or adapter, or it cannot be used.
    """
    name = config.inference.adapter
    if uses_own_model(name):
        return _open_own(config, None if name == BASE_ALONE else expand_home(name))
    run = find_adapter_run(name, config.output.base_output_dir, config.output.named_experiment)
    if not Path(name).is_dir():
        logger.info("run %s of experiment %s", run.run_id, run.experiment_name)
    return open_run(run, None if config.model.device == "auto" else config.model.device, given=config.explicit_values())


def open_run(
    run: RunFolder,
    device: str | None = None,
    precision: Precision | None = None,
    given: Mapping[str, Any] | None = None,
) -> Session:
    """The run's model with its adapter, its tokenizer as saved, its template and domains.

    Args:
        device: as `model.device`; None takes the run's.
        precision: of weights and computation; None takes the run's.
        given: what the user set for this, by section: `{"model": {"trust_remote_code": True}}` lets the model's own
            code run, which the run's config alone never does; `accept_changed_base` there takes a base that is not the
            one that the run trained on.

    Raises:
        CheckpointError: the run has no finished adapter, or a damaged one; ModelLoadingError, AdapterError: it cannot
            be loaded, or its base is another now.
        ConfigurationError: its model carries code that the user has not allowed.
    """
    config = open_run_config(run, given or {}, "model.trust_remote_code")
    accepted = bool(((given or {}).get("model") or {}).get("accept_changed_base"))
    config = config.replace_keys(model={"accept_changed_base": accepted})
    run.require_adapter()
    place = get_device(device or config.model.device)
    trained = config.training.precision
    # fp16 exists on CUDA alone: elsewhere such a run answers in the device's own precision.
    elsewhere = device is not None or (trained == "fp16" and place.type != "cuda")
    if precision:
        config = config.replace_keys(model={"dtype": precision})
    precision = precision or resolve_precision("auto" if elsewhere else trained, place)
    tokenizer = load_tokenizer(config.model, str(run.tokenizer))
    config = config.replace_keys(data={"date": resolve_date(config.data, tokenizer)})
    is_here = local_folder(config.model) is not None
    if is_here:
        check_base(run.base_record, config.model)
    base = load_model(config.model, place, precision)
    if not is_here:  # of a hub: now it is
        check_base(run.base_record, config.model)
    model = load_adapter(base, run.adapter)
    data = run.read_metadata("data.json")
    texts = are_texts(data["train"]["mappings"].values(), config.data.fields)
    domains = tuple(data["domains"])
    return session_on(
        model, tokenizer, config, texts, place, precision, source=str(run.root), adapter=run.adapter, domains=domains
    )


def are_texts(mappings: Collection[str], fields: FieldsSection) -> bool:
    """Whether every file was read as plain texts: then its mapping names the texts' field, and perhaps the domain's."""
    text = text_field(fields)
    return text != fields.messages and all(m.split(", domain from ")[0] == text for m in mappings)


def text_field(fields: FieldsSection) -> str:
    """The field of rows that are plain texts."""
    return fields.text or ALIASES["text"][0]


def _open_own(config: TrainingConfig, adapter: Path | None) -> Session:
    """The config's own model, alone or under a bare adapter folder (whose tokenizer is taken where it has one)."""
    place = get_device(config.model.device)
    precision = resolve_precision(config.training.precision, place)
    config = config.replace_keys(model={"seq_len": resolve_seq_len(config.model, read_facts(config.model))})
    saved = adapter if adapter and (adapter / "tokenizer.json").is_file() else None
    tokenizer = load_tokenizer(config.model, str(saved) if saved else None)
    load_template_file(config.data.template, tokenizer)
    config = config.replace_keys(data={"date": resolve_date(config.data, tokenizer)})
    rows, named = read_facts(config.model).vocabulary, str(saved or config.model.id)
    check_vocabulary(tokenizer, rows, named, config.model.resize_embeddings)
    if adapter:
        check_base(RunFolder(adapter.resolve().parents[1]).base_record, config.model)
    model = load_model(config.model, place, precision)
    if adapter:
        model = _with_adapter(model, adapter, config.model.id)
    source = str(adapter or config.model.id)
    return session_on(model, tokenizer, config, False, place, precision, source=source, adapter=adapter)


def _with_adapter(model: Any, folder: Path, model_id: str) -> Any:
    try:
        return load_adapter(model, folder)
    except AdapterError as error:
        if not isinstance(error.__cause__, RuntimeError):  # shapes that differ: most likely another base
            raise
        trained_on = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise AdapterError(f"{error}\nmodel.id is '{model_id}'; the adapter was trained on '{trained_on}'.") from error


def session_on(
    model: Any,
    tokenizer: Any,
    config: TrainingConfig,
    texts: bool,
    device: torch.device,
    precision: Precision,
    *,
    source: str = "",
    adapter: Path | None = None,
    domains: tuple[str, ...] | None = None,
) -> Session:
    """A session on a model in memory, such as one that is training.

    Args:
        config: with `data.template` resolved.
        texts: it was trained on plain texts alone, see `are_texts`.

    Raises:
        ModelLoadingError: the tokenizer or the model's generation config cannot be used.
    """
    encoder = TextEncoder(tokenizer)  # before the renderer, which takes for granted that there is an EOS
    renderer = build_renderer(config.data, tokenizer)
    ends = _trained_ends(renderer, encoder, texts)
    stop_ids = frozenset({encoder.eos_id, *ends, *_configured_ends(model, config.model.id)})
    return Session(
        source, adapter, model, tokenizer, encoder, renderer, config, domains, texts, stop_ids, device, precision
    )


def _trained_ends(renderer: Renderer, encoder: TextEncoder, texts: bool) -> set[int]:
    """The tokens that end an answer in training: the last one of a chat, an earlier one, and a call of a tool."""
    if texts:
        text = Example((Message("assistant", "b"),), None, "", 0, is_text=True)
        return {int(encoder.encode([renderer.render_example(text)])[0].input_ids[-1])}
    turn = (Message("user", "a"), Message("assistant", "b"))
    call = Message("assistant", "", calls=({"name": "f", "arguments": {"a": "b"}},))
    ends = {int(encoder.encode([renderer.render_example(Example(turn, None, "", 0))])[0].input_ids[-1])}
    for chat, tools in (((*turn, *turn), ()), ((turn[0], call), (A_TOOL,))):
        try:
            segments = renderer.render_example(Example(chat, None, "", 0, tools), DataNotes())
        except DatasetError:  # such chats are no part of what this template was trained with
            continue
        last_ids = [int(encoder.encode([[s]])[0].input_ids[-1]) for s in segments if s.response]
        ends |= encoder.special_ids.intersection(last_ids)
    return ends


def _configured_ends(model: Any, model_id: str) -> list[int]:
    """What the model's generation config stops at.

    Raises:
        ModelLoadingError: it names something else than tokens by their ids.
    """
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured] if configured is not None else []
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
        raise ModelLoadingError(
            f"model.id: the generation_config.json of '{model_id}' has eos_token_id {configured!r}, expected a token's "
            "id or a list of ids. Fix it there."
        )
    return listed

"""What is planned for several devices: sizes are those of real models, sums those of the run's own plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork  # type: ignore[import-not-found]
from tiny_models import save_tiny_model, tiny_model  # type: ignore[import-not-found]
from torch.distributed.tensor import DTensor

from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError, ModelLoadingError
from training_lens.models.adapters import attach, trainable_parameters
from training_lens.models.factory import load_model
from training_lens.training.device_rates import DEVICES, find_device
from training_lens.training.layout_costs import (
    COUNTS,
    Layout,
    LayoutCost,
    Workload,
    choose_layout,
    compare_layouts,
    cost_layout,
    count_layer_bytes,
    count_token_flops,
    find_smallest,
)
from training_lens.training.loop.memory_budget import BYTES_PER_TRAINED, estimate_footprint
from training_lens.training.loop.optimizer import build_optimizer
from training_lens.training.model_shape import LLAMAS, ModelShape, build_shape, read_shape

CPU = torch.device("cpu")
WORK = Workload(examples=64, example_tokens=512, run_tokens=10_000_000)
H100 = DEVICES["h100-80"]


@pytest.fixture(scope="module")
def shapes() -> dict[str, ModelShape]:
    """The published shapes that tests ask for, with the default adapter."""
    return {name: read_shape(TrainingConfig(), name) for name in ("llama-1b", "llama-8b")}


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_predicted_bytes_are_those_of_a_model_that_took_a_step(tmp_path: Path, quantization: str) -> None:
    save_tiny_model(tmp_path / "base", hidden_size=64, intermediate_size=200)
    config = TrainingConfig(model={"id": str(tmp_path / "base"), "quantization": quantization})
    shape = read_shape(config, None)
    model = attach(load_model(config.model, CPU, "fp32"), config.peft)
    optimizer = build_optimizer(trainable_parameters(model), config.replace_keys(training={"lr": 1e-3}).training)
    model.train()(input_ids=torch.arange(1, 9)[None]).logits.sum().backward()
    optimizer.step()

    layout: Layout = "replicated 4-bit" if quantization == "4bit" else "replicated"
    base = count_layer_bytes(shape, layout, 1, weight_bytes=4) + 4 * shape.count(in_layers=False)
    assert base == sum(held_bytes(p) for p in model.parameters() if not p.requires_grad)
    moments = [optimizer.state[p][name] for _, p in trainable_parameters(model) for name in ("exp_avg", "exp_avg_sq")]
    held = [tensor for _, p in trainable_parameters(model) for tensor in (p, p.grad)] + moments
    assert shape.trainable * BYTES_PER_TRAINED == sum(held_bytes(tensor) for tensor in held)


def held_bytes(tensor: Any) -> int:
    """A tensor's bytes, with the scales of a weight in 4 bits."""
    state = getattr(tensor, "quant_state", None)
    scales = [] if state is None else [state.absmax, state.state2.absmax]
    return sum(part.numel() * part.element_size() for part in (tensor, *scales))


@pytest.mark.parametrize("devices", [2, 4])
def test_predicted_shards_are_those_of_fully_shard(tmp_path: Path, devices: int) -> None:
    """50 rows do not divide by 4: the first process holds 13."""
    save_tiny_model(tmp_path / "base", intermediate_size=50)
    process = fork(shard_layers, tmp_path / "bytes.txt", devices)
    process.join()
    assert process.exitcode == 0
    shape = read_shape(TrainingConfig(model={"id": str(tmp_path / "base")}), None)
    assert count_layer_bytes(shape, "sharded", devices, weight_bytes=4) == int((tmp_path / "bytes.txt").read_text())


def shard_layers(into: Path, devices: int) -> None:
    """Write how many bytes of the decoder layers the first of so many processes holds."""
    from torch.distributed import init_device_mesh, init_process_group
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)
    mesh = init_device_mesh("cpu", (devices,))
    layers = tiny_model(intermediate_size=50).model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    shards = [p.to_local() for p in layers.parameters() if isinstance(p, DTensor)]
    into.write_text(str(sum(shard.numel() * shard.element_size() for shard in shards)))


@pytest.mark.parametrize(("name", "parameters"), [("llama-1b", 1_235_814_400), ("llama-8b", 8_030_261_248)])
def test_a_named_shape_has_the_parameters_of_its_config(
    shapes: dict[str, ModelShape], name: str, parameters: int
) -> None:
    built = build_shape(name)
    assert shapes[name].parameters == sum(p.numel() for p in built.parameters()) == parameters


def test_a_config_file_is_the_shape_that_it_describes(tmp_path: Path, shapes: dict[str, ModelShape]) -> None:
    build_shape("llama-1b").config.save_pretrained(tmp_path)
    of_file = read_shape(TrainingConfig(), str(tmp_path / "config.json"))
    assert of_file == replace(shapes["llama-1b"], name=str(tmp_path / "config.json"))


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_one_device_needs_what_the_run_itself_plans(shapes: dict[str, ModelShape], is_checkpointed: bool) -> None:
    config = TrainingConfig(model={"seq_len": 2048}, training={"gradient_checkpointing": is_checkpointed})
    needs = estimate_footprint(attach_on_meta(config), config, "bf16")
    cost = cost_layout(shapes["llama-1b"], H100, 1, WORK, "replicated", is_checkpointed)
    assert cost.total == needs.fixed + needs.token * cost.micro_batch_tokens


def attach_on_meta(config: TrainingConfig) -> Any:
    with torch.device("meta"):
        return attach(build_shape("llama-1b"), config.peft).get_base_model()


def test_more_devices_take_less_of_each_and_less_time(shapes: dict[str, ModelShape]) -> None:
    costs = [cost_layout(shapes["llama-8b"], H100, count, WORK, "sharded", True) for count in COUNTS if 1 < count <= 64]
    held = [sum(term.bytes for term in cost.memory if term.name == "decoder layers") for cost in costs]
    assert held == sorted(held, reverse=True) and held[0] == 2 * held[1]
    run = [cost.run_seconds[1] for cost in costs]
    assert run == sorted(run, reverse=True)


@pytest.mark.parametrize("device", ["t4-16", "l4-24", "h100-80"])
def test_the_fewest_devices_are_proposed(shapes: dict[str, ModelShape], device: str) -> None:
    rates = DEVICES[device]
    for layout, cost in find_smallest(shapes["llama-8b"], rates, WORK).items():
        others = [found for count in COUNTS for found in compare(shapes, rates, count) if found.layout == layout]
        assert not any(found.fits for found in others if found.devices < cost.devices)
        assert cost.fits == any(found.fits for found in others) == (cost.total <= cost.usable)
        assert cost.missing == min(found.missing for found in others)


def compare(shapes: dict[str, ModelShape], rates: Any, count: int) -> list[LayoutCost]:
    return compare_layouts(shapes["llama-8b"], rates, count, WORK)


def test_weights_in_16_bits_go_before_4_bits_and_the_fastest_before_others(shapes: dict[str, ModelShape]) -> None:
    on_one, on_large = (choose_layout(compare(shapes, DEVICES[name], 1)) for name in ("t4-16", "h200-141"))
    assert on_one and on_one.layout == "replicated 4-bit" and on_one.is_checkpointed
    assert on_large and on_large.layout == "replicated" and not on_large.is_checkpointed
    assert choose_layout([cost for cost in compare(shapes, DEVICES["t4-16"], 1) if cost.layout == "replicated"]) is None


def test_a_frozen_weight_costs_two_thirds_of_a_trained_one(shapes: dict[str, ModelShape]) -> None:
    bare = replace(shapes["llama-8b"], trainable=0, attention_width=0)
    assert count_token_flops(bare, 512, False) == 4 * bare.multiplied
    assert count_token_flops(bare, 512, True) == 6 * bare.multiplied
    trained = replace(bare, trainable=1000)
    assert count_token_flops(trained, 512, False) - count_token_flops(bare, 512, False) == 6 * 1000


def test_experts_cost_memory_whole_and_time_by_those_that_compute_a_token(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "base", "Mixtral")
    config = TrainingConfig(model={"id": str(folder)}, peft={"target_parameters": "none"})
    shape = read_shape(config, None)
    experts = sum(w.numbers * w.count for w in shape.weights if w.is_layer and w.rows == 4 and w.numbers > 4 * 32)
    assert shape.parameters - shape.multiplied > experts / 2  # 2 of 4 compute a token
    assert count_layer_bytes(shape, "replicated 4-bit", 1, 2) > 2 * experts  # no linear layers: they stay in 16 bits


@pytest.mark.parametrize(("given", "nearest"), [("h100", "h100-80"), ("RTX-4090", "rtx4090-24")])
def test_an_unknown_device_is_refused_with_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(ConfigurationError, match=f"t4-16, .*Did you mean '{nearest}'"):
        find_device(given)
    assert find_device(nearest.upper()) is DEVICES[nearest]


def test_an_unknown_shape_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"llama-405b.*Did you mean 'llama-70b'"):
        build_shape("llama-70")
    assert set(LLAMAS) >= {"llama-8b", "llama-70b", "llama-405b"}


def test_devices_share_the_examples_of_a_step(shapes: dict[str, ModelShape]) -> None:
    assert [WORK.count_tokens(count) for count in (1, 8, 64, 128)] == [64 * 512, 8 * 512, 512, 512]
    alone, eight = (cost_layout(shapes["llama-1b"], H100, count, WORK, "replicated", False) for count in (1, 8))
    assert [cost.run_seconds[0] / cost.step_seconds[0] for cost in (alone, eight)] == [306, 306]  # 10 M / (64 x 512)
    assert alone.time[0].low == 8 * eight.time[0].low


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "llama", "hidden_size": "wide"},
        [],
    ],
)
def test_a_file_that_describes_no_model_is_refused_and_its_code_not_run(tmp_path: Path, content: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    with pytest.raises(ModelLoadingError):
        build_shape(str(tmp_path / "config.json"))
    with pytest.raises(ModelLoadingError):
        build_shape(str(tmp_path))
    assert not (tmp_path / "executed").exists()

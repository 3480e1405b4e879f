"""What is asked to be adapted is, and no more; what cannot be is refused with what can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from training_lens.config.schema import ModelSection, PeftSection
from training_lens.errors import AdapterError
from training_lens.models.adapters import attach, check_adapter, trainable_parameters
from training_lens.models.factory import build_skeleton
from training_lens.models.targets import choose_targets, whole_modules


def skeleton() -> Any:
    return build_skeleton(ModelSection())


def adapted_paths(model: Any) -> set[str]:
    """Paths of the modules that got a LoRA."""
    return {
        n.removeprefix("base_model.model.").split(".lora_")[0] for n, _ in trainable_parameters(model) if ".lora_" in n
    }


def linear_paths(model: Any) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")}


def test_a_skeleton_has_every_module_and_no_weights() -> None:
    model = skeleton()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert linear_paths(model)


def test_auto_is_every_linear_layer_but_the_head() -> None:
    assert adapted_paths(attach(skeleton(), PeftSection())) == linear_paths(skeleton())


def test_auto_takes_the_conv1d_layers_of_gpt2() -> None:
    adapted = attach(tiny_model("GPT2"), PeftSection(r=4))
    assert {path.rsplit(".", 1)[-1] for path in adapted_paths(adapted)} == {"c_attn", "c_proj", "c_fc"}
    assert adapted.peft_config["default"].fan_in_fan_out
    shapes = {
        n.split(".lora_")[1][0]: tuple(p.shape) for n, p in trainable_parameters(adapted) if "h.0.attn.c_attn" in n
    }
    assert shapes == {"A": (4, 32), "B": (96, 4)}


def test_auto_gives_whole_paths_where_a_name_means_more() -> None:
    model = skeleton()
    model.model.layers[0].mlp.gate_proj = torch.nn.Identity()  # the same name, elsewhere no linear layer
    names, _ = choose_targets(model, PeftSection())
    assert "model.layers.1.mlp.gate_proj" in names
    assert adapted_paths(attach(model, PeftSection())) == linear_paths(skeleton()) - {"model.layers.0.mlp.gate_proj"}


def test_a_regular_expression_takes_whole_paths() -> None:
    peft = PeftSection(target_modules=r".*layers\.[01]\.self_attn\.[qv]_proj", r=4)
    wanted = {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}
    assert adapted_paths(attach(skeleton(), peft)) == wanted


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"no module is called 'q_porj'. Did you mean 'q_proj'.*Linear layers: down_"),
        ({"target_modules": "q_proj"}, r"whole paths such as 'model.layers.0.self_attn.q_proj'.* give \[q_proj\]"),
        ({"target_modules": r".*\.q_porj"}, r"expression '.*' is no module's whole path.*Linear layers: down_proj"),
        ({"target_modules": "(["}, r"'\(\[' is not a regular expression"),
        ({"target_modules": ["norm"]}, r"'model.norm' is a .*RMSNorm; only linear.*modules_to_save=\[norm\]"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, r"is an Embedding, and peft.use_dora works on linear"),
        (
            {"target_modules": ["embed_tokens"], "init": "pissa"},
            r"is an Embedding, and peft.init=pissa works on linear",
        ),
        (
            {"r": 4096},
            r"peft.r: rank 4096 is more than 'model.layers.0.* can have, which maps 192 to \d+; give at most",
        ),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 999}},
            r"peft.rank_pattern\['q_proj'\]: rank 999 .* give at most 192",
        ),
        ({"rank_pattern": {"q_porj": 4}}, r"peft.rank_pattern: 'q_porj' matches no adapted.*Did you mean 'q_proj'"),
        ({"alpha_pattern": {"lm_head": 4}}, r"peft.alpha_pattern: 'lm_head' matches no adapted module"),
        ({"alpha_pattern": {"*": 4}}, r"peft.alpha_pattern: '\*' is not a regular expression"),
        ({"modules_to_save": ["lm_haed"]}, r"peft.modules_to_save: no module is called 'lm_haed'. Did you mean 'lm_he"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]},
            r"all of them are in peft.modules_to_save too",
        ),
        ({"modules_to_save": ["layers"]}, r"all of them are in peft.modules_to_save too"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(section: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        check_adapter(skeleton(), PeftSection(**section))


def test_fused_experts_are_refused_by_their_class() -> None:
    with pytest.raises(AdapterError, match=r"'model.layers.0.mlp.experts' is a MixtralExperts; only linear layers"):
        attach(tiny_model("Mixtral"), PeftSection(target_modules=["experts"]))


def test_a_name_to_train_whole_means_that_name_alone() -> None:
    """PEFT compares bare endings, by which 'norm' would also mean 'input_layernorm'."""
    assert whole_modules(skeleton(), ["norm"]) == (["model.norm"], False)
    assert whole_modules(skeleton(), ["lm_head"]) == (["model.embed_tokens", "lm_head"], True)

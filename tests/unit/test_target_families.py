"""Every kind of target that is supported: its features, logits and layers' inputs, its draft, its tensors, decoding."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle.decode.drafter import DynamicDrafter, StaticDrafter
from eagle.decode.fitting_draft import load_fitting_draft
from eagle.decode.generate import SpeculativeDecoder, generate_alone
from eagle.decode.sampling import Sampling
from eagle.decode.tree import EAGLE1_PATHS, chain_paths
from eagle.drafts.choices import DraftChoices
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.saved import save_draft
from eagle.errors import RequestError
from eagle.generate.source_options import SourceOptions
from eagle.generate.sources import TrunkSource
from eagle.releases import TORCH
from eagle.target.check import check_target
from eagle.target.config import load_config, parse_config
from eagle.target.cpu_trunk import packed_trunk
from eagle.target.families import TARGET_FAMILIES
from eagle.target.features import HIDDEN_STATE, aux_name, features_of
from eagle.target.trunk import expected_tensors, has_long_rope, least_context, load_trunk, parts_of, trunk_values
from eagle.target.weights import Weights, read_head, read_norm
from eagle.train.arguments import read_options
from eagle.train.draft_choice import draft_config
from tests.drafts import CPU, RIGGED, RiggedDraft, greedy_by_transformers, random_draft, tiny_target
from tests.families import ROWS, WINDOW, make_row, row_named
from tests.unit.config_cases import base

KNOWN = [row for row in ROWS if row.is_known_here()]
#: Longer than the windows.
IDS = torch.randint(3, 400, (2, WINDOW + 20), generator=torch.Generator().manual_seed(0))
GREEDY, NEW = Sampling(), 16
DRAFTERS = {
    "chain": StaticDrafter(chain_paths(3), CPU, GREEDY),
    "tree": StaticDrafter(EAGLE1_PATHS, CPU, GREEDY),
    "dynamic tree": DynamicDrafter(20, 4, 5),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a row's target, made once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = make_row(tmp_path_factory.mktemp("row") / name, row_named(name))
        return folders[name]

    return make


def every(test):
    return pytest.mark.parametrize("name", [row.name for row in KNOWN])(test)


def test_every_family_has_a_row():
    assert {row.family for row in ROWS} == set(TARGET_FAMILIES)


@every
def test_features_are_what_logits_are_read_from(made, name):
    folder = made(name)
    config = check_target(folder, "--model_name").config
    trunk, model = load_trunk(folder, torch.float32, CPU), AutoModelForCausalLM.from_pretrained(folder).eval()
    if "longrope" in name or name == "phi4-mini":  # every prompt with the long factors, as it is served
        for rope in (getattr(model.config, key, None) for key in ("rope_parameters", "rope_scaling")):
            if rope:
                rope["short_factor"] = rope["long_factor"]
        short = model(IDS).logits
        changed = type(model)(model.config).eval()
        changed.load_state_dict(model.state_dict())
        model = changed
        assert not torch.allclose(short, model(IDS).logits, atol=1e-2)  # it is no small matter
    layers = (1, 4, config.num_hidden_layers - 1)
    with torch.no_grad():
        found = features_of(trunk, (HIDDEN_STATE, aux_name(layers)), input_ids=IDS, use_cache=False)
        expected = model(IDS, output_hidden_states=True)
    head = read_head(Weights(folder), config)
    torch.testing.assert_close(found[HIDDEN_STATE] @ head.T, expected.logits, rtol=1e-4, atol=1e-4)
    inputs = torch.cat([expected.hidden_states[layer] for layer in layers], -1)
    torch.testing.assert_close(found[aux_name(layers)], inputs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(TORCH < (2, 1, 1), reason="attention is eager there")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_whole_sequences_need_no_mask(made, name, monkeypatch):
    """transformers 4.57 gives every layer one, unless it is told that nothing is masked."""
    source = TrunkSource(SourceOptions(made(name), torch.float32, CPU, (HIDDEN_STATE,)))
    source.packed = None  # as on cards
    masks = []

    def attention(*args, attn_mask=None, **options):
        masks.append(attn_mask)
        return torch._C._nn.scaled_dot_product_attention(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    told = []
    source.trunk.register_forward_pre_hook(
        lambda _, args, given: told.append(given["attention_mask"]), with_kwargs=True
    )
    source.features([IDS[0].numpy(), IDS[1, :9].numpy()])
    assert len(told) == 1 and told[0].shape == IDS.shape and told[0].all()
    assert masks == [None] * load_config(made(name)).num_hidden_layers


@every
def test_the_norm_is_what_the_last_hidden_state_is_multiplied_by(made, name):
    folder = made(name)
    config, trunk = load_config(folder), load_trunk(folder, torch.float32, CPU)
    seen: list[torch.Tensor] = []
    trunk.get_submodule(TARGET_FAMILIES[config.family].trunk_norm).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad():
        found = trunk(input_ids=IDS, use_cache=False).last_hidden_state
    scale = torch.rsqrt(seen[0].square().mean(-1, keepdim=True) + config.rms_norm_eps)
    torch.testing.assert_close(seen[0] * scale * read_norm(Weights(folder), config), found, rtol=1e-4, atol=1e-4)


@every
def test_the_draft_is_a_llama_layer_of_the_targets_sizes(made, name):
    config = load_config(made(name))
    raw = config.draft().to_json(as_llama=True)
    assert (raw["model_type"], raw["architectures"], raw["hidden_act"]) == ("llama", ["LlamaForCausalLM"], "silu")
    assert raw["num_hidden_layers"] == 1 and not config.own.keys() & raw.keys()
    assert parse_config(raw).logit_scale == config.logit_scale
    for field in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rope_theta"):
        assert raw[field] == getattr(config, field)
    third = DRAFT_FAMILIES["eagle3"].config(config, None, DraftChoices())
    assert (third.family, third.logit_scale, third.own) == ("llama", 1.0, {})


@every
def test_the_cpus_own_pass_is_for_layers_that_are_llamas(tmp_path, name, capsys):
    folder = make_row(tmp_path / "calm", row_named(name), initializer_range=0.02)  # whose rounding stays small
    config, trunk = load_config(folder), load_trunk(folder, torch.bfloat16, CPU)
    found = packed_trunk(trunk, parts_of(trunk, config))
    plain = name in ("llama", "llama-3.1", "llama-3.2", "qwen2", "mistral")
    assert (found is not None) == (plain and hasattr(trunk, "rotary_emb"))
    assert not capsys.readouterr().err


@every
def test_greedy_decoding_is_the_targets_own(made, name):
    folder = made(name)
    target = tiny_target(folder)
    prompt = IDS[0].tolist()  # longer than the window, so that every node of a tree is limited by it
    alone = generate_alone(target, prompt, NEW, GREEDY)
    if "longrope" not in name and name != "phi4-mini":  # transformers' own generation takes the short factors
        tokens, features = greedy_by_transformers(folder, prompt, NEW + 8)
        assert alone.tokens == tokens[:NEW]
        for drafter in DRAFTERS.values():
            right = RiggedDraft(target, features, RIGGED["always right"])
            assert SpeculativeDecoder(target, right, drafter, GREEDY).generate(prompt, NEW).tokens == tokens[:NEW]
    for drafter in DRAFTERS.values():
        draft = random_draft(target)
        assert SpeculativeDecoder(target, draft, drafter, GREEDY).generate(prompt, NEW).tokens == alone.tokens


# What is refused


@every
def test_a_look_alike_is_refused(made, name, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(made(name), folder)
    raw = json.loads((folder / "config.json").read_text())
    width = "moe_intermediate_size" if "moe_intermediate_size" in raw else "intermediate_size"
    (folder / "config.json").write_text(json.dumps(raw | {width: raw[width] + 32}))
    with pytest.raises(RequestError, match=r"Weights and config\.json are not of the same model"):
        check_target(folder, "--model_name")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"model_type": "gemma3", "vision_config": {"a": 1}, "text_config": {"model_type": "gemma3_text"}}, "images"),
        ({"model_type": "qwen2_5_vl", "vision_config": {"depth": 3}, "architectures": ["Qwen2_5_VL"]}, "Qwen2_5_VL"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "an encoder"),
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "no lm_head to share"),
        ({"model_type": "chatglm", "auto_map": {"AutoModel": "modeling_chatglm.ChatGLM"}}, "modeling_chatglm.ChatGLM"),
        ({"model_type": "falcon", "architectures": ["FalconForCausalLM"]}, "'FalconForCausalLM' is not supported"),
        (base("gemma_3_1B") | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
        (base("gemma_3_1B") | {"use_bidirectional_attention": True}, "an encoder"),
        (base("qwen3_8B") | {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window is on"),
        ({k: v for k, v in base("qwen3_8B").items() if k != "head_dim"}, "no 'head_dim'"),
        ({k: v for k, v in base("qwen3_30B_A3B").items() if k != "num_experts"}, "no 'num_experts'"),
        (
            {"model_type": "granite", **{k: v for k, v in base().items() if k != "model_type"}, "logits_scaling": 0},
            "0;",
        ),
        (base("mistral_7B") | {"sliding_window": 0}, "sliding_window is 0; expected a number of tokens, or null"),
        (base("phi_4") | {"sliding_window": "2047"}, "sliding_window is '2047'"),
        (base("llama_3.1_8B") | {"sliding_window": 4096}, "which transformers does not heed"),
        (
            base("llama_3.1_8B") | {"sliding_window": 4096, "use_sliding_window": False},
            "sliding_window is 4096, which transformers does not heed",
        ),
        (base("llama_3.1_8B") | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which"),
        (
            base() | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            "partial_rotary_factor is 0.25, which",
        ),
        (base("phi_4") | {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "the rope type 'ntk' is not known"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(raw, said):
    with pytest.raises(RequestError, match=said):
        parse_config(raw)


@pytest.mark.skipif(not row_named("phi4").is_known_here(), reason="this transformers computes it otherwise")
def test_the_code_that_phi3_was_released_with_is_no_matter(made, tmp_path):
    folder = tmp_path / "released"
    shutil.copytree(made("phi4"), folder)
    raw = json.loads((folder / "config.json").read_text())
    repository = "microsoft/Phi-3-mini-4k-instruct--"  # as transformers saves a fine-tuned one
    code = {"AutoConfig": "configuration_phi3.Phi3Config"}
    code["AutoModelForCausalLM"] = f"{repository}modeling_phi3.Phi3ForCausalLM"
    (folder / "config.json").write_text(json.dumps(raw | {"auto_map": code}))
    assert check_target(folder, "--model_name").config == load_config(made("phi4"))
    assert type(load_trunk(folder, torch.float32, CPU)).__module__.startswith("transformers.")
    other = code | {"AutoModelForCausalLM": "modeling_own.Phi3ForCausalLM"}
    (folder / "config.json").write_text(json.dumps(raw | {"auto_map": other}))
    with pytest.raises(RequestError, match=r"modeling_own\.Phi3ForCausalLM"):
        check_target(folder, "--model_name")


@pytest.mark.skipif(not row_named("mistral").is_known_here(), reason="this transformers computes it otherwise")
def test_a_mistral_that_transformers_takes_for_another_kind_is_refused(made, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(made("mistral"), folder)
    raw = json.loads((folder / "config.json").read_text())
    kinds = ["full_attention", "sliding_attention"] * (raw["num_hidden_layers"] // 2)
    (folder / "config.json").write_text(json.dumps(raw | {"layer_types": kinds, "sliding_window": 16}))
    with pytest.raises(RequestError, match="takes it for 'ministral'"):
        check_target(folder, "--model_name")


@pytest.mark.skipif(not row_named("mistral").is_known_here(), reason="this transformers computes it otherwise")
def test_a_head_dim_that_is_left_open(tmp_path):
    """Ropes other than the plain one are computed from it, by transformers 4 without a look at the sizes."""
    folder = make_row(tmp_path / "m", row_named("mistral"), head_dim=32)
    raw = json.loads((folder / "config.json").read_text())
    for key in ("head_dim", "rope_parameters", "rope_scaling", "rope_theta"):
        raw.pop(key, None)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": raw["max_position_embeddings"]}
    (folder / "config.json").write_text(json.dumps(raw | {"rope_theta": 1e4, "rope_scaling": yarn}))
    config = check_target(folder, "--model_name").config
    assert config.head_dim == raw["hidden_size"] // raw["num_attention_heads"]
    load_trunk(folder, torch.float32, CPU)(input_ids=IDS)


# What several ways of writing mean


def test_both_generations_of_transformers_say_the_same_of_gemma():
    old = base("gemma_3_1B")
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_local_base_freq", "sliding_window_pattern")}
    new["layer_types"] = [f"{'full' if (at + 1) % 6 == 0 else 'sliding'}_attention" for at in range(26)]
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
    }
    assert parse_config(new) == parse_config(old)
    assert parse_config(new).digest() == parse_config(old).digest()
    assert parse_config(old | {"rope_local_base_freq": 20000}).digest() != parse_config(old).digest()


def test_both_generations_of_transformers_say_the_same_of_phi():
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    sizes = {"original_max_position_embeddings": 4096, "max_position_embeddings": 131072, "partial_rotary_factor": 0.75}
    old = base("phi_4") | sizes | {"rope_scaling": {"type": "su", **factors}}
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "partial_rotary_factor")}
    new["rope_parameters"] = {
        "rope_type": "longrope", **factors, "rope_theta": 250000, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    assert parse_config(new) == parse_config(old)
    assert parse_config(old).draft().rope_scaling is None


def test_longrope_beside_its_rope_is_every_familys():
    """Which context is the original one may stand at the top of config.json; vLLM heeds it there for Llama too."""
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    raw = base("llama_3.1_8B") | {"rope_scaling": {"type": "longrope", **factors}}
    raw |= {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    config = parse_config(raw)
    assert config.rope_scaling["original_max_position_embeddings"] == 16 and has_long_rope(config)
    assert least_context(config) == 17


def test_a_drafts_window_is_its_targets():
    """Drafts come with Qwen's keys in a Llama's config; vLLM takes a draft's window from its target."""
    raw = base("llama_3.1_8B") | {"sliding_window": 4096, "use_sliding_window": False}
    assert parse_config(raw | {"num_hidden_layers": 1}).window is None


def test_what_changes_a_family_changes_its_digest():
    for name, change in (
        ("qwen3_30B_A3B", {"num_experts_per_tok": 4}),
        ("mistral_7B", {"sliding_window": 4096}),
        ("gemma_3_1B", {"sliding_window": 1024}),
    ):
        assert parse_config(base(name) | change).digest() != parse_config(base(name)).digest()


def test_the_draft_of_a_target_with_a_window_is_limited_alike():
    assert parse_config(base("mistral_7B")).window is None
    assert parse_config(base("mistral_7B") | {"sliding_window": 4096}).window == 4096
    assert parse_config({k: v for k, v in base("mistral_7B").items() if k != "sliding_window"}).window == 4096
    assert parse_config(base("phi_4") | {"sliding_window": 262144}).window is None  # beyond its context
    assert parse_config(base("gemma_3_1B")).window is None  # of some layers only


def test_the_embeddings_are_no_auxiliary_feature_where_vllm_does_not_hand_them_over():
    for name, is_refused in (("gemma_3_1B", True), ("qwen3_8B", False)):
        target, choices = parse_config(base(name)), DraftChoices(aux_layers=(0, 4, 9))
        if is_refused:
            with pytest.raises(RequestError, match="does not hand over the input of layer 0"):
                DRAFT_FAMILIES["eagle3"].config(target, None, choices)
        else:
            assert DRAFT_FAMILIES["eagle3"].config(target, None, choices).extra


@pytest.mark.skipif(not row_named("mistral").is_known_here(), reason="this transformers computes it otherwise")
def test_records_are_cut_to_the_window_unless_told_otherwise(made, tmp_path):
    folder = made("mistral-window")
    words = ["--tmpdir", str(tmp_path), "--cpdir", str(tmp_path / "c"), "--basepath", str(folder)]
    options = read_options(words)
    assert options.max_len == WINDOW
    draft_config(options, load_config(folder), {})
    assert read_options([*words[:-1], str(made("llama"))]).max_len == 2048
    with pytest.raises(RequestError, match=f"Cut the records to that: --max_len {WINDOW}"):
        draft_config(read_options([*words, "--max_len", "2048"]), load_config(folder), {})


def test_values_that_say_nothing():
    tied = parse_config(base("gemma_3_1B") | {"tie_word_embeddings": None})
    assert tied.tie_word_embeddings
    moe = base("qwen3_30B_A3B")
    assert parse_config(moe | {"num_experts": None, "num_local_experts": 128}) == parse_config(moe)


@pytest.mark.skipif(not row_named("qwen3").is_known_here(), reason="this transformers has none")
def test_a_draft_that_calls_itself_its_target_is_the_layer_that_its_tensors_are(made, tmp_path):
    folder = made("qwen3")
    target = tiny_target(folder)
    draft = random_draft(target)
    save_draft(draft, tmp_path / "draft")
    raw = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "draft" / "config.json").write_text(json.dumps(raw))
    found = load_fitting_draft(tmp_path / "draft", folder, target)
    assert found.config == target.config.draft()
    assert torch.equal(found.state_dict()["fc.weight"], draft.state_dict()["fc.weight"])


@pytest.mark.skipif(not row_named("qwen3_moe").is_known_here(), reason="this transformers has none")
def test_experts_are_counted():
    config = parse_config(base("qwen3_30B_A3B"))
    shapes = expected_tensors(config)
    assert shapes["model.layers.47.mlp.experts.127.down_proj.weight"] == (2048, 768)
    assert shapes["model.layers.0.mlp.gate.weight"] == (128, 2048)
    assert sum(map(math.prod, shapes.values())) - trunk_values(config) == 151936 * 2048

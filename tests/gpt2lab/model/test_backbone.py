"""The backbone is GPT-2: exact sizes, and the logits and gradients of transformers."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2lab.errors import InputError
from gpt2lab.model.backbone import CONV1D_WEIGHTS, Backbone, load_backbone, to_hf
from gpt2lab.settings import ModelShape

TINY = ModelShape(n_layer=3, n_head=4, n_embd=64, n_positions=128, vocab_size=512)


def plain_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=512, n_positions=128, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("layers", "width", "heads", "parameters"),
    [
        (6, 768, 12, 81_912_576),
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_parameter_counts_are_gpt2s(layers: int, width: int, heads: int, parameters: int) -> None:
    with torch.device("meta"):
        backbone = Backbone(ModelShape(layers, heads, width, 1024, 50_257))
    assert backbone.lm.num_parameters() == parameters


def test_logits_and_gradients_equal_transformers(tmp_path) -> None:
    plain = plain_gpt2()
    plain.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path)).eval()
    ids = torch.randint(0, 512, (4, 96))
    ours, theirs = backbone.logits(ids), plain(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5

    ours.logsumexp(-1).sum().backward()
    theirs.logsumexp(-1).sum().backward()
    for name, parameter in backbone.lm.named_parameters():
        reference = plain.get_parameter(name).grad
        if name.endswith(CONV1D_WEIGHTS):
            reference = reference.T
        relative = (parameter.grad - reference).norm() / reference.norm()
        assert relative <= 1e-5, name


def test_hf_round_trip_changes_no_weight(tmp_path) -> None:
    backbone = Backbone(TINY)
    to_hf(backbone).save_pretrained(tmp_path)
    again = load_backbone(str(tmp_path))
    for (name, weight), (_, twin) in zip(backbone.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(weight, twin), name
    assert again.lm.lm_head.weight is again.lm.transformer.wte.weight


def test_an_exported_folder_loads_in_transformers_alone(tmp_path) -> None:
    backbone = Backbone(TINY).eval()
    to_hf(backbone).save_pretrained(tmp_path)
    ids = torch.randint(0, 512, (2, 40))
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert loaded.config.activation_function == "gelu_new"
    assert (loaded(ids).logits - backbone.logits(ids)).abs().max() <= 1e-5
    assert (load_backbone(str(tmp_path)).eval().logits(ids) - backbone.logits(ids)).abs().max() <= 1e-5


def test_residual_projections_start_smaller() -> None:
    backbone = Backbone(ModelShape(8, 4, 128, 64, 512))
    projection = backbone.blocks[0].mlp.c_proj.weight.std().item()
    assert projection == pytest.approx(0.02 / 16**0.5, rel=0.1)
    assert backbone.blocks[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_future_token_changes_no_earlier_logit() -> None:
    backbone = Backbone(TINY).eval()
    ids = torch.randint(0, 512, (1, 60))
    moved = ids.clone()
    moved[0, 30] = (moved[0, 30] + 1) % 512
    difference = (backbone.logits(ids) - backbone.logits(moved)).abs().amax(-1)[0]
    assert difference[:30].max() == 0
    assert difference[30:].min() > 0


def test_activation_checkpointing_changes_no_gradient() -> None:
    ids = torch.randint(0, 512, (2, 32))
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        backbone = Backbone(TINY)
        if checkpointed:
            backbone.checkpoint_activations()
        backbone.train().logits(ids).logsumexp(-1).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    assert torch.equal(*gradients)


def test_an_unreadable_model_folder_is_an_input_error(tmp_path) -> None:
    with pytest.raises(InputError, match="contains no model"):
        load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1}')
    with pytest.raises(InputError, match="no weights"):
        load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="bert"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True), ("layer_norm_epsilon", 0.01)],
)
def test_gpt2_variant_is_refused(tmp_path, key: str, value: object) -> None:
    model = to_hf(Backbone(ModelShape(2, 2, 32, 16, 64)))
    setattr(model.config, key, value)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{key}={value}, a variant"):
        load_backbone(str(tmp_path))


def test_missing_weights_are_never_filled_with_random_numbers(tmp_path) -> None:
    model = to_hf(Backbone(ModelShape(2, 2, 32, 16, 64)))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"h\.1\.mlp\.c_fc\.weight"):
        load_backbone(str(tmp_path))


def test_a_projection_depends_on_the_seed_alone() -> None:
    """Ranks and a repeated run start with the same projection, independent of the global random state."""
    made = []
    for drawn_before, seed in ((1, 3), (2, 3), (1, 4)):
        backbone = Backbone(ModelShape(1, 1, 16, 8, 30))
        torch.manual_seed(drawn_before)
        backbone.add_projection(24, seed)
        assert backbone.projection is not None
        made.append(backbone.projection.weight)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])

from itertools import combinations, pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_bcd.blocks import LayerBlock, create_blocks_from_model, describe_blocks

DISCOVERIES = ["auto", "transformer", "layer", "linear", "child"]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)
    )


class BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        if width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.transition = nn.Conv2d(4, 4, 1)
        self.layer2 = nn.Sequential(BasicBlock(4, 8), BasicBlock(8, 8))
        self.fc = nn.Linear(8, 2)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class MixtureLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(4, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(5))


class MixtureModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(MixtureLayer() for _ in range(3))
        self.head = nn.Linear(4, 7)


class StrayParameters(nn.Module):
    """Direct parameters next to children, a ParameterList, norms at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 4))
        self.norm_in = nn.LayerNorm(4)
        self.fc1 = nn.Linear(4, 4)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))])
        self.fc2 = nn.Linear(4, 4)
        self.norm_out = nn.LayerNorm(4)


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 7)
        self.decoder.weight = self.embed.weight


def wrapped(model: nn.Module) -> nn.Module:
    lightning = pytest.importorskip("lightning.pytorch")

    class Wrapper(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = model

    return Wrapper()


def hugging_face(name: str) -> nn.Module:
    hf = pytest.importorskip("transformers")
    tiny = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3}
    tiny["num_attention_heads"] = 2
    if name == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=8, n_layer=3, n_head=2, n_positions=8))
    if name == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(max_position_embeddings=8, **tiny))
    if name == "t5":
        return hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=16, num_layers=3, num_decoder_layers=2, num_heads=2)
        )
    if name == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**tiny))
    if name == "vit":
        del tiny["vocab_size"]
        return hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, num_labels=3, **tiny))
    return hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=5, num_key_value_heads=1, **tiny))


def names(blocks: list[LayerBlock]) -> list[str]:
    return [block.name for block in blocks]


def contents(model: nn.Module, blocks: list[LayerBlock]) -> dict[str, list[str]]:
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {block.name: [name_of[id(p)] for p in block.parameters] for block in blocks}


def assert_partition(model: nn.Module, blocks: list[LayerBlock]) -> None:
    covered = [id(p) for block in blocks for p in block.parameters]
    assert sorted(covered) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(set(names(blocks))) == len(blocks) > 1


# --- LayerBlock


def test_layer_block_counts_elements_and_shows_them():
    block = LayerBlock("fc", nn.Linear(4, 3).parameters())
    assert block.num_parameters() == 15
    assert repr(block) == "LayerBlock('fc', 15 elements, 2 parameters)"
    assert isinstance(block.parameters, list)


def test_unfreeze_restores_what_the_user_had_frozen():
    layer = nn.Linear(4, 3)
    layer.bias.requires_grad_(False)
    block = LayerBlock("fc", layer.parameters())
    block.freeze()
    assert [p.requires_grad for p in block.parameters] == [False, False]
    block.freeze()
    block.unfreeze()
    assert [p.requires_grad for p in block.parameters] == [True, False]


def test_layer_block_rejects_empty_duplicate_and_foreign_elements():
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"non-empty \(fc\), but got none"):
        LayerBlock("fc", [])
    with pytest.raises(ValueError, match="got 2 of which 1 are distinct"):
        LayerBlock("fc", [layer.weight, layer.weight])
    with pytest.raises(TypeError, match="tuple"):
        LayerBlock("fc", layer.named_parameters())  # type: ignore[arg-type]


def test_repr_of_an_uninitialised_block_does_not_fail():
    assert "uninitialised" in repr(LayerBlock("lazy", nn.LazyLinear(3).parameters()))


# --- discovery covers real architectures


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (mlp, ["0", "2", "4"]),
        (cnn, ["0", "3", "5"]),
        (ResNet, ["embeddings", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "head"]),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False),
            ["layers.0", "layers.1", "layers.2"],
        ),
        (MixtureModel, ["embeddings", "layers.0", "layers.1", "layers.2", "head"]),
        (StrayParameters, ["fc1", "scales", "fc2"]),
        (TiedModel, ["embed", "middle", "decoder"]),
    ],
)
@pytest.mark.parametrize("wrap", [False, True])
def test_auto_covers_plain_models(model, expected, wrap):
    module = wrapped(model()) if wrap else model()
    blocks = create_blocks_from_model(module)
    assert_partition(module, blocks)
    edges = {"embeddings", "head"}
    assert names(blocks) == [f"net.{name}" if wrap and name not in edges else name for name in expected]


LAYERS = {
    "gpt2": [f"transformer.h.{i}" for i in range(3)],
    "bert": [f"bert.encoder.layer.{i}" for i in range(3)],
    "t5": [f"encoder.block.{i}" for i in range(3)] + [f"decoder.block.{i}" for i in range(2)],
    "llama": [f"model.layers.{i}" for i in range(3)],
    "mixtral": [f"model.layers.{i}" for i in range(3)],
}


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("name", [*LAYERS, "vit"])
def test_auto_covers_hugging_face_models(name, wrap):
    model = hugging_face(name)
    module = wrapped(model) if wrap else model
    blocks = create_blocks_from_model(module)
    assert_partition(module, blocks)
    assert names(blocks)[0] == "embeddings"
    assert names(blocks)[-1] == "head"
    if name != "vit":  # the path of its layers depends on the version of transformers
        assert names(blocks)[1:-1] == [f"net.{layer}" if wrap else layer for layer in LAYERS[name]]
    assert len(blocks) == (7 if name == "t5" else 5)


@pytest.mark.parametrize("block_type", ["layer", "child"])
@pytest.mark.parametrize("name", [*LAYERS, "vit"])
def test_every_discovery_covers_hugging_face_models(name, block_type):
    model = hugging_face(name)
    if name == "gpt2" and block_type == "child":  # its head is tied, so there is only one child with parameters left
        model = model.transformer
    assert_partition(model, create_blocks_from_model(model, block_type))


def test_tied_head_of_gpt2_is_in_the_embeddings_and_the_final_norm_is_the_head():
    model = hugging_face("gpt2")
    found = contents(model, create_blocks_from_model(model, "transformer"))
    assert found["embeddings"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert found["head"] == ["transformer.ln_f.weight", "transformer.ln_f.bias"]


def test_between_two_layer_lists_leftovers_join_the_layer_before():
    model = hugging_face("t5")
    found = contents(model, create_blocks_from_model(model, "transformer"))
    assert found["encoder.block.2"][-1] == "encoder.final_layer_norm.weight"
    assert found["head"] == ["decoder.final_layer_norm.weight"] + (
        [] if model.config.tie_word_embeddings else ["lm_head.weight"]
    )
    resnet = ResNet()
    found = contents(resnet, create_blocks_from_model(resnet))
    assert found["layer1.1"][-2:] == ["transition.weight", "transition.bias"]
    assert found["embeddings"] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert found["head"] == ["fc.weight", "fc.bias"]


def test_lists_of_experts_inside_layers_are_not_blocks():
    model = MixtureModel()
    found = contents(model, create_blocks_from_model(model, "transformer"))
    assert any("experts.4" in name for name in found["layers.1"])


def test_a_list_of_leaf_modules_or_of_mixed_classes_is_not_a_layer_list():
    leaves = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="for which the model has no module"):
        create_blocks_from_model(leaves, "transformer")
    mixed = nn.Sequential(MixtureLayer(), Expert())
    experts = [f"0.experts.{i}" for i in range(5)]
    assert names(create_blocks_from_model(mixed, "transformer")) == ["embeddings", *experts, "head"]


def test_norms_and_stray_parameters_join_the_block_before_them():
    model = StrayParameters()
    found = contents(model, create_blocks_from_model(model, "layer"))
    assert found["fc1"] == ["class_token", "norm_in.weight", "norm_in.bias", "fc1.weight", "fc1.bias"]
    assert found["scales"] == ["scales.0", "scales.1"]
    assert found["fc2"][-2:] == ["norm_out.weight", "norm_out.bias"]
    found = contents(model, create_blocks_from_model(model, "linear"))
    assert list(found) == ["fc1", "fc2"]
    assert found["fc1"][-2:] == ["scales.0", "scales.1"]


def test_norms_of_other_libraries_are_recognised_by_name():
    model = hugging_face("llama")
    assert not any("norm" in name for name in names(create_blocks_from_model(model, "layer")))


def test_a_parametrised_layer_is_one_layer():
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), weight_norm(nn.Linear(4, 2)))
    for block_type in ("auto", "layer", "linear"):
        blocks = create_blocks_from_model(model, block_type)
        assert_partition(model, blocks)
        assert names(blocks) == ["0", "1"]


def test_child_descends_through_wrappers_with_one_child():
    model = wrapped(nn.Sequential(mlp(), nn.ReLU()))
    assert names(create_blocks_from_model(model, "child")) == ["net.0.0", "net.0.2", "net.0.4"]
    assert names(create_blocks_from_model(wrapped(ResNet()), "child")) == [
        f"net.{child}" for child in ("conv1", "bn1", "layer1", "transition", "layer2", "fc")
    ]


def test_a_tied_weight_is_in_the_block_of_its_first_occurrence():
    model = TiedModel()
    found = contents(model, create_blocks_from_model(model))
    assert found["embed"] == ["embed.weight"]
    assert found["decoder"] == ["decoder.bias"]


def test_a_layer_shared_across_depth_counts_once():
    shared = Expert()
    model = nn.Sequential(nn.ModuleList([shared, shared, Expert()]), nn.Linear(4, 2))
    blocks = create_blocks_from_model(model)
    assert_partition(model, blocks)
    assert names(blocks) == ["0.0", "0.2", "head"]


@pytest.mark.parametrize("block_type", ["auto", "layer", "child", "transformer"])
def test_frozen_parameters_stay_out_and_stay_frozen(block_type):
    model = ResNet()
    model.conv1.requires_grad_(False)
    model.layer1[0].bn1.bias.requires_grad_(False)
    blocks = create_blocks_from_model(model, block_type)
    assert_partition(model, blocks)
    for block in blocks:
        block.freeze()
        block.unfreeze()
    assert not model.conv1.weight.requires_grad
    assert not model.layer1[0].bn1.bias.requires_grad


def test_frozen_layers_are_not_counted_in_a_layer_list():
    model = MixtureModel()
    model.layers[0].requires_grad_(False)
    assert names(create_blocks_from_model(model)) == ["embeddings", "layers.1", "layers.2", "head"]


@pytest.mark.parametrize("block_type", ["auto", "layer", "linear", "child"])
def test_discovery_is_deterministic_and_follows_registration_order(block_type):
    model = StrayParameters()
    once = contents(model, create_blocks_from_model(model, block_type))
    again = contents(model, create_blocks_from_model(model, block_type))
    assert list(once.items()) == list(again.items())
    assert [name for held in once.values() for name in held] == [name for name, _ in model.named_parameters()]


# --- mappings, lists, callables


def test_a_mapping_searches_names_and_leftovers_join_the_block_before():
    model = StrayParameters()
    found = contents(model, create_blocks_from_model(model, {"late": "fc2", "early": r"^fc1\.weight$"}))
    assert list(found) == ["late", "early"]
    assert found["early"] == [
        *("class_token", "norm_in.weight", "norm_in.bias", "fc1.weight", "fc1.bias", "scales.0", "scales.1")
    ]
    assert found["late"] == ["fc2.weight", "fc2.bias", "norm_out.weight", "norm_out.bias"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"a": r"^0\.", "b": r"weight"}, r"an overlap: 0\.weight in a and b"),
        ({"a": r"^0\.", "b": r"nothing"}, "no trainable parameter for b"),
        ({}, r"in no block: 0\.weight"),
    ],
)
def test_a_bad_mapping_is_an_error_with_the_coverage_table(patterns, message):
    with pytest.raises(ValueError, match=f"(?s){message}.*gradient \\+ optimizer.*largest block"):
        create_blocks_from_model(mlp(), patterns)


def test_an_invalid_pattern_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"got '\(' for 'a'.*re\.escape"):
        create_blocks_from_model(mlp(), {"a": "("})


def test_a_pattern_that_matches_only_frozen_parameters_matches_nothing():
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter for a"):
        create_blocks_from_model(model, {"a": r"^0\.", "b": r"^2\.", "c": r"^4\."})


def two_blocks(model: nn.Module) -> list[LayerBlock]:
    return [LayerBlock("first", model[0].parameters()), LayerBlock("rest", model[1:].parameters())]


def test_a_list_or_callable_of_blocks_is_kept_as_it_is():
    model = mlp()
    blocks = two_blocks(model)
    assert create_blocks_from_model(model, blocks) == blocks
    assert names(create_blocks_from_model(model, two_blocks)) == ["first", "rest"]


def test_frozen_parameters_leave_explicit_blocks():
    model = mlp()
    model[0].bias.requires_grad_(False)
    blocks = create_blocks_from_model(model, two_blocks)
    assert_partition(model, blocks)
    assert contents(model, blocks)["first"] == ["0.weight"]


def test_parameters_frozen_after_their_block_was_made_leave_it():
    model = mlp()
    blocks = two_blocks(model)
    model[0].bias.requires_grad_(False)
    assert contents(model, create_blocks_from_model(model, blocks))["first"] == ["0.weight"]


def test_a_block_made_before_its_parameters_were_unfrozen_trains_again():
    model = mlp().requires_grad_(False)
    blocks = two_blocks(model)
    model.requires_grad_(True)
    blocks = create_blocks_from_model(model, blocks)
    for block in blocks:
        block.freeze()
        block.unfreeze()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: [LayerBlock("a", m[0].parameters())], r"in no block: 2\.weight, 2\.bias, 4\.weight"),
        (lambda m: [LayerBlock("a", m.parameters()), LayerBlock("b", m[0].parameters())], r"an overlap: 0\.weight"),
        (lambda m: [LayerBlock("a", m.parameters()), LayerBlock("b", mlp().parameters())], "another model in b"),
        (lambda m: [LayerBlock("a", m[:2].parameters()), LayerBlock("a", m[2:].parameters())], "with the name a"),
        (lambda m: [], "in no block"),
    ],
)
@pytest.mark.parametrize("as_callable", [False, True])
def test_bad_blocks_are_an_error_with_the_coverage_table(make, message, as_callable):
    model = mlp()
    with pytest.raises(ValueError, match=f"(?s){message}.*gradient \\+ optimizer"):
        create_blocks_from_model(model, make if as_callable else make(model))


def test_a_block_of_frozen_parameters_only_is_an_error():
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"(?s)no trainable parameter for first.*gradient"):
        create_blocks_from_model(model, two_blocks)


@pytest.mark.parametrize("block_type", [3, None, LayerBlock("a", [nn.Parameter(torch.ones(1))]), ["0", "2"]])
def test_other_types_are_an_error(block_type):
    with pytest.raises(TypeError, match="a list of LayerBlock"):
        create_blocks_from_model(mlp(), block_type)
    if not isinstance(block_type, LayerBlock):
        with pytest.raises(TypeError, match="a callable that returns one"):
            create_blocks_from_model(mlp(), lambda model: block_type)


# --- errors of discovery


def test_an_unknown_string_is_an_error_that_lists_the_valid_ones():
    with pytest.raises(ValueError, match="but got 'layers'") as caught:
        create_blocks_from_model(mlp(), "layers")
    assert all(repr(valid) in str(caught.value) for valid in DISCOVERIES)


@pytest.mark.parametrize("block_type", ["auto", "layer", "linear"])
def test_discovery_that_ends_with_one_block_is_an_error_with_the_table(block_type):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"(?s)one block of everything.*0  0 .*12 .*100\.0 %.*largest block"):
        create_blocks_from_model(model, block_type)


@pytest.mark.parametrize(
    ("model", "block_type"), [(mlp, "transformer"), (lambda: nn.Conv1d(1, 1, 1), "linear"), (Expert, "transformer")]
)
def test_discovery_that_finds_no_module_is_an_error_with_the_table(model, block_type):
    with pytest.raises(ValueError, match=rf"(?s)got '{block_type}', for which .*\(in no block\).*100\.0 %"):
        create_blocks_from_model(model(), block_type)


def test_a_callable_that_returns_one_block_is_an_error_but_a_list_or_mapping_warns():
    model = mlp()
    one = [LayerBlock("all", model.parameters())]
    with pytest.raises(ValueError, match="one block of everything"):
        create_blocks_from_model(model, lambda _: one)
    for block_type in (one, {"all": "weight"}):
        with pytest.warns(UserWarning, match="'all' holds all trainable parameters"):
            blocks = create_blocks_from_model(model, block_type)
        assert blocks[0].num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("block_type", [*DISCOVERIES, {"a": "."}, []])
def test_a_model_without_trainable_parameters_is_an_error(block_type):
    for model in (nn.ReLU(), mlp().requires_grad_(False)):
        with pytest.raises(ValueError, match=r"to be trainable, but got only frozen"):
            create_blocks_from_model(model, block_type)


def test_lazy_parameters_are_an_error_until_a_batch_went_through():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias.*run one batch"):
        create_blocks_from_model(model)
    model(torch.ones(2, 4))
    assert names(create_blocks_from_model(model)) == ["0", "1"]


# --- sizes


def row_of(sizes: list[int]) -> nn.ParameterDict:
    return nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(size)) for i, size in enumerate(sizes)})


def each_alone(model: nn.Module) -> list[LayerBlock]:
    return [LayerBlock(name, [p]) for name, p in model.named_parameters()]


@pytest.mark.parametrize("seed", range(6))
def test_num_blocks_finds_the_smallest_largest_group_of_all_contiguous_partitions(seed):
    generator = torch.Generator().manual_seed(seed)
    count = 3 + seed
    sizes = torch.randint(1, 30, (count,), generator=generator).tolist()
    if seed == 0:
        sizes = [0, 5, 0]  # parameters without elements do not break it
    model = row_of(sizes)
    for num_blocks in range(2, count + 1):
        blocks = create_blocks_from_model(model, each_alone, num_blocks=num_blocks)
        assert_partition(model, blocks)
        assert [id(p) for block in blocks for p in block.parameters] == [id(p) for p in model.parameters()]
        groupings = [(0, *cuts, count) for cuts in combinations(range(1, count), num_blocks - 1)]
        totals = [[sum(sizes[a:b]) for a, b in pairwise(cuts)] for cuts in groupings]
        smallest = min(map(max, totals))
        found = [block.num_parameters() for block in blocks]
        assert len(found) == num_blocks
        assert max(found) == smallest
        squares = min(sum(t * t for t in total) for total in totals if max(total) == smallest)
        assert sum(t * t for t in found) == squares


def test_num_blocks_names_groups_by_first_and_last():
    blocks = create_blocks_from_model(row_of([1, 1, 1, 5]), each_alone, num_blocks=2)
    assert names(blocks) == ["p0..p2", "p3"]
    assert names(create_blocks_from_model(mlp(), "layer", num_blocks=3)) == ["0", "2", "4"]


def test_num_blocks_of_one_is_explicit_and_warns():
    with pytest.warns(UserWarning, match=r"'0\.\.4' holds all"):
        assert len(create_blocks_from_model(mlp(), num_blocks=1)) == 1


def test_num_blocks_above_the_blocks_found_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match=r"at most 3, the blocks found, but got 4\. Do lower it.*max_parameters"):
        create_blocks_from_model(mlp(), num_blocks=4)


@pytest.mark.parametrize("argument", ["num_blocks", "max_parameters"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_sizes_must_be_positive_integers(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` to be a positive integer"):
        create_blocks_from_model(mlp(), **{argument: value})


def test_max_parameters_splits_by_module_and_keeps_what_fits():
    model = MixtureModel()  # a layer: attention 20, each expert 40 + 36
    found = contents(model, create_blocks_from_model(model, max_parameters=100))
    assert list(found)[:6] == [
        "embeddings",
        "layers.0.attention..layers.0.experts.0",
        *(f"layers.0.experts.{i}" for i in range(1, 5)),
    ]
    assert "head" in found
    assert_partition(model, create_blocks_from_model(model, max_parameters=100))
    assert list(contents(model, create_blocks_from_model(model, max_parameters=1000))) == list(
        contents(model, create_blocks_from_model(model))
    )


@pytest.mark.parametrize("limit", [1, 7, 20, 37, 50, 90, 300])
@pytest.mark.parametrize("model", [mlp, cnn, ResNet, MixtureModel, StrayParameters, TiedModel])
def test_max_parameters_holds_unless_one_parameter_is_larger(model, limit):
    module = model()
    blocks = create_blocks_from_model(module, max_parameters=limit)
    assert_partition(module, blocks)
    assert all(block.num_parameters() <= limit or len(block.parameters) == 1 for block in blocks)
    assert [id(p) for block in blocks for p in block.parameters] == [id(p) for p in module.parameters()]


def test_max_parameters_splits_a_leaf_by_parameter_and_a_single_block_into_several():
    model = nn.Linear(4, 3)
    assert contents(model, create_blocks_from_model(model, max_parameters=12)) == {
        "weight": ["weight"],
        "bias": ["bias"],
    }


def test_a_block_of_one_parameter_keeps_its_name_above_the_limit():
    model = row_of([5, 3])
    blocks = [LayerBlock("large", [model["p0"]]), LayerBlock("small", [model["p1"]])]
    assert create_blocks_from_model(model, blocks, max_parameters=2) == blocks


def test_pieces_of_interleaved_blocks_have_distinct_names():
    model = nn.ModuleList(nn.ModuleDict({k: nn.Linear(2, 2) for k in "qkvo"}) for _ in range(3))
    patterns = {"in": r"\.(q|k)\.", "out": r"\.(v|o)\."}
    assert_partition(model, create_blocks_from_model(model, patterns, max_parameters=12))


def test_blocks_are_split_first_and_then_merged():
    model = MixtureModel()
    blocks = create_blocks_from_model(model, "child", max_parameters=100, num_blocks=4)
    assert_partition(model, blocks)
    coarse = create_blocks_from_model(model, "child")
    assert len(coarse) == 3
    assert len(blocks) == 4
    assert max(b.num_parameters() for b in blocks) < max(b.num_parameters() for b in coarse) / 2


# --- table


def test_describe_blocks_lists_sizes_shares_bytes_and_totals():
    model = nn.Sequential(nn.Linear(15, 16), nn.Linear(16, 16).to(torch.bfloat16))
    lines = describe_blocks(create_blocks_from_model(model)).splitlines()
    assert lines[0].split() == ["index", "name", "parameters", "share", "gradient", "+", "optimizer"]
    assert lines[1].split() == ["0", "0", "256", "48.5", "%", "3.0", "KiB"]
    assert lines[2].split() == ["1", "1", "272", "51.5", "%", "1.6", "KiB"]
    assert lines[3].split(";")[0].split() == ["total", "blocks:", "2", "528", "100.0", "%", "4.6", "KiB"]
    assert lines[3].endswith("; largest block: 3.0 KiB = 65.3 % of all")
    assert len({len(line.split(";")[0]) for line in lines}) == 1


def test_describe_blocks_counts_the_states_it_is_told():
    block = [LayerBlock("a", [nn.Parameter(torch.zeros(10))])]
    assert " 40 B" in describe_blocks(block, states_per_parameter=0)
    assert " 120 B" in describe_blocks(block)
    big = [LayerBlock("a", [nn.Parameter(torch.empty(2**30, device="meta"))])]
    assert " 12.0 GiB" in describe_blocks(big)


def test_describe_blocks_rejects_nothing_and_negative_states():
    with pytest.raises(ValueError, match="at least one block, but got none"):
        describe_blocks([])
    with pytest.raises(ValueError, match="0 or more, but got -1"):
        describe_blocks([LayerBlock("a", nn.Linear(2, 2).parameters())], states_per_parameter=-1)

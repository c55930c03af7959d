"""The network against the slides' table, an ONNX graph run by onnxruntime, and NumPy."""

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet.errors import UserError
from alexnet.model import AlexNet, ResponseNorm, UnscaledDropout, blocked_convolution
from training.network import build_model
from training.recipes import RECIPES

BVLC_ALEXNET = Path(onnx.__file__).parent / "backend/test/data/light/light_bvlc_alexnet.onnx"
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


def layer(model: AlexNet, name: str) -> nn.Module:
    return dict(model.named_modules())[f"{'features' if name[0] == 'c' else 'classifier'}.{name}"]


def full_size(**options) -> AlexNet:
    with torch.device("meta"):
        return AlexNet(**options)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("variant", "count"), [("ungrouped", 62_378_344), ("paper", 60_965_224)])
def test_parameter_counts_at_1000_classes(variant, count):
    assert count_parameters(full_size(variant=variant)) == count


@pytest.mark.parametrize("variant", ["ungrouped", "paper"])
def test_feature_maps_have_the_sizes_of_the_deck(variant):
    model = full_size(variant=variant)
    shapes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: shapes.update({name: tuple(output.shape)})
        )
    logits = model(torch.empty(2, 3, 227, 227, device="meta"))
    assert [shapes[f"features.{name}"][1:] for name in ("conv1", "pool1", "conv2", "pool2")] == [
        (96, 55, 55),
        (96, 27, 27),
        (256, 27, 27),
        (256, 13, 13),
    ]
    assert [shapes[f"features.{name}"][1:] for name in ("conv3", "conv4", "conv5", "pool5")] == [
        (384, 13, 13),
        (384, 13, 13),
        (256, 13, 13),
        (256, 6, 6),
    ]
    assert shapes["classifier.fc6"] == shapes["classifier.fc7"] == (2, 4096)
    assert logits.shape == (2, 1000)


def test_deck_has_neither_groups_nor_response_normalisation():
    modules = list(full_size(variant="ungrouped").modules())
    assert {module.groups for module in modules if isinstance(module, nn.Conv2d)} == {1}
    assert not any(isinstance(module, nn.LocalResponseNorm) for module in modules)


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("ungrouped", "dropout6 fc6 relu6 dropout7 fc7 relu7 fc8"),
        ("paper", "fc6 relu6 dropout6 fc7 relu7 dropout7 fc8"),
    ],
)
def test_dropout_of_one_half_is_on_inputs_in_the_slides_and_on_outputs_in_the_paper(variant, names):
    model = full_size(variant=variant)
    assert [name for name, _ in model.classifier.named_children()] == names.split()
    kind = UnscaledDropout if variant == "paper" else nn.Dropout
    assert {(type(m), m.p) for m in model.modules() if isinstance(m, nn.Dropout)} == {(kind, 0.5)}


def test_the_sources_dropout_masks_while_training_and_halves_in_evaluation():
    x = torch.randn(100, 1000).requires_grad_()
    layer = UnscaledDropout(0.5)
    y = layer(x)
    kept = y != 0
    assert torch.equal(y, x * kept) and abs(float(kept.float().mean()) - 0.5) < 0.01
    y.sum().backward()
    assert torch.equal(x.grad, kept.float())
    assert torch.equal(layer.eval()(x), x / 2)


def bvlc_weight_shapes(graph) -> dict[str, tuple[int, ...]]:
    return {
        tensor.name.removesuffix("__SHAPE"): tuple(numpy_helper.to_array(tensor).tolist())
        for tensor in graph.initializer
        if tensor.name.endswith("__SHAPE")
    }


def test_paper_has_the_weights_of_the_bvlc_graph_layer_by_layer():
    shapes = bvlc_weight_shapes(onnx.load(BVLC_ALEXNET).graph)
    model = full_size(variant="paper")
    assert len(shapes) == 2 * len(LAYERS)
    for name in LAYERS:
        assert tuple(layer(model, name).weight.shape) == shapes[f"{name}_w_0"]
        assert tuple(layer(model, name).bias.shape) == shapes[f"{name}_b_0"]


def halved(lrn: onnx.NodeProto, bias: float) -> list[onnx.NodeProto]:
    """The same normalisation of each half of the maps."""
    ends = ("a", "b")
    parts, done = ([f"{lrn.output[0]}_{word}_{end}" for end in ends] for word in ("part", "done"))
    attributes = {a.name: helper.get_attribute_value(a) for a in lrn.attribute} | {
        "bias": float(bias)
    }
    return [
        helper.make_node("Split", lrn.input, parts, axis=1),
        *(
            helper.make_node("LRN", [i], [o], **attributes)
            for i, o in zip(parts, done, strict=True)
        ),
        helper.make_node("Concat", done, lrn.output, axis=1),
    ]


def bvlc_graph_with_weights_of(model: AlexNet, *, lrn_bias: float) -> onnx.ModelProto:
    """The published graph (LRN after ReLU, before the pooling; groups 1, 2, 1, 2, 2) with 227×227
    input, our weights for its constants, k of the LRN as asked, and logits as output. It has one
    LRN over all maps, here one for each half; and no factor in evaluation, here in the weights."""
    document = onnx.load(BVLC_ALEXNET)
    graph = document.graph
    weights = {}
    for name in LAYERS:
        weights[f"{name}_w_0"] = layer(model, name).weight.detach().numpy()
        weights[f"{name}_b_0"] = layer(model, name).bias.detach().numpy()
    weights["OC2_DUMMY_1"] = np.array([1, -1])
    weights["fc7_w_0"], weights["fc8_w_0"] = weights["fc7_w_0"] / 2, weights["fc8_w_0"] / 2
    nodes = []
    for node in graph.node:
        if node.op_type == "LRN":
            nodes += halved(node, lrn_bias)
        elif node.op_type not in ("ConstantOfShape", "Softmax"):
            nodes.append(node)
    for field in ("node", "initializer", "input", "output", "value_info"):
        graph.ClearField(field)
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(array, n) for n, array in weights.items())
    graph.input.append(helper.make_tensor_value_info("data_0", TensorProto.FLOAT, [1, 3, 227, 227]))
    graph.output.append(helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None))
    return document


def test_paper_gives_the_logits_of_the_onnx_graph():
    torch.manual_seed(0)
    model = AlexNet("paper", num_classes=20, width=0.25, init="he").eval()
    for name in LAYERS:
        nn.init.normal_(layer(model, name).bias)
    # Large enough that LRN's denominator is far from constant.
    x = 50 * torch.randn(1, 3, 227, 227)
    with torch.no_grad():
        ours = model(x).numpy()

    def run(lrn_bias: float) -> np.ndarray:
        graph = bvlc_graph_with_weights_of(model, lrn_bias=lrn_bias)
        session = onnxruntime.InferenceSession(
            graph.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return session.run(None, {"data_0": x.numpy()})[0]

    theirs = run(lrn_bias=2.0)
    scale = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() <= 1e-4 * scale
    assert np.abs(ours - run(lrn_bias=1.0)).max() > 1e-2 * scale  # so the comparison can fail


def test_response_normalisation_follows_the_formula_in_each_half_of_the_maps():
    maps = 100 * np.random.default_rng(0).standard_normal((2, 12, 4, 4))
    expected = np.empty_like(maps)
    for i in range(12):
        half = 6 * (i // 6)
        neighbours = maps[:, max(half, i - 2) : min(half + 6, i + 3)]
        energy = (neighbours**2).sum(1)
        expected[:, i] = maps[:, i] / (2 + 1e-4 / 5 * energy) ** 0.75
    norms = [m for m in full_size(variant="paper").modules() if isinstance(m, nn.LocalResponseNorm)]
    assert len(norms) == 2
    for norm in norms:
        np.testing.assert_allclose(norm(torch.from_numpy(maps)).numpy(), expected, rtol=1e-10)


def test_response_normalisation_is_torchs_in_float32_both_ways_and_pools_nothing():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    generator = torch.Generator().manual_seed(0)
    maps, gradient = (torch.randn(2, 16, 5, 5, generator=generator) for _ in range(2))
    theirs, ours = nn.LocalResponseNorm(5, k=2), ResponseNorm(5, alpha=1e-4, k=2, groups=2)
    found, names = [], set()
    for norm in (lambda x: torch.cat([theirs(half) for half in x.chunk(2, 1)], 1), ours):
        x = (100 * maps).requires_grad_()
        names.clear()
        with Seen():
            y = norm(x)
            y.backward(gradient)
        found.append((y.detach(), x.grad, "avg_pool3d_backward" in names))
    for wanted, given in zip(*(rows[:2] for rows in found), strict=True):
        assert (given - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert [rows[2] for rows in found] == [True, False], "which no GPU repeats bit for bit"
    half = ours((100 * maps).bfloat16())
    torch.testing.assert_close(half.float(), found[1][0], rtol=2**-7, atol=0)
    assert half.dtype == torch.bfloat16


SOURCE_STD = dict.fromkeys(LAYERS, 0.01) | dict.fromkeys(("conv3", "conv4", "conv5"), 0.03)
BIAS = dict.fromkeys(("conv1", "conv3", "fc8"), 0.0) | dict.fromkeys(
    ("conv2", "conv4", "conv5", "fc6", "fc7"), 1.0
)


@pytest.mark.parametrize("init", [None, "source", "text"])
def test_published_initialisations_draw_their_std_and_biases(init):
    torch.manual_seed(0)
    model = AlexNet("paper", num_classes=100, width=0.25, init=init)
    for name in LAYERS:
        weight, bias = (p.detach() for p in layer(model, name).parameters())
        std = 0.01 if init == "text" else SOURCE_STD[name]
        # Five standard errors of a standard deviation, and of a mean.
        tolerance = 5 / math.sqrt(2 * weight.numel())
        assert float(weight.std()) == pytest.approx(std, rel=tolerance), name
        assert abs(float(weight.mean())) < 5 * std / math.sqrt(weight.numel()), name
        assert torch.equal(bias, torch.full_like(bias, BIAS[name])), name


def test_he_initialisation_keeps_the_size_of_the_signal():
    torch.manual_seed(0)
    model = AlexNet("ungrouped", num_classes=50, width=0.25, init="he").eval()
    for name in LAYERS:
        weight, bias = (p.detach() for p in layer(model, name).parameters())
        expected = 0.001 if name == "fc8" else math.sqrt(2 / weight[0].numel())
        tolerance = 5 / math.sqrt(2 * weight.numel())
        assert float(weight.std()) == pytest.approx(expected, rel=tolerance), name
        assert not bias.any()
    with torch.no_grad():
        hidden = model.classifier[:-1](model.features(torch.randn(8, 3, 227, 227)).flatten(1))
    assert 0.3 < float(hidden.std()) < 10  # of 1, through seven layers


# The paper's own initialisation begins a little higher; fc8 of std 0.01 after He's, by 2 to 5.
@pytest.mark.parametrize(
    ("recipe", "above"), [("baseline", 0.2), ("paper", 0.6), ("fast", 0.2), ("smoke", 0.2)]
)
def test_the_first_loss_of_each_recipe_at_its_width_is_near_that_of_guessing(recipe, above):
    """While training, on 12 images as smooth and as varied in value as photos are."""
    config = RECIPES[recipe]()
    model = build_model(config, 1000)
    x = F.interpolate(torch.randn(12, 3, 16, 16), (227, 227), mode="bicubic")
    x *= (60.0 if config.normalise == "mean" else 1.0) / x.std()
    with torch.no_grad():
        logits = model(x)
    # fc8 begins alike for any number of classes: ten of its rows are that of ten.
    for classes in (10, 1000):
        loss = float(F.cross_entropy(logits[:, :classes], torch.arange(12) % classes))
        print(f"{recipe}, {classes} classes: {loss:.3f}, ln K {math.log(classes):.3f}")
        assert abs(loss - math.log(classes)) < above


def test_width_scales_convolutions_and_hidden_units():
    model = full_size(variant="paper", width=0.125, num_classes=7)
    assert [layer(model, f"conv{i}").out_channels for i in range(1, 6)] == [12, 32, 48, 48, 32]
    assert [layer(model, f"fc{i}").out_features for i in (6, 7, 8)] == [512, 512, 7]
    assert model(torch.empty(1, 3, 227, 227, device="meta")).shape == (1, 7)


def test_batch_norm_takes_the_place_of_the_convolutions_biases():
    plain, normed = full_size(), full_size(batch_norm=True)
    channels = 96 + 256 + 384 + 384 + 256
    assert count_parameters(normed) == count_parameters(plain) + channels
    names = [name for name, _ in normed.features.named_children()]
    assert names[:4] == ["conv1", "bn1", "relu1", "pool1"]
    assert sum(name.startswith("bn") for name in names) == 5
    assert all(getattr(normed.features, f"conv{i}").bias is None for i in range(1, 6))


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    for options in ({"variant": "paper"}, {"batch_norm": True}):
        model = AlexNet(num_classes=3, width=1 / 16, init="he", **options)
        model(torch.randn(4, 3, 227, 227)).square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_conv1_in_blocks_of_pixels_is_the_same_convolution():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 227, 227, dtype=torch.float64, generator=random)
    weight = torch.randn(8, 3, 11, 11, dtype=torch.float64, generator=random).requires_grad_()
    bias = torch.randn(8, dtype=torch.float64, generator=random).requires_grad_()
    wanted = nn.functional.conv2d(x, weight, bias, stride=4)
    gradient = torch.randn(wanted.shape, dtype=torch.float64, generator=random)
    found = blocked_convolution(x, weight, bias)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, (weight, bias), gradient),
        torch.autograd.grad(wanted, (weight, bias), gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_conv1_is_the_first_layer_and_listed_once():
    model = AlexNet(width=1 / 16, num_classes=2)
    assert model.conv1 is model.features[0]
    assert [name for name in model.state_dict() if "conv1" in name] == [
        "features.conv1.weight",
        "features.conv1.bias",
    ]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"variant": "caffe"}, "variant 'caffe' is unknown; choose one of 'ungrouped', 'paper'"),
        ({"init": "zeros"}, "init 'zeros' is unknown; choose one of 'source', 'text', 'he'"),
        ({"num_classes": 0}, "num_classes 0 must be a whole number from 1 up"),
        ({"num_classes": True}, "num_classes True must be a whole number from 1 up"),
        ({"width": 0.0}, "width 0.0 must lie between 0.03125 and 4"),
        ({"width": math.nan}, "width nan must lie between 0.03125 and 4"),
        ({"norm_group": -1}, "norm_group -1 must be a whole number of images; 0 takes the whole"),
        ({"norm_group": 2.5}, "norm_group 2.5 must be a whole number of images"),
        ({"variant": "paper", "batch_norm": True}, "batch_norm does not go with variant 'paper'"),
    ],
)
def test_impossible_networks_are_refused_in_one_line(options, text):
    with pytest.raises(UserError) as caught:
        AlexNet(**options)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)

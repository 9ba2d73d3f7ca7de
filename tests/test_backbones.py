"""Every backbone keeps the same promises; each has its published size; the speedrun net starts whitened.

N images, C channels, S pixels a side, K classes, F filters, M places in all images.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, gelu
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

from results.schema import UsageError
from trainables.backbones import (
    BACKBONES,
    check_backbone,
    initialize_from_images,
    parts,
    smallest_image,
    takes_images,
)
from trainables.backbones.layers import Dropout, set_dropout
from trainables.backbones.speedrun import Stage, WhitenedConv, speedrun_cnn

SPEEDRUN = ("speedrun_cnn", "speedrun_cnn_medium", "speedrun_cnn_large")
TOO_SMALL = r"Kernel size can't be greater than actual input size|Output size is too small"


def meta_net(name: str, *, image_size: int = 32, channels: int = 3, num_classes: int = 100) -> nn.Module:
    """Without storage: shapes, sizes and errors of the largest net in milliseconds."""
    with torch.device("meta"):
        return BACKBONES[name](num_classes=num_classes, dropout=0.5, image_size=image_size, channels=channels)


@pytest.fixture(params=BACKBONES, scope="module")
def backbone(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def net(backbone: str) -> nn.Module:
    """A real net for the smallest images that it takes, of one channel, and 5 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BACKBONES[backbone](num_classes=5, dropout=0.5, image_size=smallest_image(backbone), channels=1)


def training(net: nn.Module) -> nn.Module:
    """In training mode, but for stochastic depth."""
    net.train()
    for module in net.modules():
        if isinstance(module, StochasticDepth):
            module.eval()
    return net


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smallest_images(count: int, backbone: str) -> Tensor:
    return noise(count, 1, smallest_image(backbone), smallest_image(backbone))


def size(net: nn.Module, *, image_size: int) -> tuple[int, int]:
    """Trained parameters, and multiply-adds of an image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
    return sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "image_size", "parameters", "giga_multiply_adds"),
    [  # as torchvision publishes them with its weights
        ("resnet18", 224, 11_689_512, 1.814),
        ("resnet34", 224, 21_797_672, 3.664),
        ("resnet50", 224, 25_557_032, 4.089),
        ("resnet101", 224, 44_549_160, 7.801),
        ("efficientnet_b0", 224, 5_288_548, 0.386),
        ("efficientnet_b3", 300, 12_233_232, 1.827),
        ("efficientnet_b4", 380, 19_341_616, 4.394),
        ("convnext_tiny", 224, 28_589_128, 4.456),
        ("mobilenet_v3_small", 224, 2_542_856, 0.057),
    ],
)
def test_imagenet_nets_are_as_large_as_published(
    name: str, image_size: int, parameters: int, giga_multiply_adds: float
) -> None:
    counted, multiply_adds = size(meta_net(name, image_size=image_size, num_classes=1000), image_size=image_size)
    assert counted == parameters
    assert round(multiply_adds / 1e9, 3) == giga_multiply_adds


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        # 3x3 convolutions 3-32, 32-64, 64-128, their norms, 128-100 linear:
        # 864 + 18,432 + 73,728 + 2 x (32 + 64 + 128) + 12,900; at 32, 16 and 8 pixels.
        ("small_cnn", 106_372, 864 * 1024 + 18_432 * 256 + 73_728 * 64 + 12_800),
        ("small_cnn_groupnorm", 106_372, 864 * 1024 + 18_432 * 256 + 73_728 * 64 + 12_800),
        # 150,690 at 10 classes, and 90 more classes of 160 weights and a bias.
        ("efficient200k", 150_690 + 90 * 161, 8_424_320),
        # torchvision's at 1000 classes, 900 classes of 513 fewer, and 49 - 9 pixels x 3 x 64 fewer in the stem.
        ("resnet18", 11_689_512 - 900 * 513 - 40 * 192, 555_468_800),
        ("resnet34", 21_797_672 - 900 * 513 - 40 * 192, 1_159_448_576),
        ("resnet50", 23_705_252, 1_298_014_208),
        ("resnet101", 44_549_160 - 900 * 2049 - 40 * 192, 2_510_168_064),
        # 2.7 and 5.9 million in the sources.
        ("resnet44v2", 2_647_684, 388_870_656),
        ("resnet44v2_four_stages", 5_940_356, 441_312_256),
        # Convolutions: 432 in the stem; 9 x (16 + 3 x 64) x 64, 9 x (64 + 3 x 128) x 128, 9 x (128 + 3 x 256) x 256;
        # projections 16 x 64, 64 x 128, 128 x 256. Norms: 2 x (16 + 3 x 64 + 64 + 3 x 128 + 128 + 3 x 256 + 256).
        # Classifier: 257 x 100. Multiply-adds: the stages at 32, 16 and 8 pixels.
        (
            "wide_resnet16_4",
            432 + 119_808 + 516_096 + 2_064_384 + 1024 + 8192 + 32_768 + 3616 + 25_700,
            (432 + 119_808 + 1024) * 1024 + (516_096 + 8192) * 256 + (2_064_384 + 32_768) * 64 + 25_600,
        ),
        ("wide_resnet28_10", 36_479_194 + 90 * 641, 5_243_386_368),  # published: 36.5 million, 5.2 billion
        # torchvision's, and 900 classes fewer.
        ("efficientnet_b0", 5_288_548 - 900 * 1281, 116_282_368),
        ("efficientnet_b3", 12_233_232 - 900 * 1537, 294_835_520),
        ("efficientnet_b4", 19_341_616 - 900 * 1793, 470_803_808),
        # 96 filters of 1 pixel x 3, not of 16.
        ("convnext_tiny", 28_589_128 - 900 * 769 - 15 * 3 * 96, 1_450_269_696),
        ("mobilenet_v3_small", 2_542_856 - 900 * 1025, 17_599_488),
        # 24 biases (and 24 frozen filters of 12); 3x3 convolutions 24-64-64, 64-128-128, 128-256-256; six norms;
        # 256-100 without bias. At 31, 15, 7 and 3 pixels; a stage pools after its first convolution.
        (
            "speedrun_cnn",
            24 + 13_824 + 36_864 + 73_728 + 147_456 + 294_912 + 589_824 + 4 * (64 + 128 + 256) + 25_600,
            (288 + 13_824) * 961 + (36_864 + 73_728) * 225 + (147_456 + 294_912) * 49 + 589_824 * 9 + 25_600,
        ),
        # 24-64-64, 64-192-192, 192-256-256; the last stage stays at 7 pixels.
        (
            "speedrun_cnn_medium",
            24 + 13_824 + 36_864 + 110_592 + 331_776 + 442_368 + 589_824 + 4 * (64 + 192 + 256) + 25_600,
            (288 + 13_824) * 961 + (36_864 + 110_592) * 225 + (331_776 + 442_368 + 589_824) * 49 + 25_600,
        ),
        # 24-64-64-64, 64-192-192-192, 192-384-384-384; nine norms; 384-100.
        (
            "speedrun_cnn_large",
            24 + 13_824 + 2 * 36_864 + 110_592 + 2 * 331_776 + 663_552 + 2 * 1_327_104 + 6 * (64 + 192 + 384) + 38_400,
            (288 + 13_824) * 961 + (2 * 36_864 + 110_592) * 225 + (2 * 331_776 + 663_552 + 2 * 1_327_104) * 49 + 38_400,
        ),
    ],
)
def test_nets_have_their_exact_size_at_32_pixels_and_100_classes(
    name: str, parameters: int, multiply_adds: int
) -> None:
    assert size(meta_net(name), image_size=32) == (parameters, multiply_adds)


@pytest.mark.parametrize(("image_size", "channels", "num_classes"), [(9, 1, 2), (64, 2, 4), (96, 1, 1000)])
def test_nets_give_logits_for_any_image_size_channels_and_classes(
    backbone: str, image_size: int, channels: int, num_classes: int
) -> None:
    net = meta_net(backbone, image_size=image_size, channels=channels, num_classes=num_classes).eval()
    with torch.no_grad():
        logits_NK = net(torch.empty(2, channels, image_size, image_size, device="meta"))
    assert logits_NK.shape == (2, num_classes)


def test_nets_compute_in_double_precision(backbone: str) -> None:
    net = meta_net(backbone).double().eval()
    with torch.no_grad():
        logits_NK = net(torch.empty(2, 3, 32, 32, dtype=torch.float64, device="meta"))
    assert logits_NK.dtype == torch.float64


def test_images_a_pixel_too_small_are_refused_with_the_size_wanted(backbone: str) -> None:
    side = smallest_image(backbone)
    with pytest.raises(
        UsageError, match=f"{backbone} takes images of {side} pixels or more, not {side - 1}; use larger"
    ):
        check_backbone(backbone, image_size=side - 1)


@pytest.mark.parametrize("name", ["convnext_tiny", *SPEEDRUN])
def test_a_refused_image_size_would_have_failed(name: str) -> None:
    side = smallest_image(name) - 1
    with pytest.raises(RuntimeError, match=TOO_SMALL):
        meta_net(name, image_size=side)(torch.empty(2, 3, side, side, device="meta"))


@pytest.mark.parametrize("built_for", [64, 96])
def test_nets_built_for_large_images_say_how_small_they_may_be(backbone: str, built_for: int) -> None:
    side = smallest_image(backbone, built_for=built_for)
    net = meta_net(backbone, image_size=built_for).eval()
    with torch.no_grad():
        assert net(torch.empty(2, 3, side, side, device="meta")).shape == (2, 100)
        if side > 1:
            with pytest.raises(RuntimeError, match=TOO_SMALL):
                net(torch.empty(2, 3, side - 1, side - 1, device="meta"))


@pytest.mark.parametrize("name", ["small_cnn", "convnext_tiny", *SPEEDRUN])
@pytest.mark.parametrize("built_for", range(1, 13))
def test_nets_take_the_images_they_are_built_for(name: str, built_for: int) -> None:
    side = max(smallest_image(name), built_for)
    assert smallest_image(name, built_for=side) <= side
    images_NCSS = torch.empty(2, 3, side, side, device="meta")
    assert meta_net(name, image_size=side)(images_NCSS).shape == (2, 100)


def test_a_first_image_size_too_small_for_the_net_is_refused() -> None:
    check_backbone("convnext_tiny", image_size=16, built_for=64)
    with pytest.raises(
        UsageError, match="convnext_tiny, built for 64 pixels, takes images of 16 pixels or more, not 15"
    ):
        check_backbone("convnext_tiny", image_size=15, built_for=64)


def test_the_refusal_names_nets_that_take_the_image() -> None:
    with pytest.raises(UsageError, match="one of small_cnn, ") as refusal:
        check_backbone("convnext_tiny", image_size=7)
    assert "convnext_tiny" not in str(refusal.value).split("one of")[1]


def test_an_unknown_backbone_is_refused_with_the_choices() -> None:
    for ask in (check_backbone, smallest_image):
        with pytest.raises(UsageError, match="no backbone 'vgg'; there are small_cnn, efficient200k, resnet18"):
            ask("vgg")


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_tiny", "mobilenet_v3_small"])
@pytest.mark.parametrize("image_size", [32, 64, 128])
def test_small_images_keep_a_map_of_4_pixels_a_side(name: str, image_size: int) -> None:
    features = meta_net(name, image_size=image_size).get_submodule("features").eval()
    with torch.no_grad():
        maps_NCSS = features(torch.empty(2, 3, image_size, image_size, device="meta"))
    assert maps_NCSS.shape[2:] == (4, 4)


def test_each_parameter_is_in_exactly_one_part_from_the_input_to_the_classifier(backbone: str) -> None:
    net = meta_net(backbone, num_classes=7)
    cut = parts(net)
    in_parts = [id(parameter) for part in cut for parameter in part.parameters()]
    assert in_parts == [id(parameter) for parameter in net.parameters()]
    assert len(cut) >= 4
    assert all(list(part.parameters()) for part in cut)
    linear = [module for module in cut[-1].modules() if isinstance(module, nn.Linear)][-1]
    assert linear.out_features == 7
    assert not any(isinstance(module, nn.Conv2d) for module in cut[-1].modules())


def test_the_norm_of_a_stem_is_in_the_part_of_its_convolution() -> None:
    stem, *stages, classifier = parts(meta_net("resnet18"))
    assert [type(module).__name__ for module in stem.children()] == ["Conv2d", "BatchNorm2d"]
    assert len(stages) == 4
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 513 * 100


def test_the_only_dropout_is_the_one_that_can_be_changed(backbone: str) -> None:
    net = meta_net(backbone)
    assert not any(isinstance(module, nn.modules.dropout._DropoutNd) for module in net.modules())
    assert sum(isinstance(module, Dropout) for module in net.modules()) == 1


def test_dropout_acts_in_training_until_it_is_set_to_0(net: nn.Module, backbone: str) -> None:
    images_NCSS = smallest_images(4, backbone)
    set_dropout(training(net), 0.5)
    with torch.no_grad():
        assert not torch.equal(net(images_NCSS), net(images_NCSS))
        set_dropout(net, 0.0)
        assert torch.equal(net(images_NCSS), net(images_NCSS))


def test_nets_train_on_two_of_the_smallest_images_they_take(net: nn.Module, backbone: str) -> None:
    check_backbone(backbone, image_size=smallest_image(backbone))
    net.zero_grad()
    cross_entropy(net.train()(smallest_images(2, backbone)), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())


def test_gradients_reach_every_trained_parameter(net: nn.Module, backbone: str) -> None:
    set_dropout(training(net), 0.0)
    net.zero_grad()
    cross_entropy(net(smallest_images(6, backbone)), torch.tensor([0, 1, 2, 3, 4, 0])).backward()
    without = [name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert without == []


def test_a_state_dict_holds_all_that_prediction_needs(net: nn.Module, backbone: str) -> None:
    restored = meta_net(backbone, image_size=smallest_image(backbone), channels=1, num_classes=5)
    restored.load_state_dict(net.state_dict(), assign=True)
    images_NCSS = smallest_images(3, backbone)
    with torch.no_grad():
        assert torch.equal(restored.eval()(images_NCSS), net.eval()(images_NCSS))


def test_stochastic_depth_is_no_dropout() -> None:
    net = meta_net("efficientnet_b0")
    set_dropout(net, 0.0)
    probabilities = [module.p for module in net.modules() if isinstance(module, StochasticDepth)]
    assert len(probabilities) == 16  # blocks
    assert probabilities == pytest.approx([0.2 * block / 16 for block in range(16)])


def smooth_images(count: int, *, channels: int, image_size: int) -> Tensor:
    """Neighbouring pixels and channels are correlated, and the mean is not 0."""
    rough_NCSS = noise(count, channels + 1, image_size + 1, image_size + 1)
    return 2 * avg_pool2d(rough_NCSS[:, 1:] + rough_NCSS[:, :1], 2, stride=1) + 0.3


def whitened_net(images_NCSS: Tensor) -> tuple[nn.Module, WhitenedConv]:
    _, channels, side, _ = images_NCSS.shape
    net = speedrun_cnn(num_classes=3, dropout=0.0, image_size=side, channels=channels)
    initialize_from_images(net, images_NCSS)
    first = next(net.children())
    assert isinstance(first, WhitenedConv)
    return net, first


@pytest.mark.parametrize(("image_size", "channels", "count"), [(8, 1, 200), (32, 3, 100), (96, 3, 20)])
def test_whitened_patches_are_uncorrelated_with_unit_variance(image_size: int, channels: int, count: int) -> None:
    images_NCSS = smooth_images(count, channels=channels, image_size=image_size)
    _, first = whitened_net(images_NCSS)
    with torch.no_grad():
        whitened_FM = first(images_NCSS).transpose(0, 1).flatten(1)
    values = 4 * channels
    assert len(whitened_FM) == 2 * values
    assert torch.equal(whitened_FM[values:], -whitened_FM[:values])
    assert whitened_FM.mean(1).abs().max() < 1e-4
    # Variances are v / (v + 0.0005); the smallest v of these patches is above 0.05.
    assert torch.allclose(whitened_FM[:values].cov(), torch.eye(values), atol=0.01)


def test_whitening_is_deterministic_and_draws_nothing() -> None:
    images_NCSS = smooth_images(70, channels=3, image_size=8)
    before = torch.get_rng_state()
    _, first = whitened_net(images_NCSS)
    once, bias = first.weight.clone(), first.bias.clone()
    torch.set_rng_state(before)
    first.whiten(images_NCSS)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.weight, once)
    assert torch.equal(first.bias, bias)


@pytest.mark.parametrize("images_NCSS", [torch.full((5, 3, 8, 8), 0.7), noise(1, 1, 2, 2), noise(2, 3, 3, 3)])
def test_whitening_survives_constant_and_few_images(images_NCSS: Tensor) -> None:
    net, _ = whitened_net(images_NCSS)
    assert all(values.isfinite().all() for values in net.state_dict().values())
    with torch.no_grad():
        assert net.eval()(images_NCSS).isfinite().all()


def test_the_whitening_is_saved_but_never_trained() -> None:
    net, first = whitened_net(smooth_images(20, channels=3, image_size=8))
    assert torch.equal(net.state_dict()["0.weight"], first.weight)
    assert all(parameter is not first.weight for parameter in net.parameters())
    assert not first.weight.requires_grad
    assert first.bias.requires_grad


@pytest.mark.parametrize(("name", "count"), [("speedrun_cnn", 6), ("speedrun_cnn_large", 9)])
def test_later_convolutions_start_by_handing_their_input_on(name: str, count: int) -> None:
    net = BACKBONES[name](num_classes=3, dropout=0.0, image_size=16, channels=3)
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == count
    for convolution in convolutions:
        images_NCSS = noise(2, convolution.in_channels, 5, 5)
        with torch.no_grad():
            maps_NCSS = convolution(images_NCSS)
        assert torch.allclose(maps_NCSS[:, : convolution.in_channels], images_NCSS)
        assert convolution.weight[convolution.in_channels :].all()  # the rest is random


def test_the_second_and_third_convolution_of_a_large_stage_are_a_residual_branch() -> None:
    stage = Stage(2, 4, convolutions=3, pool=True).eval()
    with torch.no_grad():
        stage.keeping[-1].weight.zero_()  # the branch gives nothing
        images_NCSS = noise(2, 2, 6, 6)
        wide_NCSS = stage.widening(images_NCSS)
        assert torch.equal(stage(images_NCSS), gelu(wide_NCSS))
    assert wide_NCSS.shape == (2, 4, 3, 3)


def test_only_the_speedrun_nets_take_weights_from_images(backbone: str) -> None:
    assert takes_images(meta_net(backbone)) == (backbone in SPEEDRUN)


@pytest.mark.parametrize("name", ["small_cnn", "wide_resnet16_4"])
def test_nets_without_whitening_ignore_the_images(name: str) -> None:
    net = BACKBONES[name](num_classes=3, dropout=0.0, image_size=8, channels=1)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    initialize_from_images(net, noise(4, 1, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())

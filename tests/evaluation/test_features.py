"""Pooled features against the model's own tokens; one pass, whatever is asked of it."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from models_for_tests import squares, tiny

import vitprobe as vp
from vitprobe.data.parts import Arrays
from vitprobe.errors import DataError, MeasureError
from vitprobe.evaluation.features import at_layers, extract, parse_choice

IMAGES = squares(10).numpy()


def features_of(model, choices, images=IMAGES, indices=None):
    (found,) = extract(
        model,
        [(Arrays(images, None), indices)],
        choices,
        batch_size=4,
        device=torch.device("cpu"),
        precision="fp32",
        workers=1,
        progress=False,
    )
    return found


def own_tokens(model, images=IMAGES):
    """What each block writes, and the final norm of it."""
    with torch.no_grad():
        inputs = model.normalize(torch.from_numpy(images))
        outputs = model.module.forward_intermediates(
            inputs, return_prefix_tokens=True, intermediates_only=True, norm=False, output_fmt="NLC"
        )
        residual = [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]
        return residual, [model.module.norm(tokens) for tokens in residual]


def close(a, b):
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_choices_are_the_models_own_tokens():
    model = tiny(depth=4)
    _, normed = own_tokens(model)
    texts = ("cls", "mean", "cls+mean", "cls4", "cls4+mean", "mean2")
    choices = {text: parse_choice(text, model) for text in texts}
    found = features_of(model, choices.values())
    cls, mean = normed[-1][:, 0], normed[-1][:, 1:].mean(dim=1)
    last = torch.cat([tokens[:, 0] for tokens in normed], dim=1)
    expected = {
        "cls": cls,
        "mean": mean,
        "cls+mean": torch.cat([cls, mean], dim=1),
        "cls4": last,
        "cls4+mean": torch.cat([last, mean], dim=1),
        "mean2": torch.cat([normed[-2][:, 1:].mean(dim=1), mean], dim=1),
    }
    for text, choice in choices.items():
        assert str(choice) == text
        assert close(found[choice], expected[text]), text


def test_layers_follow_the_convention():
    model = tiny()
    residual, normed = own_tokens(model)
    for convention in ("residual", "normed"):
        layers = at_layers(parse_choice("mean", model), model, convention)
        assert [choice.layer for choice in layers] == [0, 1, 2, 3]
        found = list(features_of(model, layers).values())
        expected = [tokens[:, 1:].mean(dim=1) for tokens in residual]
        if convention == "normed":
            expected = [
                *(
                    block.norm1(tokens)[:, 1:].mean(dim=1)
                    for block, tokens in zip(model.module.blocks[1:], residual, strict=False)
                ),
                normed[-1][:, 1:].mean(dim=1),
            ]
        for ours, theirs in zip(found[1:], expected, strict=True):
            assert close(ours, theirs.detach())


def test_everything_comes_from_one_pass_and_in_order():
    model = tiny()
    seen = []
    model.module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    choices = [parse_choice(text, model) for text in ("cls", "cls2", "mean")]
    choices += at_layers(choices[0], model, "residual") + at_layers(choices[2], model, "normed")
    found = features_of(model, choices, indices=np.array([7, 2, 5, 9, 0]))
    assert seen == [4, 1]
    alone = features_of(model, choices[:1])[choices[0]]
    assert close(found[choices[0]], alone[[7, 2, 5, 9, 0]])


def test_auto_is_what_the_models_head_reads():
    assert str(parse_choice("auto", tiny())) == "cls"
    assert str(parse_choice("auto", tiny(global_pool="avg"))) == "mean"
    assert str(parse_choice("cls", tiny(global_pool="avg"))) == "cls"
    # Without class token the mean of patches stands for it.
    bare = tiny(class_token=False, global_pool="avg")
    assert str(parse_choice("cls+mean", bare)) == "mean"
    assert {str(choice) for choice in at_layers(parse_choice("cls", bare), bare, "normed")} == {
        "mean"
    }


def test_a_model_of_any_family_has_a_mean():
    module = timm.create_model("resnet10t", num_classes=0).eval()
    model = vp.wrap(module, name="r", input_size=(3, 64, 64))
    choice = parse_choice("auto", model)
    found = features_of(model, [choice], squares(3, size=64).numpy())[choice]
    with torch.no_grad():
        assert close(found, module(model.normalize(squares(3, size=64))))


def test_one_channel_and_other_sizes_are_preprocessed_as_for_a_comparison():
    model = tiny(channels=1)
    wide = (squares(3, size=48)[:, :, 4:44] * 255).to(torch.uint8)
    choice = parse_choice("cls", model)
    found = features_of(model, [choice], wide.numpy())[choice]
    square = wide[:, :, :, 4:44].float() / 255
    from vitprobe.data.blocks import View, resize

    grey = torch.stack([resize(image, View(1, 32, 32)) for image in square])
    with torch.no_grad():
        expected = model.module.forward_features(model.normalize(grey))[:, 0]
    assert close(found, expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clss", "no features 'clss'"),
        ("cls0", "no features 'cls0'"),
        ("mean+mean", "no features"),
        ("cls9", "are of 9 blocks and model 'tiny' has 3"),
    ],
)
def test_choices_that_there_are_not_are_refused(text, said):
    with pytest.raises(MeasureError, match=said):
        parse_choice(text, tiny())


def test_several_blocks_are_no_layer():
    model = tiny()
    with pytest.raises(MeasureError, match="'cls2' are of several blocks"):
        at_layers(parse_choice("cls2", model), model, "normed")


@pytest.mark.parametrize("image", [1, 9])
def test_features_that_are_not_finite_are_refused_by_name(image):
    model = tiny(name="mine")
    images = IMAGES.copy()
    images[image, 0, 0, 0] = np.nan
    with pytest.raises(MeasureError, match=f"class token of model 'mine' .* image {image};"):
        features_of(model, [parse_choice("cls", model)], images)


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="2 channels cannot be given to a model of 3"):
        features_of(tiny(), [parse_choice("cls", tiny())], IMAGES[:, :2])

"""MAE and supervised losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitprobe.errors import RecipeError
from vitprobe.training.augment import Augment, AugmentConfig
from vitprobe.training.encoder import EncoderConfig
from vitprobe.training.methods import METHODS, Batch
from vitprobe.training.methods.mae import MAE, MAEConfig, normalize_patches, patchify
from vitprobe.training.methods.supervised import Supervised, SupervisedConfig
from vitprobe.training.randomness import Draws

ENCODER = EncoderConfig(
    image_size=8, patch_size=2, channels=1, width=16, depth=2, heads=2,
    mean=(0.0,), std=(1.0,), positions="sincos",
)  # fmt: skip
WHOLE = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
AUGMENT = Augment(WHOLE, size=8, mean=ENCODER.mean, std=ENCODER.std)


def _mae(mask_ratio: float = 0.75, normalize: bool = True) -> MAE:
    torch.manual_seed(0)
    config = MAEConfig(
        name="mae", decoder_width=8, decoder_depth=1, decoder_heads=2, mask_ratio=mask_ratio,
        normalize_targets=normalize,
    )  # fmt: skip
    return MAE(config, ENCODER, AUGMENT, classes=10)


def _batch(n: int = 4, epoch: int = 0) -> Batch:
    images = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.arange(n), Draws(0, epoch, torch.arange(n)))


def test_patchify_by_hand() -> None:
    image = torch.arange(32.0).view(1, 2, 4, 4)
    patches = patchify(image, 2)
    assert patches.shape == (1, 4, 8)
    # Rows, then columns, then channels within a patch.
    assert patches[0, 0].tolist() == [0, 16, 1, 17, 4, 20, 5, 21]
    assert patches[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]
    assert patches[0, 2].tolist() == [8, 24, 9, 25, 12, 28, 13, 29]


def test_patch_normalisation_by_hand() -> None:
    patches = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]]])
    # Mean 1/2; variance with n - 1: 4 x (1/4) / 3 = 1/3.
    high = 0.5 / math.sqrt(1 / 3 + 1e-6)
    expected = torch.tensor([[[-high, -high, high, high], [0, 0, 0, 0]]])
    torch.testing.assert_close(normalize_patches(patches), expected)


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 4), (0.5, 8), (0.6, 6), (0.9, 1)])
def test_the_encoder_sees_exactly_the_visible_share(ratio: float, visible: int) -> None:
    mae = _mae(ratio)
    lengths: list[int] = []
    hook = mae.encoder.blocks.register_forward_hook(
        lambda _, args, __: lengths.append(args[0].shape[1])
    )
    mae.loss(_batch())
    hook.remove()
    assert lengths == [1 + visible]


def test_the_mask_is_a_uniform_random_subset() -> None:
    mae, n = _mae(), 8000
    order = Draws(0, 0, torch.arange(n)).permutation("mask", 16)
    seen = torch.zeros(n, 16).scatter(1, order[:, : mae.visible], 1.0)
    assert (seen.sum(dim=1) == 4).all()
    # Each patch visible with probability 4/16, each pair with 4 x 3 / (16 x 15); four deviations.
    single = seen.mean(dim=0)
    assert (single - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / n)
    pairs = (seen.T @ seen / n)[~torch.eye(16, dtype=torch.bool)]
    assert (pairs - 0.05).abs().max() < 4.5 * math.sqrt(0.05 * 0.95 / n)


def test_masks_differ_by_epoch_and_repeat_by_key() -> None:
    mae = _mae()
    first, again, later = (mae.loss(_batch(epoch=epoch))[0].item() for epoch in (0, 0, 1))
    assert first == again
    assert first != later


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_the_mean_square_over_masked_patches_only(
    monkeypatch: pytest.MonkeyPatch, normalize: bool
) -> None:
    mae, batch = _mae(normalize=normalize), _batch()
    prediction = torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(mae, "decode", lambda tokens, visible: prediction)
    loss, _ = mae.loss(batch)
    order = batch.draws.permutation("mask", 16)
    squares = []
    for i, image in enumerate(batch.images):
        for patch in order[i, 4:].tolist():
            row, column = divmod(patch, 4)
            pixels = image[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            if normalize:
                pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            squares += ((prediction[i, patch] - pixels) ** 2).tolist()
    assert len(squares) == 4 * 12 * 4
    assert loss.item() == pytest.approx(sum(squares) / len(squares), rel=1e-4)
    # What is predicted where nothing was masked does not matter.
    rows = torch.arange(4)[:, None]
    prediction[rows, order[:, :4]] += 100
    assert torch.equal(mae.loss(batch)[0], loss)


def test_the_encoder_never_sees_a_masked_patch() -> None:
    mae = _mae()
    images = torch.rand(1, 1, 8, 8)
    visible = torch.tensor([[3, 0, 7, 12]])
    changed = images.clone()
    changed[:, :, 4:6, 4:6] += 1  # patch 10
    assert torch.equal(mae.encode(images, visible), mae.encode(changed, visible))


def test_with_every_patch_visible_encoding_is_timms() -> None:
    mae = _mae().eval()
    images = torch.rand(2, 1, 8, 8)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(mae.encode(images, everything), mae.encoder.forward_features(images))


def test_the_decoder_puts_tokens_back_in_their_places() -> None:
    mae = _mae()
    places: list[Tensor] = []
    mae.decoder_blocks.register_forward_hook(lambda _, args, __: places.append(args[0]))
    visible = torch.tensor([[5, 2]])
    tokens = torch.randn(1, 3, 16)
    mae.decode(tokens, visible)
    embedded = mae.decoder_embed(tokens)
    sequence = places[0] - mae.decoder_pos_embed
    torch.testing.assert_close(sequence[0, [0, 1 + 5, 1 + 2]], embedded[0])
    torch.testing.assert_close(sequence[0, 1 + 4], mae.mask_token[0, 0])


def test_fixed_positions_get_no_gradient_and_everything_else_does() -> None:
    mae = _mae()
    loss, _ = mae.loss(_batch())
    loss.backward()
    without = {name for name, p in mae.named_parameters() if p.grad is None}
    assert without == {"encoder.pos_embed", "decoder_pos_embed"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mask_ratio": 1.0}, "method.mask_ratio"),
        ({"decoder_depth": 0}, "method.decoder_depth"),
        ({"decoder_width": 10}, "method.decoder_width"),
    ],
)
def test_impossible_mae_settings_are_refused(change: dict[str, float], named: str) -> None:
    settings = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2} | change
    with pytest.raises(RecipeError, match=named):
        MAEConfig(name="mae", **settings)


def test_a_mask_that_leaves_nothing_visible_is_refused() -> None:
    with pytest.raises(RecipeError, match="leaves none of the 16 patches visible"):
        _mae(mask_ratio=0.99)


def test_normalising_single_values_is_refused() -> None:
    config = MAEConfig(name="mae", decoder_width=8, decoder_depth=1, decoder_heads=2)
    encoder = EncoderConfig(
        image_size=4, patch_size=1, channels=1, width=8, depth=1, heads=1, mean=(0.0,), std=(1.0,)
    )
    with pytest.raises(RecipeError, match=r"method\.normalize_targets"):
        MAE(config, encoder, AUGMENT, classes=10)


def _supervised(smoothing: float) -> Supervised:
    torch.manual_seed(0)
    config = SupervisedConfig(name="supervised", label_smoothing=smoothing)
    return Supervised(config, ENCODER, AUGMENT, classes=4)


def test_supervised_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    method = _supervised(0.2)
    logits = torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 2.0]])
    monkeypatch.setattr(method.encoder, "forward", lambda images: logits)
    batch = Batch(torch.rand(2, 1, 8, 8), torch.tensor([0, 0]), Draws(0, 0, torch.arange(2)))
    loss, terms = method.loss(batch)
    # Targets: 0.8 + 0.2 / 4 on class 0, 0.05 on each other; -log p = log(sum exp) - logit.
    total = math.log(math.exp(2) + 3)
    expected = (total - 0.85 * 2 + total - 0.05 * 2) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert terms["accuracy"].item() == 0.5


def test_a_fresh_classifier_is_undecided() -> None:
    loss, _ = _supervised(0.1).loss(_batch())
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)


def test_supervised_evaluation_counts_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    method = _supervised(0.0)
    monkeypatch.setattr(method.encoder, "forward", lambda x: torch.eye(4)[torch.arange(len(x)) % 4])
    labels = torch.arange(600) % 4
    labels[:60] = (labels[:60] + 1) % 4
    scores = method.evaluate(torch.rand(600, 1, 8, 8), labels)
    assert scores == {"test_accuracy": 0.9}


def test_label_smoothing_out_of_range_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"method\.label_smoothing"):
        SupervisedConfig(name="supervised", label_smoothing=1.0)


def test_methods_are_registered_under_the_names_recipes_use() -> None:
    assert {"mae": MAE, "supervised": Supervised} == METHODS

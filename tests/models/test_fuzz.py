"""Damaged, hostile and merely odd checkpoints: refused with a VitprobeError, or loaded as they say.

Whatever is done to a file, loading it runs no code that it holds, and what a report claims to have
loaded is in the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vitprobe as vp
from vitprobe.errors import CheckpointError, VitprobeError

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
FUZZ = settings(
    max_examples=int(os.environ.get("VITPROBE_FUZZ", "40")),
    deadline=None,
    derandomize="VITPROBE_FUZZ" not in os.environ,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
"""More and other examples with VITPROBE_FUZZ=1000 in the environment."""

Content = dict[str, Any]


def perturbed(module: torch.nn.Module) -> dict[str, Tensor]:
    """A state dict no two numbers of which are alike, so that each tells where it came from."""
    generator = torch.Generator().manual_seed(3)
    return {
        key: torch.randn(value.shape, generator=generator) * 0.1
        if value.is_floating_point()
        else value
        for key, value in module.state_dict().items()
    }


def vit(**more: Any) -> dict[str, Tensor]:
    return perturbed(VisionTransformer(**SIZES, mlp_ratio=2.0, num_classes=0, **more))


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def mae() -> Content:
    decoder = {"mask_token": torch.randn(1, 1, 16), "decoder_pos_embed": torch.randn(1, 17, 16)}
    return {"model": {**vit(), **decoder}, "args": {"model": "mae_vit_base_patch16"}}


def moco_v3() -> Content:
    both = {
        **prefixed("module.base_encoder.", vit()),
        **prefixed("module.momentum_encoder.", vit()),
        "module.predictor.0.weight": torch.randn(8, 8),
    }
    return {"state_dict": both, "arch": "vit_small", "epoch": 3}


def beit() -> Content:
    module = Beit(
        **SIZES, mlp_ratio=2.0, num_classes=0, use_rel_pos_bias=True, use_abs_pos_emb=False
    )
    return {"model": perturbed(module), "args": {"model": "beit_base_patch16_224"}}


def open_clip_tower() -> Content:
    clip = pytest.importorskip("open_clip").model.CLIP
    tower = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return perturbed(clip(8, tower, text))


def dino() -> Content:
    backbone = prefixed("module.backbone.", vit())
    head = {"module.head.mlp.0.weight": torch.randn(4, 32)}
    return {"student": {**backbone, **head}, "teacher": {**backbone, **head}}


def dinov2() -> Content:
    tensors = vit(init_values=1.0, reg_tokens=2)
    tensors["register_tokens"] = tensors.pop("reg_token")
    tensors["pos_embed"] = torch.randn(1, 17, 32)  # registers have no positions
    tensors["mask_token"] = torch.randn(1, 32)
    return tensors


def hugging_face(kind: str, **more: Any) -> Content:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind.removesuffix('Model')}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        **more,
    )
    return perturbed(getattr(transformers, kind)(config))


def torchvision_vit() -> Content:
    from torchvision.models import VisionTransformer as Theirs

    return perturbed(Theirs(16, 4, 2, 4, 32, 64))


WRITERS: dict[str, Callable[[], Content]] = {
    "timm": vit,
    "deit": lambda: {"model": vit(), "model_ema": vit(), "args": {"model": "deit_tiny"}},
    "mae": mae,
    "moco_v3": moco_v3,
    "dino": dino,
    "dinov2": dinov2,
    "hf vit": lambda: hugging_face("ViTModel"),
    "hf dinov2": lambda: hugging_face("Dinov2Model"),
    "hf clip": lambda: hugging_face("CLIPVisionModel"),
    "lightning": lambda: {"state_dict": prefixed("model.", vit()), "hyper_parameters": {"lr": 1}},
    "beit": beit,
    "open_clip": open_clip_tower,
    "hf siglip": lambda: hugging_face("SiglipVisionModel"),
    "hf dinov3": lambda: hugging_face("DINOv3ViTModel"),
    "hf mae": lambda: hugging_face("ViTMAEModel"),
    "hf ijepa": lambda: hugging_face("IJepaModel"),
    "hf beit": lambda: hugging_face("BeitModel", use_relative_position_bias=True),
    "torchvision": torchvision_vit,
}


@cache
def written(dialect: str) -> Content:
    """What a checkpoint of the dialect holds."""
    return WRITERS[dialect]()


class Payload:
    """What pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 3",)


# What may not happen while a file is read: starting processes, and finding a pickle's own globals.
FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn",
    "pickle.find_class", "subprocess.Popen",
)  # fmt: skip
_alarms: list[str] | None = None


def _listen(event: str, args: tuple[Any, ...]) -> None:
    if _alarms is not None and event in FORBIDDEN:
        _alarms.append(f"{event}{args}")


sys.addaudithook(_listen)


def tried(path: Path, **options: Any) -> vp.Model | None:
    """The model of a file, or None where it is refused as it should be; no code of it has run."""
    global _alarms
    _alarms = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return vp.load(path, heads=4, **options)
    except VitprobeError as error:
        said = str(error)
    finally:
        alarms, _alarms = _alarms, None
        assert not alarms
    assert len(said) > 10
    assert "\n" not in said
    return None


def everything(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from everything(value)


def numbers(tensor: Tensor) -> np.ndarray:
    """Its numbers as bytes are compared, so that nan equals nan."""
    return tensor.detach().float().contiguous().numpy().ravel().view(np.uint32)


def check_claims(model: vp.Model, content: Content) -> None:
    """All that the report claims to have loaded is in the file, and its share is that large."""
    assert model.report is not None
    tensors = [t for t in everything(content) if t.is_floating_point() and _is_small(t)]
    # timm has no position for a class token before registers: it is added to the token itself.
    tensors += [
        token.float() + positions[:, :1].float()
        for token in tensors
        for positions in tensors
        if token.shape == (1, 1, 32) and positions.ndim == 3 and positions.shape[::2] == (1, 32)
    ]
    held = np.unique(np.concatenate([numbers(tensor) for tensor in tensors]))
    state = model.module.state_dict()
    encoder = {
        name: parameter.numel()
        for name, parameter in model.module.named_parameters()
        if not name.startswith("head")
    }
    claimed = [key for key in model.report.matched if key in encoder]
    for key in claimed:
        found = bool(np.isin(numbers(state[key]), held).all())
        assert found, f"{key} is not in the file"
    share = sum(encoder[key] for key in claimed) / sum(encoder.values())
    assert model.report.loaded_fraction <= share + 1e-9
    assert not set(model.report.missing) & set(model.report.matched)


def test_the_alarm_rings():
    """Ordinary unpickling of a payload would not go unnoticed."""
    global _alarms
    _alarms = []
    try:
        pickle.loads(pickle.dumps(Payload()))
    finally:
        alarms, _alarms = _alarms, None
    assert [alarm.partition("(")[0] for alarm in alarms] == ["pickle.find_class", "os.system"]


@pytest.mark.parametrize("dialect", WRITERS)
def test_what_is_not_damaged_loads(tmp_path, dialect):
    content = written(dialect)
    torch.save(content, tmp_path / "model.pth")
    model = tried(tmp_path / "model.pth")
    assert model is not None
    assert model.report.loaded_fraction == 1.0
    check_claims(model, content)


def test_a_few_bytes_that_read_as_many_numbers_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({**vit(), "reg_token": torch.zeros(1).expand(1, 1 << 40, 32)}, path)
    with pytest.raises(CheckpointError, match=r"reg_token in .* of which the file does not hold"):
        vp.load(path, heads=4)


@pytest.mark.parametrize(
    "dialect",
    [
        name if name in ("mae", "hf siglip") else pytest.param(name, marks=pytest.mark.slow)
        for name in WRITERS
    ],
)
def test_no_tensor_of_the_encoder_can_be_missing_unnoticed(tmp_path, dialect):
    """Dropped one by one: refused, or no part of what the report claims."""
    path = tmp_path / "model.pth"
    content = written(dialect)
    holders = [content, *(value for value in content.values() if isinstance(value, dict))]
    for holder in holders:
        for key in _of_tensor(holder):
            value = holder.pop(key)
            try:
                torch.save(content, path)
                model = tried(path)
                if model is not None:
                    check_claims(model, content)
            finally:
                holder[key] = value


SHAPES: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.flatten(),
    lambda t: t[None],
    lambda t: t.mT if t.ndim > 1 else t[..., None],
    lambda t: t[..., :-1] if t.ndim else t,
    lambda t: torch.cat([t, t]) if t.ndim else t,
    lambda t: t.new_empty(0),
    lambda t: t.new_zeros(()),
    lambda t: t.new_empty((0, *t.shape[1:])),
]
HUGE: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.new_zeros(1).expand(1 << 20, 1 << 20),
    lambda t: t.new_zeros(1).expand(1, 1 << 40, 32),
    lambda t: t.flatten()[:1].expand(t.shape) if t.ndim else t,
    lambda t: t.new_zeros(1).expand(1 << 16, 3, 1 << 10, 1 << 10),
]
KINDS: list[Callable[[Tensor], Any]] = [
    lambda t: t.half(),
    lambda t: t.bfloat16(),
    lambda t: t.double(),
    lambda t: t.long(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.to_sparse(),
    lambda t: t.tolist(),
    lambda t: None,
    lambda t: "text",
    lambda t: torch.nn.Parameter(t) if t.is_floating_point() else t,
]
VALUES: list[Callable[[Tensor], Tensor]] = [
    lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t,
    lambda t: torch.full_like(t, torch.inf) if t.is_floating_point() else t,
]
EXTRAS: list[tuple[str, Callable[[], Any]]] = [
    ("blocks.7.attn.qkv.weight", lambda: torch.randn(96, 32)),
    ("blocks.99999.norm1.weight", lambda: torch.randn(32)),
    (f"blocks.{'9' * 40}.norm1.weight", lambda: torch.randn(32)),
    ("blocks.0.attn.rel_pos", lambda: torch.randn(4)),
    ("blocks.0.attn.relative_position_bias_table", lambda: torch.randn(52, 4)),
    ("pos_embed", lambda: torch.randn(1, 50, 32)),
    ("patch_embed.proj.weight", lambda: torch.randn(8, 3, 0, 4)),
    ("norm_pre.weight", lambda: torch.randn(32)),
    ("rope.periods", lambda: torch.randn(2)),
    ("dist_token", lambda: torch.randn(1, 1, 32)),
    ("queue", lambda: torch.randn(2, 2)),
    ("config", lambda: {"hidden_size": "wide", "num_attention_heads": -1, "image_size": [[1]]}),
    ("args", lambda: {"num_heads": "four", "model": 7, "img_size": 10**9, "mean": ["a"]}),
    ("model", dict),
    ("teacher", lambda: {"backbone.patch_embed.proj.weight": torch.randn(2, 2)}),
    ("", lambda: torch.randn(1)),
    ("état\n", lambda: torch.randn(1)),
]
RENAMES = [
    lambda key: "module." + key,
    lambda key: "_orig_mod.module." + key,
    lambda key: key.replace("blocks.1.", "blocks.5."),
    lambda key: key.replace("weight", "wieght"),
    lambda key: key.upper(),
    lambda key: key + ".",
    lambda key: "visual." + key,
    lambda key: key.partition(".")[2] or key,
]


CHANGES = {"shape": SHAPES, "huge": HUGE, "kind": KINDS, "value": VALUES}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["drop", "rename", "rename all", "extra", "kind of all", "swap", *CHANGES]),
        st.integers(0, 9),
        st.integers(0, 999),
        st.integers(0, 999),
    ),
    min_size=1,
    max_size=3,
)


def mutated(dialect: str, steps: list[tuple[str, int, int, int]]) -> Content:
    """A checkpoint of a dialect with a few things done to it: (what, where, to which, how)."""
    content = {k: dict(v) if isinstance(v, dict) else v for k, v in written(dialect).items()}
    for what, where, which, how in steps:
        holders = [content, *(v for v in content.values() if isinstance(v, dict))]
        holders = [holder for holder in holders if _of_tensor(holder)]
        if not holders:
            break
        target = holders[where % len(holders)]
        keys = sorted(_of_tensor(target))
        key = keys[which % len(keys)]
        if what == "drop":
            del target[key]
        elif what == "rename":
            target[RENAMES[how % len(RENAMES)](key)] = target.pop(key)
        elif what == "rename all":
            for each in keys:
                target[RENAMES[how % len(RENAMES)](each)] = target.pop(each)
        elif what == "extra":
            name, value = EXTRAS[how % len(EXTRAS)]
            target[name] = value()
        elif what == "swap":
            other = keys[how % len(keys)]
            target[key], target[other] = target[other], target[key]
        elif what == "kind of all":
            for each in keys:
                if target[each].is_floating_point() and _is_small(target[each]):
                    target[each] = KINDS[how % 3](target[each])
        elif _is_small(target[key]) and target[key].numel():
            changes = CHANGES[what]
            target[key] = changes[how % len(changes)](target[key])
    return content


def _is_small(tensor: Tensor) -> bool:
    return not tensor.is_sparse and tensor.numel() < 10**6


def _of_tensor(content: Content) -> list[str]:
    return [key for key, value in content.items() if isinstance(value, Tensor)]


@FUZZ
@given(
    dialect=st.sampled_from(sorted(WRITERS)),
    steps=STEPS,
    legacy=st.booleans(),
    branch=st.sampled_from([None, "teacher", "ema"]),
)
def test_mutated_state_dicts_are_refused_or_loaded_as_claimed(dialect, steps, legacy, branch):
    content = mutated(dialect, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pth")
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        model = tried(path, branch=branch)
        if model is not None:
            check_claims(model, content)
        model = tried(path, size=24)
        assert model is None or model.anatomy.grid == (6, 6)


@FUZZ
@given(dialect=st.sampled_from(sorted(WRITERS)), steps=STEPS)
def test_the_architecture_alone_of_mutated_state_dicts(dialect, steps):
    content = mutated(dialect, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pth")
        torch.save(content, path)
        with contextlib.suppress(VitprobeError):
            vp.load(f"init:{path}", heads=4)


def flat(dialect: str) -> dict[str, Tensor]:
    content = written(dialect)
    inner = next((v for v in content.values() if isinstance(v, dict)), content)
    return {key: v.contiguous() for key, v in inner.items() if isinstance(v, Tensor)}


def torch_zip(path: Path, dialect: str) -> None:
    torch.save({**written(dialect), "hook": Payload()}, path)


def torch_legacy(path: Path, dialect: str) -> None:
    content = {**written(dialect), "hook": Payload()}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def safetensors(path: Path, dialect: str) -> None:
    save_file(flat(dialect), path)


FLAX = (
    (r"^cls_token$", "cls"),
    (r"^pos_embed$", "Transformer/posembed_input/pos_embedding"),
    (r"^patch_embed\.proj", "embedding"),
    (r"^norm\.", "Transformer/encoder_norm."),
    (r"^blocks\.(\d)\.", r"Transformer/encoderblock_\1/"),
    (r"/norm1\.", "/LayerNorm_0."),
    (r"/norm2\.", "/LayerNorm_2."),
    (r"/mlp\.fc1", "/MlpBlock_3/Dense_0"),
    (r"/mlp\.fc2", "/MlpBlock_3/Dense_1"),
    (r"/attn\.", "/MultiHeadDotProductAttention_1/"),
    (r"(norm|LayerNorm_\d)\.weight", r"\1.scale"),
    (r"weight$", "kernel"),
)


def flax(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """timm's tensors as the original JAX ViTs have them: kernels as (in, out), heads on an axis."""
    arrays = {}
    for key, value in tensors.items():
        for pattern, replacement in FLAX:
            key = re.sub(pattern, replacement, key)
        key = key.replace(".", "/")
        if "/qkv/" in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                shape = (32, 4, 8) if part.ndim == 2 else (4, 8)
                arrays[key.replace("qkv", name)] = (
                    part.T.reshape(shape) if part.ndim == 2 else (part.reshape(shape))
                )
        elif "/proj/" in key:
            arrays[key.replace("proj", "out")] = (
                value.T.reshape(4, 8, 32) if value.ndim == 2 else value
            )
        elif value.ndim == 4:
            arrays[key] = value.permute(2, 3, 1, 0)
        else:
            arrays[key] = value.T if value.ndim == 2 else value
    return {key: value.contiguous().numpy() for key, value in arrays.items()}


def npz(path: Path, dialect: str) -> None:
    arrays = flax(flat(dialect)) if dialect == "timm" else {"hook": np.array([Payload()])}
    np.savez(path, **arrays)


CONTAINERS = {
    "model.pth": torch_zip,
    "legacy.pth": torch_legacy,
    "model.safetensors": safetensors,
    "model.npz": npz,
}


@cache
def whole(name: str, dialect: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        CONTAINERS[name](path, dialect)
        return path.read_bytes()


PLACE = st.integers(-2000, 2000) | st.floats(0, 1, exclude_max=True)
"""Of a byte: counted from either end, where headers lie, or as a share of the whole."""
EDITS = st.lists(
    st.tuples(PLACE, st.just("flip"), st.integers(1, 255))
    | st.tuples(PLACE, st.sampled_from(["leave out", "repeat"]), st.integers(1, 64))
    | st.tuples(PLACE, st.just("put in"), st.binary(min_size=1, max_size=16))
    | st.tuples(PLACE, st.just("cut"), st.none()),
    min_size=1,
    max_size=4,
)


def damaged(sound: bytes, edits: list[tuple[Any, str, Any]]) -> bytes:
    data = bytearray(sound)
    for place, what, how in edits:
        if not data:
            break
        at = int(place * len(data)) if isinstance(place, float) else place % len(data)
        if what == "flip":
            data[at] ^= how
        elif what == "leave out":
            del data[at : at + how]
        elif what == "repeat":
            data[at:at] = data[at : at + how]
        elif what == "put in":
            data[at:at] = how
        else:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize("name", CONTAINERS)
@FUZZ
@given(dialect=st.sampled_from(["timm", "mae", "dino", "hf vit"]), edits=EDITS)
def test_damaged_files_are_refused_or_loaded_and_run_nothing(name, dialect, edits):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(damaged(whole(name, dialect), edits))
        tried(path)


@pytest.mark.parametrize("name", CONTAINERS)
def test_files_with_a_payload_run_nothing(name, tmp_path):
    (tmp_path / name).write_bytes(whole(name, "timm"))
    model = tried(tmp_path / name)
    assert model is not None
    check_claims(model, flat("timm"))


@cache
def saved_folder() -> Path:
    """A model as transformers saves it, in two shards."""
    transformers = pytest.importorskip("transformers")
    folder = Path(tempfile.mkdtemp(prefix="vitprobe-fuzz-"))
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(
        folder, max_shard_size="40KB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module", autouse=True)
def _no_folder_left() -> Iterator[None]:
    yield
    if saved_folder.cache_info().currsize:
        shutil.rmtree(saved_folder())


def test_arrays_of_objects_run_nothing(tmp_path):
    npz(tmp_path / "model.npz", "mae")
    assert tried(tmp_path / "model.npz") is None


def test_a_saved_folder_loads():
    assert tried(saved_folder()) is not None


@FUZZ
@given(which=st.integers(0, 9), edits=EDITS)
def test_damaged_folders_are_refused_or_loaded(which, edits):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(saved_folder(), Path(parent, "model")))
        files = sorted(folder.iterdir())
        path = files[which % len(files)]
        path.write_bytes(damaged(path.read_bytes(), edits))
        tried(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**12) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@FUZZ
@given(
    name=st.sampled_from(["config.json", "model.safetensors.index.json"]),
    which=st.integers(0, 99),
    value=JSON,
)
def test_folders_with_an_odd_config_are_refused_or_loaded(name, which, value):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(saved_folder(), Path(parent, "model")))
        path = folder / name
        described = json.loads(path.read_text())
        key = sorted(described)[which % len(described)]
        path.write_text(json.dumps({**described, key: value}))
        tried(folder)
        path.write_text(json.dumps(value))
        tried(folder)

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitprobe.errors import SourceError, VitprobeError
from vitprobe.models import ModelSpec, parse_spec


def test_options_follow_the_source() -> None:
    spec = parse_spec("mae.pth, heads=12,branch=ema,size=192x256,mean=0.48/0.45/0.40,std=.5")
    assert spec == ModelSpec(
        kind="file",
        target="mae.pth",
        options={
            "heads": 12,
            "branch": "ema",
            "size": (192, 256),
            "mean": (0.48, 0.45, 0.40),
            "std": (0.5,),
        },
        text="mae.pth, heads=12,branch=ema,size=192x256,mean=0.48/0.45/0.40,std=.5",
    )


@pytest.mark.parametrize(
    ("text", "kind", "target"),
    [
        ("timm:deit_tiny_patch16_224", "timm", "deit_tiny_patch16_224"),
        ("init:deit_tiny_patch16_224,seed=3", "init", "deit_tiny_patch16_224"),
        ("run:runs/mae", "run", "runs/mae"),
        ("hf:google/vit-base-patch16-224,size=384", "hf", "google/vit-base-patch16-224"),
        ("torchvision:vit_b_16.IMAGENET1K_V1", "torchvision", "vit_b_16.IMAGENET1K_V1"),
        ("init:hf:google/vit,seed=1", "init_hf", "google/vit"),
        ("init:torchvision:swin_t", "init_torchvision", "swin_t"),
        ("init:run:runs/mae,seed=1", "init_file", "runs/mae/encoder.safetensors"),
        ("folder/with=sign/mae.pth.tar", "file", "folder/with=sign/mae.pth.tar"),
        ("C:\\models\\mae.pth", "file", "C:\\models\\mae.pth"),
    ],
)
def test_sources(text: str, kind: str, target: str) -> None:
    spec = parse_spec(text)
    assert (spec.kind, spec.target) == (kind, target)


def test_keywords_win_and_none_leaves_be() -> None:
    spec = parse_spec(
        "mae.pth,heads=12,size=224", heads=4, size=None, mean=0.5, std=(0.1, 0.2, 0.3)
    )
    assert spec.options == {
        "heads": 4,
        "size": (224, 224),
        "mean": (0.5,),
        "std": (0.1, 0.2, 0.3),
    }


def test_an_existing_file_may_hold_a_comma(tmp_path: Path) -> None:
    path = tmp_path / "mae,heads=3.pth"
    path.touch()
    assert parse_spec(str(path)).target == str(path)


def test_saved_folders(tmp_path: Path) -> None:
    folder = tmp_path / "vit,large"
    folder.mkdir()
    (folder / "config.json").touch()
    assert parse_spec(str(folder)) == ModelSpec("file", str(folder), {}, str(folder))
    spec = parse_spec(f"init:{folder}", seed=3)
    assert (spec.kind, spec.target, spec.options) == ("init_file", str(folder), {"seed": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no model"),
        ("timm:", "names no model"),
        ("mae.pth,head=12", "Did you mean 'heads'?"),
        ("mae.pth,heads=0", "heads=0 in the model spec 'mae.pth,heads=0' is not a number"),
        ("mae.pth,heads=1.5", "an integer above 0"),
        ("mae.pth,heads", "not an option of the form name=value"),
        ("mae.pth,heads=3,heads=6", "'heads' is given twice"),
        ("mae.pth,size=1x2x3", "an input size such as 224"),
        ("mae.pth,mean=x", "0.48/0.45/0.40"),
        ("mae.pth,mean=124/116/104", "of images in [0, 1]"),
        ("mae.pth,std=0", "above 0"),
        ("mae.pth,eps=nan", "epsilon"),
        ("mae.pth,seed=1", "'seed' does not apply"),
        ("timm:deit_tiny_patch16_224,heads=3", "'heads' does not apply"),
        ("hf:", "names no model"),
        ("init:torchvision:", "names no model"),
        ("hf:google/vit,heads=3", "'heads' does not apply"),
        ("torchvision:vit_b_16,seed=1", "'seed' does not apply"),
        ("tim:deit", "Did you mean 'timm'?"),
    ],
)
def test_errors_name_the_offender(text: str, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_spec(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_a_spec_or_a_vitprobe_error(text: str) -> None:
    with contextlib.suppress(VitprobeError):
        parse_spec(text)


def test_parsing_imports_no_torch() -> None:
    code = (
        "import sys; from vitprobe.models import parse_spec; parse_spec('timm:x'); "
        "sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

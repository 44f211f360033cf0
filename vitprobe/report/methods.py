"""What the section on methods says: what each measure is, and how this run was made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitprobe.plots.style import attention_noun, measured, subjects
from vitprobe.report import findings
from vitprobe.report.words import LEVEL, with_minus
from vitprobe.wording import join

if TYPE_CHECKING:
    from vitprobe.measures.base import Info
    from vitprobe.results import Comparison

# Measures that see only the attention that goes to patches, made to sum to 1 again.
_RENORMALISED = ("attention_distance", "attention_entropy")


def method(info: Info) -> list[tuple[str, str]]:
    """Everything a measure says about itself, as (heading, text)."""
    streams = {
        "exact": "any split of the images gives the same number",
        "blocked": "summed over blocks, whose size belongs to the number",
        "subset": "computed on the first images only",
    }[info.streams]
    return [
        ("What", info.what),
        ("Unit", info.unit or "none"),
        ("Range", with_minus(info.range)),
        ("Reading", info.direction),
        ("Source", info.source),
        ("Unchanged by", join(info.invariances) or "nothing listed"),
        ("Images", streams),
        ("Interval", info.interval),
        ("Null", info.null),
        ("Caveats", info.caveats),
        ("Elsewhere", info.elsewhere),
    ]


def settings(result: Comparison, attention: tuple[str, ...]) -> list[str]:
    """How this run was made, for a methods section."""
    provenance = result.provenance
    sentences = []
    if "cka" in result.measures:
        read = {
            "normed": "layer i is what the attention of block i reads (after its first norm), and "
            "the last layer is the model's final norm",
            "residual": "layer 0 is the tokens that enter block 0, and layer i the output of block "
            "i - 1",
        }[provenance["layers"]]
        estimator = {
            "unbiased": "debiased (unbiased HSIC; values below 0 are kept, not clamped)",
            "biased": "biased",
        }[provenance["estimator"]]
        sentences += [
            f"Layers ({provenance['layers']}): {read}.{_residual(result)}",
            f"Tokens compared: {provenance['tokens']}.",
            f"CKA is {estimator}, over all images at once."
            if provenance["cka_value"] == "exact"
            else f"CKA is {estimator}, accumulated over blocks of {provenance['block']} images.",
            f"Intervals of CKA are {LEVEL} and pointwise, from its influence function over images; "
            "a layer with itself is 1 by construction and has none."
            if provenance["estimator"] == "unbiased"
            else "Biased CKA has no intervals.",
        ]
        if len(subjects(result)) > 1:
            sentences += _of_wholes(result)
    if attention:
        some, every = "patch queries", "attention_entropy_all" in attention
        if attention == ("attention_entropy_all",):
            some, every = "all queries", False
        exception = " (for entropy over all tokens, over all queries)" if every else ""
        sentences.append(f"Attention is averaged over {some}{exception}, then over images.")
    if titles := renormalised(attention):
        subject = join(titles)
        verb = "renormalises" if len(titles) == 1 else "renormalise"
        beside = (
            ", so sink mass, which this hides, stands beside" if "sink_mass" in attention else ""
        )
        sentences.append(f"{subject[0].upper()}{subject[1:]} {verb} it over patch keys{beside}.")
    if len(result.models) > 1 and any(
        result.group_of(name) != "similarity" and result.is_per_image(name)
        for name in result.measures
    ):
        sentences.append(
            "Differences between models are paired: the same images, heads and layers averaged "
            "within each, and a Student t interval of the mean difference. Models cannot be told "
            "apart when that interval contains 0, or when Holm's correction over the list of "
            "differences does not let the difference stand."
        )
    if findings.several_seeds(result):
        sentences.append(
            "Claims about methods take seeds as the unit: Welch's t interval between methods, "
            "Student's t within one; images are no replicates of a method."
        )
    if "attention_distance" in attention:
        names = measured(result, "attention_distance", subjects(result))
        noun = attention_noun(result, names)
        firsts = {
            name: (findings.first_blocks(result, name), len(result.attention_layers(name)))
            for name in names
        }
        if len(set(firsts.values())) == 1:
            first, depth = firsts[names[0]]
            numbers = f"{first} of {depth}"
        else:
            numbers = join(
                [f"{first} of {depth} in {name}" for name, (first, depth) in firsts.items()]
            )
        sentences.append(
            f"First {noun}s are the first quarter of a model's {noun}s, rounded up: {numbers}."
        )
    grey = [name for name in subjects(result) if result.input_size(name)[0] == 1]
    luminance = f"; given to {join(grey)}, of one channel, as luminance" if grey else ""
    return [
        *sentences,
        f"Images: {provenance['preprocessing']}{luminance}.",
        f"Forward passes in {provenance['precision']} on {provenance['device']}.",
    ]


def _of_wholes(result: Comparison) -> list[str]:
    """How numbers of whole models are made of those of their layers."""
    sentences = [
        "Layers at equal depth are those at the same share of their models' depths: in models of "
        "L blocks, layer i and layer i."
    ]
    if result.provenance["estimator"] == "unbiased":
        sentences.append(
            "The interval of a mean of CKA over layer pairs has the mean of their standard errors "
            "as its own, as though all errors went together: the widest that it can be."
        )
    if len(subjects(result)) > 2:
        sentences.append(
            "The distance of two models is the mean over layers at equal depth of the angle "
            "arccos(CKA), in radians: 0 for layers alike, π/2 for layers with nothing in common "
            "(Williams et al. 2021); CKA outside of −1 to 1 is cut for the angle alone. The "
            "dendrogram joins by average linkage."
        )
    return sentences


def _residual(result: Comparison) -> str:
    """Which models do not follow the convention of the others."""
    asked = result.provenance["layers"]
    names = [n for n in result.models if result.describe(n).get("layers", asked) != asked]
    return f" Those of {join(names)} are residual." if names else ""


def renormalised(attention: tuple[str, ...]) -> list[str]:
    """Titles of the renormalised measures among these, inside a sentence."""
    return [findings.in_text(name) for name in attention if name in _RENORMALISED]

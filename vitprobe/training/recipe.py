"""Recipes: TOML files read into frozen dataclasses with strict keys."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from vitprobe.errors import RecipeError, suggest
from vitprobe.training.augment import AugmentConfig
from vitprobe.training.encoder import EncoderConfig
from vitprobe.training.methods import METHODS, MethodConfig
from vitprobe.training.methods.distill import DistillConfig
from vitprobe.training.optimizer import OptimizerConfig

R = TypeVar("R", bound="Written")


class Written:
    """Base of recipes, which are dataclasses: how one is written down."""

    def to_dict(self) -> dict[str, Any]:
        """Nested tables of JSON (and TOML) values."""
        tables: dict[str, Any] = json.loads(json.dumps(asdict(cast(Any, self))))
        return _without_none(tables)

    def to_toml(self) -> str:
        """A recipe file that loads as this recipe, with nothing inherited."""
        scalars, tables = [], []
        for key, value in self.to_dict().items():
            if isinstance(value, dict):
                tables += ["", f"[{key}]", *(f"{k} = {_toml(v)}" for k, v in value.items())]
            else:
                scalars.append(f"{key} = {_toml(value)}")
        return "\n".join([*scalars, *tables, ""])


@dataclass(frozen=True)
class Recipe(Written):
    """Everything that decides a training run, and so what a checkpoint remembers of it.

    data: a source that vitprobe.data.labelled.load_labelled takes.
    epochs: 0 leaves the encoder as it was initialised, the untrained start of a longer run.
    batch_size: images per update, over all processes; an incomplete last batch of an epoch is left
        out.
    augment: how views of an image are drawn.
    views: for methods that train on several, what each kind of view changes of `augment`.
    distill: a teacher, and what of it the method learns besides; none by default.
    accumulate: parts of a batch that are computed one after the other, to need less memory.
    precision: of activations; "auto" is bf16 on CUDA and fp32 elsewhere. Weights are fp32.
    compile: transformer blocks through torch.compile; "auto" is "blocks" on CUDA, "off" elsewhere.
        "graphs" besides replays forward and backward passes as CUDA graphs, where a trial at the
        start shows that this computes the same.
    recompute: forget activations inside each block and compute them again for the gradient.
    threads: of torch on the CPU, 0 for as many as it chooses. Sums depend on it to the last bit, so
        a recipe that must give the same numbers on every machine names it.
    save_every: epochs between training states; one is also saved every `save_minutes`.
    evaluate_every: epochs between evaluations on the test images, which the last epoch ends with;
        0 for none at all.
    knn: neighbours of the k-NN accuracy that is evaluated where there are labels; 0 for none.
    snapshots: epochs after which the encoder is kept in snapshots/; 0 is the start.
    """

    method: MethodConfig
    data: str
    epochs: int
    batch_size: int
    encoder: EncoderConfig
    optimizer: OptimizerConfig
    augment: AugmentConfig
    views: tuple[dict[str, Any], ...] = ()
    distill: DistillConfig | None = None
    seed: int = 0
    accumulate: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "off", "blocks", "graphs"] = "auto"
    recompute: bool = False
    threads: int = 0
    save_every: int = 1
    save_minutes: float = 15.0
    evaluate_every: int = 10
    knn: int = 0
    snapshots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        least = {
            "epochs": 0, "batch_size": 1, "accumulate": 1, "save_every": 1, "evaluate_every": 0,
            "threads": 0, "knn": 0,
        }  # fmt: skip
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise RecipeError(f"{name} must be at least {lowest}, not {getattr(self, name)}.")
        if not 0 <= self.seed < 2**63:
            raise RecipeError(f"seed must be at least 0 and below 2^63, not {self.seed}.")
        if self.save_minutes <= 0:
            raise RecipeError(f"save_minutes must be above 0, not {self.save_minutes}.")
        beyond = [epoch for epoch in self.snapshots if not 0 <= epoch <= self.epochs]
        if beyond:
            raise RecipeError(f"snapshots must be epochs from 0 to {self.epochs}, not {beyond[0]}.")
        if self.batch_size % self.accumulate:
            raise RecipeError(
                f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}."
            )
        reason = METHODS[self.method.name].accumulation_changes
        if self.accumulate > 1 and reason:
            raise RecipeError(f"accumulate must be 1 with {self.method.name}: {reason}.")
        obstacle = self._graph_obstacle
        if self.compile == "graphs" and obstacle:
            raise RecipeError(f'compile = "graphs" cannot be had: {obstacle}; use "blocks".')
        METHODS[self.method.name].check_views(self.view_sizes, self.encoder)

    @property
    def augmentations(self) -> tuple[AugmentConfig, ...]:
        """How each kind of view is drawn."""
        base = asdict(self.augment)
        return tuple(
            _build(AugmentConfig, {**base, **view}, f"views[{i}].", "given")
            for i, view in enumerate(self.views or ({},))
        )

    @property
    def view_sizes(self) -> tuple[int, ...]:
        """The side of every view in pixels."""
        return tuple(
            view.size or self.encoder.image_size
            for view in self.augmentations
            for _ in range(view.count)
        )

    @property
    def _graph_obstacle(self) -> str:
        if self.recompute:
            return "recompute saves and restores random states, which a graph cannot record"
        if self.accumulate > 1:
            return "with accumulate above 1, a graph would overwrite gradients instead of adding"
        return METHODS[self.method.name].graph_obstacle


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null; a key that is left out is None."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # TOML knows no surrogate pairs, and JSON leaves the delete character as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def remarks(recipe: Any) -> tuple[str, ...]:
    """What of a recipe of any kind can be followed but is seldom meant."""
    warmup = recipe.optimizer.warmup_epochs
    if not 0 < recipe.epochs <= warmup:
        return ()
    return (
        f"the warm-up of {warmup:g} epochs is as long as the run of {recipe.epochs} or longer, so "
        "that the learning rate never comes down; lower optimizer.warmup_epochs",
    )


def load_recipe(
    recipe: str | Path | Recipe,
    *,
    data: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of that bundled name or TOML file, changed by `overrides` {"optimizer.lr": 1e-3}.

    A file may hold `inherits = NAME` (a bundled recipe, or a .toml path relative to the file); its
    own keys win, table by table. Raises RecipeError for an unknown, missing or ill-typed key.
    """
    changes = dict(overrides or {})
    if data is not None:
        changes["data"] = str(data)
    return read_recipe(Recipe, recipe, _bundle(), changes, _complete)


def read_recipe(
    kind: type[R],
    recipe: str | Path | R,
    bundle: Traversable,
    overrides: Mapping[str, Any],
    complete: Callable[[dict[str, Any]], None] = lambda tables: None,
) -> R:
    """A recipe of a kind, as `load_recipe` reads it.

    bundle: folder of the recipes that have names. complete: fills in tables that leave something
    out. Raises RecipeError as `load_recipe` does.
    """
    if isinstance(recipe, Written):
        source, tables = "given", recipe.to_dict()
    else:
        source = str(recipe)
        tables = _read(_locate(source, Path(), bundle), (), bundle)
    # What was said of another method says nothing of this one.
    method = tables.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    if name is not None and overrides.get("method.name", name) != name:
        tables["method"] = {}
    for key, value in overrides.items():
        _set(tables, key, value)
    complete(tables)
    built: R = _build(kind, tables, "", source)
    return built


def method_of(recipe: str | Path) -> str:
    """The name of the method that a recipe trains by; "" where it says none.

    Raises RecipeError where there is no such recipe, or it cannot be read.
    """
    method = _read(_locate(str(recipe), Path(), _bundle()), (), _bundle()).get("method", {})
    return str(method.get("name", "")) if isinstance(method, Mapping) else ""


def filled(saved: Mapping[str, Any], kind: type[Written] = Recipe) -> dict[str, Any]:
    """A recipe of a kind as an earlier version resolved it, with the defaults of keys that it did
    not have.

    Raises RecipeError where it is no recipe of this version.
    """
    built: Written = _build(kind, saved, "", "of the saved state")
    return built.to_dict()


def _complete(tables: dict[str, Any]) -> None:
    """Fill in what the method knows of its encoder."""
    method, encoder = tables.get("method"), tables.get("encoder", {})
    if isinstance(method, Mapping) and isinstance(encoder, Mapping):
        kind = METHODS.get(str(method.get("name")))
        completed = kind.complete(method, encoder) if kind else {}
        if completed:
            tables["encoder"] = completed


def bundled_recipes(bundle: Traversable | None = None) -> tuple[str, ...]:
    """Names of the recipes that come with vitprobe; those that are only inherited are left out.

    bundle: their folder; that of the training recipes by default.
    """
    names = (entry.name for entry in (bundle or _bundle()).iterdir())
    stems = (name.removesuffix(".toml") for name in names if name.endswith(".toml"))
    return tuple(sorted(stem for stem in stems if not stem.startswith("_")))


def _bundle() -> Traversable:
    return resources.files("vitprobe.training") / "recipes"


def _locate(recipe: str, folder: Path, bundle: Traversable) -> Traversable:
    """A path to a .toml file relative to `folder`, or the name of a bundled recipe."""
    if recipe.endswith(".toml"):
        path = folder / recipe
        if not path.is_file():
            raise RecipeError(f"No recipe file {path}.")
        return path
    bundled = bundle / f"{recipe}.toml"
    if not bundled.is_file():
        known = bundled_recipes(bundle)
        raise RecipeError(
            f"No recipe {recipe!r}; give a .toml file or one of: {', '.join(known)}."
            f"{suggest(recipe, known)}"
        )
    return bundled


def _read(file: Traversable, inheritors: tuple[str, ...], bundle: Traversable) -> dict[str, Any]:
    file = file.resolve() if isinstance(file, Path) else file
    if str(file) in inheritors:
        raise RecipeError(f"Recipe {file} inherits itself.")
    try:
        own = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe {file} is not valid TOML: {error}.") from error
    parent = own.pop("inherits", None)
    if parent is None:
        return own
    if not isinstance(parent, str):
        raise RecipeError(f"Recipe {file}: inherits must be a string, not {parent!r}.")
    found = _locate(parent, Path(str(file)).parent, bundle)
    inherited = _read(found, (*inheritors, str(file)), bundle)
    return _merge(inherited, own)


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _set(tables: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        table = tables.setdefault(parent, {})
        if not isinstance(table, dict):
            raise RecipeError(f"Override {key!r}: {parent!r} is not a table.")
        tables = table
    tables[last] = value


def _build(kind: Any, table: Any, prefix: str, source: str) -> Any:
    """A dataclass of this kind from a TOML table; `prefix` is the table's dotted path."""
    if not isinstance(table, Mapping):
        raise RecipeError(f"Recipe {source}: {prefix.rstrip('.')} must be a table, not {table!r}.")
    if kind is MethodConfig:
        kind = _method_config(table, source)
    known = {field.name: field for field in fields(kind)}
    for key in table:
        if key not in known:
            raise RecipeError(f"Recipe {source}: unknown key '{prefix}{key}'.{suggest(key, known)}")
    types = get_type_hints(kind)
    values = {}
    for name, field in known.items():
        if name in table:
            values[name] = _convert(table[name], types[name], f"{prefix}{name}", source)
        elif field.default is MISSING:
            raise RecipeError(f"Recipe {source}: the key '{prefix}{name}' is missing.")
    return kind(**values)


def _method_config(table: Mapping[str, Any], source: str) -> type[MethodConfig]:
    name = table.get("name")
    if not isinstance(name, str) or name not in METHODS:
        raise RecipeError(
            f"Recipe {source}: method.name must be one of {', '.join(METHODS)}, not {name!r}."
            f"{suggest(str(name), METHODS)}"
        )
    return METHODS[name].Config


def _convert(value: Any, kind: Any, name: str, source: str) -> Any:
    """`value` as the annotated type `kind`, without losing anything."""
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        choices = " or ".join(map(repr, get_args(kind)))
        raise RecipeError(f"Recipe {source}: {name} must be {choices}, not {value!r}.")
    if get_origin(kind) is UnionType:
        # None is never written: a key is there or it is not.
        return _convert(value, get_args(kind)[0], name, source)
    if get_origin(kind) is dict:
        if isinstance(value, Mapping):
            return dict(value)
        raise RecipeError(f"Recipe {source}: {name} must be a table, not {value!r}.")
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        variable = inner[-1] is Ellipsis
        if isinstance(value, list | tuple) and (variable or len(value) == len(inner)):
            kinds = [inner[0]] * len(value) if variable else inner
            return tuple(_convert(v, k, name, source) for v, k in zip(value, kinds, strict=True))
        count = "" if variable else f"{len(inner)} "
        raise RecipeError(
            f"Recipe {source}: {name} must be a list of {count}values, not {value!r}."
        )
    if kind in _WORDS:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is float and number and math.isfinite(value):
            return float(value)
        if type(value) is kind and kind is not float:
            return value
        raise RecipeError(f"Recipe {source}: {name} must be {_WORDS[kind]}, not {value!r}.")
    return _build(kind, value, f"{name}.", source)


_WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
}

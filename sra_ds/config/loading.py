"""From YAML and `key.path=value` overrides to a validated `Recipe`.

    defaults < recipe that `extends` names < recipe file < overrides

`model.moe.mode` in a layer stands for a few keys, those of a file in `recipes/modes`, below the layer's
own. Layers merge key by key; a part whose `kind` changes is replaced whole, since the keys of one kind
mean nothing to another; a corpus keeps what all sources share, a wavelet mixer what both forms do.
"""

import difflib
import types
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from sra_ds.config.data import CorpusConfig
from sra_ds.config.model import WaveletsConfig
from sra_ds.config.recipe import Recipe
from sra_ds.errors import ConfigError

CHOICE_KEYS = ("kind", "source", "form")
SHARED: dict[str, type[BaseModel]] = {"source": CorpusConfig, "form": WaveletsConfig}
"""What the choices under a key have in common."""
MODES = ("gnn", "hgnn", "orthogonal", "ghost")
"""Architectures of the MoE research family; `orthogonal` goes on from `hgnn`, `ghost` from that."""
Tree = dict[str, Any]


def named_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("sra_ds") / "recipes"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def load_recipe(name_or_file: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a named recipe or a YAML file, apply overrides, validate.

    Raises `ConfigError` with the dotted path, the value and what was allowed.
    """
    tree = _read_layers(str(name_or_file), seen=())
    if not overrides:
        return validate(tree)
    overlay: Tree = {}
    for override in overrides:
        overlay = merge(overlay, parse_override(override))
    overlay = _with_mode(overlay)
    return validate(merge(_with_defaults(tree), overlay))


def validate(tree: Tree) -> Recipe:
    """Turn a plain tree into a `Recipe`; every failure is a one-line `ConfigError`."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The merged recipe as YAML that `load_recipe` reads back to an equal `Recipe`."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def parse_override(text: str) -> Tree:
    """`a.b=1` -> {"a": {"b": 1}}; the value is YAML."""
    path, separator, value = text.partition("=")
    if not separator or not all(path.split(".")):
        raise ConfigError(f"override {text!r}: expected key.path=value")
    try:
        leaf = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # ValueError: an impossible date
        raise ConfigError(f"override {text!r}: the value is not valid YAML") from None
    *outer, last = path.split(".")
    tree: Tree = {last: leaf}
    for key in reversed(outer):
        tree = {key: tree}
    return tree


def merge(base: Tree, overlay: Tree) -> Tree:
    """`base` with `overlay` on top; neither is changed."""
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        if isinstance(old, str) and isinstance(value, dict):
            old = {CHOICE_KEYS[key == "data"]: old}
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = merge(_kept(old, value), value)
        elif (
            isinstance(old, dict) and isinstance(value, str) and value in map(old.get, CHOICE_KEYS)
        ):
            continue
        else:
            merged[key] = value
    return merged


def _with_defaults(tree: Tree) -> Tree:
    """Every default spelt out, so that an override can reach into a part the recipe left out."""
    try:
        spelt_out: Tree = Recipe.model_validate(tree).model_dump(mode="json")
        return spelt_out
    except ValidationError:
        return tree  # an override may complete it; the merged tree is validated in any case


def _kept(old: Tree, new: Tree) -> Tree:
    """What of `old` still means something under `new`: nothing after a change of kind, what all
    corpora share after a change of source, all wavelets after one of form."""
    changed = [key for key in CHOICE_KEYS if key in new and key in old and new[key] != old[key]]
    if not changed:
        return old
    common = SHARED[changed[0]].model_fields if changed[0] in SHARED else ()
    return {key: old[key] for key in common if key in old}


def _read_layers(name_or_file: str, seen: tuple[str, ...]) -> Tree:
    own = str(Path(name_or_file).resolve()) if Path(name_or_file).is_file() else name_or_file
    if own in seen:
        raise ConfigError(f"recipe {name_or_file!r} extends itself: {' -> '.join(seen)}")
    tree = _with_mode(_read_yaml(name_or_file))
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    sibling = Path(name_or_file).parent / str(parent)
    found = str(sibling) if sibling.suffix and sibling.is_file() else str(parent)
    return merge(_with_defaults(_read_layers(found, (*seen, own))), tree)


def _with_mode(layer: Tree) -> Tree:
    """The layer with what `model.moe.mode` stands for."""
    model = layer.get("model")
    if not isinstance(model, dict) or "moe" not in model:
        return layer
    rest = {**layer, "model": {key: value for key, value in model.items() if key != "moe"}}
    moe = model["moe"]
    if not isinstance(moe, dict) or set(moe) != {"mode"}:
        raise ConfigError(
            f"model.moe: only `mode` is known, one of {', '.join(MODES)} (got {moe!r})"
        )
    if moe["mode"] not in MODES:
        near = _nearest(str(moe["mode"]), list(MODES))
        raise ConfigError(f"model.moe.mode: no mode {moe['mode']!r}{near}: {', '.join(MODES)}")
    return merge(_read_mode(moe["mode"]), rest)


def _read_mode(name: str) -> Tree:
    """A mode, and below it the one it goes on from."""
    text = (resources.files("sra_ds") / "recipes" / "modes" / f"{name}.yaml").read_text("utf-8")
    tree: Tree = yaml.safe_load(text)
    below = tree.pop("extends", None)
    return tree if below is None else merge(_read_mode(below), tree)


def _read_yaml(name_or_file: str) -> Tree:
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"recipe file {name_or_file} does not exist")
        text = path.read_text(encoding="utf-8", errors="replace")
    elif name_or_file in named_recipes():
        text = (resources.files("sra_ds") / "recipes" / f"{name_or_file}.yaml").read_text("utf-8")
    else:
        raise ConfigError(
            f"no recipe named {name_or_file!r}{_nearest(name_or_file, named_recipes())}; "
            f"known: {', '.join(named_recipes())}; or give a .yaml file"
        )
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"{name_or_file} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{name_or_file}: a recipe is a mapping of keys, found {type(tree).__name__}"
        )
    return tree


def _explain(error: ValidationError) -> str:
    lines = []
    found = error.errors(include_url=False)
    for item in found:
        own = item["loc"]
        if any(len(own) < len(other["loc"]) and other["loc"][: len(own)] == own for other in found):
            continue  # a whole that lacks the part that is wrong
        path, owners = _locate(item["loc"])
        where = ".".join(path) or "recipe"
        if item["type"] == "extra_forbidden":
            known = sorted({name for owner in owners for name in owner.model_fields})
            where = where if where.isprintable() else repr(where)
            lines.append(f"unknown key {where}{_nearest(path[-1], known)}")
        elif item["type"] == "missing":
            lines.append(f"{where} is required")
        elif item["type"].startswith("union_tag"):
            context = item["ctx"]
            key = f"{where}.{context['discriminator']}".replace("'", "")
            wrong = "tag" in context
            lines.append(
                f"{key}: got {context['tag']!r}, allowed: {context['expected_tags']}"
                if wrong
                else f"{key} is required to say which choice the other keys belong to"
            )
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = (
                "" if isinstance(item["input"], (dict, BaseModel)) else f" (got {item['input']!r})"
            )
            lines.append(f"{where}: {message}{value}")
    return "; ".join(lines)


def _locate(loc: tuple[int | str, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """The dotted path without union tags, and the parts that could own its last key."""
    path: list[str] = []
    owners: list[type[BaseModel]] = [Recipe]
    for depth, key in enumerate(loc):
        fields = [owner.model_fields[str(key)] for owner in owners if key in owner.model_fields]
        tagged = [owner for owner in owners if _has_tag(owner, key)]
        if tagged and not fields:
            owners = tagged
            continue
        path.append(str(key))
        if depth < len(loc) - 1 and fields:
            owners = [part for field in fields for part in _parts(field.annotation)]
    return path, owners


def _has_tag(part: type[BaseModel], tag: int | str) -> bool:
    for key in CHOICE_KEYS:
        field = part.model_fields.get(key)
        if field is not None and tag in get_args(field.annotation):
            return True
    return False


def _parts(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [part for argument in get_args(annotation) for part in _parts(argument)]
    return []


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"

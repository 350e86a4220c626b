"""One expert as two files: its tensors, and a card that says what it is and where it comes from.

    layer2-expert07.safetensors    experts.up_weight, ..., router.anchors (see `export_rows`)
    layer2-expert07.json           `Card`

What is read back is checked against the card, and the card against its schema.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sra_ds.config import Recipe
from sra_ds.config.base import Part
from sra_ds.errors import CheckpointError, ConfigError
from sra_ds.files import file_sha256
from sra_ds.inference.export.rows import State, has_bias
from sra_ds.inference.places import Place, routed
from sra_ds.storage.run_dir import write_atomically

PATTERN = "layer*-expert*.json"


class Shape(Part):
    """The model an expert was taken from."""

    layers: int
    experts: int
    top_k: int
    width: int
    """D."""
    hidden: int
    """F of the experts."""
    kind: str
    """Kind of the experts: gelu or swiglu."""
    bias: bool
    """Whether the experts have biases."""
    router: str
    """Kind of the router."""
    heads: int | None = None
    """Attention heads of experts that are blocks."""


class Load(Part):
    """How often an expert was chosen."""

    share: float = Field(ge=0)
    """Of all routes of its layer."""
    routes: float = Field(ge=0)
    counted_in: str
    """File of the run that says so."""


class Card(Part):
    """What an exported expert is."""

    schema_version: Literal[1] = 1
    run: str
    """Name of the run it comes from."""
    recipe: str
    step: int
    """Training step of the weights."""
    weights_sha256: dict[str, str]
    """Hashes of the checkpoint's weight files."""
    model: Shape
    layer: int = Field(ge=0)
    expert: int = Field(ge=0)
    load: Load | None
    """None when the run tells none."""
    top_tokens: tuple[str, ...] | None
    """Tokens it was chosen for most; None before `tools/analyze.py` has found them."""
    anchor: tuple[float, ...] | None
    """The anchor, as in the tensors; None for a router without anchors."""
    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$")
    """The tensors, beside the card."""
    sha256: str
    """Hash of that file."""
    tensors: dict[str, tuple[int, ...]]
    """Shapes by name."""

    @property
    def place(self) -> Place:
        """Where it comes from."""
        return Place(self.layer, self.expert)


class Exported(NamedTuple):
    """An expert read back."""

    card: Card
    path: Path
    rows: State


def shape_of(recipe: Recipe) -> Shape:
    """What a card says of a model; raises `ConfigError` for a dense one."""
    channel = routed(recipe)
    return Shape(
        layers=recipe.model.layers,
        experts=channel.experts,
        top_k=channel.top_k,
        width=recipe.model.width,
        hidden=channel.expert.hidden,
        kind=channel.expert.kind,
        bias=has_bias(channel),
        router=channel.router.kind,
        heads=channel.expert_heads if channel.expert_kind == "block" else None,
    )


def stem_of(place: Place, experts: int) -> str:
    """File name without ending; numbers of experts have equal width, so that names sort."""
    digits = max(2, len(str(experts - 1)))
    return f"layer{place.layer}-expert{place.expert:0{digits}d}"


def write_tensors(path: Path, rows: State) -> None:
    """The tensors of one expert."""
    save_file({name: row.contiguous() for name, row in rows.items()}, path, {"format": "pt"})
    path.chmod(0o644)  # readable by others, as every other file of a run


def write_card(path: Path, card: Card) -> None:
    """The card of one expert."""
    write_atomically(path, card.model_dump_json(indent=1) + "\n")


def find_cards(path: Path) -> list[Path]:
    """Cards in a folder, or the one a file is or belongs to; raises `CheckpointError` for none."""
    if path.is_dir():
        found = sorted(path.glob(PATTERN))
        if not found:
            raise CheckpointError(f"{path} holds no exported experts ({PATTERN})")
        return found
    card = path.with_suffix(".json")
    if path.suffix not in (".json", ".safetensors") or not card.is_file():
        raise CheckpointError(f"{path} is neither an exported expert's card nor a folder of some")
    return [card]


def read_export(path: Path) -> Exported:
    """An expert by its card; raises `CheckpointError` if card and tensors are damaged or do not belong
    together."""
    try:
        card = Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        what = " ".join(f"{'.'.join(map(str, first['loc']))} {first['msg']}".split())
        raise CheckpointError(
            f"{path} is not an expert's card ({what}); export the expert again"
        ) from None
    tensors = path.with_name(card.file)
    if not tensors.is_file():
        raise CheckpointError(f"{tensors} is missing; it belongs to {path.name}")
    if file_sha256(tensors) != card.sha256:
        raise CheckpointError(f"{tensors} is damaged (its hash is not the one in {path.name})")
    rows = _read_tensors(tensors)
    if {name: tuple(row.shape) for name, row in rows.items()} != card.tensors:
        raise CheckpointError(f"{tensors} does not hold the tensors {path.name} names")
    for name, row in rows.items():
        if not row.is_floating_point() or not row.isfinite().all():
            raise CheckpointError(f"{tensors}: {name} has values that are no finite numbers")
    return Exported(card=card, path=path, rows=rows)


def require_fit(found: Exported, recipe: Recipe, rows: dict[str, tuple[int, ...]]) -> None:
    """Raise `ConfigError` unless the expert fits a model whose experts have `rows`, shapes by name."""
    own, other = shape_of(recipe), found.card.model
    for key in ("width", "hidden", "kind", "bias", "router", "heads"):
        mine, theirs = getattr(own, key), getattr(other, key)
        if mine != theirs:
            raise ConfigError(
                f"{found.path} is of a model with {key}={theirs}, {recipe.name} has {key}={mine}; "
                "experts go into models of the same shape only"
            )
    there = found.card.tensors
    for name in {**rows, **there}:
        if rows.get(name) != there.get(name):
            raise ConfigError(
                f"{found.path} does not fit {recipe.name}: {name} has the shape "
                f"{there.get(name, 'of nothing')} there and {rows.get(name, 'of nothing')} here"
            )


def _read_tensors(path: Path) -> State:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not readable ({error})") from None

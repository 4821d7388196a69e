"""How a student is quantised, as an entry of its model's config, so that checkpoints and exports have it. Written by
`quant_linear`, read by `pretrained`, `export` and `checkpoint.resume`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from student_trainer.students.quantisers.activations import ACTIVATIONS

# An RMSNorm before the linears that write into the residual stream, before every linear, or nowhere.
SubNorm = Literal["output", "all", "none"]

ENTRY = "student_quantisation"
VERSION = 1
OLD_ENTRY = "bitnet_student"  # from trainers with a single quantiser: sub_norm, eps, quantise_activations


@dataclass(frozen=True)
class Record:
    """`quantiser`: a name in QUANTISERS. `eps`: that of the SubLN norms. `activations`: a name in ACTIVATIONS.
    `stages`, `bits`, `group_size`: how the weights are quantised, if the quantiser leaves these open.
    """

    quantiser: str
    sub_norm: SubNorm
    eps: float
    activations: str
    stages: int | None = None
    bits: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("sub_norm", get_args(SubNorm)), ("activations", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                expected = " or ".join((", ".join(map(repr, known[:-1])), repr(known[-1])))
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")
        if not (isinstance(self.eps, (int, float)) and self.eps > 0.0):
            raise ValueError(f"eps: got {self.eps}, expected a number above 0")
        if self.stages not in (None, 1, 2):
            raise ValueError(f"stages: got {self.stages!r}, expected 1 or 2")

    def differing(self, asked: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        """The settings in `asked` that differ from the record: name, recorded value, requested value."""
        says = {
            **asdict(self),
            "quantise_activations": self.activations != "none",
            "activation_bits": int(self.activations.removeprefix("int")) if self.activations != "none" else None,
        }
        for name, value in asked.items():
            if value is not None and value != says[name]:
                yield name, says[name], value


def write_record(config: Any, record: Record) -> None:
    """Write it into the model's config, in place of an earlier entry."""
    if hasattr(config, OLD_ENTRY):
        delattr(config, OLD_ENTRY)
    setattr(config, ENTRY, _entry(record))


def _entry(record: Record) -> dict[str, Any]:
    """Without the fields that are None, so that a trainer that does not know these can read it."""
    return {"version": VERSION, **{name: value for name, value in asdict(record).items() if value is not None}}


def read_record(config: Any, path: str = "") -> Record | None:
    """The record in a config, None if it has none. ValueError for one that this trainer can't read."""
    return record_in({name: getattr(config, name, None) for name in (ENTRY, OLD_ENTRY)}, path)


def record_in(config: Mapping[str, Any], path: str = "") -> Record | None:
    """`read_record` for a config as plain containers."""
    entry, old = config.get(ENTRY), config.get(OLD_ENTRY)
    where = f"{path}: its config's entry " if path else "the config's entry "
    try:
        if entry is not None:
            fields = dict(entry)
            if (version := fields.pop("version", None)) != VERSION:
                raise ValueError(f"got version {version}, this trainer reads {VERSION}: use the trainer that wrote it")
            return Record(**fields)
        if old is not None:
            # The first exports did not say: they always quantised activations.
            activations = "int8" if old.get("quantise_activations", True) else "none"
            return Record("bitnet", old["sub_norm"], old["eps"], activations)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{where}{ENTRY if entry is not None else OLD_ENTRY} cannot be read: {error}") from None
    return None


def renewed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, as plain containers, with its entry in today's form, even if an older trainer wrote it."""
    record = record_in(config)
    rest = {name: value for name, value in config.items() if name not in (ENTRY, OLD_ENTRY)}
    return rest if record is None else rest | {ENTRY: _entry(record)}

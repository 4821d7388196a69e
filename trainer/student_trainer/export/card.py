"""The model card of every export: README.md from the template `model_card.md.jinja`. Called by the formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from student_trainer.export.bits import BitsAWeight
from student_trainer.students.quantisers.quantiser import Quantiser

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


@dataclass(frozen=True)
class ModelCard:
    """What a run knows about the model it made; the exporter adds format and loading instructions.

    `teacher` and its fingerprint are empty if there was none. `data`: one line per source. `figures`: name -> value as
    it is printed. `config`: the run's settings as YAML.
    """

    name: str
    base_model: str
    teacher: str
    teacher_fingerprint: str
    data: tuple[str, ...] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    config: str = ""


def write_card(
    card: ModelCard,
    file: Path,
    *,
    library: str,
    what: str,
    loading: str,
    notes: tuple[str, ...],
    quantiser: Quantiser,
    bits: BitsAWeight | None,
) -> None:
    """Render the card. `quantiser`: that of the weights, which take `bits`. In Markdown: `what` says what the files
    hold, `loading` how to open them, `notes` are caveats.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        card=card, library=library, what=what, loading=loading, notes=notes, quantiser=quantiser.name,
        bits=f"{quantiser.bits:g}", effective=bits,
    )  # fmt: skip
    file.write_text(text, encoding="utf-8")

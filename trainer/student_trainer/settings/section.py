"""The base class of every section of the settings: a frozen record that refuses unknown names."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _tuple_of_one(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_tuple_of_one)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

Points = tuple[tuple[int, float], ...]


def _rising(points: Points | None) -> Points | None:
    if points is not None and (not points or any(a[0] >= b[0] for a, b in pairwise(points))):
        raise ValueError(f"got the points {list(points)}, expected [[step, factor], ...] with increasing steps")
    return points


# The factor on a coefficient, as points [step, factor] with linear interpolation between them.
Schedule = Annotated[Points | None, AfterValidator(_rising)]

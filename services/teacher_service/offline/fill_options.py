"""The options of `stillhouse-teacher fill`, and the request that they make. Used by `fill_command.py`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from teacher_proto.dataset.codecs import parse_codec
from teacher_proto.errors import RequestError
from teacher_proto.requests import KINDS, Kind, Limits, TargetsRequest, check_request
from teacher_service.settings import TeacherSettings, parse_settings


@dataclass(frozen=True)
class Slice:
    """Which units of the data this process scores: every `of`-th, from the `number`-th, counted from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Slice:
        """From text such as `2/8`. ValueError for anything else."""
        number, _, of = text.partition("/")
        if not number.isdigit() or not of.isdigit() or not 1 <= int(number) <= int(of):
            raise ValueError(f"--slice {text}: expected I/N, such as 1/8 to 8/8")
        return cls(int(number), int(of))

    def has(self, unit: int) -> bool:
        return unit % self.of == self.number - 1


@dataclass(frozen=True)
class FillOptions:
    """`own` are fill's options, `settings` the service's, `request` is what is requested for every document, `part`
    this process's share of the data, `codec` how a dataset encodes targets; from `engine_arguments`, `settings` can be
    made again in another process."""

    own: argparse.Namespace
    settings: TeacherSettings
    request: TargetsRequest
    part: Slice
    codec: dict[str, Any]
    engine_arguments: list[str]


def parse_fill(arguments: list[str]) -> FillOptions:
    """Parse the command line. ValueError in one line for what can't be done as requested."""
    options, rest = _parser().parse_known_args(arguments)
    for name, value in (("MODEL", options.model), ("DATA", options.data)):
        if value is None or value.startswith("-"):
            raise ValueError(f"{name} is missing: stillhouse-teacher fill MODEL DATA --store FOLDER or --output URL")
    settings = parse_settings([options.model, *rest])
    if (settings.store is None) == (options.output is None):
        raise ValueError(
            "expected --store or --output: the folder of the target store to fill, or the URL of a target dataset"
            if options.output is None
            else "got --store and --output, expected one of them: a target store or a target dataset"
        )
    if options.output is None:
        given = [name for name in _OF_DATASETS if getattr(options, name.replace("-", "_")) != _OF_DATASETS[name]]
        if given:
            raise ValueError(f"--{given[0]} is for target datasets: it needs --output URL and has no effect on --store")
    for name in ("shard_tokens", "replicas"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected 1 or more")
    if options.replicas > 1 and options.ray is None:
        raise ValueError("--replicas is for a Ray cluster: it needs --ray ADDRESS")
    return FillOptions(
        options,
        settings,
        _request(options),
        Slice.parse(options.slice),
        parse_codec(options.codec),
        [options.model, *rest],
    )


# Options that don't apply to --store, and their defaults.
_OF_DATASETS = {"slice": "1/1", "shard-tokens": 2**20, "codec": "lossless", "ray": None, "replicas": 1}


def sequence_length(limits: Limits, options: argparse.Namespace) -> int:
    limit = limits.max_sequence_length
    length = limit if options.max_length is None else options.max_length
    if not 1 <= length <= limit:
        raise ValueError(f"--max-length {length}: this teacher takes sequences of 1 to {limit} tokens")
    return length


def _request(options: argparse.Namespace) -> TargetsRequest:
    """What is requested for every sequence, with a one-token sequence as a placeholder."""
    asked = {
        "kinds": options.kinds.split(","), "top_k": options.top_k, "num_samples": options.num_samples,
        "temperatures": [float(t) for t in options.temperatures.split(",") if t],
        "sample_temperature": options.sample_temperature, "seed": options.seed, "hidden_dtype": options.hidden_dtype,
    }  # fmt: skip
    if "gather" in asked["kinds"]:
        raise ValueError("--kinds gather: its ids come from a student, and a fill has none")
    try:
        return TargetsRequest(sequences=([0],), **asked)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise ValueError(f"--{name}: {first['msg']}, got {first['input']!r}") from None


def check_against(request: TargetsRequest, limits: Limits, kinds: tuple[Kind, ...]) -> None:
    try:
        check_request(request, limits, kinds)
    except RequestError as error:
        raise ValueError(f"--{(error.field or '').partition('.')[0].replace('_', '-')}: {error.message}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stillhouse-teacher fill", allow_abbrev=False,
        description="Compute the targets of a data set into a target store or a target dataset, without a server. The "
        "same command resumes where it stopped.",
        epilog="MODEL and DATA come first. All options of stillhouse-teacher that concern model and store apply too: "
        "--store (unless --output is given), --store-bytes, --engine, --dtype, --window.",
    )  # fmt: skip
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub name of the model")
    parser.add_argument("data", nargs="?", metavar="DATA", help=".jsonl, .parquet or .txt file, or a folder of them")
    parser.add_argument("--output", metavar="URL", help="target dataset to write: a folder, s3:// or gs://")
    parser.add_argument("--shard-tokens", type=int, default=2**20, help="--output: tokens per shard (default: 2**20)")
    parser.add_argument(
        "--codec", default="lossless", help="--output: lossless, or compact:BITS with 2 to 8 bits per logprob"
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="--output: run the engines on this Ray cluster; auto: the local one"
    )
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="--ray: number of engines (default: 1)")
    parser.add_argument("--slice", default="1/1", metavar="I/N", help="--output: do the I-th of N parts of DATA")
    parser.add_argument(
        "--kinds", default="top_k", help=f"kinds of target, comma-separated: {', '.join(KINDS)} (default: top_k)"
    )
    parser.add_argument("--top-k", type=int, default=64, help="kind top_k: logprobs per position (default: 64)")
    parser.add_argument("--temperatures", default="", help="temperatures to store log_z for, comma-separated")
    parser.add_argument("--num-samples", type=int, default=50, help="kind sampled: draws per position (default: 50)")
    parser.add_argument("--sample-temperature", type=float, default=1.0, help="kind sampled: temperature (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="kind sampled: seed (default: 0)")
    parser.add_argument(
        "--hidden-dtype", default="float16", help="kind hidden: float16, bfloat16 or int8 (default: float16)"
    )
    parser.add_argument(
        "--max-length", type=int, help="cut documents into pieces of this many tokens; the teacher's limit if not given"
    )
    parser.add_argument("--no-special-tokens", action="store_true", help="do not let the tokenizer add BOS or EOS")
    return parser

"""Write the tree of the packages into README.md and, a line a file, into docs/architecture.md.

make tree          tests/unit/test_readme.py holds both to it

A file's line is the first sentence of its module.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = re.compile(r".+?[.?](?=\s+[A-Z`])|.+")
BEGIN, END = "<!-- tree: written by `make tree` -->\n", "<!-- end of tree -->\n"
PACKAGES = {
    "proto/teacher_proto": "the contract: records, identity, errors, hardware; importing it does not import torch",
    "proto/teacher_proto/wire": "records <-> bytes",
    "proto/teacher_proto/client": "`TeacherClient`: replicas, retries, deadlines, progress",
    "proto/teacher_proto/store": "the target store",
    "proto/teacher_proto/compute": "logits -> records: the one implementation, used by every engine",
    "proto/teacher_proto/process": "processes: signals, progress lines, child processes",
    "proto/teacher_proto/dataset": "target datasets: Parquet shards in any folder or bucket",
    "services/serving": "the base of both services",
    "services/serving/http": "connections, limits, keys, TLS, errors by one table",
    "services/serving/scheduling": "admission, fair queue, sharing of equal requests",
    "services/teacher_service": "FastAPI over an engine",
    "services/teacher_service/engines": "vLLM, transformers, and a scripted engine for tests",
    "services/teacher_service/compat": "the APIs of other servers, one file each",
    "services/teacher_service/offline": "targets without a server: `fill`, `pack`, `dataset`",
    "services/attention_service": "FastAPI over a transformers model, cut off above the requested layer",
    "trainer/student_trainer": "the trainer",
    "trainer/student_trainer/settings": "the one definition of every setting, one file per section",
    "trainer/student_trainer/batch": "batches, and their alignment with the teacher's rows",
    "trainer/student_trainer/data": "from sources to packed batches",
    "trainer/student_trainer/data/policies": "policies for the mixture's weights, one file each",
    "trainer/student_trainer/losses": "pure functions, one file per family",
    "trainer/student_trainer/losses/fused": "the loss between the head's matrix products, as Triton kernels",
    "trainer/student_trainer/students": "student models",
    "trainer/student_trainer/students/quantisers": "quantised weights, one file per quantiser",
    "trainer/student_trainer/students/adapters": "adapters: what is trained instead of all weights, one file each",
    "trainer/student_trainer/calibration": "initial values computed from data: LRC corrections, SubLN gains",
    "trainer/student_trainer/targets": "sources of targets, and prefetching",
    "trainer/student_trainer/rollouts": "text that the student generates for on-policy training",
    "trainer/student_trainer/optim": "optimizers, schedules, clipping",
    "trainer/student_trainer/checkpoint": "checkpoints and resuming",
    "trainer/student_trainer/evaluation": "held-out evaluation",
    "trainer/student_trainer/influence": "influence of documents on a target",
    "trainer/student_trainer/reporting": "metrics, reports, wandb, Prometheus",
    "trainer/student_trainer/export": "export to other formats",
    "trainer/student_trainer/cli": "the other commands, and how settings are composed",
    "benchmarks": "benchmarks, one script each: `make bench-NAME`",
    "demo": "`make demo`, `make bitdistill`, `make diffusion`, `make classification`",
}


def packages() -> str:
    """The block of README.md, as Markdown: a line a package."""
    return "\n".join(["```", *(f"{package + '/':<46}{about}" for package, about in PACKAGES.items()), "```\n"])


def files() -> str:
    """The block of docs/architecture.md, as Markdown: a line a file."""
    lines = ["```text"]
    for package, about in PACKAGES.items():
        modules = sorted(path for path in (ROOT / package).glob("*.py") if path.name != "__init__.py")
        if modules:
            lines.append(f"{package + '/':<46}{about}")
            lines += [f"  {path.name:<26}{_first_sentence(path)}" for path in modules]
    return "\n".join([*lines, "```\n"])


PAGES = {"README.md": packages, "docs/architecture.md": files}


def with_tree(page: str, text: str) -> str:
    """The text of one of `PAGES` with its tree written again. ValueError without the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return before + BEGIN + PAGES[page]() + END + after


def _first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    text = " ".join(docstring.split("\n\n")[0].split())
    return SENTENCE.match(text)[0].rstrip(".") if text else ""


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(with_tree(page, path.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)

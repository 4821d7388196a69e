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
    "proto/teacher_proto": "the contract: records, identity, errors, hardware; never torch at import",
    "proto/teacher_proto/wire": "records <-> bytes",
    "proto/teacher_proto/client": "`TeacherClient`: replicas, retries, deadlines, progress",
    "proto/teacher_proto/store": "the target store",
    "proto/teacher_proto/compute": "logits -> records: the one definition that every engine uses",
    "proto/teacher_proto/process": "what every command does as a process: signals, progress lines, children",
    "proto/teacher_proto/dataset": "answers in Parquet shards, in any folder or bucket",
    "services/serving": "what both services stand on",
    "services/serving/http": "connections, limits, keys, TLS, errors by one table",
    "services/serving/scheduling": "admission, fair queue, one computation for all who ask the same",
    "services/teacher_service": "FastAPI over an engine",
    "services/teacher_service/engines": "vLLM, transformers, and arithmetic for tests",
    "services/teacher_service/compat": "other servers' wire formats, a file a format",
    "services/teacher_service/offline": "targets without a server: `fill`, `pack`, `dataset`",
    "services/attention_service": "FastAPI over an eager model that is cut off above the layer asked for",
    "trainer/student_trainer": "the trainer, a process of its own",
    "trainer/student_trainer/settings": "what a run is: the one definition of every setting, a file a section",
    "trainer/student_trainer/batch": "a batch, and the teacher's rows beside it",
    "trainer/student_trainer/data": "from sources to packed batches",
    "trainer/student_trainer/data/policies": "who decides the mixture's weights, a file a policy",
    "trainer/student_trainer/losses": "pure functions, a file a family",
    "trainer/student_trainer/losses/fused": "the head between its products, as Triton kernels for GPUs",
    "trainer/student_trainer/students": "what learns",
    "trainer/student_trainer/students/quantisers": "weights in few bits, a file a quantiser",
    "trainer/student_trainer/students/adapters": "what is trained in place of all weights, a file an adapter",
    "trainer/student_trainer/calibration": "first values of low-rank corrections, out of data",
    "trainer/student_trainer/targets": "where targets come from, and how they come ahead of time",
    "trainer/student_trainer/rollouts": "text that the student writes and learns from",
    "trainer/student_trainer/optim": "how gradients become updates",
    "trainer/student_trainer/checkpoint": "a run on disk",
    "trainer/student_trainer/evaluation": "held-out figures",
    "trainer/student_trainer/influence": "which documents help with which",
    "trainer/student_trainer/reporting": "where figures go",
    "trainer/student_trainer/export": "a student for those who run it",
    "trainer/student_trainer/cli": "commands beside training, and the settings' composition",
    "benchmarks": "a script a figure: `make bench-NAME`",
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
    """The text of one of `PAGES` with its tree made anew. ValueError without the markers."""
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

"""The page of a run: what is in it, and what it does with text that looks like markup."""

import json
from pathlib import Path

import pytest

from student_trainer.reporting.json_lines import read_lines
from student_trainer.reporting.report import RunRecord, main, write_report


def _write_run(folder: Path, kl: float, token: str = "word") -> Path:
    folder.mkdir()
    metrics = [{"step": step, "loss/cross_entropy": 5.0 - step, "grad_norm": 1.0, "wait_share": 0.1} for step in (1, 2)]
    evaluations = [
        {"step": step, "prose": {"cross_entropy": 4.0, "kl": kl + 2 - step, "agreement": 0.25 * step, "tokens": 100}}
        for step in (0, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    samples = [
        {"step": step, "source": "prose", "document": "prose:1", "prompt": "It was", "written": f"{token} at {step}",
         "ended": False, "instead": "a night"}
        for step in (0, 1, 2)
    ]  # fmt: skip
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    (folder / "passage.json").write_text(
        json.dumps([{"text": token, "teacher": [["a", 0.5]], "student": [["b", 0.5]]}])
    )
    return folder


def _data(page: str) -> dict:
    line = next(line for line in page.splitlines() if line.startswith("const data = "))
    return json.loads(line.removeprefix("const data = ").removesuffix(";"))


def test_page_holds_every_figure_of_every_run(tmp_path: Path) -> None:
    runs = [RunRecord.read(_write_run(tmp_path / "plain", 3.0)), RunRecord.read(_write_run(tmp_path / "taught", 2.0))]
    write_report(runs, tmp_path / "report.html", title="two runs", facts=[("teacher", "one")])
    page = (tmp_path / "report.html").read_text()
    charts = {chart["title"]: chart["series"] for chart in _data(page)["charts"]}
    assert charts["KL(teacher‖student), held out, prose"] == [
        {"run": 0, "points": [[0, 5.0], [2, 3.0]]},
        {"run": 1, "points": [[0, 4.0], [2, 2.0]]},
    ]
    assert charts["training cross entropy"][1]["points"] == [[1, 4.0], [2, 3.0]]
    assert charts["learning rate"] == []
    assert '<td class="best">2.000</td>' in page and '<td class="best">3.000</td>' not in page


def test_text_that_looks_like_markup_stays_text(tmp_path: Path) -> None:
    token = "</script><script>alert(1)</script>"
    run = RunRecord.read(_write_run(tmp_path / "run", 1.0, token), name="<b>run</b>")
    write_report([run], tmp_path / "report.html", title="<i>title</i>")
    page = (tmp_path / "report.html").read_text()
    assert token not in page and "<b>run</b>" not in page and "<i>title</i>" not in page
    assert _data(page)["passages"][0]["tokens"][0]["text"] == token


def test_what_the_students_wrote_stands_beside_what_the_document_says(tmp_path: Path) -> None:
    runs = [RunRecord.read(_write_run(tmp_path / name, 1.0, name)) for name in ("plain", "taught")]
    write_report(runs, tmp_path / "report.html", title="two runs")
    page = (tmp_path / "report.html").read_text()
    assert page.count("It was") == page.count("a night") == 1
    for name in ("plain", "taught"):
        assert f"{name} at 0" in page and f"{name} at 2" in page and f"{name} at 1" not in page


def test_a_common_beginning_is_shown_once_and_others_beside_it(tmp_path: Path) -> None:
    runs = [RunRecord.read(_write_run(tmp_path / name, 1.0, "same")) for name in ("plain", "taught")]
    other = {"source": "prose", "document": "prose:1", "prompt": "It was", "written": "a teacher's text", "instead": ""}
    write_report(runs, tmp_path / "report.html", title="two", others={"teacher": [other]}, untrained="pruned")
    page = (tmp_path / "report.html").read_text()
    assert "a teacher&#39;s text" in page and "<dt>teacher</dt>" in page
    assert page.count("same at 0") == page.count("<dt>pruned, step 0</dt>") == 1 and page.count("same at 2") == 2
    assert page.count("<td>pruned</td>") == 1 and page.count("<td>taught</td>") == 1


def test_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    write_report([RunRecord.read(_write_run(tmp_path / "run", 1.0))], tmp_path / "report.html", title="alone")
    page = (tmp_path / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and "src=" not in page and "<link" not in page


def test_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err


def test_a_mixture_that_changed_is_a_picture_with_its_reasons(tmp_path: Path) -> None:
    folder = _write_run(tmp_path / "run", 1.0)
    shares = (0.5, 0.5, 0.6, 0.6, 0.7)
    lines = [{"step": step + 1, "mixture/a": share, "mixture/<b>": 1 - share} for step, share in enumerate(shares)]
    lines[1] |= {"decided/a": 0.6, "decided/<b>": 0.4, "reason/a/excess": 0.25, "decided_note": "back to <i>"}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([RunRecord.read(folder)], tmp_path / "report.html", title="run")
    page = (tmp_path / "report.html").read_text()
    (picture,) = _data(page)["mixtures"]
    assert picture["sources"] == ["a", "<b>"]
    assert picture["points"] == [[1, 0.5, 0.5], [3, 0.6, 0.4], [5, 0.7, pytest.approx(0.3)]]
    assert "What it was trained on" in page and "a 0.600" in page and "excess 0.25" in page
    assert "<b> 0.4" not in page and "back to <i>" not in page and "back to &lt;i&gt;" in page
    plain = RunRecord.read(_write_run(tmp_path / "plain", 1.0))
    write_report([plain], tmp_path / "plain.html", title="plain")
    assert "What it was trained on" not in (tmp_path / "plain.html").read_text()


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_lines(file) == []
    file.write_text('{"step": 1}\n{"step": 2, "text": "a\u2028b"}\n{"step": 3, "lo')
    assert [line["step"] for line in read_lines(file)] == [1, 2]


def test_what_each_says_stands_under_its_name_where_runs_have_other_examples(tmp_path: Path) -> None:
    """The teacher is silent on one example, and the runs were evaluated on others."""
    for name, documents in (("plain", "ab"), ("taught", "bc")):
        examples = [
            {"document": key, "prompt": f"text {key}", "right": 0, "student": 1, "student_probability": 0.75,
             "teacher": 0 if key == "c" else None, "teacher_probability": 0.9 if key == "c" else None}
            for key in documents
        ]  # fmt: skip
        line = {"step": 2, "source": "prose", "words": [" no", " yes"], "student": [[0, 2], [0, 0]],
                "teacher": [[1, 0], [0, 0]] if name == "taught" else None, "examples": examples}  # fmt: skip
        (_write_run(tmp_path / name, 1.0) / "classes.jsonl").write_text(json.dumps(line) + "\n")
    runs = [RunRecord.read(tmp_path / name) for name in ("plain", "taught")]
    write_report(runs, tmp_path / "report.html", title="two")
    page = (tmp_path / "report.html").read_text()
    assert "<th>teacher</th><th>plain</th><th>taught</th>" in page
    rows = {key: page.split(f"<td>text {key}</td>")[1].split("</tr>")[0] for key in "abc"}
    assert [row.count("yes 75 %") for row in rows.values()] == [1, 2, 1]
    assert rows["a"].index("yes 75 %") < rows["a"].rindex("–") and rows["c"].index("no 90 %") < rows["c"].index("–")

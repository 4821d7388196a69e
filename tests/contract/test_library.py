"""What trainers of other people take from us: rows of answers, the fused head, and the examples that show both."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from student_trainer.losses import head_loss, teacher_rows, token_term
from teacher_proto.client.sync_client import SyncTeacherClient
from teacher_proto.requests import TargetsRequest
from teacher_proto.targets import TokenTargets
from tests.contract.faces import truth_of
from tests.models import VOCAB_SIZE, save_tiny_llama, tiny_tokenizer
from tests.teacher_process import TeacherProcess
from tests.trainer_run import teacher_script

EXAMPLES = Path(__file__).parents[2] / "examples"
SEQUENCES = [[3, 5, 8, 13, 21], [2, 7], [40, 41, 42]]


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess(script=teacher_script()) as process:
        yield process


def answers(url: str, **asked: Any) -> list[TokenTargets]:
    with SyncTeacherClient(url) as client:
        return client.targets(TargetsRequest(sequences=SEQUENCES, **asked))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_loss_of_ones_own_is_that_of_float64(teacher: TeacherProcess, temperature: float) -> None:
    torch.manual_seed(0)
    hidden_ND = torch.randn(10, 16, requires_grad=True)
    weight_VD = torch.randn(VOCAB_SIZE, 16, requires_grad=True)
    temperatures = [] if temperature == 1.0 else [temperature]
    rows = teacher_rows(answers(teacher.url, top_k=32, temperatures=temperatures), temperatures)
    labels_N = torch.tensor([label for tokens in SEQUENCES for label in (*tokens[1:], -100)])
    term = token_term("kl", "forward_kl", temperature=temperature)
    loss = head_loss(hidden_ND, weight_VD, labels_N, rows, [term])
    loss.total.backward()

    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden_ND, weight_VD))
    log_q_NV = (hidden @ weight.T / temperature).log_softmax(-1)
    total, row = torch.zeros((), dtype=torch.float64), 0
    for tokens in SEQUENCES:
        for log_p_V in truth_of(tokens, temperature)[:-1]:
            best_K = np.argsort(-log_p_V, kind="stable")[:32].copy()
            log_p_K, log_q_K = torch.from_numpy(log_p_V[best_K]), log_q_NV[row, best_K]
            p_rest, q_rest = 1 - log_p_K.exp().sum(), 1 - log_q_K.exp().sum()
            total = total + (log_p_K.exp() * (log_p_K - log_q_K)).sum() + p_rest * (p_rest / q_rest).log()
            row += 1
        row += 1  # the last row of a sequence has no label
    total.backward()
    assert loss.total.item() == pytest.approx(total.item(), rel=2e-3)
    torch.testing.assert_close(hidden_ND.grad.double(), hidden.grad, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(weight_VD.grad.double(), weight.grad, rtol=5e-3, atol=5e-3)


def test_rows_of_every_kind_stand_in_order(teacher: TeacherProcess) -> None:
    given = answers(teacher.url, kinds=("top_k", "sampled"), top_k=4, num_samples=6, rows=((1, 4), (0, 2), (0, 3)))
    rows = teacher_rows(given)
    assert rows.ids_NK.shape == (8, 4) and len(rows.sampled_offsets) == 9
    np.testing.assert_array_equal(rows.ids_NK.numpy(), np.concatenate([answer.ids for answer in given]))
    assert rows.sampled_counts.sum() == 8 * 6


def test_what_cannot_be_rows_is_refused(teacher: TeacherProcess) -> None:
    given = answers(teacher.url, top_k=4, temperatures=[2.0])
    with pytest.raises(ValueError, match="got 0 responses"):
        teacher_rows([])
    with pytest.raises(ValueError, match=r"got temperatures \[\], but the responses have log_z at 1"):
        teacher_rows(given)
    with pytest.raises(ValueError, match="all with the same tensors"):
        teacher_rows([*given, *answers(teacher.url, kinds=("score",))], [2.0])


def test_losses_import_torch_numpy_and_pydantic_alone() -> None:
    """Beside what these bring; a fresh environment is in `test_wheel`."""
    script = (
        "import sys; import student_trainer.losses, teacher_proto.client.sync_client\n"
        "for name in ('hydra', 'omegaconf', 'wandb', 'transformers', 'datasets', 'peft', 'safetensors'):\n"
        "    assert name not in sys.modules, name\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def example(name: str, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=folder, text=True, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("student") / "model", num_hidden_layers=1)


def test_a_plain_trainer_of_transformers(teacher: TeacherProcess, student: Path, tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("The still takes a wash and gives a spirit. " * (number + 1))
    said = example(
        "hf_trainer.py", teacher.url, str(student), "*.txt", "--steps=2", "--rows=3", "--length=32", folder=tmp_path
    )
    assert "taught by scripted" in said and len(losses_of(said)) == 2


def test_a_loop_in_plain_torch_on_no_more_text_than_a_batch(
    teacher: TeacherProcess, student: Path, tmp_path: Path
) -> None:
    text = "The still takes a wash and gives a spirit. " * 8
    (tmp_path / "a.txt").write_text(text)
    length = len(tiny_tokenizer()(text).input_ids) // 4
    said = example(
        "torch_loop.py", teacher.url, str(student), "*.txt", "--steps=2", "--rows=4", f"--length={length}",
        folder=tmp_path,
    )  # fmt: skip
    assert "taught by scripted" in said and "step 2: " in said


@pytest.mark.parametrize("beta", ["0", "0.5", "1"])
def test_trls_trainer_as_a_subclass(teacher: TeacherProcess, student: Path, tmp_path: Path, beta: str) -> None:
    said = example("trl_distill.py", teacher.url, str(student), "--steps=2", f"--beta={beta}", folder=tmp_path)
    losses = losses_of(said)
    assert len(losses) == 2 and all(loss > 0 for loss in losses)


def losses_of(said: str) -> list[float]:
    line = next(line for line in said.splitlines() if line.startswith("losses "))
    return [float(each) for each in line.removeprefix("losses [").rstrip("]").split(",")]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_over_the_whole_vocabulary_it_is_the_loss_of_trls_own_trainer(
    student: Path, tmp_path: Path, beta: float
) -> None:
    """The same model as TRL's local teacher and as ours, on one batch of completions of different lengths."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    spec = importlib.util.spec_from_file_location("trl_distill", EXAMPLES / "trl_distill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = save_tiny_llama(tmp_path / "teacher", seed=7)
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # noqa: E731
    common = {
        "processing_class": AutoTokenizer.from_pretrained(student),
        "train_dataset": Dataset.from_dict({"prompt": ["A still is"] * 4}),
        "args": DistillationConfig(
            output_dir=str(tmp_path), beta=beta, temperature=2.0, max_completion_length=8, report_to="none",
            per_device_train_batch_size=2, use_cpu=True,
        ),
    }  # fmt: skip
    inputs = {
        "prompt_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[11, 12, 13, 14], [15, 16, 1, 1]]),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }  # fmt: skip
    theirs = DistillationTrainer(model=load(student), teacher_model=load(model), **common)
    expected = theirs.compute_loss(theirs.model, inputs)
    with (
        TeacherProcess(str(model), "--engine=hf", "--dtype=float32", f"--max-top-k={VOCAB_SIZE}") as process,
        SyncTeacherClient(process.url) as client,
    ):
        ours = module.ServedDistillationTrainer(model=load(student), teacher=client, top_k=VOCAB_SIZE, **common)
        loss = ours.compute_loss(ours.model, inputs)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    expected.backward(), loss.backward()
    for (name, their), (_, our) in zip(theirs.model.named_parameters(), ours.model.named_parameters(), strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-2, atol=1e-3, msg=name)

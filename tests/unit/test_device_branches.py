"""No untested side: every branch on what a device or a CPU can do is found in the source, and is in this table with the
tests that force it to both of its sides, on a CPU.

A new branch fails here until it is in the table. It belongs in `hardware.py` or `device.py`, where one test serves all.
"""

from __future__ import annotations

import ast
from functools import cache

import pytest

from tests.devices import ROOT, asked, branches

HARDWARE = "proto/teacher_proto/hardware.py::"
SERVICES = "services/teacher_service/engines/vllm_options.py::"
TRAINER = "trainer/student_trainer/"
IN_HARDWARE, IN_DEVICE = "unit/proto/test_hardware.py::test_", "unit/trainer/test_device.py::test_"
SIDES, COMPUTE = "unit/trainer/test_device_sides.py::test_", "unit/trainer/test_compute.py::test_"
VLLM, PROJECTION = "unit/teacher_service/test_vllm_options.py::test_", "unit/losses/test_projection.py::test_"

# Function -> how many questions it asks, and the tests that answer them both ways.
FORCED: dict[str, tuple[int, tuple[str, ...]]] = {
    f"{HARDWARE}runs_triton": (4, (f"{IN_HARDWARE}triton_s_kernels_run_on_nvidia_s_gpus_from_ampere_on",)),
    f"{HARDWARE}pick_device": (1, (f"{IN_HARDWARE}auto_is_a_gpu_where_there_is_one",)),
    f"{HARDWARE}device_name": (1, (f"{IN_HARDWARE}auto_is_a_gpu_where_there_is_one",)),
    f"{HARDWARE}choose_dtype": (1, (f"{IN_HARDWARE}an_x86_cpu_computes_in_what_it_has_and_is_allowed",)),
    f"{HARDWARE}emulation_warning": (
        1,
        (
            f"{IN_HARDWARE}a_cpu_held_to_avx2_is_told_float32_and_warned_with_a_factor_that_it_measured",
            f"{IN_HARDWARE}a_gpu_that_emulates_is_named_as_one",
        ),
    ),
    f"{HARDWARE}cpu_name": (
        2,
        (
            f"{IN_HARDWARE}a_warning_leaves_the_number_of_threads_alone",
            f"{IN_HARDWARE}a_cpu_without_a_name_is_called_by_its_architecture",
        ),
    ),
    f"{HARDWARE}_computes": (
        4,
        (
            f"{IN_HARDWARE}a_cuda_device_is_asked_itself",
            f"{IN_HARDWARE}an_arm_cpu_is_asked_of_onednn",
            f"{IN_HARDWARE}an_x86_cpu_computes_in_what_it_has_and_is_allowed",
            f"{IN_HARDWARE}other_devices_get_float32",
        ),
    ),
    f"{HARDWARE}_cuda_computes_bfloat16": (2, (f"{IN_HARDWARE}a_cuda_device_is_asked_itself",)),
    f"{HARDWARE}_x86_computes": (1, (f"{IN_HARDWARE}an_x86_cpu_computes_in_what_it_has_and_is_allowed",)),
    f"{HARDWARE}_cpu_features": (
        3,
        (
            f"{IN_HARDWARE}a_torch_that_lists_no_features_is_asked_for_each",
            f"{IN_HARDWARE}an_x86_cpu_computes_in_what_it_has_and_is_allowed",
        ),
    ),
    f"{HARDWARE}_allowed_isa": (2, (f"{IN_HARDWARE}either_of_onednn_s_variables_holds_a_cpu_back",)),
    f"{HARDWARE}_is_x86": (
        1,
        (
            f"{IN_HARDWARE}an_arm_cpu_is_asked_of_onednn",
            f"{IN_HARDWARE}an_x86_cpu_computes_in_what_it_has_and_is_allowed",
        ),
    ),
    f"{HARDWARE}_kind": (
        1,
        (
            f"{IN_HARDWARE}a_cpu_held_to_avx2_is_told_float32_and_warned_with_a_factor_that_it_measured",
            f"{IN_HARDWARE}a_gpu_that_emulates_is_named_as_one",
        ),
    ),
    f"{HARDWARE}_model_name": (1, (f"{IN_HARDWARE}a_cpu_without_a_name_is_called_by_its_architecture",)),
    "proto/teacher_proto/compute/hf_model.py::HfModel.__init__": (
        3,
        (
            "contract/test_start_and_end.py::test_a_dtype_that_is_emulated_is_warned_of_in_the_log",
            "contract/test_start_and_end.py::test_the_transformers_teacher_says_each_stage_and_its_dtype_and_ends_quietly",
            "contract/test_engine_hf.py::test_logits_are_float32_where_a_device_sums_in_it",
        ),
    ),
    "proto/teacher_proto/compute/reduction.py::reduce_rows": (
        1,
        (
            "unit/test_reduction.py::test_every_column_is_what_dense_float64_says",
            "unit/test_reduction_triton.py::test_the_interpreted_kernels_satisfy_what_the_passes_in_torch_do",
        ),
    ),
    "proto/teacher_proto/compute/reduction.py::chunk_rows": (
        1,
        ("unit/test_reduction.py::test_the_chunks_of_an_accelerator_do_not_change_a_record",),
    ),
    "proto/teacher_proto/compute/reduction.py::Workspace.__init__": (
        1,
        ("unit/test_reduction.py::test_the_chunks_of_an_accelerator_do_not_change_a_record",),
    ),
    # Does nothing for a tensor of a CPU, and makes a GPU the current one for its own.
    "proto/teacher_proto/compute/reduction_triton.py::reduce_in_one_pass": (
        1,
        ("unit/test_reduction_triton.py::test_the_interpreted_kernels_satisfy_what_the_passes_in_torch_do",),
    ),
    "services/attention_service/model.py::AttentionModel.__init__": (
        2,
        (
            "unit/attention_service/test_model.py::test_the_dtype_of_the_checkpoint_is_taken_where_it_is_computed_in",
            "unit/attention_service/test_model.py::test_a_dtype_that_is_emulated_is_warned_of",
        ),
    ),
    f"{SERVICES}prepare_environment": (
        1,
        ("unit/teacher_service/test_vllm_environment.py::test_no_device_is_asked_for_before_vllm_is_imported",),
    ),
    f"{SERVICES}built_for_cpu": (
        1,
        ("unit/teacher_service/test_vllm_environment.py::test_which_vllm_is_installed_says_where_it_computes",),
    ),
    f"{SERVICES}engine_arguments": (
        1,
        (f"{VLLM}auto_is_the_checkpoint_s_own_dtype_where_the_hardware_computes_in_it",),
    ),
    f"{SERVICES}_auto_dtype": (
        2,
        (f"{VLLM}auto_is_the_checkpoint_s_own_dtype_where_the_hardware_computes_in_it",),
    ),
    f"{SERVICES}_warn_of_emulation": (1, (f"{VLLM}a_dtype_that_is_emulated_is_warned_of_with_its_factor",)),
    f"{TRAINER}batch/teacher_rows.py::TeacherRows.to": (
        1,
        (f"{SIDES}the_widest_row_of_draws_is_looked_up_only_where_nothing_is_waited_for",),
    ),
    f"{TRAINER}batch/tensors.py::moved": (
        3,
        ("unit/batch/test_micro_batch.py::test_a_copy_to_a_gpu_is_made_of_pinned_memory",),
    ),
    f"{TRAINER}cli/effects.py::module": (
        1,
        (
            "unit/trainer/test_settings.py::test_a_setting_without_effect_warns",
            "unit/trainer/test_settings.py::test_settings_with_effect_do_not_warn",
        ),
    ),
    f"{TRAINER}device.py::choose_device": (
        6,
        (
            f"{IN_DEVICE}without_a_gpu",
            f"{IN_DEVICE}each_rank_takes_a_gpu_of_its_own",
            f"{IN_DEVICE}what_is_no_device_of_ours_is_refused",
        ),
    ),
    f"{TRAINER}device.py::use_device": (
        2,
        (
            f"{IN_DEVICE}a_rank_takes_its_gpu_before_it_connects",
            f"{IN_DEVICE}on_a_cpu_ranks_connect_by_gloo_and_no_gpu_is_touched",
        ),
    ),
    f"{TRAINER}device.py::keep_freed_memory": (
        1,
        (
            "unit/trainer/test_cpu_memory.py::test_arrays_of_a_step_are_made_of_the_pages_of_the_last",
            "unit/trainer/test_cpu_memory.py::test_another_malloc_is_left_alone",
        ),
    ),
    f"{TRAINER}losses/chunks.py::default_chunk_rows": (
        1,
        (f"{SIDES}a_chunk_is_as_tall_as_the_device_s_memory_allows_and_never_low",),
    ),
    f"{TRAINER}losses/chunks.py::run_chunks": (
        1,
        ("unit/losses/test_fused.py::test_kernels_agree_with_the_reference",),
    ),
    f"{TRAINER}losses/chunks.py::kernels_serve": (
        1,
        ("unit/losses/test_fused.py::test_kernels_serve_where_the_hardware_runs_triton",),
    ),
    f"{TRAINER}losses/projection.py::multiplies_into_float32": (1, (f"{PROJECTION}a_cpu_has_neither",)),
    f"{TRAINER}losses/projection.py::HeadProjection.__init__": (
        2,
        (
            f"{PROJECTION}a_cpu_rounds_the_gradient_and_no_logit",
            f"{PROJECTION}a_gpu_multiplies_in_bf16_and_adds_up_in_float32",
        ),
    ),
    # The fixture `gpu` has one that adds into float32, and one that does not.
    f"{TRAINER}losses/projection.py::HeadProjection.back_to_weight_": (
        1,
        (f"{PROJECTION}a_gpu_multiplies_in_bf16_and_adds_up_in_float32",),
    ),
    f"{TRAINER}optim/logit_tiles.py::largest_logits": (
        1,
        (f"{SIDES}logits_are_looked_at_in_tiles_of_any_device_s_size_alike",),
    ),
    f"{TRAINER}randomness.py::capture": (
        3,
        (
            f"{IN_DEVICE}random_states_are_kept_of_this_process_s_gpu_alone",
            "unit/trainer/test_checkpoint.py::test_a_restored_run_goes_on_bit_for_bit",
        ),
    ),
    f"{TRAINER}randomness.py::restore": (
        3,
        (
            f"{IN_DEVICE}random_states_are_kept_of_this_process_s_gpu_alone",
            "unit/trainer/test_checkpoint.py::test_a_restored_run_goes_on_bit_for_bit",
        ),
    ),
    f"{TRAINER}ranks.py::open_ranks": (
        1,
        (
            f"{IN_DEVICE}a_rank_takes_its_gpu_before_it_connects",
            f"{IN_DEVICE}on_a_cpu_ranks_connect_by_gloo_and_no_gpu_is_touched",
        ),
    ),
    f"{TRAINER}students/causal.py::attention_for": (
        1,
        (f"{SIDES}attention_is_flex_on_a_gpu_and_sdpa_elsewhere_unless_it_is_named",),
    ),
    f"{TRAINER}students/causal.py::wrap_decoder": (1, (f"{COMPUTE}auto_is_what_the_hardware_computes_in",)),
    f"{TRAINER}students/compute.py::compute_dtype": (1, (f"{COMPUTE}auto_is_what_the_hardware_computes_in",)),
    f"{TRAINER}students/compute.py::name_compute": (
        3,
        (
            f"{COMPUTE}a_run_goes_on_in_what_it_began_with_bit_for_bit_on_other_hardware",
            f"{SIDES}the_start_names_the_device_that_the_student_computes_on",
        ),
    ),
    f"{TRAINER}students/compute.py::_device_name": (
        1,
        (f"{SIDES}the_start_names_the_device_that_the_student_computes_on",),
    ),
    f"{TRAINER}students/load.py::student_from_model": (
        1,
        (f"{SIDES}attention_is_flex_on_a_gpu_and_sdpa_elsewhere_unless_it_is_named",),
    ),
    f"{TRAINER}students/load.py::begin": (
        1,
        (f"{SIDES}attention_is_flex_on_a_gpu_and_sdpa_elsewhere_unless_it_is_named",),
    ),
    f"{TRAINER}targets/open.py::read_head": (
        1,
        (f"{SIDES}a_teacher_s_head_is_float32_on_a_cpu_and_keeps_its_dtype_elsewhere",),
    ),
}  # fmt: skip


def test_every_branch_on_a_device_is_in_the_table_and_nothing_else() -> None:
    found = branches()
    unlisted = {function: asks for function, asks in found.items() if function not in FORCED}
    assert not unlisted, "branches on a device without a test that forces both sides: name it in FORCED"
    assert not FORCED.keys() - found.keys(), "no longer there: take them out of FORCED"
    grown = {function: asks for function, asks in found.items() if len(asks) != FORCED[function][0]}
    assert not grown, "other questions than FORCED counts: see to their tests, and count them there"


@cache
def named_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("function", FORCED)
def test_the_tests_that_force_it_are_there(function: str) -> None:
    tests = FORCED[function][1]
    assert tests
    for test in tests:
        file, _, name = test.partition("::")
        assert name.startswith("test_") and name in named_in(file), f"{test}, named for {function}, is not there"


@pytest.mark.parametrize(
    "line",
    [
        "if tensor.device.type == 'cuda': pass",
        "x = 1 if 'cpu' != device.type else 2",
        "x = SIZES[device.type]",
        "x = SIZES.get(device.type, 0)",
        "assert device.type in ('cpu', 'cuda')",
        "if device == 'cuda': pass",
        "if name.startswith('cuda'): pass",
        "if x.is_cuda: pass",
        "if torch.cuda.is_available(): pass",
        "n = torch.accelerator.device_count()",
        "if torch.version.hip: pass",
        "if torch.cuda.get_device_capability() >= (9, 0): pass",
        "if torch.backends.cpu.get_cpu_capability() == 'AVX512': pass",
        "if hasattr(torch.nn.functional, 'linear_cross_entropy'): pass",
        "f = getattr(torch.cpu, 'get_capabilities', None)",
        "if importlib.util.find_spec('triton') is None: pass",
        "if os.environ.get('TRITON_INTERPRET') == '1': pass",
        "if hardware.runs_triton(device): pass",
        "if platform.machine() == 'x86_64': pass",
        "if torch.__version__ >= '2.13': pass",
        "if current_platform.is_cpu(): pass",
    ],
)
def test_a_question_of_any_form_is_found(line: str) -> None:
    assert [name for name, _ in asked(ast.parse(f"def here():\n    {line}"))][:1] == ["here"]


@pytest.mark.parametrize("line", ["x = torch.zeros(3, device=device)", "torch.cuda.synchronize()", "kind = term.type"])
def test_what_asks_nothing_is_not(line: str) -> None:
    assert not list(asked(ast.parse(line)))

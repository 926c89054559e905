"""The table of hosts in the documentation: every cell has tests, and every test exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs/ideas/your_loop.md"

FILTERED, ACCUMULATE = "interop/test_filtered", "interop/test_filtered_accumulate"
LOOPS = "distributed/test_distributed_loops"
HF, HF_RANKS = "interop/test_transformers", "interop/test_transformers_ranks"
PL, PL_RANKS = "interop/test_lightning", "interop/test_lightning_ranks"
HF_SHARDS, PL_SHARDS = "interop/test_transformers_shards", "interop/test_lightning_shards"
SAM_SHARDS = "interop/test_sam_shards"
SAM, SHARDS = "interop/test_sam", "distributed/test_rows_over_shards"

# What shows each cell: a file and a test of it.
TESTS = {
    "`Filtered`": {
        "DDP": [
            (LOOPS, "test_filtered_with_the_rows_of_all_ranks"),
            (FILTERED, "test_a_module_whose_wrapper_would_not_average_over_ranks_is_refused"),
        ],
        "FSDP2": [
            (SHARDS, "test_filtered_drives_an_optimizer_of_torch"),
            (SHARDS, "test_batches_accumulate_where_rows_need_not_be_held"),
        ],
        "accumulation": [(ACCUMULATE, "test_accumulated_rows_follow_ordinary_backward_passes")],
        "float16": [
            (FILTERED, "test_a_row_that_overflows_is_rejected_alone_and_the_scale_backs_off"),
            (LOOPS, "test_filtered_with_a_scaler_on_several_ranks"),
        ],
        "bfloat16": [(FILTERED, "test_autocast_around_one_step_or_many")],
        "resume": [
            (FILTERED, "test_a_run_goes_on_bit_for_bit"),
            (
                "interop/test_host_faults",
                "test_a_rank_that_is_lost_and_restarted_goes_on_from_the_last_checkpoint",
            ),
        ],
        "SAM": [
            (ACCUMULATE, "test_accumulated_batches_are_one_batch"),
            (FILTERED, "test_an_optimizer_that_needs_a_closure_is_refused"),
        ],
        "filter": [(FILTERED, "test_twenty_steps_are_those_of_the_pure_loop")],
        "EMA": [(FILTERED, "test_averaged_weights_are_those_of_a_loop_by_hand")],
        "logging": [(FILTERED, "test_what_the_criterion_says_in_addition_to_its_loss")],
    },
    "`FilteredTrainer`": {
        "DDP": [(HF_RANKS, "test_two_ranks_are_one_process_with_the_rows_of_both")],
        "FSDP2": [
            (HF_SHARDS, "test_shards_train_as_one_process_with_the_rows_of_all"),
            (HF_SHARDS, "test_what_needs_whole_parameters_is_refused_at_once"),
            (HF_SHARDS, "test_fsdp2_of_accelerate_on_a_gpu_or_more"),
            (HF_RANKS, "test_other_kinds_of_parallelism_are_refused"),
        ],
        "accumulation": [(HF, "test_the_mean_of_all_rows_is_the_gradient_of_a_trainer")],
        "float16": [
            (HF, "test_in_float16_a_row_that_overflows_is_rejected_and_not_the_step"),
            (HF, "test_in_float16_on_a_gpu_a_row_that_overflows_is_rejected_alone"),
            (HF_RANKS, "test_in_float16_all_ranks_reject_the_rows_that_overflow_on_one"),
        ],
        "bfloat16": [
            (HF, "test_bf16_is_autocast_around_the_model"),
            (HF_RANKS, "test_options_of_the_trainer"),
        ],
        "resume": [
            (HF, "test_a_resumed_run_is_the_uninterrupted_one"),
            (HF, "test_a_scale_is_resumed_with_the_run"),
            (HF_RANKS, "test_a_resumed_run_is_the_uninterrupted_one"),
        ],
        "SAM": [
            (HF, "test_a_subclass_trains_as_its_base_with_accumulation_and_sharpness"),
            (HF_RANKS, "test_three_ranks_are_one_process_with_the_rows_of_all"),
        ],
        "filter": [(HF, "test_twenty_steps_are_those_of_a_plain_loop")],
        "EMA": [
            (HF, "test_averaged_weights_are_those_of_filtered_steps"),
            (HF_RANKS, "test_averaged_weights_are_those_of_one_process"),
        ],
        "logging": [
            (HF, "test_what_the_loss_logs_is_the_mean_over_rows_and_steps"),
            (HF_RANKS, "test_metrics_are_logged_once_and_alike_on_all_ranks"),
        ],
    },
    "`FilteredModule`": {
        "DDP": [(PL_RANKS, "test_two_ranks_train_as_one_process_with_the_rows_of_both")],
        "FSDP2": [
            (PL_SHARDS, "test_shards_train_as_one_process_with_the_rows_of_all"),
            (PL_SHARDS, "test_what_needs_whole_parameters_is_refused_before_the_first_step"),
            (PL_RANKS, "test_strategies_that_cannot_work_are_refused_by_name"),
        ],
        "accumulation": [(PL, "test_twenty_steps_are_those_of_a_plain_loop")],
        "float16": [
            (PL, "test_in_float16_a_row_that_overflows_is_rejected_and_not_the_step"),
            (PL, "test_in_float16_on_a_gpu_a_row_that_overflows_is_rejected_alone"),
            (PL_RANKS, "test_in_float16_all_ranks_reject_the_rows_that_overflow_on_one"),
        ],
        "bfloat16": [
            (PL, "test_mixed_precision_is_autocast_around_the_step"),
            (PL_RANKS, "test_mixed_precision_is_autocast_on_every_rank"),
        ],
        "resume": [
            (PL, "test_a_resumed_run_is_the_uninterrupted_one"),
            (PL, "test_a_scale_is_resumed_with_the_run"),
            (PL_RANKS, "test_a_resumed_run_is_the_uninterrupted_one"),
        ],
        "SAM": [(PL_RANKS, "test_two_ranks_train_as_one_process_with_the_rows_of_both")],
        "filter": [(PL, "test_twenty_steps_are_those_of_a_plain_loop")],
        "EMA": [
            (PL, "test_averaged_weights_are_those_of_filtered_steps"),
            (PL_RANKS, "test_averaged_weights_are_those_of_one_process"),
        ],
        "logging": [
            (PL, "test_loss_and_metrics_are_logged_once_per_step"),
            (PL_RANKS, "test_logs_are_those_of_one_process"),
        ],
    },
    "`SAM`": {
        "DDP": [(SAM, "test_ranks_that_perturb_on_their_own_apply_the_mean")],
        "FSDP2": [
            (SAM_SHARDS, "test_shards_train_as_one_process_with_all_samples"),
            (SAM_SHARDS, "test_gradients_of_single_ranks_are_refused"),
        ],
        "accumulation": [
            (SAM, "test_a_closure_may_accumulate_over_several_backward_passes"),
            (PL, "test_sam_in_lightning_refuses_batches_that_its_closure_does_not_have"),
        ],
        "float16": [
            (SAM, "test_a_grad_scaler_changes_nothing_but_the_scale"),
            (SAM, "test_impossible_arguments_are_refused"),  # with no_sync
        ],
        "bfloat16": [(SAM, "test_autocast_around_the_step_sees_the_perturbed_weights")],
        "resume": [(SAM, "test_a_checkpoint_goes_on_bit_for_bit")],
        "SAM": [(SAM, "test_twenty_steps_are_those_of_the_pure_chain")],
        "filter": [],
        "EMA": [(SAM, "test_averaged_weights_are_those_of_a_loop_by_hand")],
        "logging": [],
    },
}

ANSWERS = ("works", "refused", "not tested", "yours", "no")


def table():
    """Return the cells of the table by host and feature."""
    text = TABLE.read_text().split("## Host by host", 1)[1]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:6]]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def functions(file):
    return {
        node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)
    }


def test_the_table_has_the_cells_that_are_tested():
    cells = table()
    assert {host: set(row) for host, row in cells.items()} == {
        host: set(row) for host, row in TESTS.items()
    }
    for host, row in cells.items():
        for feature, cell in row.items():
            answer = re.split(r"[;,]", cell)[0]
            assert answer in ANSWERS, (host, feature, cell)
            shown = bool(TESTS[host][feature])
            assert shown == (answer in ("works", "refused")), (host, feature, cell)


def test_what_needs_a_gpu_is_said():
    for host, row in table().items():
        for feature, cell in row.items():
            gpu = any("on_a_gpu" in test for _, test in TESTS[host][feature])
            assert ("GPU untested" in cell) == gpu, (host, feature)


@pytest.mark.parametrize("host", TESTS)
def test_every_test_of_a_cell_exists(host):
    for tests in TESTS[host].values():
        for file, name in tests:
            assert name in functions(ROOT / "tests" / f"{file}.py"), (file, name)

"""The architecture: imports between modules, tests of modules, and docstrings of public names."""

import ast
import inspect
import subprocess
import symtable
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import gradfilter as gf
from gradfilter import diagnostics, distributed, interop, schedules, testing

SOURCE = Path(gf.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
TESTS = Path(__file__).parents[1]
EXPORTS = ("__init__.py", "__main__.py", "_public.py")  # import from every floor, and hold no idea
# Imports point to the left only.
FLOORS = [
    *(
        "core",
        "schedules",
        "grads",
        "diagnostics",
        "transforms",
        "testing",
        "distributed",
        "interop",
        "lab",
    )
]
ALIASES = {"Info", "Params", "Tree", "Plan"}  # of types, which have no docstring of their own
PUBLIC = {
    name: thing
    for package in (gf, diagnostics, interop, distributed, schedules, testing)
    for name, thing in ((name, getattr(package, name)) for name in dir(package))
    if callable(thing) and not name.startswith("_") and name not in ALIASES
}
# What users do not call by name is shown where it is made.
NOT_CALLED = {
    *("Quantile", "Transform", "GradStack", "ComputedStack", "TrainState", "TrainStep", "ema_of"),
    *("InputCurvature", "HessianTop", "HessianTrace", "OperatorNorm", "NoiseScale"),
}
# Imported when they are first asked for.
LAZY = {
    "_lightning.py": {"lightning"},
    "_transformers.py": {"accelerate", "transformers"},
    "_agreement_plot.py": {"matplotlib"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(dotted):
    parts = dotted.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else 0


def test_imports_point_one_way():
    for path in FILES:
        if path.name in EXPORTS:
            continue
        own = floor(".".join(("gradfilter", *path.relative_to(SOURCE).parts)))
        for name in imports(path):
            if name.startswith("gradfilter"):
                assert floor(name) <= own, f"{path.name} imports {name}"


def test_the_core_needs_torch_and_einops_only():
    # typing_extensions comes with torch.
    allowed = {"torch", "einops", "typing_extensions", "gradfilter", *sys.stdlib_module_names}
    for path in FILES:
        if "lab" not in path.relative_to(SOURCE).parts:
            found = {name.split(".")[0] for name in imports(path)}
            found -= LAZY.get(path.name, set())
            assert found <= allowed, f"{path.name} imports {found - allowed}"


def test_frameworks_are_imported_only_when_asked_for():
    loaded = "import sys, gradfilter.interop; print({'lightning', 'transformers'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_only_tree_touches_pytree():
    users = [p.name for p in FILES if any("pytree" in name for name in imports(p))]
    assert users == ["_tree.py"]


def test_modules_are_private():
    for path in FILES:
        assert path.name.startswith("_"), path


def test_no_two_modules_and_no_two_classes_have_one_name():
    modules = Counter(p.name for p in FILES if p.name not in EXPORTS)
    classes = Counter(
        node.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in (modules + classes).items() if count > 1] == []


def test_there_is_no_import_circle():
    """Imports inside of functions count: they would only hide a circle."""
    graph = import_graph()
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for needed in sorted(graph[module]):
            visit(needed)
        done.add(path.pop())

    for module in sorted(graph):
        visit(module)


# Modules whose only importer stands next to them in the same folder, and why they are files.
NEIGHBOURS = {
    "gradfilter.distributed._rows_over_shards": "who holds what; the other: one matrix of rows",
    "gradfilter.grads._vmap": "one of the three plans",
    "gradfilter.grads.fused._conv_windows": "how windows are laid out; the other: what is asked",
    "gradfilter.grads.fused.overrides._attention": "the registry lists the overrides",
    "gradfilter.grads.fused.overrides._convolution": "the registry lists the overrides",
    "gradfilter.grads.fused.overrides._cross_entropy": "the registry lists the overrides",
    "gradfilter.grads.fused.overrides._embedding_bag": "the registry lists the overrides",
    "gradfilter.grads.fused.overrides._losses": "the registry lists the overrides",
    "gradfilter.grads.fused.overrides._norms": "the registry lists the overrides",
    "gradfilter.grads.fused.overrides._recurrent": "the registry lists the overrides",
    "gradfilter.interop._earlier_batches": "what a graph leaves for the next; the other: a host",
    "gradfilter.interop._published_schedulers": "public classes",
    "gradfilter.lab._demo": "a command",
    "gradfilter.lab._find_lr": "a command",
    "gradfilter.lab._help": "the help; the other file parses what is typed",
    "gradfilter.lab._list_runs": "a command",
    "gradfilter.lab.data._sources": "the data sets, which the loader finds by name",
    "gradfilter.lab.models._networks": "the networks, which the builder finds by name",
    "gradfilter.lab.report._comparisons": "a section of the report",
    "gradfilter.lab.report._measurements": "a section of the report",
    "gradfilter.lab.stats._measurement": "one measurement; the command makes many",
    "gradfilter.lab.stats._metrics": "the metrics, which a measurement finds by name",
    "gradfilter.lab.stats._surroundings": "points around images, which a measurement finds by name",
    "gradfilter.lab.sweep._join": "the start of a study; the command also ends it",
    "gradfilter.lab.train._accuracies": "needs torch; what reads evaluations does not",
    "gradfilter.testing._laws": "the laws; the other file tries them",
    "gradfilter.transforms._consensus": "a public transform with a page of its own",
    "gradfilter.transforms._every": "public transforms, which one other is built on",
    "gradfilter.transforms._inductor": "what torch's compiler gets; the other file keeps graphs",
    "gradfilter.transforms._joined_norms": "one formula; the other: what torch's compiler gets",
    "gradfilter.transforms._read_values": "what a step reads; the other file: what it changes",
}


def test_a_module_for_one_neighbour_has_a_reason_to_be_a_file():
    importers = defaultdict(set)
    for module, needed in import_graph().items():
        for name in needed:
            importers[name].add(module)
    alone = {
        name
        for name, found in importers.items()
        if len(found) == 1 and name.rpartition(".")[0] == next(iter(found)).rpartition(".")[0]
    }
    assert alone == set(NEIGHBOURS)


# The tests of modules that no file of tests is named after.
TESTED_BY = {
    "_about": ["lab/test_demo.py"],
    "_products": ["grads/test_stack.py", "grads/test_stack_half.py"],
    "_lost_ranks": [
        "distributed/test_rank_stack_faults.py",
        "distributed/test_rows_over_shards.py",
    ],
    "_readable": ["transforms/test_agreement.py", "grads/test_differentiated.py"],
    "_shards": ["distributed/test_sharded.py", "distributed/test_sharded_mesh.py"],
    "distributed/_gathered_rows": ["distributed/test_rank_stack.py"],
    "grads/fused/_sharded_leaves": ["distributed/test_rows_over_shards.py"],
    "_tree": ["transforms/test_train_step.py", "transforms/test_update_rules_donate.py"],
    "_types": ["transforms/test_chain.py", "transforms/test_update_rules_donate.py"],
    "diagnostics/_spectra": [
        "diagnostics/test_input_curvature.py",
        "diagnostics/test_parameter_curvature.py",
    ],
    "grads/_buffer_watch": [
        "grads/fused/overrides/test_norms_batch_norm.py",
        "grads/test_call_context.py",
    ],
    "grads/_joined_stacks": ["grads/test_stack.py", "grads/test_stack_immutable.py"],
    "grads/_loop": ["grads/test_microbatch.py"],
    "grads/_loss": ["grads/test_microbatch.py", "grads/test_microbatch_errors.py"],
    "grads/_state_owners": ["grads/test_module_attributes.py"],
    "grads/_vmap": ["grads/test_microbatch.py"],
    "grads/_writes": ["grads/test_call_context.py"],
    "transforms/_torch_state": ["transforms/test_from_torch.py"],
    "grads/fused/_conv_factor": ["grads/fused/test_factors_memory.py"],
    "grads/fused/_conv_geometry": ["grads/fused/test_conv_windows.py"],
    "grads/fused/_host": ["grads/fused/overrides/test_registry.py"],
    "grads/fused/_lift": ["grads/fused/overrides/test_registry.py"],
    "grads/fused/_row_questions": [
        "grads/fused/test_row_groups.py",
        "grads/test_normalized_loss.py",
    ],
    **{
        f"grads/fused/overrides/{name}": [
            "grads/fused/overrides/test_registry.py",
            "grads/fused/test_fused_properties.py",
            "grads/fused/test_fused_zoo.py",
        ]
        for name in ("_attention", "_convolution", "_embedding", "_linear", "_recurrent")
    },
    "grads/fused/overrides/_cross_entropy": [
        "grads/fused/overrides/test_registry.py",
        "grads/test_empty_rows.py",
    ],
    "grads/fused/overrides/_vmap_faults": ["grads/fused/overrides/test_spellings.py"],
    "interop/_frameworks": ["interop/test_lightning.py", "interop/test_transformers.py"],
    "interop/_gsam": ["interop/test_sam.py"],
    "interop/_host_chain": ["interop/test_filtered.py"],
    "interop/_host_ranks": [
        "interop/test_lightning_ranks.py",
        "interop/test_transformers_ranks.py",
    ],
    "interop/_host_shards": [
        "interop/test_lightning_shards.py",
        "interop/test_transformers_shards.py",
    ],
    "interop/_hosted": ["interop/test_lightning.py", "interop/test_transformers.py"],
    "lab/_connect": ["lab/test_demo_ranks.py"],
    "lab/_demo_config": ["lab/test_demo.py"],
    "lab/_device": ["lab/test_demo.py"],
    "lab/_find_lr_config": ["lab/test_find_lr.py"],
    "lab/_help": ["lab/test_constraints.py"],
    "lab/_interrupt": ["lab/test_demo.py"],
    "lab/_options": ["lab/train/test_train.py", "lab/train/test_config_checks.py"],
    "lab/_plot": ["lab/test_demo.py"],
    "lab/_processes": ["lab/test_demo_ranks.py"],
    "lab/_runs_config": ["lab/test_list_runs.py"],
    "lab/data/_random": ["lab/data/test_batches.py"],
    "lab/data/_samples": ["lab/data/test_batches_stream.py"],
    "lab/report/_comparisons": ["lab/report/test_report.py", "lab/report/test_legend.py"],
    "lab/report/_curves": ["lab/report/test_report_comparable.py"],
    "lab/report/_figures": ["lab/report/test_settings.py", "lab/report/test_report_comparable.py"],
    "lab/report/_measurements": ["lab/report/test_report.py", "lab/report/test_report_cases.py"],
    "lab/report/_parts": ["lab/report/test_legend.py"],
    "lab/report/_report_config": ["lab/report/test_report_refusals.py"],
    "lab/report/_runs": ["lab/report/test_settings.py", "lab/report/test_report_refusals.py"],
    "lab/sweep/_attended": ["lab/sweep/test_workers_jobs.py"],
    "lab/sweep/_axes": [
        "lab/sweep/test_sweep_command.py",
        "lab/sweep/test_sweep_config_options.py",
    ],
    "lab/sweep/_bracketed_values": ["lab/sweep/test_sweep_config_options.py"],
    "lab/sweep/_join": ["lab/sweep/test_sweep_config_options.py", "lab/sweep/test_queue.py"],
    "lab/sweep/_plan": [
        "lab/sweep/test_sweep_command.py",
        "lab/sweep/test_sweep_config_options.py",
    ],
    "lab/sweep/_storage": ["lab/sweep/test_sweep_faults.py"],
    "lab/train/_accuracies": ["lab/train/test_train.py"],
    "lab/train/_build_training": ["lab/train/test_train.py"],
    "lab/train/_evaluation": ["lab/train/test_progress.py", "lab/test_list_runs.py"],
    "lab/train/_restore": ["lab/train/test_train.py", "lab/train/test_train_bad_input.py"],
    "lab/train/_run_place": ["lab/train/test_train.py", "lab/train/test_train_bad_input.py"],
    "lab/train/_train_command": ["lab/train/test_train.py"],
    "lab/train/_train_config": ["lab/train/test_train.py", "lab/test_constraints.py"],
    "transforms/_blocks": ["transforms/test_clipping.py", "transforms/test_update_rules_donate.py"],
    "transforms/_ema": ["transforms/test_combinators.py"],
    "transforms/_host_changes": ["transforms/test_compile.py"],
    "transforms/_state_dict": ["transforms/test_train_step.py"],
    "transforms/_transform": ["transforms/test_chain.py", "transforms/test_update_surroundings.py"],
}


def named_after(test, modules):
    """The module that a file of tests is named after: test_MODULE.py or test_MODULE_ASPECT.py."""
    name = test.stem.removeprefix("test")
    found = [module for module in modules if f"{name}_".startswith(f"{module}_")]
    return max(found, key=len, default=None)


def test_the_tests_of_a_module_are_found_by_name():
    unnamed = set()
    for path in FILES:
        if path.name in ("__init__.py", "__main__.py"):
            continue
        folder = path.parent.relative_to(SOURCE)
        modules = [other.stem for other in path.parent.glob("_*.py")]
        tests = (TESTS / folder).glob("test_*.py")
        if path.stem not in {named_after(test, modules) for test in tests}:
            unnamed.add((folder / path.stem).as_posix())
    assert unnamed == set(TESTED_BY)
    listed = {test for tests in TESTED_BY.values() for test in tests}
    assert [test for test in sorted(listed) if not (TESTS / test).is_file()] == []


def test_no_two_files_of_tests_have_one_name():
    """Pytest imports a file of tests by its base name."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def closures(table):
    """The functions of a file that refer to variables of a function around them."""
    for inner in table.get_children():
        if isinstance(inner, symtable.Function) and inner.get_name() not in COMPREHENSIONS:
            yield inner.get_name(), {*inner.get_frees()} - {"__class__"}
        yield from closures(inner)


COMPREHENSIONS = {"genexpr", "listcomp", "setcomp", "dictcomp", "<genexpr>"}


def test_state_is_named():
    """A function that would close over more than two things is a class with named fields."""
    found = [
        (path.name, name, sorted(free))
        for path in FILES
        for name, free in closures(symtable.symtable(path.read_text(), path.name, "exec"))
        if len(free) > 2
    ]
    assert found == []


def import_graph():
    """Every module, and those that it imports anywhere; packages are left out."""
    modules = {
        ".".join(("gradfilter", *path.relative_to(SOURCE).with_suffix("").parts)): path
        for path in FILES
        if path.name not in EXPORTS
    }
    return {
        module: {name for name in imports(path) if name in modules} - {module}
        for module, path in modules.items()
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring_with_an_example(name):
    documentation = inspect.getdoc(PUBLIC[name])
    assert documentation and len(documentation.splitlines()[0]) <= 100
    if name not in NOT_CALLED:
        assert ">>>" in documentation

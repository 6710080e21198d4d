"""Order of the files for `make test`: the longest first, so that its workers end together."""

# Files that take more than about three CPU seconds in the short run, the longest first.
LONGEST = [
    "tests/models/test_instruction_sets.py",
    "tests/bench/timing/test_regressions.py",
    "tests/swap_in/test_transformations.py",
    "tests/ops/test_group_norm.py",
    "tests/report/test_browser.py",
    "tests/bench/test_device_script.py",
    "tests/fast/test_half.py",
    "tests/fast/test_fallback_reasons.py",
    "tests/system/test_switches.py",
    "tests/fast/cpu/test_group_norm.py",
    "tests/data/store/test_store.py",
    "tests/data/encoding/test_planning.py",
    "tests/fast/test_compile_option.py",
    "tests/ops/test_posterior.py",
    "tests/data/encoding/test_encode.py",
    "tests/fast/test_cuda_graphs.py",
    "tests/fast/test_weights.py",
    "tests/data/encoding/test_repair.py",
    "tests/cli/test_plans.py",
    "tests/cli/test_cli.py",
    "tests/data/failures/test_failures_sources.py",
    "tests/data/failures/test_failures_files.py",
    "tests/examples/test_export_kernels.py",
    "tests/fuzz/test_parsers.py",
    "tests/report/tuning/test_tune.py",
    "tests/ops/test_attention.py",
    "tests/test_imports.py",
    "tests/swap_in/test_own_class.py",
    "tests/swap_in/test_dtypes.py",
    "tests/data/failures/test_failures_kills.py",
    "tests/data/failures/test_failures_rot.py",
    "tests/data/failures/test_failures_images.py",
    "tests/fast/test_training_pass.py",
    "tests/fast/cpu/test_cpu_pass.py",
    "tests/swap_in/test_training_scripts.py",
    "tests/data/store/test_leases.py",
    "tests/swap_in/test_hooks.py",
    "tests/ops/test_launching.py",
    "tests/checkpoints/test_hub.py",
]


def pytest_collection_modifyitems(items):
    """Sort the tests by file; those of one file, and the other files, keep their order."""
    places = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))

"""The tests of bits, run again as on CPUs with fewer instructions: all other runs are under this CPU's own.

torch and oneDNN choose at their first operation, so each set runs in a fork of one process that has imported both
libraries and has computed nothing.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

# Of torch's operators, and of oneDNN, whose name for the smallest is another. Each has those before it.
SETS = {"DEFAULT": "SSE41", "AVX2": "AVX2", "AVX512": "AVX512_CORE"}


def test_bits_under_each_instruction_set(forks):
    own = torch.backends.cpu.get_cpu_capability()
    lower = list(SETS)[: list(SETS).index(own)] if own in SETS else []
    if not lower:
        pytest.skip(f"torch's operators have no set below {own} on this CPU")
    done = forks.run(Path(__file__), *lower)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"all equal under {name}" for name in lower], done.stderr


def checks():
    """Yield a test and its arguments."""
    from fast import test_forward
    from fast.cpu import test_cpu_pass
    from latents import test_cpu_sampling
    from models import test_autoencoder_kl as network
    from models import test_posterior as posterior
    from models import test_tiled_autoencoder as tiled

    for name in ("smallest", "no-quant-convs", "attention-in-blocks", "mish"):
        yield network.test_same_bits, name
    for batch in (1, 3):
        yield network.test_same_bits_at_odd_sizes, batch, (23, 17)
    yield (network.test_flux2,)
    yield (network.test_gradients_equal_diffusers,)
    yield tiled.test_tiling_keeps_diffusers_bits, "one-axis", True
    yield (posterior.test_kl_and_nll_equal_diffusers,)
    for layout in posterior.LAYOUTS:
        yield posterior.test_bits_equal_diffusers_in_every_layout, layout
    yield posterior.test_values_equal_diffusers, torch.float32, False
    yield posterior.test_a_row_depends_on_its_seed_alone, torch.float32
    yield test_cpu_sampling.test_normals_have_the_bits_of_philox, 7
    yield (test_forward.test_exact_precision_runs_the_modules,)
    yield test_cpu_pass.test_deterministic_rows_are_those_of_images_alone, torch.float32
    from latents import test_convert  # computes when it is imported

    yield (test_convert.test_encode_latents_is_encode_sample_scale,)


def run_under(name: str) -> None:
    """Run the tests in this process, and print the set that torch's operators had."""
    os.environ |= {"ATEN_CPU_CAPABILITY": name.lower(), "ONEDNN_MAX_CPU_ISA": SETS[name]}
    for test, *arguments in checks():
        torch.manual_seed(0)
        test(*arguments)
    sys.stdout.write(f"all equal under {torch.backends.cpu.get_cpu_capability()}\n")


def main() -> None:
    """Run the tests under each set that is named by an argument."""
    # diffusers imports them if they are there: five seconds of CPU time.
    sys.modules.update(dict.fromkeys(("accelerate", "peft", "scipy", "transformers")))
    next(checks())  # the imports
    for name in sys.argv[1:]:
        if os.fork() == 0:
            run_under(name)
            return
        os.wait()


if __name__ == "__main__":
    main()

"""On a CPU, where no kernel wins: channels_last, the same latents, and a reason that says so; no interpreter."""

import os
import subprocess
import sys

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import copy, torch, fastvae
from fast.small_models import HANDS, pixels, latents, small_model
from fastvae.fast.layers import Reason

for hand in HANDS:
    for freeze in (False, True):
        vae = small_model("SD", hand)
        x, z = pixels(vae), latents(vae)
        plain = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
        laid = copy.deepcopy(vae).to(memory_format=torch.channels_last)
        given = [value.contiguous(memory_format=torch.channels_last) for value in (x, z)]
        expected = laid.encode(given[0]).latent_dist.parameters, laid.decode(given[1]).sample
        fastvae.accelerate(vae, freeze=freeze)
        for _ in range(2):
            ours = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
            for one, same in zip(ours, expected):
                assert torch.equal(one, same) and one.is_contiguous(), (hand, freeze)
        assert set(fastvae.explain(vae).reasons.values()) == {{Reason.CPU}}
        assert (fastvae.fast_report(vae)["packed_bytes"] > 0) == freeze
        assert all(weight.is_contiguous() for weight in vae.parameters())
        heard = []
        vae.encoder.conv_out.register_forward_hook(lambda *_: heard.append(1))
        vae.encode(x)
        assert heard == [1]
        vae.requires_grad_(True)
        vae(x).sample.sum().backward()
        assert vae.encoder.conv_in.weight.grad is not None
        fastvae.restore(vae)
        assert torch.equal(vae.encode(x).latent_dist.parameters, plain[0])
"""


def test_a_cpu_gets_channels_last_and_its_reason():
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tests=tests)],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join([os.path.dirname(tests), tests])},
        check=False,
    )
    assert done.returncode == 0, done.stderr

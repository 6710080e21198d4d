"""``fastvae tune``: measure every layer in every form, choose, check the network, and write the user's table."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from fastvae_kernels.cpu import library, sources

from fastvae.checkpoints.loading import full_name
from fastvae.fast.accelerate import accelerate, path_of
from fastvae.fast.forms import tables
from fastvae.fast.forms.device_name import name_of
from fastvae.fast.forms.form import Entry, Form, Forms
from fastvae.fast.forms.shapes import Convolution
from fastvae.latents.scaling import pixel_multiple
from fastvae.report.contestants import TASKS, decoding, encoding, open_fp32
from fastvae.report.machine import versions
from fastvae.report.timing import interleaved, median
from fastvae.report.tuning import measure, network
from fastvae.report.tuning.journal import Journal
from fastvae.report.tuning.layers import convolutions_to_tune
from fastvae.system.cache_folder import cache_folder
from fastvae.system.devices import DTYPES, default_dtype, resolve_device

Say = Callable[[str], None]
# Form to take instead of one that is not accurate enough.
NEXT = {Form.WINOGRAD4: Form.WINOGRAD2, Form.WINOGRAD2: Form.DIRECT, Form.FOUR_TAPS: Form.DIRECT}
SIZES = {"cpu": (256, 512), "cuda": (256, 512, 1024)}


@dataclass
class Choice:
    """A layer at one size: error and time of its forms, and the form that it gets."""

    convolution: Convolution
    ratios: dict[str, float]
    samples: dict[str, list[float]]
    form: Form
    refused: list[str] = field(default_factory=list)

    def demote(self) -> None:
        """Take the next form that is faster than the direct one."""
        self.refused.append(self.form.value)
        left = {form: taken for form, taken in self.samples.items() if form not in self.refused}
        wanted = NEXT[self.form]
        self.form = measure.fastest({form: left[form] for form in left if form in (wanted, Form.DIRECT)})

    def entry(self) -> Entry:
        return Entry(*self.convolution.key, self.convolution.pixels, self.form)

    def facts(self) -> dict[str, Any]:
        """Return the choice as values for JSON."""
        return {
            "layer": str(self.convolution.key),
            "pixels": self.convolution.pixels,
            "form": self.form.value,
            "refused": self.refused,
            "error_ratio": {form: ratio if ratio < measure.LARGEST else None for form, ratio in self.ratios.items()},
            "milliseconds": {form: 1e3 * median(taken) for form, taken in self.samples.items()},
        }


def tune(
    vae: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    preset: str | None = None,
    sizes: Sequence[int] = (),
    dtype: str | None = None,
    device: str | None = None,
    again: bool = False,
    seconds: float = 2.0,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Find the fastest accurate form of each convolution of a model on a device, and write the user's table.

    preset: of a single file, if its tensors do not decide the scaling. sizes: sides of the square images, by default
    256 and 512, on a GPU also 1024. seconds: of measuring one layer. again: measure also what the journal has. say:
    called with each step. Returns values for JSON. Raises ValueError for a size that the model does not take and for a
    model that does not run fused, and the errors of loading a model.
    """
    place = resolve_device(device)
    dtype = dtype or default_dtype(place)
    model, _ = open_fp32(vae, subfolder, revision, preset)
    sizes = tuple(sizes) or SIZES.get(place.type, SIZES["cuda"])
    multiple = pixel_multiple(model)
    if wrong := [size for size in sizes if size < multiple or size % multiple]:
        raise ValueError(f"sizes must be multiples of the model's {multiple} pixels per latent, got {wrong[0]}")
    plain = model.to(device=place, dtype=DTYPES[dtype])
    fast = accelerate(copy.deepcopy(plain), freeze=True)
    name = name_of(place)
    say(f"tune    {full_name(vae)}  {name}  {dtype}  {', '.join(map(str, sizes))} pixels")
    journal = Journal(cache_folder() / "forms" / f"{name}.journal.json", _made_with())
    if again:
        journal.entries.clear()
    convolutions = convolutions_to_tune(fast, path_of(fast), sizes)
    choices = [_choice(convolution, fast, journal, seconds, say) for convolution in convolutions]
    checks = network.checks(plain)
    verdicts = _settle(choices, fast, checks, journal, _digest(plain), say)
    won = _won(fast, plain, choices, min(sizes), seconds)
    table = tables.write(name, [choice.entry() for choice in choices], versions())
    return {
        "title": "fastvae tune",
        "model": vae,
        "device": str(place),
        "name": name,
        "dtype": dtype,
        "sizes": list(sizes),
        "versions": versions(),
        "layers": [choice.facts() for choice in choices],
        "checks": [asdict(verdict) for verdict in verdicts],
        "won": won,
        "table": str(table),
        "digest": tables.forms_of(place).digest,
    }


def _made_with() -> dict[str, Any]:
    return {
        **versions(),
        "threads": torch.get_num_threads(),
        "c_kernels": library.why_not() or sources.source_hash(),
    }


def _digest(vae: torch.nn.Module) -> str:
    """Return the sha256 of all weights, in the dtype in which they run."""
    hasher = hashlib.sha256()
    for name, value in vae.state_dict().items():
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        hasher.update(memoryview(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return hasher.hexdigest()[:16]


def _choice(convolution: Convolution, fast: Any, journal: Journal, budget: float, say: Say) -> Choice:
    path = path_of(fast)

    def measured() -> dict[str, Any]:
        ratios = measure.error_ratios(convolution, path)
        say(f"measure {convolution.name}: {', '.join(ratios)} in turns")
        return {"ratios": ratios, "samples": measure.seconds(convolution, path, list(map(Form, ratios)), budget)}

    kept = journal.get(convolution.name, measured)
    path.packed.clear()  # the transformed weights of all layers together are four times the model
    return Choice(convolution, **kept, form=measure.fastest(kept["samples"]))


def _settle(
    choices: list[Choice], fast: Any, checks: list[network.Check], journal: Journal, weights: str, say: Say
) -> list[network.Verdict]:
    """Demote layers, the one with the largest error first, until the whole network is right; return the verdicts.

    Raises ValueError if the network is wrong with the direct form everywhere.
    """
    while True:
        forms = Forms(choice.entry() for choice in choices)
        verdicts = []
        for check in checks:
            name = f"{check.task} {check.size} of {weights} with {forms.digest}"
            say(f"check   {check.task} {check.size}x{check.size}: against float64")
            errors = journal.get(name, lambda check=check, forms=forms: _errors(check, fast, forms))
            verdicts.append(network.Verdict(check.task, check.size, *errors))
            if not verdicts[-1].is_right:
                break
        else:
            return verdicts
        chosen = [choice for choice in choices if choice.form is not Form.DIRECT]
        if not chosen:
            raise ValueError(f"vae must be right with the direct form alone, got {verdicts[-1]}: run fastvae doctor")
        worst = max(chosen, key=lambda choice: choice.ratios[choice.form.value])
        say(f"refuse  {worst.form} for {worst.convolution.name}: {verdicts[-1]}")
        worst.demote()


def _errors(check: network.Check, fast: Any, forms: Forms) -> list[float]:
    path = path_of(fast)
    path.forget()
    path.forms = forms
    verdict = check.verdict(fast)
    return [measure.bounded(verdict.largest), measure.bounded(verdict.rms)]


def _won(fast: Any, plain: Any, choices: list[Choice], size: int, budget: float) -> list[dict[str, Any]]:
    """Return the times of encode and decode with the direct form and with the chosen ones, in turns."""
    path, won = path_of(fast), []
    chosen = Forms(choice.entry() for choice in choices)
    for task in TASKS:
        x = network.input_for(plain, task, size)
        run = encoding(fast) if task == "encode" else decoding(fast)

        def call(forms: Forms, run: Any = run, x: torch.Tensor = x) -> None:
            path.forms = forms
            run(x)

        calls = {"direct": lambda call=call: call(Forms()), "tuned": lambda call=call: call(chosen)}
        with torch.no_grad():
            for one in calls.values():
                one()
            taken = interleaved(calls, x.device, budget)
        won.append({"task": task, "size": size, **{f"{name}_ms": 1e3 * median(taken[name]) for name in taken}})
    return won

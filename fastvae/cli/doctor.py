"""fastvae doctor [FOLDER]"""

from __future__ import annotations

import click

from fastvae.cli import options
from fastvae.cli.output import OTHER, echo, echo_json, errors_as_sentences
from fastvae.system.terminal import strip_control_characters


@click.command()
@click.argument("folder", type=click.Path(), default=".")
@click.option(
    "--vae",
    default="tiny",
    show_default=True,
    help='The model to check: a directory, a Hub id, a single file, the name of a preset, or "tiny".',
)
@options.model_location
@options.preset
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON document.")
@options.quiet
@click.pass_context
@errors_as_sentences
def doctor(
    context: click.Context,
    folder: str,
    vae: str,
    subfolder: str | None,
    revision: str | None,
    preset: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check this machine, and the disk of FOLDER.

    A line each on versions, GPU, kernels, numerics, fast paths, forms of convolutions, image codecs and the disk says
    ok, a note, or bad. Exit code 1 if one is bad.

    \b
    Example:
      fastvae doctor latents/ --vae stabilityai/sdxl-vae
    """
    from fastvae.report.doctor import examine
    from fastvae.report.findings import BAD, NOTE
    from fastvae.system.atomic_files import free_bytes
    from fastvae.system.terminal import format_bytes, print_stderr

    if not quiet:
        print_stderr(f"doctor  {vae}  for latents in {folder} (free {format_bytes(free_bytes(folder))})\n")
    findings = []
    for finding in examine(vae, folder, subfolder=subfolder, revision=revision, preset=preset):
        findings.append(finding)
        if not as_json:
            echo(strip_control_characters(f"{finding.state:5}{finding.name:9} {finding.sentence}"))
    bad, notes = (sum(finding.state == state for finding in findings) for state in (BAD, NOTE))
    if as_json:
        listed = [{**vars(finding)} for finding in findings]
        echo_json({"ok": not bad, "findings": listed})
    else:
        echo(f"{bad or 'nothing'} {'is' if bad < 2 else 'are'} bad, {notes or 'no'} note{'' if notes == 1 else 's'}")
    if bad:
        context.exit(OTHER)

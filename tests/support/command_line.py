"""The command line in this process, by click's runner, which checks that no error is a traceback."""

from click.testing import CliRunner
from support.small_store import SIDE

from fastvae.cli.main import cli


def run(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return result


def encode(pictures, out, model, *more, code=0):
    return run("encode", pictures, out, "--vae", model, "--buckets", SIDE, "--dtype", "fp32", *more, code=code)

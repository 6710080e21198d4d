"""The list of mutations: it is of these sources and covers every kernel; a surviving change is reported."""

from collections import Counter

import pytest

from bench.kernels import mutate
from bench.timing.environment import ROOT

MUTATIONS = mutate.read_list()


def test_every_old_text_stands_once_where_the_list_says():
    for mutation in MUTATIONS:
        source = (ROOT / mutate.SOURCES / mutation.file).read_text()
        assert mutate.mutated(mutation, source) != source, mutation.name


def test_every_kernel_function_has_two_mutations_and_more():
    listed = Counter((m.file, m.function) for m in MUTATIONS if not m.equivalent)
    kernels = [
        (str(path.relative_to(ROOT / mutate.SOURCES)), function)
        for path in (ROOT / mutate.SOURCES).rglob("*.py")
        for function in mutate.kernel_functions(path.read_text())
    ]
    assert len(kernels) > 40
    assert [kernel for kernel in kernels if listed[kernel] < 2] == []


def test_every_test_named_is_there():
    for mutation in MUTATIONS:
        for test in mutation.tests:
            file, _, function = test.partition("::")
            assert f"def {function}(" in (ROOT / mutate.TESTS / file).read_text(), f"{mutation.name}: {test}"


@pytest.mark.parametrize(
    "change",
    [
        "mask dropped",
        "merge term missing",
        "variance uncentred",
        "index truncated to 32 bits",
        "wrong channel",
        "wrong group at a ragged tail",
        "bias folded twice",
        "factor forgotten",
        "residual bias forgotten",
        "missed rescale: sums of the tiles",
        "log-sum-exp without the maximum",
        "key tail unmasked",
        "dK and dV swapped",
        "Philox round count 9",
        "key schedule constant wrong",
        "sine and cosine swapped",
        "clamp missing",
        "row seed taken from row 0",
        "uint8 offset 127.5 wrong",
        "phase kernels transposed",
    ],
)
def test_the_classical_errors_are_in_the_list(change):
    assert any(m.name.startswith(change) and not m.equivalent for m in MUTATIONS)


TOY = '''
def doubled(x):
    """Twice x."""
    return 2 * x
'''
TOY_TEST = """
import toy

def test_doubled():
    assert toy.doubled(3) == 6
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A repository of one function and its test; returns a call of the script on these changes (name, old, new)."""
    monkeypatch.setattr(mutate, "PRELOADED", ("pytest",))
    for name in ("OMP_NUM_THREADS", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")  # the script sets them and does not restore them
    (tmp_path / mutate.SOURCES).mkdir(parents=True)
    (tmp_path / mutate.TESTS).mkdir(parents=True)
    (tmp_path / mutate.SOURCES / "toy.py").write_text(TOY)
    (tmp_path / mutate.TESTS / "test_toy.py").write_text(TOY_TEST)
    (tmp_path / "pyproject.toml").write_text(f'[tool.pytest.ini_options]\npythonpath = ["{mutate.SOURCES}"]\n')

    def run(*changes, only="toy.py"):
        listed = tmp_path / "mutations.toml"
        rows = "".join(f"    {{ name = '{n}', old = '{o}', new = '{x}'{rest} }},\n" for n, o, x, rest in changes)
        listed.write_text(f'["toy.py".doubled]\ntests = ["test_toy.py::test_doubled"]\nchanges = [\n{rows}]\n')
        return mutate.main(["--only", only] if only else [], tmp_path, listed)

    return run


def test_a_change_that_nobody_notices_is_reported(toy, capsys):
    harmless = ("harmless", "2 * x", "x * 2", "")
    assert toy(("wrong", "2 * x", "3 * x", ""), harmless) == 1
    output = capsys.readouterr().out
    assert "toy.py doubled: wrong" in output
    assert "no test noticed: test_toy.py::test_doubled" in output
    assert "2 mutations, 1 killed, 1 survived" in output


def test_an_equivalent_change_has_a_reason_and_is_no_survivor(toy, tmp_path, capsys):
    equal = ("harmless", "2 * x", "x * 2", ", equivalent = 'a product has no order'")
    (tmp_path / "kernels").mkdir(exist_ok=True)
    assert toy(equal, ("wrong", "2 * x", "3 * x", ""), only="") == 0
    written = (tmp_path / mutate.SUMMARY).read_text()
    assert f"2 mutations, 1 killed, 1 equivalent; sources: `{mutate.source_hash()}`" in written
    assert "| `toy.py` | 1 | 2 | 1 | 1 |" in written
    assert "- `doubled` in `toy.py`, harmless: a product has no order." in written
    rows = [list(row.values())[:6] for row in mutate.read_rows(tmp_path / mutate.ROWS)]
    test = "test_toy.py::test_doubled"
    assert rows == [
        ["harmless", "toy.py", "doubled", test, "equivalent", "a product has no order"],
        ["wrong", "toy.py", "doubled", test, "killed", test],
    ]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("gone", "4 * x", "x", ""), "the list is stale: 'gone' of doubled in toy.py finds its old text 0 times"),
        (("twice", "x", "y", ""), "the list is stale: 'twice' of doubled in toy.py finds its old text 3 times"),
        (("no name", "2 * x", "y", ""), "NameError"),
        (("no equal", "2 * x", "3 * x", ", equivalent = \"it is not\""), "broken"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_what_proves_nothing_is_refused(toy, capsys, change, words):
    assert toy(change) == 1
    assert words in capsys.readouterr().out


def test_the_summary_is_of_these_sources_and_nothing_survived():
    """A change of a kernel needs a new run: `make mutate`."""
    rows = mutate.read_rows()
    assert (ROOT / mutate.SUMMARY).read_text() == mutate.summarize(rows, mutate.source_hash())
    assert len((ROOT / mutate.SUMMARY).read_text().splitlines()) <= 60
    assert {row["verdict"] for row in rows} == {"killed", "equivalent"}


def test_the_rows_are_those_of_the_list():
    listed = [(m.name, m.file, m.function, " ".join(m.tests)) for m in MUTATIONS]
    assert [tuple(row[name] for name in mutate.COLUMNS[:4]) for row in mutate.read_rows()] == listed

"""The picture of the packages is drawn from today's imports, and the reader of imports finds what it should."""

import pytest

from bench.pages import architecture_svg
from bench.pages.import_graph import circle, imports_back_up, imports_of, longest_chain, reduced


def test_the_committed_picture_is_of_todays_imports():
    assert architecture_svg.PICTURE.read_text() == architecture_svg.picture(), "run: make report"


def test_a_package_without_a_place_is_named(monkeypatch):
    places = {name: place for name, place in architecture_svg.PLACES.items() if name != "fast"}
    monkeypatch.setattr(architecture_svg, "PLACES", places)
    with pytest.raises(ValueError, match=r"differing: \['fast'\]"):
        architecture_svg.picture()


def test_no_arrow_points_up(monkeypatch):
    monkeypatch.setattr(architecture_svg, "PLACES", {**architecture_svg.PLACES, "fastvae_kernels": (0.3, 1)})
    with pytest.raises(ValueError, match="latents imports fastvae_kernels"):
        architecture_svg.picture()


def test_circles_chains_and_forbidden_imports_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b"}, "b": set()}) == []
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]
    assert reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert imports_back_up({"a": set(), "b": {"a"}}, (("a",), ("b",))) == ["b imports a"]
    assert imports_back_up({"a": {"b"}, "b": set()}, (("a",), ("b",))) == []
    with pytest.raises(ValueError, match=r"\['c'\] are in no line"):
        imports_back_up({"c": set()}, (("a",),))


def test_imports_inside_functions_count_and_relative_ones_are_refused(tmp_path):
    (tmp_path / "a.py").write_text("import os.path\ndef f():\n    from fastvae import latents\n")
    assert imports_of(tmp_path / "a.py") == ["os.path", "fastvae.latents"]
    (tmp_path / "b.py").write_text("from . import latents\n")
    with pytest.raises(ValueError, match="full name of the module that line 1"):
        imports_of(tmp_path / "b.py")

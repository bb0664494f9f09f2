"""How setup.py finds the CUDA compiler."""

import pathlib
import runpy

import pytest
import setuptools


@pytest.fixture
def build(monkeypatch):
    """What setup.py defines, without building anything."""
    monkeypatch.setattr(setuptools, "setup", lambda **given: None)
    monkeypatch.delenv("COMMOPT_CUDA", raising=False)
    monkeypatch.delenv("CUDACXX", raising=False)
    return runpy.run_path(str(pathlib.Path(__file__).parent.parent / "setup.py"))


def compiler(folder: pathlib.Path, says: str = "") -> pathlib.Path:
    folder.mkdir()
    (folder / "nvcc").write_text(f"#!/bin/sh\necho '{says}' >&2\n")
    (folder / "nvcc").chmod(0o755)
    return folder / "nvcc"


def test_a_link_is_followed(build, tmp_path, monkeypatch):
    """nvcc looks for what belongs to it beside itself, and finds nothing where only a link to it is."""
    real = compiler(tmp_path / "cuda")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").symlink_to(real)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert build["nvcc"]() == str(real)


def test_what_is_asked_for(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(compiler(tmp_path / "other")))
    assert build["nvcc"]() == str(tmp_path / "other/nvcc")
    monkeypatch.setenv("COMMOPT_CUDA", "0")
    assert build["nvcc"]() is None
    monkeypatch.setenv("COMMOPT_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1, got 'yes'"):
        build["nvcc"]()


def test_a_compiler_without_a_toolkit(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(compiler(tmp_path / "half", "nvcc fatal: no nvcc.profile")))
    (tmp_path / "build").mkdir()
    with pytest.raises(SystemExit, match="half/nvcc does not say where its CUDA is.*COMMOPT_CUDA=0"):
        build["write_ninja"](tmp_path / "build/build.ninja", tmp_path / "out.so")

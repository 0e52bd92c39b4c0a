"""The architecture: modules import only what stands above them, and proofs import no torch."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import accaware

ROOT = Path(accaware.__file__).parent

#: From the top down (docs and design, section 4). A module may import its own line and those above.
ORDER = [
    "formats files",
    "bounds",
    "projections",
    "rows rotation",
    "quantizers",
    "layers inputs",
    "trace",
    "prepare",
    "initialise",
    "integer.layer integer.emulate integer.reference",
    "integer.convert integer.network",
    "onnx",
    "ptq",
    "certify",
    "exporter",
    "experiments",
    "cli",
    "__main__",
]
#: These see integers only: importing them must not import torch.
INTEGER_ONLY = ["formats", "bounds", "integer.layer", "integer.emulate", "integer.reference", "certify.certificate"]
INTEGER_ONLY += ["certify.proof", "certify.report", "certify.files", "certify.second", "certify.targets", "onnx.read"]
INTEGER_ONLY += ["certify.carried", "experiments.grid", "experiments.report"]

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if path != ROOT / "__init__.py"
)


def rank(module):
    """The line of ORDER that a module (without the package's name) stands on."""
    found = [
        (len(name), line)
        for line, names in enumerate(ORDER)
        for name in names.split()
        if module == name or module.startswith(name + ".")
    ]
    return max(found)[1] if found else None


def source(module):
    path = ROOT.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def imports(module):
    """The modules of this package that a module imports, anywhere in its text."""
    for node in ast.walk(ast.parse(source(module))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.removeprefix("accaware.") for name in names if name.startswith("accaware."))


def test_every_module_has_its_place():
    # A package without code of its own needs none.
    assert [m for m in MODULES if rank(m) is None and not (ROOT / m).is_dir()] == []


@pytest.mark.parametrize("module", [m for m in MODULES if rank(m) is not None])
def test_a_module_imports_only_what_stands_above(module):
    for name in imports(module):
        above = rank(name)
        if above is None:  # a public name of the package itself, loaded lazily
            assert name in {*accaware.__all__, "__version__"}, f"{module} imports {name}"
        else:
            assert above <= rank(module), f"{module} imports {name}, which stands below it"


ONNX_MAY_IMPORT = {"formats", "bounds", "integer.layer"}


@pytest.mark.parametrize("module", MODULES)
def test_only_readers_and_the_exporter_know_onnx(module):
    found = set(imports(module))
    if module.startswith("onnx"):
        above = {name for name in found if not name.startswith("onnx")}
        assert {name for name in above if not any(name.startswith(m + ".") for m in ONNX_MAY_IMPORT)} == set()
    elif not module.startswith("exporter"):
        text = source(module)
        assert re.search(r"^\s*(import|from) onnx", text, re.MULTILINE) is None


@pytest.mark.parametrize("module", INTEGER_ONLY)
def test_proofs_import_no_torch(module):
    script = f"import sys, accaware.{module}; print('torch' in sys.modules, 'lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_public_names_of_proofs_import_no_torch():
    script = (
        "import sys, accaware; accaware.Certificate; accaware.Spec; accaware.Accumulator; accaware.IntegerLayer;"
        "accaware.certify_file; accaware.disagreements; accaware.emulate_file; accaware.TARGETS;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_exist():
    for name in accaware.__all__:
        assert getattr(accaware, name) is not None
    assert set(accaware.__all__) < set(dir(accaware))
    with pytest.raises(AttributeError, match="no attribute 'certifi'"):
        _ = accaware.certifi


def documented():
    """The modules whose docstrings hold examples."""
    return ["", *(m for m in MODULES if ">>>" in source(m))]


@pytest.mark.parametrize("module", documented())
def test_the_examples_in_docstrings_are_right(module):
    loaded = importlib.import_module(f"accaware.{module}".removesuffix("."))
    # A lazy package is no module of its own names.
    extra = (
        {"torch": importlib.import_module("torch")} if "torch." in (loaded.__doc__ or "") + source_of(loaded) else {}
    )
    results = doctest.testmod(loaded, extraglobs=extra, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0


def source_of(loaded):
    return Path(loaded.__file__).read_text()

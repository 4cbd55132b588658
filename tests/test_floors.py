"""Imports go down, and torch is not loaded where nothing needs it."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
LIGHT = (
    "mergeprobe",
    "mergeprobe.plan",
    "mergeprobe.artefact",
    "mergeprobe.predict.planner",
    "mergeprobe.predict.ridge",
    "mergeprobe.report.page",
    "mergeprobe.bench.malloc",
    "mergeprobe.cli.app",
)


def test_the_contracts_in_pyproject_hold(capsys):
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None)
    said = capsys.readouterr().out
    assert status == 0, said[said.find("Contracts") :]
    assert "3 kept, 0 broken" in said


def test_a_contract_that_does_not_hold_is_found(tmp_path, capsys):
    """The check can fail: the floors upside down."""
    config = tmp_path / "importlinter.ini"
    config.write_text(
        "[importlinter]\nroot_package = mergeprobe\n\n"
        "[importlinter:contract:1]\nname = upside down\ntype = layers\n"
        "layers =\n    mergeprobe.errors\n    mergeprobe.capture\n"
    )
    assert lint_imports(config_filename=str(config), cache_dir=None) != 0
    assert "upside down BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize("module", LIGHT)
def test_it_imports_without_torch(module):
    heavy = "{'torch', 'transformers', 'peft'}"
    code = f"import sys, {module}; sys.exit(bool({heavy} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

"""`converters/` is `shiradelta.converters` everywhere: to a type checker, in a bare checkout, in a wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.building import wheel

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_type_checker_sees_the_signature_of_convert(tmp_path: Path):
    snippet = tmp_path / "snippet.py"
    snippet.write_text(
        "import shiradelta as sd\n"
        "from shiradelta.converters import kinds\n"
        "sd.convert(1, 2, nonsense=3)\n"
        "reveal_type(kinds())\n"
        "reveal_type(sd.convert('tuned').energy_kept)\n"
    )
    # Other packages are left out, torch among them: to read them takes half a minute.
    # A cache of its own stays valid, as `make lint` runs with other options.
    cache = f"--cache-dir={ROOT / 'build' / 'mypy-without-packages'}"
    command = [sys.executable, "-m", "mypy", cache, "--no-site-packages", "--ignore-missing-imports", snippet]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stdout + found.stderr
    assert 'Unexpected keyword argument "nonsense" for "convert"' in found.stdout
    assert 'Argument 1 to "convert" has incompatible type "int"' in found.stdout
    assert 'Revealed type is "tuple[str, ...]"' in found.stdout
    assert 'Revealed type is "float | None"' in found.stdout


#: -S leaves out .pth files, and with them the finder of an editable installation.
BARE = """
import importlib, sys
from pathlib import Path

root, modules, paths = Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3:]
sys.path[:] = [str(root), *[path for path in sys.path + paths if path not in ("", str(root))]]
import shiradelta.converters

assert Path(shiradelta.__file__).parents[1] == root
for name in modules:
    found = importlib.import_module(f"shiradelta.converters.{name}")
    assert Path(found.__file__) == root / "converters" / f"{name}.py", found
    assert shiradelta.convert.__module__ == "shiradelta.converters.pipeline"
assert "converters" not in sys.modules
"""


@pytest.mark.slow
def test_a_bare_checkout_imports_the_converters():
    modules = " ".join(path.stem for path in (ROOT / "converters").glob("[!_]*.py"))
    command = [sys.executable, "-S", "-c", BARE, str(ROOT), modules, *filter(None, sys.path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_a_wheel_has_the_converters_and_not_their_stand_in():
    names = set(zipfile.ZipFile(wheel()).namelist())
    here = {f"shiradelta/converters/{path.name}" for path in (ROOT / "converters").glob("*.py")}
    assert here <= names
    assert "shiradelta/converters.py" not in names

"""An installed wheel does all that a newcomer is told to do: outside the checkout, without a compiler."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.building import wheel
from tests.hub import TOKEN, Hub
from wheels.build import run

NEEDED = ("scikit_build_core", "transformers", "diffusers", "huggingface_hub", "jinja2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
@pytest.mark.skipif(sys.platform == "win32", reason="the environment's folders are named otherwise there")
@pytest.mark.skipif(shutil.which("cc") is None, reason="the wheel's library is compiled")
def test_a_newcomer_gets_from_the_wheel_to_the_hub(hub: Hub, tmp_path: Path):
    env = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", env)  # to install that takes three CPU seconds
    python = env / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel())
    # What the package requires comes from the environment of the tests, which has torch; the wheel's own comes first.
    # `tests/wheels/test_wheels.py` installs its requirements.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    folders = dict.fromkeys([sysconfig.get_path("purelib"), *(path for path in sys.path if "site-packages" in path)])
    Path(site, "shared.pth").write_text("\n".join(folders) + "\n")
    script = shutil.copy(Path(__file__).with_name("first_steps.py"), tmp_path)
    folder = tmp_path / "empty"
    folder.mkdir()
    bare = {"PATH": str(env / "bin"), "PYTHONPATH": "", "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    said = run(python, script, cwd=folder, HF_HOME=str(tmp_path / "cache"), **bare)
    assert said.rstrip().endswith("all steps done")
    assert set(hub.repos) == {"user/style"}

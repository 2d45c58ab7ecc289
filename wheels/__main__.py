"""`python -m wheels OUT [PART ...]`: builds and checks the sdist and the wheels, all or those whose tag has a PART."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from packaging.tags import sys_tags

from wheels.build import build, pure_wheel, run, sdist
from wheels.check import audit, faults, try_installed
from wheels.targets import TARGETS


def main(out: str, *parts: str) -> None:
    """Builds and checks; a line for each file, and what could be inspected only.

    Raises:
        SystemExit: a step failed, or a wheel is not what its tag says.
    """
    targets = [one for one in TARGETS if not parts or any(part in one.tag for part in parts)]
    here = {tag.platform for tag in sys_tags()}
    folder = Path(out).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = sdist(folder)
    print(f"{source.name}: a wheel was built from it without a network", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        pure = pure_wheel(source, Path(scratch))
        for target in targets:
            wheel = build(target, pure, folder)
            if found := faults(wheel, target):
                raise SystemExit(f"{wheel.name}: {'; '.join(found)}")
            said = "inspected"
            if "manylinux" in target.tag and sys.platform == "linux":  # it looks for musl's libc on this system
                audit(wheel, target)
                said += ", by auditwheel too"
            if here & set(target.tag.split(".")):
                try_installed(wheel)
                said += ", installed and used"
            else:
                said += "; not run here"
            print(f"{wheel.name}: {said}", flush=True)
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(folder.iterdir()))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])

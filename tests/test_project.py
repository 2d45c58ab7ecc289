"""The project's own papers: license, security, citation, metadata, workflows."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import shiradelta

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
#: Of the text at https://www.apache.org/licenses/LICENSE-2.0.txt, appendix included.
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
#: What stands at the top: people find the rest from here.
TOP = (
    ".ci .github .gitignore .pre-commit-config.yaml CHANGELOG.md CITATION.cff CMakeLists.txt CONTRIBUTING.md LICENSE "
    "Makefile README.md SECURITY.md benchmarks constraints.txt converters demo docs examples libshd mkdocs.yml "
    "pyproject.toml shiradelta spec tests wheels"
)
SYSTEMS = {"ubuntu-latest", "macos-latest", "windows-latest"}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(path: Path) -> dict[Any, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict), path
    return found


PROJECT: dict[str, Any] = tomllib.loads(text("pyproject.toml"))["project"]
PYTHONS = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]


# --- the top level ---


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an sdist has no list of what belongs to it")
def test_nothing_else_stands_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} == {*TOP.split()}


# --- license, security, citation ---


def test_license_is_apache_2_unchanged():
    content = (ROOT / "LICENSE").read_bytes().replace(b"\r\n", b"\n")
    assert hashlib.sha256(content).hexdigest() == APACHE
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])


def test_security_names_the_way_to_report_and_the_supported_version():
    security = text("SECURITY.md")
    assert f"{PROJECT['urls']['Source']}/security/advisories/new" in security
    assert f"the newest release, now {PROJECT['version'].rpartition('.')[0]} " in security


def test_the_threat_model_names_tests_that_are_there():
    rows = [line for line in text("SECURITY.md").splitlines() if "`tests/" in line]
    assert len(rows) >= 16
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", "\n".join(rows)):
        assert f"def {name}(" in text(file), f"{file}::{name}"


def test_citation_is_of_this_version():
    citation = parsed(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Source"]
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["url"].endswith("2406.13175")


# --- metadata ---


def test_the_code_has_the_same_version():
    assert PROJECT["version"] == shiradelta.__version__ == version("shiradelta")


def test_metadata_has_urls_and_authors():
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= set(PROJECT["urls"])
    assert all(url.startswith(PROJECT["urls"]["Source"]) for url in PROJECT["urls"].values())
    assert PROJECT["authors"]


def test_classifiers_fit_the_rest():
    classifiers = PROJECT["classifiers"]
    assert len(classifiers) == len(set(classifiers))
    assert not any(name.startswith("License ::") for name in classifiers)  # the SPDX expression says it
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert ("Typing :: Typed" in classifiers) == (Path(shiradelta.__file__).parent / "py.typed").exists()


# --- workflows ---


def jobs() -> list[tuple[str, str, dict[str, Any]]]:
    return [(path.name, name, job) for path in WORKFLOWS for name, job in parsed(path)["jobs"].items()]


def rows(job: dict[str, Any]) -> list[dict[str, str]]:
    """The combinations of a matrix, as GitHub makes them."""
    matrix = dict(job.get("strategy", {}).get("matrix", {}))
    extra = matrix.pop("include", [])
    found: list[dict[str, str]] = [{}]
    for key, values in matrix.items():
        found = [{**row, key: value} for row in found for value in values]
    for more in extra:
        fitting = [row for row in found if all(row[key] == more[key] for key in matrix.keys() & more.keys())]
        for row in fitting:
            row.update(more)
        if not fitting:
            found.append(dict(more))
    return found


def commands(job: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_has_what_github_requires(path: Path):
    workflow = parsed(path)
    assert {"name", "jobs"} <= set(workflow)
    assert "on" in workflow or True in workflow  # YAML 1.1 reads a plain `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert re.fullmatch(r"[A-Za-z_][\w-]*", name)
        assert job["runs-on"], name
        assert job["timeout-minutes"], name
        assert set(job.get("needs", [])) <= set(workflow["jobs"]), name
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert re.fullmatch(r"[\w./-]+@[\w.-]+", step.get("uses", "a@1")), step


@pytest.mark.parametrize(("file", "name", "job"), jobs(), ids=lambda value: value if isinstance(value, str) else "")
def test_workflow_uses_only_what_exists(file: str, name: str, job: dict[str, Any]):
    used = set(re.findall(r"\$\{\{ *matrix\.(\w+) *\}\}", yaml.safe_dump(job)))
    assert used <= set().union(*rows(job))
    targets = {target for line in commands(job).splitlines() for target in re.findall(r"^make ([\w-]+)", line)}
    makefile = text("Makefile")
    if not (ROOT / "docs").exists():
        targets -= {"docs"}  # its step runs only where there is such a folder
    assert all(f"\n{target}:" in makefile for target in targets)


def test_tests_run_on_three_systems_with_the_lowest_and_the_highest_versions():
    (job,) = (job for _, name, job in jobs() if name == "test")
    found = {(row["os"], row["resolution"], row["python"]) for row in rows(job)}
    versions = {("lowest-direct", PYTHONS[0]), ("highest", PYTHONS[-1])}
    assert found == {(system, *version) for system in SYSTEMS for version in versions}
    assert "pytest" in commands(job)


def test_linux_runs_the_command_of_the_readme():
    (job,) = (job for _, name, job in jobs() if name == "readme")
    assert job["runs-on"] == "ubuntu-latest"
    assert {row["python"] for row in rows(job)} == {PYTHONS[0], PYTHONS[-1]}
    assert "make test" in commands(job)
    assert "make test" in text("README.md")


def test_issue_forms_have_what_github_requires():
    assert FORMS
    for path in FORMS:
        form = parsed(path)
        if path.name == "config.yml":
            continue
        assert {"name", "description", "body"} <= set(form), path
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert fields, path
        assert len({field["id"] for field in fields}) == len(fields), path
        assert all(field["attributes"]["label"] for field in fields), path

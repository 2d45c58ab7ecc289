"""`shiradelta chain` and its commands."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from shiradelta.cli import options
from shiradelta.cli.options import Command, Group
from shiradelta.cli.output import echo_json, echo_lines, echo_table
from shiradelta.cli.progress import progress_bar
from shiradelta.errors import ArgumentError
from shiradelta.util.text import count, size

if TYPE_CHECKING:
    from shiradelta.chain import Step


@click.group(
    cls=Group,
    examples=["chain init chain/ model/", "chain publish chain/ step.shd", "chain fold chain/ 0 10"],
)
def chain() -> None:
    """A chain holds the versions of a model, 0, 1, 2, ..., as the steps between them, in a folder.

    Every step says which version it is for and which one it gives, by digests; a step that does not fit is refused.
    """


def _print_step(step: Step, as_json: bool) -> None:
    if as_json:
        echo_json(dataclasses.asdict(step))
    else:
        echo_lines(f"{step}: {size(step.bytes)}; gives {step.gives[:12]}")


@chain.command(cls=Command, short_help="Begin a chain.", examples=["chain init chain/ model/"])
@click.argument("chain")
@click.argument("model")
def init(chain: str, model: str) -> None:
    """Begin the chain CHAIN in a new folder: the folder MODEL is version 0, and is copied there as an anchor."""
    from shiradelta.chain import Chain

    (anchor,) = Chain.create(chain, model).manifest.anchors
    echo_lines(f"{chain}: version 0 is {model}, {count(anchor.files, 'file')} of {size(anchor.bytes)}")


@chain.command(
    cls=Command,
    short_help="Publish the next step.",
    extra="publish one step after the other",
    examples=["chain publish chain/ step.shd --version 7", "chain publish chain/ tuned/ --base model/"],
)
@click.argument("chain")
@click.argument("delta")
@click.option("--version", type=click.IntRange(0), help="Refuse the step unless this is the version that it gives.")
@click.option("--base", metavar="MODEL", help="The model before the step, to check that the step fits it.")
@click.option(
    "--context",
    type=options.RegistryChoice("shiradelta.io.context:CONTEXTS"),
    default="base",
    show_default=True,
    help="With --base: whether the step may be read with the version before it only, which makes it smaller.",
)
@options.as_json
def publish(chain: str, delta: str, as_json: bool, **arguments: Any) -> None:
    """Publish DELTA as the step from the newest version of CHAIN to the next.

    DELTA is a .shd file with fingerprints, or, with --base, the folder of the model after the step.
    """
    from shiradelta.chain import Chain

    with progress_bar("publishing") as progress:
        step = Chain.open(chain).publish(delta, progress=progress, **arguments)
    _print_step(step, as_json)


@chain.command(
    cls=Command, short_help="Publish a whole model at a version.", examples=["chain anchor chain/ model/ --version 100"]
)
@click.argument("chain")
@click.argument("model")
@click.option("--version", type=click.IntRange(0), help="The version that MODEL is.  [default: the newest]")
def anchor(chain: str, model: str, version: int | None) -> None:
    """Copy the folder MODEL into CHAIN as an anchor, from which late followers begin."""
    from shiradelta.chain import Chain

    made = Chain.open(chain).publish_anchor(model, version)
    echo_lines(f"{chain}: anchor {made.version}, {count(made.files, 'file')} of {size(made.bytes)}")


@chain.command("list", cls=Command, short_help="Show the steps and anchors of a chain.", examples=["chain list chain/"])
@click.argument("chain")
@options.as_json
def list_(chain: str, as_json: bool) -> None:
    """Show the steps and anchors of CHAIN."""
    from shiradelta.chain import Chain

    manifest = Chain.open(chain).manifest
    if as_json:
        shown = {key: getattr(manifest, key) for key in ("id", "head", "tensors")}
        for key in ("anchors", "steps"):
            shown[key] = [dataclasses.asdict(row) for row in getattr(manifest, key)]
        echo_json(shown)
        return
    rows = [(each.version, 0, f"anchor {each.version}", each.bytes, each.state) for each in manifest.anchors]
    rows += [(each.start, each.stop, str(each), each.bytes, each.gives) for each in manifest.steps]
    table = [[what, size(amount), state[:12]] for *_, what, amount, state in sorted(rows)]
    echo_table([["", "bytes", "gives"], *table])
    echo_lines(f"{chain}: the newest version is {manifest.head}")


@chain.command(
    cls=Command,
    short_help="Make one step of several.",
    examples=["chain fold chain/ 0 10", "chain fold chain/ 0 2 --base model/"],
)
@click.argument("chain")
@click.argument("start", type=click.IntRange(0))
@click.argument("stop", type=click.IntRange(0))
@click.option(
    "--base", metavar="MODEL", help="The model at START; without it, it is built from an anchor where needed."
)
@options.as_json
def fold(chain: str, start: int, stop: int, base: str | None, as_json: bool) -> None:
    """Publish one step for the way from version START of CHAIN to version STOP.

    It gives the same weights, bit for bit. The steps stay; `chain gc` removes what is not needed.
    """
    from shiradelta.chain import Chain

    with progress_bar("folding") as progress:
        step = Chain.open(chain).fold(start, stop, base=base, progress=progress)
    _print_step(step, as_json)


@chain.command(
    cls=Command,
    short_help="Take a model's folder to the newest version.",
    extra="follow with one folder at a time",
    examples=["chain follow chain/ copy/", "chain follow chain/ copy/ --every 5", "chain follow chain/ copy/ --to 7"],
)
@click.argument("chain")
@click.argument("model")
@click.option("--to", type=click.IntRange(0), help="The version to go to, also an older one.  [default: the newest]")
@click.option(
    "--keep", type=click.IntRange(1), default=8, show_default=True, help="How many steps `revert` can take back."
)
@click.option(
    "--every", type=click.FloatRange(0, min_open=True), help="Go on, and look for new steps so often (seconds)."
)
@options.as_json
def follow(chain: str, model: str, to: int | None, keep: int, every: float | None, as_json: bool) -> None:
    """Apply the steps of CHAIN to the folder MODEL, from the version that it is to the newest.

    A new folder begins with an anchor. Each step is on the folder wholly or not at all; a command that was killed goes
    on where it was.
    """
    from shiradelta.chain import FolderFollower

    if to is not None and every is not None:
        raise ArgumentError("--every goes on to ever newer versions, and --to to one; give one of the two")
    with progress_bar("applying") as progress:
        follower = FolderFollower(chain, model, keep=keep, progress=progress)
        steps = follower.follow(to)
    if as_json:
        echo_json({"version": follower.version, "steps": [dataclasses.asdict(step) for step in steps]})
    else:
        echo_lines(*map(str, steps), f"{model}: version {follower.version}")
    if every is not None:
        for step in follower.watch(every):
            echo_lines(f"{model}: version {step.stop}")


@chain.command(cls=Command, short_help="Show which version a folder is.", examples=["chain status copy/"])
@click.argument("model")
@options.as_json
@click.pass_context
def status(context: click.Context, model: str, as_json: bool) -> None:
    """Show which version of a chain the folder MODEL is, from its record.

    Exit code 0 if it is one, 1 if not. `shiradelta verify` compares the weights.
    """
    from shiradelta.chain import status as run

    found = run(model)
    if as_json:
        echo_json(dataclasses.asdict(found))
    elif found.version is None:
        echo_lines(f"{model}: is no version of a chain")
    else:
        interrupted = "; an action was interrupted, which the next one takes back" if found.interrupted else ""
        kept = f"{count(found.kept, 'step')} can be taken back"
        echo_lines(f"{model}: version {found.version} of chain {found.chain[:12]}; {kept}{interrupted}")
    context.exit(found.version is None)


@chain.command(cls=Command, short_help="Remove what is not needed.", examples=["chain gc chain/ --before 100"])
@click.argument("chain")
@click.option("--before", type=click.IntRange(0), help="Remove what only versions before this one need, too.")
@options.as_json
def gc(chain: str, before: int | None, as_json: bool) -> None:
    """Remove files of CHAIN that nothing names, such as those of a publisher that was killed.

    Every version from --before on can still be reached, from it and from an anchor.
    """
    from shiradelta.chain import Chain

    report = Chain.open(chain).collect(before)
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    what = f"; no longer there: {', '.join(report.forgotten)}" if report.forgotten else ""
    echo_lines(f"{chain}: {count(report.files, 'file')} removed{what}")


@chain.command(cls=Command, short_help="Check every file of a chain.", examples=["chain verify chain/"])
@click.argument("chain")
@options.as_json
@click.pass_context
def verify(context: click.Context, chain: str, as_json: bool) -> None:
    """Read every file of CHAIN, and compute the digest of every version anew.

    Exit code 0 if all is as it was published, 1 if not.
    """
    from shiradelta.chain import Chain

    opened = Chain.open(chain)
    problems = opened.verify()
    if as_json:
        echo_json({"problems": problems})
    else:
        echo_lines(*(problems or [f"{chain}: every file is as it was published, up to version {opened.head}"]))
    context.exit(1 if problems else 0)


@chain.command(
    "import",
    cls=Command,
    short_help="Make a .shd file of another project's step.",
    examples=["chain import slime weight_v000007/ --base model/ -o step.shd"],
)
@click.argument("wire", type=options.RegistryChoice("shiradelta.chain.wires:WIRES"))
@click.argument("source")
@click.option("--base", metavar="MODEL", required=True, help="The model before the step.")
@click.option("-o", "--out", metavar="FILE", required=True, help="The .shd file to write.")
def import_(wire: str, source: str, base: str, out: str) -> None:
    """Make a .shd file, with fingerprints, of the step SOURCE on WIRE, bit for bit."""
    from shiradelta.chain.wires import read_wire

    changed = read_wire(wire, source, base, out)
    echo_lines(f"{out}: {count(changed, 'element')} of {base} change")


@chain.command(
    cls=Command,
    short_help="Write a step as another project reads it.",
    examples=["chain export slime step.shd --base model/ -o weight_v000007/ --set version=7 --set base_version=6"],
)
@click.argument("wire", type=options.RegistryChoice("shiradelta.chain.wires:WIRES"))
@click.argument("delta")
@click.option("--base", metavar="MODEL", required=True, help="The model before the step.")
@click.option("-o", "--out", metavar="FOLDER", required=True, help="The new folder to write.")
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="An option of the wire.  May be repeated.")
def export(wire: str, delta: str, base: str, out: str, settings: tuple[str, ...]) -> None:
    """Write the step DELTA to a new folder, as WIRE has it."""
    from shiradelta.chain.wires import write_wire

    if (wrong := next((each for each in settings if "=" not in each), None)) is not None:
        raise ArgumentError(f"--set {wrong}: has no value; give NAME=VALUE")
    write_wire(wire, delta, base, out, **dict(each.split("=", 1) for each in settings))
    echo_lines(f"{out}: {delta} as {wire} has it")

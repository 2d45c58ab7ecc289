"""All architectures, by family."""

from __future__ import annotations

from benchmarks.architectures import experts, images, others, text  # noqa: F401  each adds its rows
from benchmarks.architectures.zoo import ARCHITECTURES, FAMILIES

ROWS = {
    name: architecture
    for family in FAMILIES
    for name, architecture in ARCHITECTURES.items()
    if architecture.family == family
}

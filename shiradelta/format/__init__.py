"""The `.shd` format: ids and limits, arithmetic, deltas, codecs, the container (spec/FORMAT.md)."""

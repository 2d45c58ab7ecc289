"""What a `.shd` file is: ids and limits, arithmetic, deltas, codecs, the container (spec/FORMAT.md)."""

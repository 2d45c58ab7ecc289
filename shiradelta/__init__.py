"""shiradelta: sparse weight deltas, small, switched fast and taken out again exactly."""

from shiradelta.delta import TensorDelta
from shiradelta.reader import open_delta
from shiradelta.writer import save_delta

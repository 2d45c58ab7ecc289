"""The size of a TILED section is kept from its measuring to its encoding, for the same positions and grid only."""

import numpy as np

from shiradelta.backends.libshd.encoder import NativeTiled
from shiradelta.format.codecs.tiled import Tiled
from shiradelta.format.codecs.tiled_classes import choose


def test_positions_that_were_not_measured_are_encoded_whole():
    rng, shape = np.random.default_rng(0), (200, 300)
    few, many = (np.flatnonzero(rng.random(60_000) < share) for share in (0.01, 0.05))
    few.flags.writeable = many.flags.writeable = False
    chosen = choose(few, shape)
    assert chosen is not None
    codec, grid = NativeTiled(), chosen[0]
    sizes = {id(positions): codec.size_in(positions, grid) for positions in (many, few)}
    for positions in (few, many, few):
        section = codec.encode_in(positions, grid)
        assert section == Tiled().encode_in(positions, grid)
        assert len(section) == sizes[id(positions)]

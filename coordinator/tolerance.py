"""How near a release is to what this machine makes of the same updates, where the aggregator's sums are of floating point.

Machines, and numbers of threads, add in another order: what they make agrees to about 1e-7, float32's own rounding.
"""

from __future__ import annotations

import numpy as np

from coordinator.publish import Made, stored_vector, vector
from coordinator.stores import Blobs
from wire import spec
from wire.delta import Layout, Vector
from wire.messages import ReleaseManifest

TOLERANCE = 1e-5
"""‖stored - made here‖ / ‖made here‖ of each tensor that is taken for the same."""


def agrees(layout: Layout, parent: ReleaseManifest, release: ReleaseManifest, made: Made, blobs: Blobs) -> bool:
    """Whether `release` differs from the one made here in its vector alone, and by no more than TOLERANCE in any tensor.

    One that travels coded, and was made here from its own delta, differs in what that left unsent. This counts together
    with what was sent: it is the sum that is compared.
    """
    field = "adapter" if release.delta is None else "residual"
    if vars(release) | {field: None} != vars(made.release) | {field: None}:
        return False
    ours = next(blob for blob in made.blobs if spec.bytes_digest(blob) == getattr(made.release, field))
    found = stored_vector(blobs, getattr(release, field), layout.size)
    wanted, sent = vector(memoryview(ours), layout.size), np.zeros(layout.size, np.float32)
    if release.delta is not None:
        sent = stored_vector(blobs, release.adapter, layout.size) - stored_vector(blobs, parent.adapter, layout.size)
    return _near(layout, found - wanted, sent + wanted)


def _near(layout: Layout, gap: Vector, whole: Vector) -> bool:
    return all(np.linalg.norm(gap[place]) <= TOLERANCE * np.linalg.norm(whole[place]) for _, place in layout.slices())

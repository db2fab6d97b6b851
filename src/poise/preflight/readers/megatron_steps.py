"""From samples to steps under Megatron-LM's batch ramp."""

from __future__ import annotations

import math

Ramp = tuple[int, int, int]
"""First batch, increment, samples until the last batch is reached."""


def steps_for(samples: int, batch: int, ramp: Ramp | None = None) -> int:
    """Return the steps that consume ``samples``, at a batch that grows from the ramp's first to ``batch``.

    The ramp has (batch - first) / increment stages of equally many samples each (``RampupBatchsizeNumMicroBatches``
    of Megatron-LM); a stage whose batch was begun is finished with it.

    >>> steps_for(1000, 100), steps_for(350, 100, (50, 50, 200))
    (10, 6)
    """
    done = steps = 0
    if ramp is not None and ramp[0] < batch and ramp[2] > 0:
        first, increment, ramp_samples = ramp
        stages = max((batch - first) // increment, 1)
        for stage in range(min(stages, 1_000_000)):
            size = first + stage * increment
            end = min(ramp_samples * (stage + 1) / stages, samples)
            more = max(math.ceil((end - done) / size), 0)
            steps, done = steps + more, done + more * size
            if done >= samples:
                return steps
    return steps + math.ceil(max(samples - done, 0) / batch)

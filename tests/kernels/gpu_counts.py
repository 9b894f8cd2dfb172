"""What steps of ResNet-50 and ViT-B/16 dispatch on a GPU, counted by `benchmarks/gpu_fake.py`.

A JSON line for each step that the arguments name: network, precision, step, ... Needs a process
without TRITON_INTERPRET.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu_fake import counted, routed
from gpu_models import FULL
from gpu_steps import STEPS, training

arguments = sys.argv[1:]
for name, precision, step in zip(*(arguments[k::3] for k in range(3)), strict=True):
    with routed():
        on = training(step, name, FULL, precision, "cpu")
        count = counted(STEPS[step](on), on.held)
    row = {"name": name, "precision": precision, "step": step, "dispatched": count.dispatched}
    row["own"], row["launches"] = sum(count.own.values()), sum(count.launches.values())
    print(json.dumps(row | {"peak": count.peak, "ops": dict(count.ops)}))

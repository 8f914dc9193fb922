"""Runs one training with planted faults: ``python -m faults.drive <storage> <run> <json>``."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

from cpt_helpers import recipes


def main() -> None:
    import ray

    from cpt_helpers.errors import CptError
    from cpt_helpers.run import Run
    from cpt_helpers.train import launch, worker
    from faults import plant

    if os.environ.get("RAY_ADDRESS"):  # of several nodes on this machine, be on the head
        ray.init = functools.partial(ray.init, _node_ip_address="127.0.0.1")
    storage, name, options = sys.argv[1:]
    given = json.loads(options)
    run = Run(name, Path(storage))
    worker.train_loop = plant.train_loop
    try:
        launch.train(run, recipes.load(run), **given)
    except CptError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

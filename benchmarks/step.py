"""Profile of one optimizer step. ``make bench-step``.

Trains the default recipe under ZeRO-3 in two processes, like the workers but without Ray. Profiles
one steady step of rank 0 with torch's profiler. Writes ``benchmarks/results/step.txt``. Also writes
``step.trace.json``, which git ignores. Open it at https://ui.perfetto.dev.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import date
from pathlib import Path

from hardware import describe_machine

from cpt_helpers import recipes

RESULTS = Path(__file__).parent / "results"
WORKERS, STEPS = 2, 6


def rank() -> None:
    """Runs one process of the training, and profiles its last step."""
    import yaml

    from cpt_helpers.train import patches

    patches.join_cpu_group()
    patches.correct_deepspeed(1800)
    from llamafactory.train.tuner import _training_function
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    class Profiled(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == STEPS - 1:
                self.profile = profile(activities=[ProfilerActivity.CPU])
                self.profile.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step < STEPS:
                return
            self.profile.__exit__(None, None, None)
            if os.environ["RANK"] == "0":
                averages = self.profile.key_averages()
                rows = averages.table(sort_by="self_cpu_time_total", row_limit=30)
                (RESULTS / "step.txt").write_text(rows)
                self.profile.export_chrome_trace(str(RESULTS / "step.trace.json"))

    args = yaml.safe_load(Path(sys.argv[1]).read_text("utf-8"))
    from cpt_helpers.train.trainer import correct_workflow

    correct_workflow()
    _training_function({"args": args, "callbacks": [Profiled()]})


def main() -> None:
    import yaml
    from speed import recipe_for_others

    from cpt_helpers.run import storage_root
    from cpt_helpers.setup import machine

    storage = storage_root("")
    args, folder = recipe_for_others(storage)
    args |= {"max_steps": STEPS, "output_dir": str(folder / "output")}
    args["deepspeed"] = str(recipes.DEEPSPEED_CONFIGS / "ds_z3_config.json")
    file = folder / "profiled.yaml"
    file.write_text(yaml.safe_dump(args), "utf-8")
    own = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORKERS)]
    command = [sys.executable, "-W", "ignore", *torchrun, __file__, str(file)]
    log = folder / "log"
    with log.open("wb") as out:
        env = os.environ | machine.KEEP_MEMORY | own
        done = subprocess.run(command, env=env, stdout=out, stderr=out)
    if done.returncode:
        sys.exit(f"the training failed:\n{log.read_text(errors='replace')[-3000:]}")
    path = RESULTS / "step.txt"
    path.write_text(f"{date.today()}, {describe_machine()}\n{path.read_text()}")
    print(path.read_text())


if __name__ == "__main__":
    rank() if "RANK" in os.environ else main()

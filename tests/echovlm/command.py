"""The recipe's command line, with FSDP2 on CPUs too: `command.py ARGUMENTS…`.

`DIE_IN=stage1:7` in the environment kills it in that stage and step, on every rank, before the update.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from examples.echovlm.__main__ import main
from examples.echovlm.command_line import load_recipe


def die_in(stage: str, step: int) -> None:
    from examples.echovlm.trainer import RecipeTrainer

    training_step = RecipeTrainer.training_step

    def step_and_die(self, *args, **kwargs):
        loss = training_step(self, *args, **kwargs)
        if Path(self.args.output_dir).name == stage and self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    RecipeTrainer.training_step = step_and_die


if __name__ == "__main__":
    load_recipe()
    from cpu_fsdp import shard_on_cpus

    shard_on_cpus()
    if place := os.environ.get("DIE_IN"):
        name, _, number = place.partition(":")
        die_in(name, int(number))
    sys.exit(main())

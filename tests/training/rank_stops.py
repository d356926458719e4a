"""`lalte train` on torchrun's processes, of which the second is told to stop at the end of step 6.

JSON is a list: file, changes. Each rank prints its exit status.
"""

import json
import os
import signal
import sys

import torch

import lalte
from training.callbacks import RetentionCallback

update = RetentionCallback.on_optimizer_step


def update_and_stop(self, args, state, control, **more):
    update(self, args, state, control, **more)
    if os.environ["RANK"] == "1" and state.global_step + 1 == 6:  # counted after the optimizer's step
        os.kill(os.getpid(), signal.SIGTERM)


RetentionCallback.on_optimizer_step = update_and_stop
torch.set_num_threads(1)
file, *changes = json.loads(sys.argv[1])
status = lalte.main(["train", file, *changes])
sys.stdout.write(f"rank {os.environ['RANK']}: {status}\n")  # in one piece: ranks share the pipe

"""Runs that torchrun's processes do one after the other: JSON is a list of (file, changes).

RANK in a change stands for the process's number.
"""

import json
import os
import sys

import torch

from training import checkpoints
from training.config import load_config
from training.trainer import train

torch.set_num_threads(1)
torch.compiler.set_stance("force_eager")  # compiled models are wrapped, and nothing waits for a compiler
checkpoints.PATIENCE = 3.0
for file, changes in json.loads(sys.argv[1]):
    train(load_config(file, [change.replace("RANK", os.environ["RANK"]) for change in changes]))

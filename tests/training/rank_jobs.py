"""Runs that torchrun's processes do one after the other: JSON is a list of (file, changes)."""

import json
import sys

import torch

from training.config import load_config
from training.trainer import train

torch.set_num_threads(1)
for file, changes in json.loads(sys.argv[1]):
    train(load_config(file, changes))

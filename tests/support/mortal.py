"""Runs by torchrun: `tlalign train` into two folders; in the second a process is killed in its first life."""

import os
import signal
import sys

import torch
from training import FewDigits

from tlalign import readers
from tlalign.cli import main
from tlalign.engine import Trainer
from tlalign.processes import Processes

dies_after, whole, killed, *arguments = sys.argv[1:]
torch.set_num_threads(1)
readers.Digits = FewDigits
update = Trainer._update


def die(self):
    update(self)
    is_first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if (self.config.output, self.step, self.processes.rank) == (killed, int(dies_after), 1) and is_first_life:
        os.kill(os.getpid(), signal.SIGKILL)


Trainer._update = die
# They stay together for the second run.
Processes.leave = lambda self: None
for folder in (whole, killed):
    if status := main([*arguments, f"--output={folder}"]):
        sys.exit(status)

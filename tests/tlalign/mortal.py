"""Runs by torchrun: `tlalign train`, of which one process is killed in its first life."""

import os
import signal
import sys

import torch
from training import FewDigits

from tlalign import readers
from tlalign.cli import main
from tlalign.engine import Trainer

torch.set_num_threads(1)
readers.Digits = FewDigits
update = Trainer._update
dies_after = int(sys.argv[1])


def die(self):
    update(self)
    if self.step == dies_after and self.processes.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


Trainer._update = die
sys.exit(main(sys.argv[2:]))

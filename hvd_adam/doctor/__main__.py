"""Diagnoses this machine, other hosts or a job, and gives a remedy for each fault.

python -m hvd_adam.doctor
python -m hvd_adam.doctor --hosts host1,host2
horovodrun -np 8 -H host1:4,host2:4 python -m hvd_adam.doctor
"""

import sys

from hvd_adam.cli import run
from hvd_adam.doctor.command import diagnose
from hvd_adam.doctor.config import DoctorConfig

if __name__ == "__main__":
    argv = ["--hosts" if argument == "-H" else argument for argument in sys.argv[1:]]  # the launchers' spelling
    run(diagnose, DoctorConfig, "hvd_adam.doctor", argv)

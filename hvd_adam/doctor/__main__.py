"""Says what is wrong with this machine, with other hosts, or with a job, and what to do about it.

python -m hvd_adam.doctor
python -m hvd_adam.doctor --hosts host1,host2
horovodrun -np 8 -H host1:4,host2:4 python -m hvd_adam.doctor
"""

import sys

from hvd_adam.cli import run
from hvd_adam.doctor.config import DoctorConfig
from hvd_adam.doctor.examine import examine

if __name__ == "__main__":
    argv = ["--hosts" if argument == "-H" else argument for argument in sys.argv[1:]]  # as launchers call it
    run(examine, DoctorConfig, "hvd_adam.doctor", argv)

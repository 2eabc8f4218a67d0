"""The command-line options of the doctor. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvd_adam.config import option, require

# ssh would take a leading dash for an option.
_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class DoctorConfig:
    """Diagnoses this machine, other hosts, or the job that it is started in."""

    json: bool = option(False, "print one JSON object instead of a table")
    seconds: float = option(10.0, "time limit of all measurements together, in seconds, at most 600")
    timeout: float = option(60.0, "seconds to wait for a rank or host that does not respond, at most 3600")
    output_dir: str = option("runs", "the directory that runs will be written to")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto uses a GPU if there is one")
    hosts: str | None = option(None, "also -H: check these hosts too, over ssh, as in host1,host2")
    ssh_port: int | None = option(None, "ssh port of the hosts (default: from the ssh configuration)")
    ssh_key: str | None = option(None, "ssh private key (default: from the ssh configuration)")

    def __post_init__(self) -> None:
        require(0 < self.seconds <= 600, "seconds", self.seconds, "above 0 and at most 600")
        require(0 < self.timeout <= 3600, "timeout", self.timeout, "above 0 and at most 3600")
        require(bool(self.output_dir), "output-dir", "empty", "the name of a directory")
        port = self.ssh_port
        require(port is None or 0 < port < 65536, "ssh-port", port, "from 1 to 65535")
        require(self.ssh_key is None or Path(self.ssh_key).is_file(), "ssh-key", self.ssh_key, "a file")
        if self.hosts is not None:
            for host in self.host_names() or ("",):
                require(bool(_HOST.fullmatch(host)), "hosts", repr(self.hosts), "names, as in host1,host2")

    def host_names(self) -> tuple[str, ...]:
        """Returns the distinct hosts to check, without a number of slots after a colon."""
        names = (re.sub(r":\d+$", "", part.strip()) for part in (self.hosts or "").split(","))
        return tuple(dict.fromkeys(filter(None, names)))

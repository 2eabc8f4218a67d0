"""The time of one training step, from the program that each rank runs. Imports no torch.

The order of calls is that of `distributed.gradients.reducer`, `gradients.compression`, `wire.coded_allreduce`,
`wire.masters` and `strategies.zero`: hooks start the collectives of full buckets during backward; the last bucket
starts when backward has ended. On processors a compressed bucket is sent in pieces. Pieces that have arrived are
added, sent on and decoded while the rank waits, and between others that it encodes (see `pipeline`). With
`defer_averaging`, as in `hvd_adam.train`, a small all-reduce travels ahead of the last bucket, and each bucket is
updated as soon as its sum is there, or each message of it without compression. On devices, and with codes, the
update comes after all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from hvd_adam.simulate.machine import Codec, Machine, expected_maximum
from hvd_adam.simulate.pipeline import Piece, Pipeline, Sent
from hvd_adam.simulate.timeline import Operation, Processors, Timeline
from hvd_adam.simulate.traffic import Ranks, Traffic, allgather, allreduce, alltoall, columns, cut, seconds
from hvd_adam.simulate.workload import Bucket, Workload

BUCKET_BYTES = 8 * 2**20  # the default of `distribute`

# What is advised. fp16 is left out, as in `--tune` of the training: gradients above 65504 overflow.
ADVISED = ("none", "bf16", "int8", "int4")
# Bytes that are sent of a gradient: the dtype's, and codes with their bfloat16 scales, a scale for 256 and 32
# elements (wire.codec.CODECS).
WIRE_BYTES = {"none": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1 + 2 / 256, "int4": 0.5 + 2 / 32}
CODED = ("int8", "int4")
STRATEGIES = ("allreduce", "sharded")

# Bytes that a fused step of Adam reads and writes for a float32 parameter: it reads the gradient, and reads and
# writes parameter and both moments.
UPDATE_BYTES = 28
ALLREDUCE_MESSAGES = 2  # of a piece of an all-reduce, as collectives.pieces.ALLREDUCE_BYTES
SMALL_BYTES = 64.0  # of flags and messages that are sent by themselves

# Bytes that `wire.master_shard` reads and writes for a float32 element of the own shard: it looks for changes (4
# cleared, 8 copied, 8 compared), makes masters the parameters and back (3 × 8), and subtracts (8 cleared, 12).
MASTER_BYTES = 64

LONGEST_PAUSE = 1e-3  # as collectives.waiting: seconds between two looks of a rank that waits on processors

PARTS = ("computing", "coding", "bandwidth", "latency", "update", "stragglers", "overhead")


@dataclass(frozen=True)
class Setting:
    """How a job is run.

    Attributes:
        ranks: number of ranks, and of those on a host.
        strategy: as in `distribute`.
        compression: as in `distribute`.
        accumulate: micro-batches of an update.
    """

    ranks: Ranks
    strategy: str = "allreduce"
    compression: str = "none"
    accumulate: int = 1


@dataclass(frozen=True)
class Step:
    """A predicted step.

    Attributes:
        seconds: its expected duration.
        parts: seconds by name in `PARTS`; their sum is `seconds`. "bandwidth" and "latency" are what the rank
            waits for collectives.
        sent: bytes that a rank sends.
        sent_by_host: bytes that a host sends to others.
    """

    seconds: float
    parts: dict[str, float]
    sent: float
    sent_by_host: float


def simulate(workload: Workload, setting: Setting, machine: Machine) -> Step:
    """Returns the expected step of a job.

    The slowest of N ranks decides: all computing is slower by the expected maximum of N draws of the jitter.

    Args:
        workload: of one micro-batch.
        setting: how the job is run.
        machine: on which machines.
    """
    if _load(setting, machine) > 1 and min(setting.ranks.per_host, setting.ranks.total) > 1:
        workload = workload.slower(workload.sharing)
    even = _Program(workload, setting, machine).run()
    lag = machine.jitter * expected_maximum(setting.ranks.total)
    slow = _Program(workload.slower(1 + lag), setting, machine).run() if lag else even
    overhead = _overhead(workload, setting, machine, even.parts["bandwidth"] + even.parts["latency"])
    parts = {**even.parts, "stragglers": slow.seconds - even.seconds, "overhead": overhead}
    return Step(slow.seconds + overhead, parts, even.sent, even.sent_by_host)


def _load(setting: Setting, machine: Machine) -> float:
    """Returns the threads that compute on a core; 0 on devices."""
    local = min(setting.ranks.per_host, setting.ranks.total)
    return 0.0 if machine.cores is None else machine.threads * local / machine.cores


def _overhead(workload: Workload, setting: Setting, machine: Machine, exposed: float) -> float:
    """Returns what a measured step took longer than a simulated one; longer still where ranks share cores.

    Sharded ranks of one host have another program, so the other strategy's is taken where there is no measurement.
    Inside a host, where it was measured, some of it is waiting of the two threads for each other and looking for
    arrivals, which happens in a network's time between hosts. Half of it is taken to be so: that fits steps of an
    MLP over 1 and 3 Gbit/s, whose overhead is 2 to 6 of 7 to 11 ms (docs/scaling.md).

    Args:
        workload: with what was measured.
        setting: how the job is run.
        machine: on which machines.
        exposed: seconds that a rank waits for the network.
    """
    measured = workload.unexplained
    if setting.ranks.total == 1:
        return 0.0
    names = [f"{strategy}-{setting.compression}" for strategy in (setting.strategy, "allreduce")]
    seconds = next((measured[name] for name in names if name in measured), 0.0)
    load, inside = _load(setting, machine), machine.copies is not None and any(machine.copies.values())
    if inside and setting.ranks.several_hosts and load <= 1:
        seconds -= min(max(0.0, seconds / 2), exposed)
    return seconds * max(1.0, load)


class _Program:
    """What the main thread of a rank does in a step."""

    def __init__(self, workload: Workload, setting: Setting, machine: Machine) -> None:
        self._workload, self._setting, self._machine = workload, setting, machine
        self._ranks, self._bytes = setting.ranks, WIRE_BYTES[setting.compression]
        local = min(setting.ranks.per_host, setting.ranks.total)
        cores = math.inf if machine.cores is None else machine.cores / local
        pause = 0.0 if machine.copies is None else LONGEST_PAUSE
        processors = Processors(cores, machine.threads, machine.slice)
        self._time = Timeline(machine.cycle, machine.negotiation, processors, pause)
        self._parts: dict[str, float] = defaultdict(float)
        self._sent = self._sent_by_host = self._latency = self._wire = 0.0
        passed = 1 / machine.copy_bandwidth
        # By default a codec costs its passes over memory: gradients, residuals and what is sent.
        residual = 8 * passed if setting.compression in CODED else 0.0
        default = Codec((4 + self._bytes) * passed + residual, self._bytes * passed, (4 + self._bytes) * passed)
        self._codec = machine.codecs.get(setting.compression, default)
        self._coded = setting.compression in CODED
        self._sharded = self._ranks.total > 1 and setting.strategy == "sharded"
        self._scatters = self._sharded and (self._ranks.several_hosts or self._coded)
        self._in_pieces = setting.compression in ("bf16", *CODED)
        self._two_phases = self._in_pieces and not self._scatters
        self._on_processors = machine.copies is not None
        self._ahead = self._on_processors and self._ranks.total > 1 and not self._coded
        self._in_messages = self._ahead and setting.compression == "none" and not self._scatters
        self._pipeline = Pipeline(self._time, self._gather, self._receive, works_meanwhile=self._in_pieces)

    def run(self) -> Step:
        """Runs the step. Stragglers and overhead are not part of it."""
        work, several = self._workload, self._ranks.total > 1
        self._do("computing", (self._setting.accumulate - 1) * (work.forward + work.backward))
        self._do("computing", work.forward)
        passed = 0.0
        for bucket in work.buckets:
            self._do("computing", bucket.ready - passed)
            passed = bucket.ready
            if several:
                self._collect(bucket)
                if self._ahead and bucket is work.buckets[-1]:
                    header = self._start(self._allreduce(SMALL_BYTES))
                self._send(bucket)
        self._do("computing", work.backward - passed)
        if self._ahead:
            self._pipeline.wait(header)
        if several:
            self._finish()
        if not self._ahead:
            self._update(work.elements)
        if self._sharded:
            self._time.wait(self._start(self._allreduce(SMALL_BYTES)))  # ranks that have parted
            self._exchange_parameters()
        whole = self._latency + self._wire
        for part, value in (("latency", self._latency), ("bandwidth", self._wire)):
            self._parts[part] = self._time.exposed * value / whole if whole else 0.0
        return Step(self._time.now, {p: self._parts[p] for p in PARTS}, self._sent, self._sent_by_host)

    def _collect(self, bucket: Bucket) -> None:
        """Copies the gradients of a bucket into its memory, times 1/N unless they are sent as codes.

        Processors encode large ones where they are.
        """
        copied = bucket.exact if self._coded and self._on_processors else bucket.elements
        self._pass(8 * copied)
        if self._ahead:  # a norm, which shows that no sum can be infinite
            self._pass(4 * bucket.elements)

    def _send(self, bucket: Bucket) -> None:
        """Starts to reduce a bucket, and takes pieces of it and of others further meanwhile."""
        self._pipeline.advance()
        exact = self._start(self._allreduce(4 * bucket.exact + SMALL_BYTES)) if self._coded else None
        sent = Sent(bucket, exact)
        self._pipeline.sent.append(sent)
        for elements in self._pieces_of(bucket):
            while self._coded and self._pipeline.advance():
                pass
            if self._setting.compression != "none":
                n = self._ranks.total  # of codes, a rank encodes what the others add
                encoded = elements * (n - 1) / n if self._coded else elements
                self._do("coding", encoded * self._codec.encode)
            sent.pieces.append(Piece(elements, self._start_first(elements), not self._two_phases))

    def _pieces_of(self, bucket: Bucket) -> list[float]:
        """Returns the elements of what is sent at a time, and used when it arrives."""
        if self._in_pieces:
            return columns(bucket.elements, self._ranks, self._machine)
        if not self._in_messages:
            return [bucket.elements]
        return cut(bucket.elements, ALLREDUCE_MESSAGES * self._machine.message_bytes / self._bytes)

    def _start_first(self, elements: float) -> Operation:
        nbytes = elements * self._bytes
        if self._scatters or self._two_phases:
            return self._start(alltoall(nbytes, self._ranks, self._machine))
        return self._start(self._allreduce(nbytes))

    def _finish(self) -> None:
        """Waits for all buckets, and updates each where updates need not wait for all."""
        for sent in self._pipeline.sent:
            self._pipeline.receive(sent)
            if self._ahead and not self._in_messages:
                self._update(sent.bucket.elements)
            elif self._coded and not self._on_processors:  # there the codes tell whether sums are finite
                self._pass(4 * sent.bucket.elements)  # a search for infinities
        if self._scatters and not self._ahead:  # flags and message
            self._time.wait(self._start(self._allreduce(SMALL_BYTES)))

    def _gather(self, elements: float) -> Operation:
        """Adds the parts that all ranks have sent to this one, and starts to send the sum."""
        self._do("coding", elements * self._codec.add)
        return self._start(allgather(elements * self._bytes, self._ranks, self._machine))

    def _receive(self, elements: float) -> None:
        if self._scatters:
            self._add_parts(elements)
        elif self._in_messages:
            self._update(elements)
        elif self._setting.compression != "none":
            self._do("coding", elements * self._codec.decode)

    def _add_parts(self, elements: float) -> None:
        """Adds what all ranks have sent of the own shard: N−1 additions of its length, and a copy."""
        n = self._ranks.total
        if self._coded:
            self._do("coding", elements * self._codec.decode)
        elif self._setting.compression == "bf16":
            self._do("coding", elements * self._codec.add)
            self._pass(8 * elements / n)
            return
        self._pass((12 * (n - 1) + 8) * elements / n)

    def _update(self, elements: float) -> None:
        share = self._ranks.total if self._sharded else 1
        self._do("update", UPDATE_BYTES * elements / share / self._machine.update_bandwidth)

    def _exchange_parameters(self) -> None:
        """Sends the own shard of the parameters, or the codes of its changes, to the others."""
        work, n, gathers = self._workload, self._ranks.total, []
        if self._coded:
            self._pass(MASTER_BYTES * work.elements / n)
        for bucket in work.buckets:
            own = bucket.elements / n
            nbytes = self._bytes if self._coded else 4.0
            if self._coded:
                self._do("coding", own * self._codec.encode)
            else:
                self._pass(12 * own)  # fresh memory is cleared, and filled
            gathers.append(self._start(allgather(nbytes * bucket.elements, self._ranks, self._machine)))
        exact = sum(bucket.exact for bucket in work.buckets)
        if self._coded and exact:
            self._time.wait(self._start(allgather(4 * exact, self._ranks, self._machine)))
        for bucket, operation in zip(work.buckets, gathers, strict=True):
            self._time.wait(operation)
            if self._coded:
                self._do("coding", bucket.elements * self._codec.decode)
                self._pass(12 * bucket.elements)  # added to the parameters
            else:
                self._pass(8 * (n - 1) / n * bucket.elements)
        if self._coded:
            self._pass(8 * work.elements / n)  # the own shard is remembered

    def _allreduce(self, nbytes: float) -> Traffic:
        return allreduce(nbytes, self._ranks, self._machine)

    def _start(self, traffic: Traffic) -> Operation:
        duration, waiting, cpu = seconds(traffic, self._machine, self._ranks)
        self._latency += waiting
        self._wire += duration - waiting
        self._sent += traffic.sent
        self._sent_by_host += traffic.between
        return self._time.start(duration, cpu, waiting, traffic.messages)

    def _pass(self, nbytes: float) -> None:
        self._do("coding", nbytes / self._machine.copy_bandwidth)

    def _do(self, part: str, duration: float) -> None:
        before = self._time.now
        self._time.compute(max(0.0, duration))
        self._parts[part] += self._time.now - before

"""`simulate`: the cost model, its discrete events, the published setting, calibration on ranks, and the output.

Hazards: a term that is counted twice or not at all; bytes that are not those that are sent; a constant that
another module changes; an override that has no effect; a damaged calibration; half-written files.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from helpers.on_ranks import on_ranks

from hvd_adam.distributed.context import MESSAGE_BYTES
from hvd_adam.distributed.placement import cores
from hvd_adam.errors import UserError
from hvd_adam.simulate import calibration
from hvd_adam.simulate.calibration import Calibration
from hvd_adam.simulate.config import CalibrateConfig, PredictConfig, TuneConfig
from hvd_adam.simulate.forecast import forecast, memory
from hvd_adam.simulate.machine import PRESETS, Codec, Link, Machine, expected_maximum
from hvd_adam.simulate.pipeline import LOOKED_AFTER, Piece, Pipeline, Sent
from hvd_adam.simulate.predict import forecasts_of
from hvd_adam.simulate.step import (
    ALLREDUCE_MESSAGES,
    BUCKET_BYTES,
    STRATEGIES,
    UPDATE_BYTES,
    WIRE_BYTES,
    Setting,
    simulate,
)
from hvd_adam.simulate.tcp import tcp_seconds
from hvd_adam.simulate.timeline import Processors, Timeline
from hvd_adam.simulate.traffic import Ranks, allgather, allreduce, alltoall, columns
from hvd_adam.simulate.traffic import seconds as traffic_seconds
from hvd_adam.simulate.tune import options_of
from hvd_adam.simulate.workload import PUBLISHED, Bucket, Workload

KINDS = ("allreduce", "alltoall", "allgather")
FREE = 1e30  # bytes/s: a pass over memory that costs nothing
PLAIN = Machine(
    Link(1e9, 0.0), Link(1e8, 0.0), cycle=0.0, negotiation=0.0, update_bandwidth=FREE, copy_bandwidth=FREE
)
CPUS = replace(PLAIN, copies=dict.fromkeys(KINDS, 0.0))
TWO = Workload(8, 0.1, 0.2, (Bucket(1_000_000, 0, 0.05), Bucket(500_000, 0, 0.2)))


# Traffic and constants.


def test_the_constants_are_those_of_the_modules_that_send():
    from hvd_adam.distributed.collectives import pieces, started
    from hvd_adam.distributed.gradients import bucket_layout
    from hvd_adam.distributed.gradients.compression import COMPRESSIONS
    from hvd_adam.distributed.wire.codec import CODECS

    assert bucket_layout.BUCKET_MIB * 2**20 == BUCKET_BYTES
    assert pieces.ALLREDUCE_BYTES == ALLREDUCE_MESSAGES * MESSAGE_BYTES
    assert started.Pipeline.LOOKED_AFTER == LOOKED_AFTER
    assert (*WIRE_BYTES,) == COMPRESSIONS
    for name, codec in CODECS.items():
        assert codec.payload_bytes(codec.block) / codec.block == WIRE_BYTES[name]


def test_of_a_ring_one_edge_leaves_each_host():
    ring, gather, exchange = (f(8e6, Ranks(4, 2), PLAIN) for f in (allreduce, allgather, alltoall))
    assert (ring.messages, ring.sent, ring.between) == (6, 12e6, 12e6)
    assert (gather.messages, gather.sent, gather.between) == (3, 6e6, 6e6)
    assert (exchange.messages, exchange.sent, exchange.between) == (3, 6e6, 8e6)  # 2 ranks × 2 others × 2 MB
    assert allreduce(8e6, Ranks(4, 4), PLAIN).between == 0


def test_open_mpi_gathers_by_the_algorithm_of_its_number_of_ranks():
    mpi = replace(PLAIN, collectives="openmpi")

    def blocks(nbytes, ranks):
        gathered = allgather(nbytes * ranks.total, ranks, mpi)
        return gathered.messages, gathered.between / nbytes

    assert blocks(1 << 20, Ranks(2, 1)) == (1, 1)
    assert blocks(1 << 20, Ranks(4, 2)) == (2, 4)  # neighbours: 1 block inside; 2 blocks out at both ends
    assert blocks(1 << 16, Ranks(4, 2)) == (2, 5)  # Bruck: 1 block of one rank, then 2 of both
    assert blocks(1 << 20, Ranks(32, 4)) == (31, 31)
    assert blocks(1 << 20, Ranks(4, 4)) == (2, 0)
    pieces = replace(mpi, message_bytes=MESSAGE_BYTES)
    # Two blocks of neighbours are at most one message.
    assert [allgather(4 * block, Ranks(4, 2), pieces).messages for block in (2**21, 2**21 + 4)] == [2, 4]


def test_processors_copy_messages_before_and_after_the_wire():
    slow = replace(PLAIN, copies={"allreduce": 1e-9}, between=Link(1e8, 0.0, cpu=5e-9))
    duration, _, cpu = traffic_seconds(allreduce(8e6, Ranks(2, 1), PLAIN), slow, Ranks(2, 1))
    assert (duration, cpu) == (pytest.approx(8e-3 + 80e-3), pytest.approx(8e-3 + 40e-3))


def test_the_kernel_needs_core_seconds_for_a_byte_over_tcp():
    assert 1e-12 < tcp_seconds(3) < 1e-6


def test_large_tensors_on_processors_are_sent_in_pieces():
    pieces = replace(PLAIN, message_bytes=MESSAGE_BYTES)
    assert allreduce(4 * MESSAGE_BYTES, Ranks(2, 1), pieces).messages == 2 * 2
    assert alltoall(4 * MESSAGE_BYTES, Ranks(2, 1), pieces).messages == 2


@pytest.mark.parametrize("ranks", [2, 3, 16])
@pytest.mark.parametrize("part", [1, 1 << 17, (1 << 19) + 1, 3 << 20])
def test_processors_divide_a_bucket_into_the_pieces_that_are_sent(part, ranks):
    import torch

    from hvd_adam.distributed.collectives import pieces

    sent = [ranks * (end - start) for start, end in pieces.columns(part, ranks, torch.device("cpu"))]
    assert columns(ranks * part, Ranks(ranks, 1), CPUS) == sent
    assert columns(ranks * part, Ranks(ranks, 1), PLAIN) == [ranks * part]


@pytest.mark.parametrize("machine", [PLAIN, CPUS], ids=["devices", "processors"])
@pytest.mark.parametrize("compression", WIRE_BYTES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_agree_with_those_that_the_benchmark_of_compressions_expects(strategy, compression, machine):
    import torch

    from hvd_adam.bench.wire_bytes import predicted_bytes

    model = torch.nn.Linear(1024, 2048, bias=False)
    work = Workload(1, 0.1, 0.1, (Bucket(model.weight.numel(), 0, 0.1),))
    sent = simulate(work, Setting(Ranks(4, 1), strategy, compression), machine).sent
    assert sent == pytest.approx(
        predicted_bytes(f"hvd_adam-{strategy}-{compression}", model, 4), rel=1e-6, abs=300
    )  # 300: flags


# Discrete events.


def test_who_waits_for_long_sleeps_half_a_pause_too_long():
    line = Timeline(longest_pause=1e-3)
    line.wait(line.start(1.0, 0.0))
    assert line.now == pytest.approx(1.0005)


def test_who_waits_for_several_collectives_wakes_up_after_the_first():
    line = Timeline()
    first, second = line.start(1.0, 0.0), line.start(2.0, 0.0)
    line.wait(second, first)
    assert first.is_done and not second.is_done and line.now == line.exposed == pytest.approx(1.0)
    line.wait(first, second)
    assert line.now == pytest.approx(1.0)


def test_collectives_run_one_after_another_behind_the_computing():
    line = Timeline()
    line.compute(1.0)
    first, second = line.start(3.0, 0.0), line.start(1.0, 0.0)
    line.compute(2.0)
    line.wait(second)
    assert first.is_done and line.now == pytest.approx(5.0)
    assert line.exposed == pytest.approx(2.0)


def test_a_collective_waits_for_half_a_cycle_and_a_negotiation():
    line = Timeline(cycle=0.2, negotiation=0.01)
    line.wait(line.start(1.0, 0.0))
    assert line.now == pytest.approx(1.11)


def test_what_comes_during_a_collective_is_agreed_on_after_it():
    line = Timeline(cycle=0.2, negotiation=0.01)
    line.start(1.0, 0.0)
    line.compute(0.5)
    line.wait(line.start(1.0, 0.0))
    assert line.now == pytest.approx(0.11 + 1.0 + 0.01 + 1.0)


def test_two_threads_on_one_core_take_the_sum_of_their_times():
    line = Timeline(processors=Processors(cores=1))
    operation = line.start(1.0, 1.0)
    line.compute(1.0)
    line.wait(operation)
    assert line.now == pytest.approx(2.0)


def test_a_collective_that_needs_a_third_of_a_core_slows_computing_by_as_much():
    line = Timeline(processors=Processors(cores=1))
    line.start(3.0, 1.0)
    line.compute(2.0)
    assert line.now == pytest.approx(3.0)


def test_messages_are_noticed_after_a_slice_of_what_computes_on_the_same_core():
    line = Timeline(negotiation=0.1, processors=Processors(cores=1, slice=0.5))
    operation = line.start(0.3, latency=0.2, messages=3)
    line.compute(0.1 + 2 * 0.5 + 0.2 + 3 * 0.5 + 0.1)
    assert operation.is_done and line.now == pytest.approx(2.9)
    line = Timeline(negotiation=0.1, processors=Processors(cores=2, slice=0.5))
    line.wait(line.start(0.3, latency=0.2, messages=3))
    assert line.now == pytest.approx(0.4)


def test_computing_on_half_a_core_takes_twice_as_long():
    line = Timeline(processors=Processors(cores=0.5))
    line.compute(1.0)
    assert line.now == pytest.approx(2.0)


# The step.


def test_a_step_that_waits_for_its_network_takes_the_time_of_its_bytes():
    step = simulate(TWO, Setting(Ranks(2, 1)), PLAIN)
    assert step.sent == step.sent_by_host == 6e6
    # The first bucket is sent from 0.15 to 0.19 s, the second one from 0.3 to 0.32 s.
    assert step.seconds == pytest.approx(0.32)
    assert step.parts["bandwidth"] == pytest.approx(0.02)


def test_processors_update_a_bucket_while_later_ones_travel():
    # 0.05 s for the first bucket's update, while the second one is on the wire: sent in 0.02 s after 0.3 s.
    slow = replace(
        PLAIN, update_bandwidth=UPDATE_BYTES * 2e7, copies=dict.fromkeys(KINDS, 0.0), message_bytes=FREE
    )
    step = simulate(TWO, Setting(Ranks(2, 1)), slow)
    assert step.seconds == pytest.approx(0.3 + 0.05 + 0.025, abs=1e-3)
    assert simulate(TWO, Setting(Ranks(2, 1)), replace(slow, copies=None)).seconds == pytest.approx(0.32 + 0.075)


# A bucket of 8 pieces is encoded, added and decoded in 0.1 s each. Of two ranks each encodes half of it as codes.
PIECES, STAGE = 8, 0.1
LARGE = Workload(8, 0.0, 0.0, (Bucket(PIECES << 20, 0, 0.0),))
CODECS = {
    name: Codec(encode=stages * STAGE / LARGE.elements, **dict.fromkeys(("add", "decode"), STAGE / LARGE.elements))
    for name, stages in (("bf16", 1), ("int8", 2), ("int4", 2))
}


def over_a_slow_link(machine, compression, stages=1.0):
    """Returns a machine, and a setting whose two collectives take so many `STAGE`s each."""
    half = LARGE.elements * WIRE_BYTES[compression] / 2  # what each of 2 ranks sends to the other
    machine = replace(machine, between=Link(half / STAGE / stages, 0.0), codecs=CODECS)
    return Setting(Ranks(2, 1), compression=compression), machine


@pytest.mark.parametrize("compression", CODECS)
def test_pieces_are_added_sent_on_and_decoded_while_others_travel(compression):
    whole = simulate(LARGE, *over_a_slow_link(PLAIN, compression))
    assert whole.seconds == pytest.approx(5 * STAGE, rel=1e-3)  # on devices one after another
    busy = simulate(LARGE, *over_a_slow_link(CPUS, compression))
    assert busy.seconds == pytest.approx(3 * STAGE, rel=1e-2)  # the processor never waits
    # The network never waits either, once the first piece has been encoded, until the last one is decoded.
    waiting = simulate(LARGE, *over_a_slow_link(CPUS, compression, 2.0))
    assert waiting.seconds == pytest.approx((2 * 2.0 + 2 / PIECES) * STAGE, rel=1e-2)
    assert busy.parts["coding"] == pytest.approx(3 * STAGE) == waiting.parts["coding"]


def test_a_header_goes_ahead_of_the_last_bucket_while_that_is_encoded():
    small = Workload(8, 0.0, 0.0, (Bucket(1000, 0, 0.0),))
    machine = replace(
        CPUS, between=Link(FREE, 1.0), codecs={"bf16": Codec(10.0 / 1000), "int4": Codec(20.0 / 1000)}
    )

    def after_encoding(compression):
        return simulate(small, Setting(Ranks(2, 1), compression=compression), machine).seconds - 10.0

    # One message of each phase. The header has ended by then; next to codes there is none.
    assert after_encoding("int4") == pytest.approx(1 + 1, abs=3e-3)
    assert after_encoding("bf16") == pytest.approx(1 + 1, abs=3e-3)


def test_processors_make_no_pass_over_gradients_that_they_encode():
    setting, machine = over_a_slow_link(replace(CPUS, copy_bandwidth=1e9), "int4")
    assert simulate(LARGE, setting, machine).parts["coding"] == pytest.approx(3 * STAGE)
    devices = simulate(LARGE, setting, replace(machine, copies=None)).parts["coding"]
    assert devices == pytest.approx(3 * STAGE + (8 + 4) / 1e9 * LARGE.elements)  # a copy; a search for infinities


def test_a_piece_is_received_only_after_those_before_it_and_its_sum_is_sent_at_once():
    line, log = Timeline(), []

    def gather(elements):
        log.append(("gather", elements))
        return line.start(1.0)

    pipeline = Pipeline(line, gather, lambda elements: log.append(("receive", elements)), works_meanwhile=True)
    operations = [line.start(1.0) for _ in range(3)]
    pieces = [Piece(number, operation, number == 2) for number, operation in enumerate(operations)]
    pipeline.sent.append(Sent(TWO.buckets[0], None))
    pipeline.sent[0].pieces.extend(pieces)
    pipeline.wait(operations[2])
    assert not pipeline.advance() and log == [("gather", 0), ("gather", 1)]
    pipeline.receive(pipeline.sent[0])
    assert log[2:] == [("receive", 0), ("receive", 1), ("receive", 2)]
    assert line.now == pytest.approx(5.0)


@pytest.mark.parametrize("compression", WIRE_BYTES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", [Ranks(1, 1), Ranks(4, 4), Ranks(8, 2)])
@pytest.mark.parametrize("copies", [None, dict.fromkeys(KINDS, 1e-9)], ids=["devices", "processors"])
def test_the_parts_add_up_to_the_step(copies, ranks, strategy, compression):
    machine = replace(PRESETS["p100-roce25"].machine, cores=3.0, copies=copies)
    step = simulate(TWO, Setting(ranks, strategy, compression, accumulate=2), machine)
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    assert min(step.parts.values()) >= 0


def test_what_a_measured_step_took_longer_is_added_and_grows_where_ranks_share_cores():
    work = replace(TWO, unexplained={"allreduce-none": 0.5, "sharded-int8": 0.25})

    def added(per_host, *setting):
        where = Setting(Ranks(8, per_host), *setting)
        machine = replace(PLAIN, cores=2.0)
        return simulate(work, where, machine).seconds - simulate(TWO, where, machine).seconds

    assert [added(2), added(2, "sharded"), added(4)] == pytest.approx([0.5, 0.5, 1.0])
    assert [added(2, "sharded", "int8"), added(2, "allreduce", "int8")] == pytest.approx([0.25, 0.0])
    assert simulate(work, Setting(Ranks(1, 1)), PLAIN).parts["overhead"] == 0


def test_computing_is_longer_by_its_factor_only_where_ranks_share_cores():
    work, machine = replace(TWO, sharing=1.5), replace(PLAIN, cores=2.0)

    def ratio(per_host, ranks=8):
        where = Setting(Ranks(ranks, per_host))
        parts = [simulate(each, where, machine).parts["computing"] for each in (work, TWO)]
        return parts[0] / parts[1]

    assert [ratio(2), ratio(4), ratio(4, ranks=1)] == pytest.approx([1.0, 1.5, 1.0])


def test_one_rank_computes_and_updates_only():
    machine = replace(PLAIN, update_bandwidth=UPDATE_BYTES * 1.5e6)
    step = simulate(TWO, Setting(Ranks(1, 1), accumulate=3), machine)
    assert (step.seconds, step.sent) == (pytest.approx(3 * 0.3 + 1.0), 0)
    step = simulate(TWO, Setting(Ranks(1, 1), accumulate=10**9), machine)  # in no time
    assert step.seconds == pytest.approx(10**9 * 0.3 + 1.0)


def test_sharded_ranks_share_the_update():
    machine = replace(PLAIN, between=Link(FREE, 0.0), update_bandwidth=UPDATE_BYTES * 1.5e6)
    step = simulate(TWO, Setting(Ranks(4, 1), "sharded"), machine)
    assert step.parts["update"] == pytest.approx(1 / 4)
    assert memory(TWO, Setting(Ranks(4, 1), "sharded")) == (4 + 4 + 8 / 4) * 1.5e6
    assert memory(TWO, Setting(Ranks(4, 1))) == 16 * 1.5e6


def test_the_expected_maximum_is_that_of_normal_draws():
    # E max of 2 draws: 1/√π; of 100: 2.5076 (Harter 1961). Blom's formula is within 0.03.
    assert expected_maximum(1) == 0
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), abs=0.03)
    assert expected_maximum(100) == pytest.approx(2.5076, abs=0.03)


# Forecasts.


def test_what_helps_is_what_the_bottleneck_asks_for():
    slow = replace(PLAIN, between=Link(1e7, 0.0), uncertainty={"bandwidth": 0.1})
    row = forecast(TWO, Setting(Ranks(8, 1)), slow, price=3.6)
    assert row.bottleneck == "bandwidth of the network"
    gains = dict(row.advice)
    assert gains["--compression int4"] > gains["--compression bf16"] > 0.3
    assert gains["a network of twice the bandwidth"] > 0.3 and "a network of half the latency" not in gains
    assert row.error == pytest.approx(0.1 * row.step.seconds, rel=0.5)
    assert row.price == pytest.approx(8 * 1e-3 / row.throughput * 1e6)


def test_a_job_that_only_computes_is_efficient_and_gets_no_advice():
    row = forecast(TWO, Setting(Ranks(64, 1)), replace(PLAIN, between=Link(FREE, 0.0)))
    assert (row.efficiency, row.bottleneck, list(row.advice)) == (pytest.approx(1), "computing", [])


@pytest.mark.parametrize(("model", "published"), [("resnet101", 0.90), ("inception3", 0.90), ("vgg16", 0.68)])
def test_the_efficiency_of_horovods_paper_at_512_gpus_is_within_ten_points(model, published):
    config = PredictConfig(preset="p100-roce25", model=model, ranks="512", bucket_mib=64)
    (row,), _ = forecasts_of(config)
    assert abs(row.efficiency - published) < 0.10


def test_published_models_have_their_parameters():
    millions = {name: sum(size for size, _ in model.stages) / 1e6 for name, model in PUBLISHED.items()}
    assert millions == pytest.approx({"resnet101": 44.5, "inception3": 23.8, "vgg16": 138.4}, rel=0.01)
    assert all(sum(share for _, share in model.stages) == pytest.approx(1) for model in PUBLISHED.values())


# Files and options.


def write(path):
    machine = replace(PLAIN, codecs={"int4": Codec(1e-9, 2e-9, 3e-9)}, cores=2.0, uncertainty={"computing": 0.1})
    made = Calibration(machine, {"m": replace(TWO, unexplained={"sharded-int8": -0.01})}, 1, {"device": "none"})
    path.write_text(made.to_json())
    return made


def test_a_calibration_is_read_as_it_was_written(tmp_path):
    made = write(tmp_path / "c.json")
    assert calibration.read(str(tmp_path / "c.json")) == made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a file of"),
        ("[" * 100_000, "is not JSON"),
        ('{"format": 9}', "format is 9, not 1"),
        ('{"format": true}', "format is True, not 1"),
        ("{}", "it has no format"),
    ],
    ids=str,
)
def test_a_damaged_calibration_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        calibration.read(str(tmp_path / "c.json"))
    assert "\n" not in str(refusal.value)


PLACES = {
    "samples": ("workloads", "m"),
    "forward": ("workloads", "m"),
    "buckets": ("workloads", "m"),
    "elements": ("workloads", "m", "buckets", 0),
    "exact": ("workloads", "m", "buckets", 0),
    "latency": ("machine", "inside"),
    "bandwidth": ("machine", "between"),
    "encode": ("machine", "codecs", "int4"),
    "computing": ("machine", "uncertainty"),
    **dict.fromkeys(("jitter", "cores", "collectives", "trees", "message_bytes", "copies"), ("machine",)),
    **dict.fromkeys(("workloads", "ranks_per_host", "description"), ()),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 1e308, 10**400, "x", [], {}, True, None, ...], ids=repr)
def test_a_calibration_with_an_impossible_or_missing_value_is_refused_by_its_place(tmp_path, name, value):
    write(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    place = content
    for key in PLACES[name]:
        place = place[key]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    (tmp_path / "c.json").write_text(json.dumps(content))
    possible = {("copies", "None"), ("cores", "None"), ("trees", "True")}
    if (name, repr(value)) in possible:
        calibration.read(str(tmp_path / "c.json"))
        return
    if (name, value) == ("computing", ...):  # an error that is not known counts as none
        return
    with pytest.raises(UserError, match=name) as refusal:
        calibration.read(str(tmp_path / "c.json"))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("unexplained", "sharded-int8"), -1, "m.unexplained.sharded-int8 is -1: more than a step takes"),
        (("unexplained", "sharded-int8"), -1e6, r"m.unexplained.sharded-int8 is -1e\+06: more than a step takes"),
        (("unexplained", "sharded-zip"), 0.1, "m.unexplained has an unknown sharded-zip"),
        (("buckets", 0, "elements"), 10**9, r"buckets\[0\].elements is 1000000000: not from 1 to 536870912"),
    ],
)
def test_a_calibration_of_steps_that_take_no_time_or_are_never_simulated_is_refused(
    tmp_path, path, value, message
):
    write(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    place = content["workloads"]["m"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        calibration.read(str(tmp_path / "c.json"))


def test_a_step_that_would_take_no_time_on_a_faster_network_is_refused(tmp_path):
    workload = replace(TWO, forward=1e-4, backward=1e-4, unexplained={"allreduce-none": -0.05})
    workload = replace(workload, buckets=(Bucket(1_500_000, 0, 1e-4),))  # 60 ms over 100 MB/s
    (tmp_path / "c.json").write_text(Calibration(PLAIN, {"m": workload}, 1, {"device": "none"}).to_json())
    options = {"calibration": str(tmp_path / "c.json"), "ranks": "2"}
    assert forecasts_of(PredictConfig(**options))[0][0].step.seconds > 0
    with pytest.raises(
        UserError, match=r"a step of 2 rank\(s\) would take -4\S+ ms, since measured steps took less"
    ):
        forecasts_of(PredictConfig(**options, network="ndr400"))


def test_another_network_changes_the_step_and_not_what_processors_spend(tmp_path):
    write(tmp_path / "c.json")

    def seconds(**options):
        rows, _ = forecasts_of(PredictConfig(calibration=str(tmp_path / "c.json"), ranks="4", **options))
        return rows[0].step.seconds

    assert seconds(bandwidth="100Mbit") > seconds() > seconds(bandwidth="25Gbit") >= seconds(network="ndr400")
    assert seconds(latency="10ms") > seconds()
    assert seconds(cores_per_host=0.5) > 1.9 * seconds()
    assert seconds(ranks_per_host=4, cores_per_host=4.0) < seconds() < seconds(ranks_per_host=4)  # 2 cores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --calibration FILE or --preset NAME"),
        ({"preset": "x"}, "--preset is x: it must be one of p100-roce25"),
        ({"preset": "p100-roce25"}, "--preset p100-roce25 needs --model, one of resnet101"),
        ({"preset": "p100-roce25", "model": "mlp"}, "--model is mlp: it must be one of resnet101"),
        ({"preset": "h100-ndr400", "model": "vgg16"}, "needs --throughput"),
        ({"preset": "p100-roce25", "model": "vgg16", "cores_per_host": 2.0}, "--cores-per-host has no effect"),
        ({"calibration": "c", "throughput": 3.0}, "--throughput has no effect without --preset"),
        ({"calibration": "c", "bandwidth": "1GB"}, "--bandwidth is 1GB: it must be a rate, as in 300Mbit"),
        ({"calibration": "c", "latency": "5"}, "--latency is 5: it must be a time"),
        ({"calibration": "c", "ranks": "2,x"}, "--ranks is '2,x'"),
        ({"calibration": "c", "ranks": "1" * 5000}, "--ranks is '111"),
        ({"calibration": "c", "bandwidth": f"0.{'0' * 310}1Gbit"}, "--bandwidth is 0.000"),
        ({"calibration": "c", "latency": f"1{'0' * 300}s"}, "--latency is 1000"),
        ({"calibration": "c", "cores_per_host": 1e-320}, "--cores-per-host is 1e-320: it must be from 0.01 to"),
        ({"calibration": "c", "price": 1e308}, r"--price is 1e\+308: it must be from 0 to 1e\+09"),
        ({"preset": "p100-roce25", "model": "vgg16", "throughput": 1e-320}, "--throughput is 1e-320"),
        ({"calibration": "c", "network": "x"}, "--network is x"),
        ({"calibration": "c", "plot": "x.pdf"}, "--plot is x.pdf"),
        ({"calibration": "c", "html": "x.png"}, "--html is x.png"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        PredictConfig(**options)


@pytest.mark.parametrize("option", [{"network": "25gbe"}, {"bandwidth": "1Gbit"}, {"latency": "1ms"}])
def test_a_network_without_ranks_on_several_hosts_is_refused(tmp_path, option):
    file = tmp_path / "calibration.json"
    file.write_text(Calibration(PLAIN, {"two": TWO}, 2, {"device": "none"}).to_json())
    (name,) = option
    with pytest.raises(
        UserError, match=f"--{name} has no effect on 2 ranks of one host, which has 2: give --ranks-p"
    ):
        forecasts_of(PredictConfig(calibration=str(file), ranks="1,2", **option))
    for more in ({"ranks": "2,4"}, {"ranks": "2", "ranks_per_host": 1}):
        assert forecasts_of(PredictConfig(calibration=str(file), **more, **option))


@pytest.mark.parametrize("command", ["predict", "tune"])
def test_a_network_that_is_taken_from_inside_a_host_is_mentioned(tmp_path, command):
    file = tmp_path / "calibration.json"
    inside = replace(PLAIN, copies=dict.fromkeys(KINDS, 1e-10))
    file.write_text(Calibration(inside, {"two": TWO}, 2, {"device": "none"}).to_json())
    job, note = (command, "--calibration", file), "no network is given"
    assert note in run(*job, "--ranks", 4).stdout and "2 ranks a host" in run(*job, "--ranks", 4).stdout
    assert note not in run(*job, "--ranks", 2).stdout
    assert note not in run(*job, "--ranks", 4, "--bandwidth", "1Gbit").stdout
    file.write_text(Calibration(CPUS, {"two": TWO}, 2, {"device": "none"}).to_json())
    assert note not in run(*job, "--ranks", 4).stdout  # of several hosts


def run(*argv):
    command = [sys.executable, "-m", "hvd_adam.simulate", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def test_a_proposal_is_one_page_without_requests(tmp_path):
    files = ("--plot", tmp_path / "s.png", "--html", tmp_path / "s.html")
    options = ("predict", "--preset", "p100-roce25", "--model", "resnet101", "--price", 2, *files)
    done = run(*options)
    assert done.returncode == 0, done.stderr
    assert "4,096" in done.stdout and "bottleneck" in done.stdout
    page = (tmp_path / "s.html").read_text()
    assert "4,096" in page and 'src="http' not in page and "default-src 'none'" in page
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    again = run(*options)
    assert again.returncode == 2 and "--force" in again.stderr and again.stderr.count("\n") == 1
    rows = json.loads(run("predict", "--preset", "p100-roce25", "--model", "vgg16", "--json").stdout)["rows"]
    assert [row["ranks"] for row in rows][-1] == 4096


def test_files_of_a_run_are_not_replaced(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "curves.png").write_text("curves")
    preset = ("predict", "--preset", "p100-roce25", "--model", "vgg16", "--ranks", "4", "--force")
    refused = run(*preset, "--plot", tmp_path / "curves.png")
    assert refused.returncode == 2 and "curves.png is a file of the run itself: choose another" in refused.stderr
    assert (tmp_path / "curves.png").read_text() == "curves" and not refused.stdout


def test_options_are_ordered_by_the_predictions_of_each_and_compared_with_the_defaults(tmp_path):
    file = tmp_path / "calibration.json"
    file.write_text(Calibration(PLAIN, {"two": TWO}, 2, {"device": "none"}).to_json())
    found = list(options_of(TuneConfig(calibration=str(file), ranks="4,8", bandwidth="100Mbit")))
    assert [each.forecast.ranks for each in found] == [4] * 8 + [8] * 8
    for option in found:
        config = {"strategy": option.strategy, "compression": option.compression, "bandwidth": "100Mbit"}
        asked = PredictConfig(calibration=str(file), ranks=str(option.forecast.ranks), **config)
        assert forecasts_of(asked)[0] == [option.forecast]
    few = found[:8]
    seconds = [option.forecast.step.seconds for option in few]
    assert seconds == sorted(seconds) and few[0].compression == "int4"
    (default,) = (option for option in few if option.command_line == "the defaults")
    assert few[0].speedup == default.forecast.step.seconds / seconds[0] > 2
    exact = list(options_of(TuneConfig(calibration=str(file), ranks="4", allow="lossless")))
    assert {option.compression for option in exact} == {"none"}


def test_options_that_the_model_cannot_tell_apart_are_marked():
    done = run("tune", "--preset", "p100-roce25", "--model", "vgg16", "--ranks", "512")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.lstrip().startswith("512")]
    assert len(lines) == 8 and lines[0][-1] != "~"
    fastest = float(lines[0][1].replace(",", ""))
    for _, milliseconds, *_, last in lines[1:]:
        assert (last == "~") == (float(milliseconds.replace(",", "")) < 1.2 * fastest)


def test_a_calibration_needs_several_ranks(tmp_path):
    done = run("calibrate", "--output", tmp_path / "c.json")
    assert done.returncode == 2 and "at least 2 ranks" in done.stderr and not list(tmp_path.iterdir())


@on_ranks(2)
def test_a_calibration_does_not_replace_a_file_of_a_run(cluster):
    from hvd_adam.simulate.measure import calibrate

    with TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics.jsonl")
        metrics.write_text("{}")
        with pytest.raises(UserError, match="is a file of the run itself" if cluster.is_root else ""):
            calibrate(CalibrateConfig(output=str(metrics), force=True, device="cpu"))


@on_ranks(2)
def test_ranks_measure_the_same_calibration_with_every_part_of_the_model(cluster):
    from hvd_adam.simulate.measure import measure

    before = cores()
    made = measure(cluster, CalibrateConfig(models="mlp", repeats=3, batch_size=4, image_size=8))
    work = made.workloads["mlp"]
    assert work.buckets[-1].ready == work.backward > 0 and work.forward > 0
    assert made.machine.inside.bandwidth > 1e6 and made.machine.cores >= 1
    assert set(made.machine.codecs) == {"fp16", "bf16", "int8", "int4"}
    assert "allreduce-none" in work.unexplained and "sharded-int4" in work.unexplained
    step = simulate(work, Setting(Ranks(2, 2)), made.machine)
    assert 0 < step.seconds < 60
    assert work.sharing >= 1 and cores() == before  # ranks have shared cores for a moment

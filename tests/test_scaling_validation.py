"""`scaling_validation.py`: what it makes of measurements. It is not run in full here: it needs an idle machine."""

import scaling_validation
from test_simulate import PLAIN, TWO

from hvd_adam.simulate.calibration import Calibration


def test_measurements_that_are_the_predictions_have_no_error(tmp_path, capsys):
    file = tmp_path / "calibration.json"
    file.write_text(Calibration(PLAIN, {"cnn": TWO}, 2, {"device": "none"}).to_json())
    place, names = ("cnn", 4, "100Mbit"), ("allreduce-none", "sharded-bf16", "allreduce-int4")
    seconds = {name: scaling_validation.predict(file, *place, name) for name in names}
    times = {name: [[0.0, each], [0.0, each, each], [0.5, 9 * each]] for name, each in seconds.items()}
    times["computing"] = [[0.0, 2 * (TWO.forward + TWO.backward)]]
    scaling_validation.compare({place: (file, times)})
    line = capsys.readouterr().out.splitlines()
    assert "| all | 3 | 0.0% | 0.0% | 3 | 0.0% | 0.0% | 100% | 100% of 3 |" in line
    each = seconds["allreduce-none"]
    scaling_validation.compare(
        {place: (file, {**times, "allreduce-none": [[0.0, each / 4], [0.1, each * 3 / 4]]})}
    )
    assert "| none | 1 | 100.0% | 100.0% | 0 | 100.0% | 66.7% | 0% | 0% of 0 |" in capsys.readouterr().out

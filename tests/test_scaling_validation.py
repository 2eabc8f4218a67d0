"""`scaling_validation.py`: what it makes of measurements. It is not run in full here: it needs an idle machine."""

import scaling_validation
from test_simulate import PLAIN, TWO

from hvd_adam.simulate.calibration import Calibration


def test_measurements_that_are_the_predictions_have_no_error(tmp_path, capsys):
    file = tmp_path / "calibration.json"
    file.write_text(Calibration(PLAIN, {"cnn": TWO}, 2, {"device": "none"}).to_json())
    place, names = ("cnn", 4, "100Mbit"), ("allreduce-none", "sharded-bf16", "allreduce-int4")
    times = {name: scaling_validation.predict(file, *place, name) for name in names}
    scaling_validation.compare(file, {place: times})
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("3 settings: error 0.0% (median), 0.0% (worst); 3 within 15%; right order of 3 of 3")
    scaling_validation.compare(file, {place: {**times, "allreduce-none": times["allreduce-none"] / 2}})
    assert "100.0% (worst)" in capsys.readouterr().out

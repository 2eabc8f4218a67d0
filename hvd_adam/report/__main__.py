"""Writes one HTML page that shows runs of `hvd_adam.train`: curves, scores, configurations and their differences.

python -m hvd_adam.report runs/first
python -m hvd_adam.report runs/first runs/second --output comparison.html
"""

from hvd_adam.cli import run
from hvd_adam.config import ReportConfig
from hvd_adam.extras import require


def main(config: ReportConfig) -> None:
    """Writes the page."""
    require("PIL", "jinja2", "tqdm", "yaml")
    # Imported here, so that --help and a bad value are answered first, and without these packages.
    from hvd_adam.report.command import write_report

    write_report(config)


if __name__ == "__main__":
    run(main, ReportConfig, "hvd_adam.report", needs_extra=True)

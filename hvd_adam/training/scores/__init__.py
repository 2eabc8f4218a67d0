"""What an evaluation finds: scores, counts by class, calibration and the most confident mistakes; their output."""

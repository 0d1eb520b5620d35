"""Statistics of a model on calibration text, computed once and shared by every option."""

"""Reference architectures in plain torch. Imports neither `deploy` nor `calibration`."""

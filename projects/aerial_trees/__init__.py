"""Trees in aerial photographs: tiles to train on, whole images to evaluate. See README.md."""

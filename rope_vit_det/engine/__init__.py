"""Training and evaluation, only where Detectron2's own engine does not do."""

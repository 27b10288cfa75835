"""Accuracy at equal time: the demo's network beside Detectron2's ViT of its width and depth."""

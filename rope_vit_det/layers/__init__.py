"""Small pieces of a RoPE ViT that know nothing of each other's names, nor of Detectron2."""

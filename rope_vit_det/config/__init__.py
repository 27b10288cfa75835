"""This project's keys, reading configs, and what configs and weights say of each other."""

from .keys import add_rope_vit_config
from .use import use_rope_vit

__all__ = ["add_rope_vit_config", "use_rope_vit"]

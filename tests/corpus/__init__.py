"""Faulty inputs of every kind, and what tools/train_net.py makes of each; see docs."""

"""The generated dataset of the demo."""

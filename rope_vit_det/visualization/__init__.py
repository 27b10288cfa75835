"""Drawing boxes and masks: predictions, what the training loader feeds, and mistakes."""

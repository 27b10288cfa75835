"""What many rooms need and none owns."""

"""What a checkpoint holds, its files, and finding them again."""

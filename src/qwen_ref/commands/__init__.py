"""What the commands share: messages, progress, options, files, the watch over ranks."""
